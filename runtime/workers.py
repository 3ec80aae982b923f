"""Processes of a run on this machine: started together, watched, ended together.

Each gets the environment that torchrun gives (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT). Nothing here imports torch, so that they are started at once.

One that fails ends the others, and so does one that does nothing any more: a folder that
STOPWATCH_WATCH names has a file `beats`, where each rank writes how often it went on, and until
when it will have again (runtime/watch.py). What is on the screen at the end names the rank that
began it.
"""

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base import last_resort

BEAT = struct.Struct("qd")  # how often a rank went on; time.monotonic() of the next time at latest
FOLDER = "STOPWATCH_WATCH"  # in the environment
POLL = 0.1  # seconds between two looks
TO_STOP = ("SIGTERM", "SIGINT", "SIGHUP")
# Seconds between SIGTERM and SIGKILL: for all after a signal, to save; for those that are left
# after a failure, which cannot go on, and after everything has stood still
TO_SAVE, TO_END, TO_DIE = 300.0, 20.0, 5.0
SPOKEN = (2, 3, 129, 130, 143)  # statuses of ends that say themselves what they are
PAUSE = 5.0  # a look this late: all were suspended, and get a minute to be seen again
FORGIVEN = 60.0


def launch(program, argv, n, max_restarts=0):
    """Run n copies of a Python program, all of them max_restarts times again if one fails.

    Returns the exit status of the first that failed, as a shell has it, else 0.
    """
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # is for the workers, who set a handler
    with received_signals() as signals:
        for attempt in range(max_restarts + 1):
            status = Workers(program, argv, n, attempt, max_restarts).wait(signals)
            if status in (0, 2) or signals:  # 2: it would be the same again
                break
    return status


@contextlib.contextmanager
def received_signals():
    """Yield the list of signals to stop since, in the order in which they came."""
    found = []
    before = {}  # signal -> its handler until now
    with contextlib.suppress(ValueError):  # not the main thread
        for name in TO_STOP:
            number = getattr(signal, name, None)  # Windows lacks one
            if number is None or signal.getsignal(number) == signal.SIG_IGN:
                continue
            before[number] = signal.signal(number, lambda number, frame: found.append(number))
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


class Workers:
    """One attempt: n processes from their start to their end."""

    def __init__(self, program, argv, n, attempt, max_restarts):
        self.folder = Path(tempfile.mkdtemp(prefix="stopwatch-watch-"))
        (self.folder / "beats").write_bytes(BEAT.pack(0, 0.0) * n)
        shared = dict(
            WORLD_SIZE=n,
            LOCAL_WORLD_SIZE=n,
            MASTER_ADDR="127.0.0.1",  # this machine's name need not lead anywhere
            MASTER_PORT=free_port(),
            TORCHELASTIC_RUN_ID="stopwatch",
            TORCHELASTIC_RESTART_COUNT=attempt,
            TORCHELASTIC_MAX_RESTARTS=max_restarts,
        )
        shared[FOLDER] = self.folder
        # As torchrun has it: else every one of them takes all cores
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", 1)
        command = [sys.executable, str(Path(program).resolve()), *argv]
        self.processes = []
        for rank in range(n):
            own = shared | dict(RANK=rank, LOCAL_RANK=rank)
            env = os.environ | {name: str(value) for name, value in own.items()}
            self.processes.append(subprocess.Popen(command, env=env))
        self.failed = []  # ranks, in the order in which they were seen to
        self.sent = set()  # signals
        self.looked = time.monotonic()
        self.forgiven = 0.0  # until when no rank is late

    def wait(self, signals):
        """Wait until all have ended; returns the status of the first that failed, else 0. signals:
        those that were received, all of which are passed on."""
        passed_on = 0
        kill_at = None  # time.monotonic() of SIGKILL for who is left
        verdict = ""  # what is wrong, for the screen
        try:
            while self.look():
                if len(signals) > passed_on:
                    self.send(signals[passed_on])
                    passed_on += 1
                    kill_at = kill_at or time.monotonic() + TO_SAVE
                elif self.failed and kill_at is None:
                    self.send(signal.SIGTERM)
                    kill_at = time.monotonic() + TO_END
                elif kill_at is None and (verdict := self.standing_still()):
                    last_resort.say(f"error: {verdict}; all processes are ended")
                    self.send(signal.SIGTERM)
                    kill_at = time.monotonic() + TO_DIE
                if kill_at and time.monotonic() > kill_at:
                    self.send(signal.SIGKILL)
                time.sleep(POLL)
        finally:
            if not (signals or verdict):
                self.explain()
            self.send(signal.SIGKILL)  # after an error in here
            shutil.rmtree(self.folder, ignore_errors=True)
        if signals and self.failed:
            return 128 + signals[0]
        if verdict:
            return 1
        return self.status(self.failed[0]) if self.failed else 0

    def status(self, rank):
        """As a shell has it: 128 and the number of the signal that ended it."""
        code = self.processes[rank].returncode
        return code if code >= 0 else 128 - code

    def look(self):
        """Take note of who has failed; returns whether any process is left."""
        left = False
        for rank, process in enumerate(self.processes):
            code = process.poll()
            left |= code is None
            if code and rank not in self.failed:
                self.failed.append(rank)
        return left

    def send(self, number):
        self.sent.add(number)
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    process.send_signal(number)

    # ----------------------------------------------------------------------------------------------
    # Whether they go on

    def standing_still(self):
        """Why nothing goes on any more, in words; empty while something does, or may.

        Nothing does when every process that is left is late: it has said until when it will have
        gone on, and has not, or is stopped. One that fetches data or writes a file has said
        nothing of the kind, and then all others wait for it.
        """
        now = time.monotonic()
        if now - self.looked > PAUSE:
            self.forgiven = now + FORGIVEN
        self.looked = now
        if now < self.forgiven:
            return ""
        content = (self.folder / "beats").read_bytes()
        beats = {}  # rank -> how often it went on
        stopped = []
        late = []
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                continue
            beats[rank], until = BEAT.unpack_from(content, rank * BEAT.size)
            if is_stopped(process.pid):
                stopped.append(rank)
            if until and now > until:
                late.append(rank)
        on_the_way = beats.keys() - set(late) - set(stopped)
        if not late or on_the_way:
            return ""
        n = len(self.processes)
        if stopped:
            return f"{ranks(stopped)} stopped (SIGSTOP), and the others of {n} wait in vain"
        behind = [rank for rank in beats if beats[rank] == min(beats.values())]
        if len(behind) < len(beats):
            return f"{ranks(behind)} hanging, and the others of {n} wait in vain"
        return f"none of the {n} processes goes on; NCCL_DEBUG=INFO shows what they wait for"

    def explain(self):
        """Say which rank's end has ended the others, if it cannot have said so itself."""
        lost = {}  # rank -> what it said of losing the others
        for rank in self.failed:
            with contextlib.suppress(OSError):
                lost[rank] = (self.folder / f"lost.{rank}").read_text()
        n = len(self.processes)
        for rank in self.failed:
            code = self.processes[rank].returncode
            if rank in lost or -code in self.sent:
                continue
            if code < 0:
                last_resort.say(f"error: rank {rank} of {n} was killed by {name_of(-code)}")
            elif code not in SPOKEN:
                last_resort.say(f"error: rank {rank} of {n} ended with status {code}")
            return
        for rank, reason in lost.items():
            last_resort.say(f"error: rank {rank} of {n} has lost the others: {reason}")
            return


