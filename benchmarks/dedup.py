"""Near duplicates: CPU seconds, MB/s a core, memory, recall and precision, beside datatrove, rensa
and datasketch.

Every program works in one process and in CPU time, so that other work on the machine matters
little. The rivals run in an environment of their own, which --rivals names.
"""

import itertools
import json
import subprocess
import sysconfig
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np

from base import InputError
from benchmarks.report import document, number, say, table
from data import dedup

CONFIG = dedup.MinHash()
BATCH = 256  # documents


def add_arguments(parser):
    parser.option("--megabytes", int, 20, "N", "text, of Python's library and installed packages")
    parser.option("--rivals", Path, None, "PYTHON", "a Python with datatrove, rensa or datasketch")


def run(megabytes=20, rivals=None):
    """MB/s and CPU seconds of each program on the same documents."""
    if megabytes < 1:
        raise InputError(f"--megabytes {megabytes}: expected 1 or more")
    texts = list(documents(megabytes * 1_000_000))
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f"{len(texts):,} documents, {n_bytes / 1e6:.1f} MB")
    programs = dict(ours=ours(texts))
    if rivals:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "documents.jsonl")
            path.write_text("".join(json.dumps(text) + "\n" for text in texts))
            for name in RIVALS:
                say(name)
                programs[name] = rival(rivals, name, path, folder)
    for said in programs.values():
        if "signatures_s" in said:
            said["mb_per_s"] = round(n_bytes / 1e6 / said["signatures_s"], 2)
    return dict(documents=len(texts), bytes=n_bytes, programs=programs, memory=memory())


def documents(n_bytes):
    """Yield parts of about 3,000 characters of Python files, so many bytes together."""
    size = 0
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    files = itertools.chain.from_iterable(sorted(Path(f).rglob("*.py")) for f in folders)
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        for at in range(0, len(text), 3000):
            part = text[at : at + 3000]
            size += len(part.encode())
            if size > n_bytes:
                return
            yield part


def ours(texts):
    """CPU seconds of both steps, and how many documents go."""
    dedup.signatures(texts[:BATCH], CONFIG)  # tables of characters are made once
    began = time.process_time()
    parts = [dedup.signatures(texts[i : i + BATCH], CONFIG) for i in range(0, len(texts), BATCH)]
    signed = time.process_time()

    def compare(left, right):
        return dedup.similarities(lambda rows: [texts[i] for i in rows], left, right, CONFIG)

    first = dedup.near_duplicates(np.concatenate(parts), CONFIG, compare)
    done = time.process_time()
    return dict(
        signatures_s=round(signed - began, 3),
        clusters_s=round(done - signed, 3),
        total_s=round(done - began, 3),
        removed=int((first != np.arange(len(first))).sum()),
    )


def memory(n=1_000_000):
    """Bytes a document beside the signatures, while clusters are found and half are copies."""
    rng = np.random.default_rng(0)
    config = dedup.MinHash(bands=2)  # takes no more than 14 do, one at a time
    signatures = rng.integers(0, 1 << 32, (n, config.functions), dtype=np.uint32)
    signatures[n // 2 :] = signatures[rng.integers(0, n // 2, n - n // 2)]
    keys = np.ascontiguousarray(signatures[:, :4]).view(np.uint64)
    found = {}
    for name, call in (
        ("near", lambda: dedup.near_duplicates(signatures, config)),
        ("exact", lambda: dedup.exact_duplicates(keys)),
    ):
        tracemalloc.start()
        call()
        found[f"{name}_bytes_a_document"] = round(tracemalloc.get_traced_memory()[1] / n, 1)
        tracemalloc.stop()
    return dict(found, documents=n)


# --------------------------------------------------------------------------------------------------
# Others, each a program that gets the documents' file and a folder, and prints a line of JSON

RIVALS = {
    "datatrove": """
from loguru import logger
logger.remove()
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import *
config = MinhashConfig()
sign = MinhashDedupSignature(out + "/sig", config)
sign.get_signature(sign.get_shingles(texts[0]))
began = time.process_time()
sign.run(Document(text=text, id=str(i)) for i, text in enumerate(texts))
signed = time.process_time()
for i in range(config.num_buckets):
    find = MinhashDedupBuckets(out + "/sig", out + "/buckets", config=config)
    find.run(None, i, config.num_buckets)
MinhashDedupCluster(out + "/buckets", out + "/remove", config=config).run(None, 0, 1)
""",
    "rensa": """
import re
from rensa import RMinHash, RMinHashLSH
began = time.process_time()
every = []
for text in texts:
    words = re.findall(r"[^\\W_]+", text.lower())
    one = RMinHash(num_perm=112, seed=1)
    one.update([" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))])
    every.append(one)
signed = time.process_time()
lsh = RMinHashLSH(threshold=0.72, num_perm=112, num_bands=14)
for i, one in enumerate(every):
    lsh.insert(i, one)
for one in every:
    lsh.query(one)
""",
    "datasketch": """
import re
from datasketch import MinHash, MinHashLSH
began = time.process_time()
every = []
for text in texts:
    words = re.findall(r"[^\\W_]+", text.lower())
    one = MinHash(num_perm=112, seed=1)
    one.update_batch([" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))])
    every.append(one)
signed = time.process_time()
lsh = MinHashLSH(num_perm=112, params=(14, 8))
for i, one in enumerate(every):
    lsh.insert(i, one)
for one in every:
    lsh.query(one)
""",
}
BEFORE = """
import json, sys, time
out = sys.argv[2]
texts = [json.loads(line) for line in open(sys.argv[1])]
"""
AFTER = """
done = time.process_time()
print(json.dumps(dict(signatures_s=signed - began, clusters_s=done - signed, total_s=done - began)))
"""


def rival(python, name, path, folder):
    """CPU seconds of another program; what it says where it does not run."""
    program = BEFORE + RIVALS[name] + AFTER
    command = [str(python), "-c", program, str(path), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return dict(error=" ".join(done.stderr.split()[-20:]))
    said = json.loads(done.stdout.splitlines()[-1])
    return {key: round(seconds, 3) for key, seconds in said.items()}


def render(result):
    """The result in Markdown."""
    rows = []
    for name, said in result["programs"].items():
        if "error" in said:
            rows.append([name, said["error"], "", "", ""])
            continue
        ratio = said["total_s"] / result["programs"]["ours"]["total_s"]
        rows.append(
            [
                name,
                number(said["mb_per_s"]),
                number(said["signatures_s"], ".2f"),
                number(said["clusters_s"], ".2f"),
                number(ratio, ".2f"),
            ]
        )
    memory = result["memory"]
    return document(
        f"# Near duplicates of {result['documents']:,} documents, {result['bytes'] / 1e6:.0f} MB",
        table(["program", "MB/s a core", "signatures, s", "clusters, s", "time to ours"], rows),
        f"Beside the signatures {memory['near_bytes_a_document']} bytes a document, and for equal "
        f"ones {memory['exact_bytes_a_document']} beside the keys.",
    )
