"""FineWeb-10B as GPT-2 tokens, ready to train on: the shards of the modded-nanogpt speedruns.

    ./run.sh data download fineweb10B --train-shards 9   # 0.9B training tokens, 0.1B to validate

Source: https://huggingface.co/datasets/kjj0/fineweb10B-gpt2 at a pinned revision: one validation
shard and 103 training shards of 100,000,000 tokens (200,001,024 bytes) each, in the format of
data/shards.py.

A shard is used once its size and sha256 are what the Hub lists for the revision. `checked.json`
beside the shards keeps what it listed, and size and times of change of the file that was compared:
the next start needs no network and hashes only files whose size or times differ. So a file that was
cut, replaced or written to is noticed, also if its mtime was set back; bytes that went bad on the
disk itself are not, except by

    ./run.sh data download fineweb10B --train-shards 9 --verify    # hashes every file again

--val-tokens is part of the task: losses are compared on the first 10,485,760 tokens of the
validation shard, so a corpus that has fewer is refused.
"""

import errno
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from base import InputError, one_line, write_text
from base.command import Parser, given_path
from base.files import aside, difference, one_at_a_time, sha256_of, sweep
from base.places import cache_folder
from data.dataset import Dataset
from data.shards import read_shard
from data.sources import Source
from data.tokenizers import gpt2_tokenizer

REPO = "kjj0/fineweb10B-gpt2"
REVISION = "889765ea1f903759787add96995d81171b632d0c"
N_VOCAB = 50257  # of GPT-2
EOT = 50256
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(1, 104)]
# At REVISION. Every reported loss is measured on this file, so no mirror and no hand copy may
# change it.
KNOWN_SHA256 = {VAL: "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"}

REFUSED = "the dataset is public, so unset or renew HF_TOKEN and check the proxy"
ADVICE = {  # by HTTP status
    401: REFUSED,
    403: REFUSED,
    404: "check the revision and HF_ENDPOINT",
    429: "wait a few minutes or set HF_TOKEN, which raises the limit",
}
BY_HAND = "or copy the shards into the folder by hand; --text FILE trains on a text of yours"


def open_fineweb(config, cache):
    folder = cache / "fineweb10B"
    train, val = download(folder, config.train_shards)
    return Dataset(
        name="fineweb10B",
        train=train,
        val=val,
        n_vocab=N_VOCAB,
        eot=EOT,
        fingerprint=f"{REPO}@{REVISION}",
        folder=folder,
        load_tokenizer=gpt2_tokenizer,
    )


def download(folder, train_shards=9, *, revision=REVISION, verify=False):
    """Make sure the validation shard and the first `train_shards` (1 to 103) training shards are in
    `folder`.

    Returns (train paths, val paths). verify: hash files though they look untouched. Asks the Hub
    only about files that are not what `checked.json` says, fetches only what is missing or wrong,
    aside, and keeps finished files if interrupted. If the Hub cannot be asked, a file is held
    against `checked.json`; one that is not in there (copied by hand, say) is accepted if whole by
    its own header, stderr says so, and its sha256 is kept to notice changes. Raises InputError: no
    network, refused, not found, no space, not writable, altered, corrupt twice.
    """
    if not 1 <= train_shards <= len(TRAIN):
        raise InputError(f"train_shards: expected 1 to {len(TRAIN)}, found {train_shards}")
    folder = Path(folder)
    train = TRAIN[:train_shards]
    try:
        _complete(folder, [VAL, *train], revision, verify)
    except OSError as e:  # a local one: what the Hub client raised is an InputError by now
        raise InputError(
            f"{e.filename or folder}: {e.strerror or e}; check this path or choose a folder "
            "you can write to"
        ) from e
    return [folder / name for name in train], [folder / VAL]


