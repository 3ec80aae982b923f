"""Checkpoints on disk: a folder for each, whole or not there.

    checkpoints/step-000123/state.safetensors   the tensors
                            state.json          format version, step, metric, dtype and shape of
                            every tensor, meta
                            complete            SHA-256, bytes and name of the other two, written
                            last
    checkpoints/.lock                           held by the process that is writing or deleting

One is written into step-000123.aside, every file and the folder's names fsynced, and the folder
renamed: from that moment it exists. One of the same step is first renamed to step-000123.old, and
counts until then. One to be deleted is first renamed to step-000123.trash. So a process killed at
any moment leaves whole checkpoints, and remains with these endings, which the next start removes.
Readers compare what `complete` says with the sizes (latest) and the contents (load), so that a
partial copy, a bad disk and an edited file are refused as well.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError, one_line

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

VERSION = 1  # change it when what is written below changes
TENSORS, STATE, COMPLETE = "state.safetensors", "state.json", "complete"
NAME = re.compile(r"step-([0-9]{6}|[1-9][0-9]{6,})(\.aside|\.old|\.trash)?")
LINES = re.compile(r"(?:[0-9a-f]{64} [0-9]+ [a-z.]+\n)+")  # what `complete` holds in every version
LOCK_SECONDS = 60  # how long a writer waits for another one
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # safetensors' names


# --------------------------------------------------------------------------------------------------
# Reading


def latest(folder):
    """Path of the complete checkpoint with the highest step in `folder`, or None. Raises
    InputError for a folder that cannot be read."""
    found = complete(Path(folder))
    return found[max(found)] if found else None


def load(path):
    """(tensors, meta) as they were given to save().

    The tensors are on the CPU, mapped from the file and private. Raises InputError for what is not
    a complete and unaltered checkpoint of this version.
    """
    return readable(path, read_whole)


def load_meta(path):
    """The meta that was given to save(), for which no tensor is read. Raises InputError as load()
    does."""
    return readable(path, read_state)["meta"]


def readable(path, read):
    """read(path) of a checkpoint. Raises InputError, whatever is wrong with it."""
    path = Path(path)
    try:
        return read(path)
    except InputError:
        raise
    except OSError as e:
        refuse(path, f"{Path(e.filename or path).name} cannot be read: {e.strerror or e}")
    except (ValueError, LookupError, TypeError, AttributeError, SafetensorError) as e:
        said = f"{type(e).__name__}: {one_line(e)}"
        refuse(
            path,
            f"its checksums fit and its content does not ({said}): not written by this program",
        )


def read_state(path):
    """What state.json holds. Raises InputError, and other errors for damage it does not expect."""
    files = manifest(path)
    if TENSORS not in files or STATE not in files:
        if path.is_dir():
            found = f"no valid file '{COMPLETE}' in it"
        else:
            found = "a file" if path.exists() else "nothing"
        refuse(path, f"expected the folder of a complete checkpoint, found {found}")

    verify(path, STATE, files)
    state = json.loads((path / STATE).read_bytes())
    if state["version"] != VERSION:
        refuse(
            path,
            f"expected format version {VERSION}, found {state['version']}: the version of this "
            "program that wrote it can read it",
        )
    return state


def read_whole(path):
    """What load() returns; it raises what read_state() does."""
    state = read_state(path)
    verify(path, TENSORS, manifest(path))
    tensors = load_file(path / TENSORS)
    held = listing(tensors)
    listed = state["tensors"]
    for name in sorted({*held, *listed}):
        if held.get(name) != listed.get(name):
            refuse(
                path,
                f"{TENSORS}: expected {name} to be {listed.get(name, 'absent')} as {STATE} says, "
                f"found {held.get(name, 'nothing')}",
            )
    return tensors, state["meta"]


def manifest(path):
    """{file name: (SHA-256, bytes)} as the checkpoint's `complete` says; {} if there is none or
    it is not one."""
    try:
        text = (path / COMPLETE).read_text("ascii")
    except (OSError, ValueError):
        return {}
    lines = map(str.split, text.splitlines() if LINES.fullmatch(text) else [])
    return {name: (digest, int(size)) for digest, size, name in lines}


def verify(path, name, files):
    """Refuse a checkpoint in which this file is not the one in the manifest `files`."""
    digest, size = files[name]
    with open(path / name, "rb") as f:
        found = os.fstat(f.fileno()).st_size
        if found != size:
            refuse(path, f"{name}: expected {size} bytes, found {found}: truncated or altered")
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != digest:
        refuse(
            path,
            f"{name}: expected SHA-256 {digest[:12]}..., found {found[:12]}...: altered since it "
            "was written",
        )


def refuse(path, why):
    """Raise InputError, with the checkpoint to take instead."""
    name = NAME.fullmatch(path.name)
    here = complete(path.absolute().parent)
    earlier = [step for step in here if name and step < int(name[1])]
    if earlier:
        advice = f"choose an earlier one: {here[max(earlier)]}"
    else:
        advice = "there is no earlier one beside it, so choose one from elsewhere or start without"
    raise InputError(f"{path}: {why}; {advice}") from None


def complete(folder):
    """{step: path} of the checkpoints of which every file is there with its size."""
    found = {}
    for path, step, ending in entries(folder):  # the one without an ending before the .old one
        files = manifest(path) if ending in ("", ".old") and step not in found else {}
        with contextlib.suppress(OSError):
            if files and all(
                (path / name).stat().st_size == size for name, (_, size) in files.items()
            ):
                found[step] = path
    return found


def entries(folder):
    """Sorted [(path, step, ending)] of what is named like a checkpoint or its remains."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise InputError(
            f"{folder}: cannot look for checkpoints: {e.strerror}; "
            "expected a folder that can be read"
        ) from None
    return [(folder / m[0], int(m[1]), m[2] or "") for m in map(NAME.fullmatch, names) if m]


