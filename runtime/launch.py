"""Processes of a run: joined to a World, ended with a status. runtime/workers.py starts those of
one machine, torchrun those of several."""

import contextlib
import ctypes
import datetime
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from base import InputError, RankError, SaidElsewhere, last_resort
from base.command import refuse

from . import workers
from .machine import World, lost_another
from .signals import Requests
from .watch import START
from .workers import FOLDER, launch

PAUSE = 2  # seconds in which the first rank says what all find out
PATIENCE = 10  # seconds after which a process says that it waits for others
UNSET = "start with torchrun, or unset RANK, WORLD_SIZE and their like"


def said(name, otherwise):
    """A number that torchrun sets in its processes' environment. Raises RankError where something
    else, a cluster or a shell, has set it to what is none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return otherwise
    if not (text.isascii() and text.isdecimal()):
        raise RankError(f"{name}={text} in the environment: expected a number; {UNSET}")
    return int(text)


def is_started():
    """Whether this is one of the processes that torchrun, or a cluster in its place, has started.

    Some clusters say RANK=0 and WORLD_SIZE=1 to a machine that they give several GPUs.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return "RANK" in os.environ and (by_torchrun or said("WORLD_SIZE", 1) > 1)


def join_world(gpus):
    """The World that torchrun's environment describes, with its process group.

    gpus: how many this machine has. Raises RankError where the environment does not fit.
    """
    if sys.platform == "linux" and is_started():
        # PR_SET_PDEATHSIG: if who started this is killed, stop as it would have said
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    rank = said("RANK", 0)
    local_rank = said("LOCAL_RANK", 0)
    size = said("WORLD_SIZE", 1)
    local_size = said("LOCAL_WORLD_SIZE", 1)
    if rank >= size:
        raise RankError(f"RANK={rank} in the environment: expected less than {size}; {UNSET}")
    for name in "MASTER_ADDR", "MASTER_PORT":
        if size > 1 and not os.environ.get(name):
            raise RankError(f"WORLD_SIZE={size} in the environment, but no {name}; {UNSET}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        if local_rank >= gpus:
            raise RankError(
                f"process {local_rank} has no GPU: this machine has {gpus}, lower --nproc_per_node"
            )
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, device, size)

    with waiting_for(size), ended_by_signals():
        # The first rank may be downloading for a long time while the others wait
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            timeout=datetime.timedelta(seconds=START),
            device_id=device if gpus else None,
        )
    # Groups inside a machine and across machines, where all have as many processes
    sizes = torch.tensor([local_size, -local_size], device=device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    if local_size == size or sizes.sum() != 0:
        return World(rank, size, device, size)
    nodes = [dist.new_group(range(i, i + local_size)) for i in range(0, size, local_size)]
    across = [dist.new_group(range(i, size, local_size)) for i in range(local_size)]
    return World(rank, size, device, local_size, nodes[rank // local_size], across[local_rank])


@contextlib.contextmanager
def waiting_for(size):
    """Inside, this process waits for the others to start; after a while it says so. Raises
    RankError where they cannot be reached, or the port is another program's."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = f"note: waiting for all {size} processes to come to {place} ..."
    timer = threading.Timer(PATIENCE, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except dist.DistError as e:
        reason = str(e).split("\n")[0]
        raise RankError(f"the {size} processes cannot meet at {place}: {reason}") from None
    finally:
        timer.cancel()


@contextlib.contextmanager
def ended_by_signals():
    """Inside, a signal to stop ends the process. Python's handlers would have their turn only once
    the wait for others is over."""
    before = {}  # signal -> its handler until now
    with contextlib.suppress(ValueError):  # not the main thread
        for name in "SIGTERM", "SIGINT", "SIGHUP":
            number = getattr(signal, name, None)  # Windows lacks one
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_on_all_gpus(program, argv, body, gpus=0, max_restarts=0):
    """Call body(world, requests), in a process for each GPU if there are several.

    program: the file to start again for each process, with the same argv; gpus: how many to use, 0
    for all there are. Returns the exit status of the first that failed, else 0. Raises what body
    raises.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not here:
        refuse_gpus_out_of_reach()
    if not is_started():
        if gpus > here:
            raise InputError(
                f"--gpus {gpus}: this machine has {here}; leave the option out to use all"
            )
        if (gpus or here) > 1:
            if not (dist.is_available() and dist.is_nccl_available()):
                raise InputError(
                    f"{gpus or here} GPUs: expected NCCL to connect them, which this PyTorch lacks "
                    "(on Windows all do); give --gpus 1"
                )
            return launch(program, argv, gpus or here, max_restarts)
    with Requests().listen() as requests:
        body(join_world(here), requests)
    return 0


def refuse_gpus_out_of_reach():
    """Raises InputError where there are GPUs that PyTorch cannot use: a run for them would take
    days on the CPU."""
    n = workers.count_gpus()
    if not n:
        return
    if torch.version.cuda is None:
        why = f"PyTorch {torch.__version__} was built without CUDA; install one with it into .venv"
    else:
        driver = workers.driver_version() or "unknown"
        why = (
            f"PyTorch {torch.__version__} cannot use them, which needs a driver for CUDA "
            f"{torch.version.cuda} (this one is {driver}); update it"
        )
    raise InputError(
        f"nvidia-smi shows {n} GPU{'s' * (n > 1)}, and {why}, or train on the CPU with "
        'CUDA_VISIBLE_DEVICES="" in the environment'
    )


def exit_status(program):
    """Call program() and return what it returns, or the status of how it ended, having said why: 2
    for an InputError, a signal's, 1 where another process was lost."""
    try:
        return program()
    except SaidElsewhere:
        return 2
    except InputError as e:
        if isinstance(e, RankError) or not said_by_the_first(str(e)):
            return refuse(e)
        return 2
    except SystemExit as e:  # a signal
        return e.code
    except RuntimeError as e:
        if not (dist.is_initialized() and lost_another(e)):
            raise
        lose(str(e).splitlines()[0])
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def said_by_the_first(text):
    """Whether the first rank ends with the same words, which most errors are: it says them for all.
    Waits a moment for it."""
    rank = said("RANK", 0)
    if not rank:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.distributed_c10d._get_default_store().set("error", text)
        return False
    time.sleep(PAUSE)
    if not dist.is_initialized():
        return True  # what each of them finds out before they have met
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.check(["error"]) and store.get("error").decode() == text
    except RuntimeError:  # the store went with the first rank, which had its reasons
        return True


def lose(reason):
    """Say that the others are gone; to the launcher alone where there is one, which knows whose end
    it was."""
    if FOLDER in os.environ and not last_resort.debugging():
        path = Path(os.environ[FOLDER], f"lost.{said('RANK', 0)}")
        with contextlib.suppress(OSError):
            path.write_text(reason, encoding="utf-8")
            return
    last_resort.say(
        f"error: {last_resort.rank_in_words()}another process has ended or cannot be reached: "
        f"{reason}"
    )