class _Checked:
    """What is known about the files of a folder: the notes in checked.json, and the pinned sums.

    A note has size, mtime_ns and ctime_ns of the file when it was hashed, its sha256, and the
    revision that lists it, None while the Hub has not been asked.
    """

    def __init__(self, folder, revision, verify):
        self.folder = folder
        self.revision = revision
        self.verify = verify  # hash files though they look untouched
        self.pinned = KNOWN_SHA256 if revision == REVISION else {}
        self.before = _load_notes(folder)
        self.notes = dict(self.before)

    def listed(self, name):
        """Whether the note of a file is about this revision."""
        return self.notes.get(name, {}).get("revision") == self.revision

    def expected(self, name):
        """(bytes, sha256) as far as this machine can tell; None for what it cannot."""
        note = self.notes.get(name, {})
        return note.get("size"), self.pinned.get(name, note.get("sha256"))

    def problem(self, name, size, sha256, revision):
        """What is wrong with a file, or None and a note that `revision` says it is right."""
        path = self.folder / name
        if problem := _problem(path, size):
            return problem
        stamp = _stamp(path)  # before hashing, so that a change meanwhile is noticed the next time
        note = self.notes.get(name, {})
        untouched = note.items() >= stamp.items()  # since it was hashed
        if untouched and not self.verify:
            found = note["sha256"]
        else:
            found = sha256_of(path)
        if sha256 not in (None, found):
            return f"expected sha256 {sha256}, found {found}"
        self.notes[name] = stamp | {"sha256": found, "revision": revision}

    def save(self):
        if self.notes != self.before:
            _save_notes(self.folder, self.notes)


def _complete(folder, names, revision, verify):
    """Check the files called names, and fetch those that are missing or wrong."""
    checked = _Checked(folder, revision, verify)

    # Files that the notes vouch for need no question to the Hub
    asked = []
    for name in _progress(names, folder):
        if not checked.listed(name) or checked.problem(name, *checked.expected(name), revision):
            asked.append(name)
    expected = {}
    offline = None  # why the Hub could not be asked
    if asked:
        try:
            expected = _ask_hub(asked, revision, checked.pinned)
        except InputError as e:
            offline = e

    missing = {}  # name -> (bytes, sha256)
    unsure = []  # accepted, though neither a pin nor the Hub has said what they should be
    for name in _progress(asked, folder):
        path = folder / name
        if offline:
            sure = name in checked.pinned or checked.listed(name)
            size, sha256 = checked.expected(name)
        else:
            sure = True
            size, sha256 = expected[name]
        problem = checked.problem(name, size, sha256, revision if sure else None)
        if problem is None:
            if not sure:
                unsure.append(name)
            continue
        if offline:
            if not sure and path.exists():
                problem += (
                    ", unlike when first seen (if you replaced it, delete "
                    f"{folder / 'checked.json'})"
                )
            raise InputError(f"{path}: {problem}; {offline}") from offline
        if path.is_dir():
            raise InputError(f"{path}: expected a file, found a folder; move it away")
        if path.exists():
            _say(f"{path}: {problem}; downloading it again")
        missing[name] = (size, sha256)

    if unsure:
        _say(
            f"note: {folder}: checksums not verified for {len(unsure)} shards "
            f"({unsure[0]}, ...): {offline}"
        )
    checked.save()
    if missing:
        _download(folder, missing, revision)


def _download(folder, files, revision):
    """Fetch {name: (bytes, sha256)}, one process at a time: the others find the files there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with one_at_a_time(folder):
        # Another process may have been here
        wanted = []
        for name, (size, sha256) in files.items():
            path = folder / name
            if _problem(path, size) or difference(path, size, sha256):
                wanted.append((path, size, sha256))

        need = sum(size for _, size, _ in wanted)
        free = shutil.disk_usage(folder).free
        if need > free:
            raise InputError(
                f"{folder}: expected {need:,} bytes of free disk for {len(wanted)} shards, found "
                f"{free:,}; free some space, choose another folder or take fewer training shards"
            )
        for i, (path, size, sha256) in enumerate(wanted, start=1):
            _say(f"{path}: downloading, file {i} of {len(wanted)}, {size:,} bytes")
            _fetch(path, size, sha256, revision)
            note = _stamp(path) | {"sha256": sha256, "revision": revision}
            _save_notes(folder, {path.name: note})


def _ask_hub(names, revision, known):
    """One request for {name: (bytes, sha256)}; a pinned sha256 outranks the Hub's."""
    # Read when huggingface_hub is first imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with hub_errors():
        from huggingface_hub import HfApi, constants, get_session

        # get_paths_info sets no timeout: a firewall that drops packets would hold us forever. Each
        # of the host's addresses (the Hub has four) is tried in turn: 3 s for each is 15 s at most.
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        get_session().timeout = (min(3, wait), wait, wait, wait)  # connect, read, write, pool
        infos = HfApi().get_paths_info(REPO, names, repo_type="dataset", revision=revision)
    found = {}
    for info in infos:
        if getattr(info, "lfs", None) and isinstance(info.size, int):
            found[info.path] = (info.size, known.get(info.path, info.lfs.sha256))
    if absent := [name for name in names if name not in found]:
        raise InputError(
            f"the Hub has no {absent[0]} in {REPO} at revision {revision}; {ADVICE[404]}"
        )
    return found


