"""FineWeb-10B as GPT-2 tokens, ready to train on: the shards of the modded-nanogpt speedruns.

    python -m data.fineweb --train-shards 9      # 0.9B training and 0.1B validation tokens, 2 GB

Source: https://huggingface.co/datasets/kjj0/fineweb10B-gpt2 at a pinned revision: one validation shard and
103 training shards of 100,000,000 tokens (200,001,024 bytes) each, in the format of data/shards.py.

A shard is used once its size and sha256 are what the Hub lists for the revision. `checked.json` beside the
shards notes which were compared, so the next start needs no network and hashes nothing.
"""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from .shards import InputError, read_shard

REPO = "kjj0/fineweb10B-gpt2"
REVISION = "889765ea1f903759787add96995d81171b632d0c"
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(1, 104)]
# At REVISION. Every reported loss is measured on this file, so no mirror and no hand copy may change it.
KNOWN_SHA256 = {VAL: "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"}

REFUSED = "the dataset is public, so unset or renew HF_TOKEN and check the proxy"
ADVICE = {401: REFUSED, 403: REFUSED, 404: "check the revision and HF_ENDPOINT",
          429: "wait a few minutes or set HF_TOKEN, which raises the limit"}  # by HTTP status
BY_HAND = "or copy the shards into the folder by hand"


def download(folder, train_shards=9, *, revision=REVISION):
    """Make sure the validation shard and the first `train_shards` (1 to 103) training shards are in `folder`.

    Returns (train paths, val paths). Asks the Hub only about files not noted in `checked.json`, fetches only
    what is missing or wrong, and keeps finished files if interrupted. If the Hub cannot be asked, files that
    are whole by their own header (copied by hand, say) are accepted and stderr says so.
    Raises InputError: no network, refused, not found, no space, not writable, corrupt twice.
    """
    if not 1 <= train_shards <= len(TRAIN):
        raise InputError(f"train_shards: expected 1 to {len(TRAIN)}, found {train_shards}")
    folder, names = Path(folder), [VAL, *TRAIN[:train_shards]]
    try:
        _complete(folder, names, revision)
    except OSError as e:  # a local one: what the Hub client raised is an InputError by now
        raise InputError(f"{e.filename or folder}: {e.strerror or e}; check this path or choose a folder "
                         "you can write to") from e
    return [folder / name for name in names[1:]], [folder / VAL]


def _complete(folder, names, revision):
    known = KNOWN_SHA256 if revision == REVISION else {}
    checked = _load_notes(folder)
    names = [n for n in names if not _was_checked(folder / n, checked.get(n, {}), revision, known)]
    if not names:
        return
    try:
        expected, offline = _ask_hub(names, revision, known), None
    except InputError as e:
        expected, offline = {name: (None, known.get(name)) for name in names}, e

    missing, unsure = [], []
    for name in names:
        path, (size, sha256) = folder / name, expected[name]
        problem = _problem(path, size, sha256)
        if problem and offline:
            raise InputError(f"{path}: {problem}; {offline}") from offline
        elif problem:
            missing.append(name)
            if path.exists():
                _say(f"{path}: {problem}; deleting it and downloading it again")
                path.unlink()
        elif sha256:
            checked[name] = _note(path, sha256, revision)
        else:
            unsure.append(name)
    if unsure:
        _say(f"note: {folder}: checksums not verified for {len(unsure)} shards ({unsure[0]}, ...): {offline}")
    if len(missing) + len(unsure) < len(names):
        _save_notes(folder, checked)
    if not missing:
        return

    folder.mkdir(parents=True, exist_ok=True)
    need, free = sum(expected[name][0] for name in missing), shutil.disk_usage(folder).free
    if need > free:
        raise InputError(f"{folder}: expected {need:,} bytes of free disk for {len(missing)} shards, found "
                         f"{free:,}; free some space, choose another folder or take fewer training shards")
    for i, name in enumerate(missing, start=1):
        _say(f"{folder / name}: downloading, file {i} of {len(missing)}, {expected[name][0]:,} bytes")
        _fetch(folder / name, *expected[name], revision)
        checked[name] = _note(folder / name, expected[name][1], revision)
        _save_notes(folder, checked)