# --------------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def open_store(options, log):
    """The Checkpoints of a run by its RunConfig and its Log; None with --checkpoint-every off, and
    on ranks other than the first."""
    if options.checkpoint_every == "off" or not log.active:
        yield None
        return
    keep = options.keep_last, options.keep_best
    store = Checkpoints(log.folder / "checkpoints", *keep, log.say)
    with contextlib.closing(store):
        yield store


class Checkpoints:
    """The checkpoints of one run in `folder`, written by a thread while training goes on.

    keep_last: how many are kept of the highest steps; keep_best: how many of the lowest metrics, of
    equal ones the later; the one just written is kept in any case. say: called with a line, by the
    thread as well, when something could not be written or deleted: that raises nothing, because
    training is worth more. Raises InputError for a folder that cannot be used.
    """

    def __init__(self, folder, keep_last=2, keep_best=0, say=print):
        if keep_last < 1:
            raise InputError(f"keep the last {keep_last} checkpoints: expected 1 or more")
        if keep_best < 0:
            raise InputError(f"keep the best {keep_best} checkpoints: expected 0 or more")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.say = say
        self._thread = None
        self._lock = threading.Lock()
        self._next = None  # arguments of _write(), for the thread to take
        self._running = False  # whether the thread will look for more
        self._written = False
        try:
            with locked(self.folder, seconds=0):
                self._clean()
        except BlockingIOError:
            pass  # another process is writing: what looks like remains may be its work
        except OSError as e:
            raise InputError(
                f"{folder}: cannot hold checkpoints: {e.strerror or e}; "
                "choose a folder that can be written"
            ) from None

    @property
    def busy(self):
        """Whether one is being written."""
        return self._running

    def save(self, step, tensors, meta, metric=None, wait=False, queue=False):
        """Begin to write a checkpoint; one of the same step is replaced.

        tensors: {name: CPU tensor}, not to be changed until busy is False; meta: a dict for JSON;
        metric: lower is better, None and NaN are never among the best. While another one is being
        written, wait=False returns False at once, unless queue: then this one is written after it,
        in place of one that waits already. wait=True waits for all of them, and for this one too.
        Returns whether it was begun or waits, with wait whether it was written.
        """
        assert step >= 0, step
        if self.busy and not (wait or queue):
            return False
        if wait:
            self.close()
        # Here and not in the thread: the caller may change meta, and what cannot be written is the
        # caller's mistake.
        metric = None if metric is None or math.isnan(metric) else float(metric)
        state = dict(version=VERSION, step=step, metric=metric, tensors=listing(tensors), meta=meta)
        files = {
            STATE: [json.dumps(state, indent=1).encode()],
            TENSORS: list(safetensors_file(tensors)),
        }
        with self._lock:
            self._next = step, files
            if self._running:
                return True  # the thread takes it when it is done
            self._running = True
        self._thread = threading.Thread(target=self._work, args=(not wait,), name="checkpoint")
        self._thread.start()  # not a daemon: the interpreter waits for it at its end
        if wait:
            self.close()
        return self._written if wait else True

    def close(self):
        """Wait for what is being written, or waits for that."""
        if self.busy:
            self._thread.join(2)
            if self.busy:
                self.say(f"waiting for a checkpoint to be written to {self.folder} ...")
        if self._thread:
            self._thread.join()
        self._thread = None

    def _work(self, training):
        """The thread: write what is to be written, until nothing waits. So that training hardly
        notices, it needs Python's lock a few times per tensor only, and has low priority where
        threads have their own."""
        if training and sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.nice(10)  # of this thread alone, there
        while True:
            with self._lock:
                job = self._next
                self._next = None
                if job is None:
                    self._running = False
                    return
            self._write(*job)
            del job  # its tensors are as large as the model

    def _write(self, step, files):
        """Write one, then delete what is not kept any longer."""
        path = self.folder / f"step-{step:06d}"
        aside = beside(path, ".aside")
        self._written = False
        try:
            with locked(self.folder, LOCK_SECONDS):
                try:
                    self._clean()
                    aside.mkdir()
                    lines = [write_file(aside / name, parts) for name, parts in files.items()]
                    write_file(aside / COMPLETE, lines)
                    sync(aside)
                    if path.exists():
                        os.rename(path, beside(path, ".old"))
                    os.rename(aside, path)
                    sync(self.folder)
                    self._written = True
                finally:
                    self._clean()
                self._prune(step)
        except Exception as e:  # whatever a disk or file system may come up with
            why = getattr(e, "strerror", None) or f"{type(e).__name__}: {e}"
            what = "could not delete old checkpoints"
            if not self._written:
                megabytes = sum(len(part) for parts in files.values() for part in parts) / 1e6
                what = f"could not write the checkpoint of step {step} ({megabytes:,.1f} MB)"
            self.say(
                f"{self.folder}: {what}: {why}; training goes on and the others are kept: "
                "see to the disk before the next one is due"
            )

    def _clean(self):
        """Put back or remove what a writer left that was killed or failed; only under the lock."""
        whole = complete(self.folder)
        for path, step, ending in entries(self.folder):
            if ending == ".old" and whole.get(step) == path:  # the new one never got its name
                remove(beside(path))
                os.rename(path, beside(path))
            elif ending == ".old":
                remove(path)
            elif ending:
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self, written):
        """Delete what is not to be kept of the complete checkpoints of this version."""
        here = complete(self.folder)
        metrics = {}  # step -> its metric, None if it has none
        for step, path in here.items():
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                state = json.loads((path / STATE).read_bytes())
                if state["version"] == VERSION:
                    metrics[step] = state["metric"]
        last = sorted(metrics, reverse=True)[: self.keep_last]
        measured = [step for step in metrics if metrics[step] is not None]
        best = sorted(measured, key=lambda step: (metrics[step], -step))[: self.keep_best]
        for step in metrics.keys() - {*last, *best, written}:
            remove(here[step])