def ranks(numbers):
    """ "rank 3 is", "ranks 3 and 4 are"."""
    if len(numbers) == 1:
        return f"rank {numbers[0]} is"
    *others, last = map(str, numbers)
    return f"ranks {', '.join(others)} and {last} are"


def name_of(number):
    """A signal's name, with what sends it."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if name == "SIGKILL":
        return f"{name}: by somebody, or by the system, whose memory ran out (dmesg says)"
    return name


def is_stopped(pid):
    """Whether a signal has stopped a process; not where the system has no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except (OSError, IndexError):
        return False


# --------------------------------------------------------------------------------------------------
# On all GPUs


def start_on_all_gpus(program, argv):
    """Start a process for each GPU that is to be used, before any of them has imported torch.

    Returns the exit status when they have ended; None where one process is enough, or where these
    are started already, or where the program is to find out itself.
    """
    if "RANK" in os.environ or {"-h", "--help"} & set(argv) or sys.platform == "win32":
        return None
    gpus = count_gpus()
    wanted = number_given(argv, "--gpus")
    restarts = number_given(argv, "--max-restarts")
    if gpus < 2 or wanted is None or restarts is None or wanted > gpus or wanted == 1:
        return None
    return launch(program, argv, wanted or gpus, restarts)


def number_given(argv, name):
    """The number behind an option, 0 without it; None where it is none."""
    found = "0"
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option == name:
            found = value if equals else " ".join(argv[i + 1 : i + 2])
    return int(found) if found.isascii() and found.isdecimal() else None


def count_gpus():
    """How many GPUs CUDA would find, as far as can be known without it: 0 where it cannot.

    NVIDIA's driver lists them; CUDA_VISIBLE_DEVICES takes some of them, by number or by name.
    """
    listed = gpus_of_driver()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not listed:
        return listed
    found = 0
    for name in visible.split(","):
        number = name.strip()
        if not number or (number.isdecimal() and int(number) >= listed) or number.startswith("-"):
            break  # CUDA takes those before the first that is not valid
        found += 1
    return found


def gpus_of_driver():
    """How many GPUs nvidia-smi shows; 0 without it."""
    return sum(line.startswith("GPU ") for line in nvidia_smi("-L"))


def driver_version():
    """Of NVIDIA's driver; None where nvidia-smi does not say."""
    lines = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    return lines[0].strip() if lines else None


def nvidia_smi(*options):
    """The lines that it prints; none where it is not there or fails."""
    command = shutil.which("nvidia-smi")
    if not command:
        return []
    try:
        done = subprocess.run([command, *options], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    return [] if done.returncode else done.stdout.splitlines()
