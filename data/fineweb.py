"""FineWeb-10B as GPT-2 tokens, ready to train on: the shards of the modded-nanogpt speedruns.

    python -m data.fineweb --train-shards 9      # 0.9B training and 0.1B validation tokens, 2 GB

Source: https://huggingface.co/datasets/kjj0/fineweb10B-gpt2 at a pinned revision: one validation
shard and 103 training shards of 100,000,000 tokens (200,001,024 bytes) each, in the format of
data/shards.py.

A shard is used once its size and sha256 are what the Hub lists for the revision. `checked.json`
beside the shards keeps what it listed, and size and times of change of the file that was compared:
the next start needs no network and hashes only files whose size or times differ. So a file that was
cut, replaced or written to is noticed, also if its mtime was set back; bytes that went bad on the
disk itself are not, except by

    python -m data.fineweb --train-shards 9 --verify    # hashes every file again
"""

import argparse
import errno
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from base import InputError
from base.files import aside, difference, one_at_a_time, sha256_of, sweep, write_text

from .shards import read_shard

REPO = "kjj0/fineweb10B-gpt2"
REVISION = "889765ea1f903759787add96995d81171b632d0c"
VAL = "fineweb_val_000000.bin"
TRAIN = [f"fineweb_train_{i:06d}.bin" for i in range(1, 104)]
# At REVISION. Every reported loss is measured on this file, so no mirror and no hand copy may
# change it.
KNOWN_SHA256 = {VAL: "5b95c8e0966f0861685b307b23dc5ae42b228ef74b28cb499784ae021f201640"}

REFUSED = "the dataset is public, so unset or renew HF_TOKEN and check the proxy"
ADVICE = {
    401: REFUSED,
    403: REFUSED,
    404: "check the revision and HF_ENDPOINT",
    429: "wait a few minutes or set HF_TOKEN, which raises the limit",
}  # by HTTP status
BY_HAND = "or copy the shards into the folder by hand"


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
    folder, names = Path(folder), [VAL, *TRAIN[:train_shards]]
    try:
        _complete(folder, names, revision, verify)
    except OSError as e:  # a local one: what the Hub client raised is an InputError by now
        raise InputError(
            f"{e.filename or folder}: {e.strerror or e}; check this path or choose a folder "
            "you can write to"
        ) from e
    return [folder / name for name in names[1:]], [folder / VAL]


def _complete(folder, names, revision, verify):
    pinned = KNOWN_SHA256 if revision == REVISION else {}
    before = _load_notes(folder)
    notes = dict(before)

    def wrong(name, size, sha256, source):
        """What is wrong with a file, or None and a note that `source`, a revision, says so."""
        path, note = folder / name, notes.get(name, {})
        if problem := _problem(path, size):
            return problem
        stamp = _stamp(path)  # before hashing, so that a change meanwhile is noticed the next time
        same = not verify and note.items() >= stamp.items()  # as the file that was hashed before
        found = note["sha256"] if same else sha256_of(path)
        if sha256 not in (None, found):
            return f"expected sha256 {sha256}, found {found}"
        notes[name] = stamp | {"sha256": found, "revision": source}

    def known(name):
        """(bytes, sha256, whether they are the revision's own), as far as this machine can tell."""
        note = notes.get(name, {})
        own = name in pinned or note.get("revision") == revision
        return note.get("size"), pinned.get(name, note.get("sha256")), own

    asked = [
        name
        for name in _progress(names, folder)
        if notes.get(name, {}).get("revision") != revision
        or wrong(name, *known(name)[:2], revision)
    ]
    expected, offline, missing, unsure = {}, None, {}, []
    if asked:
        try:
            expected = _ask_hub(asked, revision, pinned)
        except InputError as e:
            offline = e
    for name in _progress(asked, folder):
        path, (size, sha256, own) = (
            folder / name,
            (*expected[name], True) if not offline else known(name),
        )
        problem = wrong(name, size, sha256, revision if own else None)
        if problem and offline:
            if not own and path.exists():
                problem += f", unlike when first seen (if you replaced it, delete {folder / 'checked.json'})"
            raise InputError(f"{path}: {problem}; {offline}") from offline
        if problem:
            if path.is_dir():
                raise InputError(f"{path}: expected a file, found a folder; move it away")
            if path.exists():
                _say(f"{path}: {problem}; downloading it again")
            missing[name] = (size, sha256)
        elif not own:
            unsure.append(name)
    if unsure:
        _say(
            f"note: {folder}: checksums not verified for {len(unsure)} shards ({unsure[0]}, ...): {offline}"
        )
    if notes != before:
        _save_notes(folder, notes)
    if missing:
        _download(folder, missing, revision)


