"""Documents in files of a few megabytes, which are what the stages of a build hand on, and the
processes that work on them."""

import contextlib
import ctypes
import io
import itertools
import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from base import whole_file, write_text

FRAME = 1 << 18  # bytes of lines that are compressed together
LEVEL = 3  # of zstd: 1 saves little time, 9 little room


def write_lines(path, values):
    """Write JSON values, a line each, compressed; the same bytes for the same values.

    Returns (n,) int64, where in the file the part begins that has the k-th value: parts are
    compressed on their own, so that read_line() need not read all of it.
    """
    import zstandard

    packer = zstandard.ZstdCompressor(LEVEL, write_checksum=True)
    places = []
    packed = []
    at = 0
    waiting = []
    size = 0
    for i, value in enumerate(values, 1):
        line = (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")
        places.append(at)
        waiting.append(line)
        size += len(line)
        if size >= FRAME or i == len(values):
            packed.append(packer.compress(b"".join(waiting)))
            at += len(packed[-1])
            waiting = []
            size = 0
    with whole_file(path) as temp:
        temp.write_bytes(b"".join(packed))
    return np.array(places, dtype=np.int64)


def read_lines(path):
    """Yield the values of write_lines(), one at a time."""
    import zstandard

    with open(path, "rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        for line in io.TextIOWrapper(stream, encoding="utf-8", newline="\n"):
            yield json.loads(line)


def read_part(path, at):
    """The lines of one part, [bytes, ...] of JSON; at: its place, as write_lines() has returned
    it."""
    import zstandard

    part = []
    reader = zstandard.ZstdDecompressor().decompressobj()  # ends with the part; a stream goes on
    with open(path, "rb") as raw:
        raw.seek(at)
        while not reader.eof and (packed := raw.read(FRAME // 4)):
            part.append(reader.decompress(packed))
    return b"".join(part).split(b"\n")[:-1]


def write_arrays(path, **arrays):
    """Write arrays as .npz."""
    with whole_file(path) as temp, open(temp, "wb") as f:
        np.savez(f, **arrays)


def read_arrays(path):
    """{name: array} of write_arrays()."""
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    return json.loads(path.read_bytes())


def say(line):
    print(line, file=sys.stderr, flush=True)


def release_memory():
    """Give freed memory back to the system, of which glibc keeps what lies between other things."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)


def progress(things, what, unit, total=None, **style):
    """The things, with a bar on stderr once it takes a while."""
    return tqdm(things, desc=what, unit=unit, total=total, delay=2, disable=None, **style)


# --------------------------------------------------------------------------------------------------
# Processes


def end_with_parent():
    """In a process of the pool: end when the one that started it has ended, however it did."""
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """Calls a function for many arguments in `processes` processes; results come in order.

    One process is this one. The others are started anew, without what this one has open, where a
    second piece of work shows that they are worth it.
    """

    def __init__(self, processes):
        self.processes = processes
        self.pool = None

    def map(self, function, arguments):
        """Yield function(*args) for each args in arguments, which are taken a few at a time."""
        arguments = iter(arguments)
        head = list(itertools.islice(arguments, 2))
        if self.processes == 1 or len(head) < 2:
            for args in itertools.chain(head, arguments):
                yield function(*args)
            return

        if self.pool is None:
            self.pool = self.started(self.processes)
        waiting = []
        for args in itertools.chain(head, arguments):
            waiting.append(self.pool.submit(function, *args))
            if len(waiting) > self.processes + 1:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()

    def alone(self, function, *args):
        """function(*args), for what takes much memory: in a process that ends afterwards, without
        the others, which keep tables. With one process, in this one."""
        if self.processes == 1:
            return function(*args)
        self.close()
        with self.started(1) as pool:
            return pool.submit(function, *args).result()

    def started(self, processes):
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(processes, context, initializer=end_with_parent)

    def close(self):
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None


@contextlib.contextmanager
def workers(processes):
    crew = Workers(processes)
    try:
        yield crew
    finally:
        crew.close()