def _fetch(path, size, sha256, revision):
    """Download a file aside, compare it, rename it; once again if it is corrupt. A lost
    connection is resumed."""
    for attempt in (1, 2):
        folder = aside(path)
        folder.mkdir()
        try:
            with hub_errors(f"{path}: "):
                from huggingface_hub import hf_hub_download

                # The second time past the client's caches, which may be where the bad bytes came
                # from
                hf_hub_download(
                    REPO,
                    path.name,
                    repo_type="dataset",
                    revision=revision,
                    local_dir=folder,
                    force_download=attempt == 2,
                )
            fetched = folder / path.name
            problem = _problem(fetched, size) or difference(fetched, size, sha256)
            if problem is None:
                os.replace(fetched, path)
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _say(f"{path}: corrupt download {attempt} of 2, deleted: {problem}")
    raise InputError(
        f"{path}: {problem}, in two downloads; check the network, proxy and HF_ENDPOINT"
    )


@contextmanager
def hub_errors(where="", by_hand=BY_HAND):
    """Turn whatever the Hub client raises, its own errors, httpx's or the system's, into one
    line."""
    try:
        yield
    except Exception as e:
        # The client wraps "connection refused" in "not in the local cache": dig for the former
        cause = e
        while cause.__cause__ is not None and not hasattr(cause, "response"):
            cause = cause.__cause__
        reason = one_line(getattr(cause, "server_message", None) or cause, 300)
        hub = f"the Hub at {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}"
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in reason
        if full or getattr(cause, "filename", None):
            text = f"cannot write: {reason}; free some space or choose another folder"
        elif hasattr(cause, "response"):
            status = cause.response.status_code
            advice = ADVICE.get(status, "try again later")
            text = f"{hub} answered HTTP {status} ({reason}); {advice}, {by_hand}"
        else:
            text = (
                f"this machine cannot reach {hub} ({reason or type(cause).__name__}); "
                f"check the network and HF_ENDPOINT, {by_hand}"
            )
        raise InputError(where + text) from e


def _problem(path, size=None):
    """What is wrong with a shard file but for its tokens, or None."""
    if problem := difference(path, size):
        return problem
    try:
        read_shard(path)
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")


def _stamp(path):
    """What changes when a file is written to: a program may set mtime back, but not ctime."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}


def _load_notes(folder):
    try:
        notes = {}
        for name, note in json.loads((folder / "checked.json").read_bytes()).items():
            if isinstance(note.get("size"), int) and isinstance(note.get("sha256"), str):
                notes[name] = note
        return notes
    except (OSError, ValueError, AttributeError, RecursionError):
        # Only a memory of work done: where it is missing or damaged, the work is done again
        return {}


def _save_notes(folder, notes):
    try:
        write_text(folder / "checked.json", json.dumps(_load_notes(folder) | notes, indent=1))
    except OSError as e:  # shards in a read-only folder can be trained on all the same
        _say(
            f"note: cannot write {folder / 'checked.json'}: {e.strerror}; "
            "the next start will compare the shards again"
        )


def _progress(names, folder):
    """The names, with a bar once it takes a while: hashing reads every byte."""
    return tqdm(
        names, desc=f"comparing {folder.name}", unit="file", delay=2, disable=None, leave=False
    )


def _say(line):
    print(line, file=sys.stderr, flush=True)


def main(argv):
    """`./run.sh data download fineweb10B`: fetch shards ahead of time. Returns the exit status;
    raises InputError."""
    parser = Parser(
        prog="./run.sh data download fineweb10B",
        description="Download FineWeb-10B as GPT-2 tokens, which the GPT-2 tracks train on, and "
        "check what is there already. 9 training shards and the validation shard take 2 GB.",
    )
    parser.add_argument(
        "--train-shards",
        type=int,
        default=9,
        metavar="N",
        help="training shards, 100M tokens and 200 MB each, 1 to 103 (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=given_path,
        default=cache_folder() / "data/fineweb10B",
        help="where the shards are kept (default: where the trainer looks, %(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="hash every file again, though it looks untouched"
    )
    args = parser.parse_args(argv)
    train, val = download(args.folder, args.train_shards, verify=args.verify)
    print(f"{args.folder}: {len(train)} training shards and {len(val)} validation shard are ready")
    return 0


SOURCE = Source(
    about="FineWeb-10B as GPT-2 tokens, in shards of 100M",
    open=open_fineweb,
    tokenizer="gpt2",
    exact_val_tokens=True,
    network=True,
    download=main,
)