@contextlib.contextmanager
def locked(folder, seconds):
    """Make the folder if it is not there and hold it against other writers; the system lets go
    when a process dies. Raises BlockingIOError if another one holds it for longer than this."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as f:
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise BlockingIOError(
                        errno.EAGAIN, "another process is writing there"
                    ) from None
                time.sleep(0.02)
                continue
            except (OSError, AttributeError):
                # a file system or a machine without locks: two writers there may spoil each other's
                # attempts
                pass
            break
        try:
            yield
        finally:
            with contextlib.suppress(OSError, AttributeError):
                fcntl.flock(
                    f, fcntl.LOCK_UN
                )  # closing would not do if the process has forked meanwhile


def beside(path, ending=""):
    """The name of the same checkpoint with another ending."""
    return path.with_name(path.name.split(".")[0] + ending)


def remove(path):
    """Delete a checkpoint, if there; from the first moment it is none."""
    if path.exists():
        trash = beside(path, ".trash")
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)  # what resists is tried again by the next _clean()


def listing(tensors):
    """{name: dtype and shape}, as state.json has it."""
    return {name: f"{DTYPES[t.dtype]} {list(t.shape)}" for name, t in tensors.items()}


def safetensors_file(tensors):
    """The parts of a safetensors file: length of the header (uint64), header (JSON), then the
    tensors, whose own memory is given. Not by the library, so that it is hashed on the way,
    fails with the system's errors and gets the user's file mode. Source: the format at
    github.com/huggingface/safetensors."""
    names = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # keeps every tensor aligned
    header, end = {}, 0
    for name in names:
        t, start = tensors[name], end
        end += t.nbytes
        header[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield memoryview(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def write_file(path, parts):
    """Write a new file, on the disk when this returns; returns its line for `complete`."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as f:
        for part in parts:
            digest.update(part)
            size += f.write(part)
        f.flush()
        os.fsync(f.fileno())
    return f"{digest.hexdigest()} {size} {path.name}\n".encode()


def sync(folder):
    """Have the names in a folder on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(fd)