def _download(folder, files, revision):
    """Fetch {name: (bytes, sha256)}, one process at a time: the others find the files there."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    with one_at_a_time(folder):
        files = {
            name: (size, sha256)
            for name, (size, sha256) in files.items()
            if _problem(folder / name, size) or difference(folder / name, size, sha256)
        }
        need, free = sum(size for size, _ in files.values()), shutil.disk_usage(folder).free
        if need > free:
            raise InputError(
                f"{folder}: expected {need:,} bytes of free disk for {len(files)} shards, found "
                f"{free:,}; free some space, choose another folder or take fewer training shards"
            )
        for i, (name, (size, sha256)) in enumerate(files.items(), start=1):
            _say(f"{folder / name}: downloading, file {i} of {len(files)}, {size:,} bytes")
            _fetch(folder / name, size, sha256, revision)
            _save_notes(
                folder, {name: _stamp(folder / name) | {"sha256": sha256, "revision": revision}}
            )


def _ask_hub(names, revision, known):
    """One request for {name: (bytes, sha256)}; a pinned sha256 outranks the Hub's."""
    os.environ.setdefault(
        "HF_HUB_DISABLE_TELEMETRY", "1"
    )  # read when huggingface_hub is first imported
    with _hub_errors():
        from huggingface_hub import HfApi, constants, get_session

        # get_paths_info sets no timeout: a firewall that drops packets would hold us forever. Each
        # of the host's addresses (the Hub has four) is tried in turn, so 3 s for each fails within
        # 15 s.
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        get_session().timeout = (min(3, wait), wait, wait, wait)  # connect, read, write, pool
        infos = HfApi().get_paths_info(REPO, names, repo_type="dataset", revision=revision)
    found = {
        info.path: (info.size, known.get(info.path, info.lfs.sha256))
        for info in infos
        if getattr(info, "lfs", None) and isinstance(info.size, int)
    }
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
            with _hub_errors(f"{path}: "):
                from huggingface_hub import hf_hub_download

                # force: the second time past the client's caches, which may be where the bad bytes
                # came from
                hf_hub_download(
                    REPO,
                    path.name,
                    repo_type="dataset",
                    revision=revision,
                    local_dir=folder,
                    force_download=attempt == 2,
                )
            problem = _problem(folder / path.name, size) or difference(
                folder / path.name, size, sha256
            )
            if problem is None:
                return os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _say(f"{path}: corrupt download {attempt} of 2, deleted: {problem}")
    raise InputError(
        f"{path}: {problem}, in two downloads; check the network, proxy and HF_ENDPOINT"
    )


@contextmanager
def _hub_errors(where=""):
    """Turn whatever the Hub client raises, its own errors, httpx's or the system's, into one
    line."""
    try:
        yield
    except Exception as e:
        # the client wraps "connection refused" in "not in the local cache": dig for the former
        cause = e
        while cause.__cause__ is not None and not hasattr(cause, "response"):
            cause = cause.__cause__
        reason = " ".join(str(getattr(cause, "server_message", None) or cause).split())[:300]
        hub = f"the Hub at {os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}"
        full = (
            getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            or "No space left" in reason
        )
        if full or getattr(cause, "filename", None):
            text = f"cannot write: {reason}; free some space or choose another folder"
        elif hasattr(cause, "response"):
            status = cause.response.status_code
            advice = ADVICE.get(status, "try again later")
            text = f"{hub} answered HTTP {status} ({reason}); {advice}, {BY_HAND}"
        else:
            text = (
                f"this machine cannot reach {hub} ({reason or type(cause).__name__}); "
                f"check the network and HF_ENDPOINT, {BY_HAND}"
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
        notes = json.loads((folder / "checked.json").read_bytes())
        return {
            name: note
            for name, note in notes.items()
            if isinstance(note.get("size"), int) and isinstance(note.get("sha256"), str)
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        # only a memory of work done: where it is missing or damaged, the work is done again
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


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        type=Path,
        default=Path(__file__).parents[1] / ".cache/data/fineweb10B",
        help="where the shards are kept (default: where the trainer looks, %(default)s)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="hash every file again, though it looks untouched"
    )
    args = parser.parse_args(argv)
    try:
        train, val = download(args.folder, args.train_shards, verify=args.verify)
    except InputError as e:
        _say(f"error: {e}")
        return 2
    print(f"{args.folder}: {len(train)} training shards and {len(val)} validation shard are ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