def _ask_hub(names, revision, known):
    """One request for {name: (bytes, sha256)}; a pinned sha256 outranks the Hub's."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first imported
    with _hub_errors():
        from huggingface_hub import HfApi, constants, get_session
        # get_paths_info sets no timeout: a firewall that drops packets would hold us forever. Each of the
        # host's addresses (the Hub has four) is tried in turn, so 3 s for each fails within 15 s.
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        get_session().timeout = (min(3, wait), wait, wait, wait)  # connect, read, write, pool
        infos = HfApi().get_paths_info(REPO, names, repo_type="dataset", revision=revision)
    found = {info.path: (info.size, known.get(info.path, info.lfs.sha256))
             for info in infos if getattr(info, "lfs", None)}
    if absent := [name for name in names if name not in found]:
        raise InputError(f"the Hub has no {absent[0]} in {REPO} at revision {revision}; {ADVICE[404]}")
    return found


def _fetch(path, size, sha256, revision):
    """Download a file, again if it is corrupt. A lost connection is resumed; a killed process is not."""
    for attempt in (1, 2):
        with _hub_errors(f"{path}: "):
            from huggingface_hub import hf_hub_download
            # force: the second time past the client's caches, which may be where the bad bytes came from
            hf_hub_download(REPO, path.name, repo_type="dataset", revision=revision, local_dir=path.parent,
                            force_download=attempt == 2)
        problem = _problem(path, size, sha256)
        if problem is None:
            return
        path.unlink(missing_ok=True)
        _say(f"{path}: corrupt download {attempt} of 2, deleted: {problem}")
    raise InputError(f"{path}: {problem}, in two downloads; check the network, proxy and HF_ENDPOINT")


@contextmanager
def _hub_errors(where=""):
    """Turn whatever the Hub client raises, its own errors, httpx's or the system's, into one line."""
    try:
        yield
    except Exception as e:
        cause = e  # the client wraps "connection refused" in "not in the local cache": dig for the former
        while cause.__cause__ is not None and not hasattr(cause, "response"):
            cause = cause.__cause__
        reason = " ".join(str(getattr(cause, "server_message", None) or cause).split())[:300]
        hub = f"the Hub at {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}"
        full = getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason
        if full or getattr(cause, "filename", None):
            text = f"cannot write: {reason}; free some space or choose another folder"
        elif hasattr(cause, "response"):
            status = cause.response.status_code
            advice = ADVICE.get(status, "try again later")
            text = f"{hub} answered HTTP {status} ({reason}); {advice}, {BY_HAND}"
        else:
            text = (f"this machine cannot reach {hub} ({reason or type(cause).__name__}); "
                    f"check the network and HF_ENDPOINT, {BY_HAND}")
        raise InputError(where + text) from e


def _problem(path, size=None, sha256=None):
    """What is wrong with a shard file, cheapest test first, or None."""
    if not path.exists():
        return "not there"
    if size not in (None, path.stat().st_size):
        return f"expected {size} bytes, found {path.stat().st_size}"
    try:
        read_shard(path)
    except InputError as e:
        return str(e).removeprefix(f"{path}: ")
    if sha256:
        with open(path, "rb") as f:
            found = hashlib.file_digest(f, "sha256").hexdigest()
        if found != sha256:
            return f"expected sha256 {sha256}, found {found}"


def _note(path, sha256, revision):
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, "revision": revision}


def _was_checked(path, note, revision, known):
    """Whether `path` still looks like the file whose sha256 was compared: size, time of change, header."""
    return _problem(path) is None and note == _note(path, known.get(path.name, note.get("sha256")), revision)


def _load_notes(folder):
    try:
        notes = json.loads((folder / "checked.json").read_text())
        return {name: dict(note) for name, note in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # only a memory of work done: where it is missing or damaged, the work is done again


def _save_notes(folder, notes):
    path, aside = folder / "checked.json", folder / f"checked.json.{os.getpid()}.tmp"
    try:
        aside.write_text(json.dumps(notes, indent=1))
        os.replace(aside, path)
    except OSError as e:  # shards in a read-only folder can be trained on all the same
        _say(f"note: cannot write {path}: {e.strerror}; the next start will compare the shards again")
        with suppress(OSError):
            aside.unlink()


def _say(line):
    print(line, file=sys.stderr, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m data.fineweb", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-shards", type=int, default=9, metavar="N",
                        help="training shards, 100M tokens and 200 MB each, 1 to 103 (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / ".cache/data/fineweb10B",
                        help="where the shards are kept (default: where the trainer looks, %(default)s)")
    args = parser.parse_args(argv)
    try:
        train, val = download(args.folder, args.train_shards)
    except InputError as e:
        _say(f"error: {e}")
        return 2
    print(f"{args.folder}: {len(train)} training shards and {len(val)} validation shard are ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
