"""Data sets of the Hugging Face Hub, by a name below or OWNER/REPOSITORY, at a pinned revision.

Files are fetched into the cache, each resumed where it was interrupted and compared with the
checksum that the Hub has for it, and are then read like any others. What the card says of the
licence is recorded. HF_ENDPOINT names another hub, HF_TOKEN is for sets that ask for a login.
"""

import fnmatch
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from base import InputError, write_text
from base.files import difference, one_at_a_time
from data.pieces import progress, say
from data.sources import Files, Source

BY_HAND = "or fetch the files otherwise and give them as a path"
READS = (".parquet", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".txt")


class Known(NamedTuple):
    """Where the text of a set is."""

    repo: str
    files: str  # a pattern, or several with a comma between them
    column: str = "text"
    rows_are_lines: bool = False
    needs: str = ""  # what else it takes, for a set without text


KNOWN = {
    "fineweb": Known("HuggingFaceFW/fineweb", "sample/10BT/*.parquet"),
    "fineweb-edu": Known("HuggingFaceFW/fineweb-edu", "sample/10BT/*.parquet"),
    "tinystories": Known("roneneldan/TinyStories", "data/train-*.parquet"),
    "wikitext-103": Known(
        "Salesforce/wikitext", "wikitext-103-raw-v1/train-*.parquet", rows_are_lines=True
    ),
    "slimpajama": Known("cerebras/SlimPajama-627B", "train/chunk1/*.jsonl.zst"),
    "shakespeare": Known("karpathy/tiny_shakespeare", "*.txt,*.parquet"),
    "pg19": Known("emozilla/pg19", "data/train-*.parquet"),
    "openwebmath": Known("open-web-math/open-web-math", "data/train-*.parquet"),
    # For ./run.sh sft, dpo and grpo: data/shapes.py knows their columns
    "smoltalk": Known("HuggingFaceTB/smoltalk", "data/all/train-*.parquet", "messages"),
    "ultrafeedback": Known(
        "HuggingFaceH4/ultrafeedback_binarized", "data/train_prefs-*.parquet", "prompt"
    ),
    "gsm8k": Known("openai/gsm8k", "main/train-*.parquet", "question"),
    "the-stack-v2": Known(
        "bigcode/the-stack-v2",
        "",
        needs="it holds ids of files only; their text is in the archive of Software Heritage, "
        "which asks for an agreement: fetch it as the card of bigcode/the-stack-v2 says, and give "
        "the result as a path",
    ),
}

TAUGHT = "smoltalk", "ultrafeedback", "gsm8k"


def names():
    return ", ".join(KNOWN)


def known(part):
    """The Known of a part of a recipe. Raises InputError."""
    found = KNOWN.get(part.hub)
    if found is None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", part.hub):
            raise InputError(f"hub {part.hub}: expected OWNER/REPOSITORY or one of {names()}")
        found = Known(part.hub, ",".join(f"*{ending}" for ending in READS))
    if found.needs:
        raise InputError(f"hub {part.hub}: {found.needs}")
    return found._replace(files=part.files or found.files)


def locate(part, cache):
    """The Files of a set, fetched where they are not there yet. Raises InputError."""
    wanted = known(part)
    folder = Path(cache, "hub", wanted.repo.replace("/", "--"))
    notes = folder / "notes.json"  # {revision or "": what the Hub has said of it}
    said = json.loads(notes.read_bytes()) if notes.exists() else {}
    listing = said.get(part.revision)
    if listing is None:
        listing = ask(wanted.repo, part.revision)
        folder.mkdir(parents=True, exist_ok=True)
        said |= {part.revision: listing, listing["revision"]: listing}
        write_text(notes, json.dumps(said, indent=1))
    chosen = choose(wanted, listing["files"])
    if not chosen:
        there = ", ".join(sorted(listing["files"])[:5]) or "none"
        raise InputError(f"hub {part.hub}: no file fits {wanted.files}; there are {there}, ...")
    place = folder / listing["revision"]
    fetch(wanted.repo, listing["revision"], place, {n: listing["files"][n] for n in chosen})
    about = dict(
        repository=wanted.repo,
        revision=listing["revision"],
        licence=listing["licence"] or "not stated",
        url=f"https://huggingface.co/datasets/{wanted.repo}",
    )
    paths = [place / name for name in chosen]
    return Files(paths, chosen, about, wanted.column, wanted.rows_are_lines)


def choose(wanted, files):
    """Names that fit the pattern and can be read, sorted."""
    patterns = wanted.files.split(",")
    fits = [name for name in files if any(fnmatch.fnmatch(name, p) for p in patterns)]
    return sorted(name for name in fits if name.lower().endswith(READS))


def ask(repo, revision):
    """What the Hub has: dict of revision, licence, files {name: [bytes, sha256 or None]}."""
    from data.sources.fineweb10B import hub_errors

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with hub_errors(f"hub {repo}: ", BY_HAND):
        from huggingface_hub import HfApi

        info = HfApi().dataset_info(repo, revision=revision or None, files_metadata=True)
    card = info.card_data.to_dict() if info.card_data else {}
    licence = card.get("license") or ""
    files = {}
    for file in info.siblings:
        lfs = file.lfs
        files[file.rfilename] = [file.size, lfs["sha256"] if lfs else None]
    return dict(
        revision=info.sha,
        licence=", ".join(licence) if isinstance(licence, list) else licence,
        files=files,
    )


def fetch(repo, revision, folder, files):
    """Download those of {name: [bytes, sha256]} that are not there whole."""
    from data.sources.fineweb10B import hub_errors

    missing = [n for n, (size, _) in files.items() if difference(folder / n, size)]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    need = sum(files[name][0] or 0 for name in missing)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise InputError(
            f"{folder}: expected {need:,} bytes of free disk for {len(missing)} files, found "
            f"{free:,}; free some, choose another --cache-dir, or fewer files"
        )
    say(f"{folder}: downloading {len(missing)} files, {need:,} bytes")
    with one_at_a_time(folder):
        for name in progress(missing, f"downloading {repo}", "file"):
            size, sha256 = files[name]
            if not difference(folder / name, size):
                continue  # another process has been here
            part = folder / "partial"
            for attempt in (1, 2):
                with hub_errors(f"hub {repo}: {name}: ", BY_HAND):
                    from huggingface_hub import hf_hub_download

                    # An interrupted download goes on from what lies in this folder
                    path = hf_hub_download(
                        repo,
                        name,
                        repo_type="dataset",
                        revision=revision,
                        local_dir=part,
                        force_download=attempt == 2,
                    )
                problem = difference(Path(path), size, sha256)
                if problem is None:
                    break
                say(f"{name}: corrupt download {attempt} of 2: {problem}")
            if problem:
                raise InputError(f"{folder / name}: {problem}, in two downloads")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, folder / name)
        shutil.rmtree(folder / "partial", ignore_errors=True)


SOURCE = Source("data sets of the Hugging Face Hub", network=True, locate=locate)
