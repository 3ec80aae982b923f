"""Processes of a run: started by torchrun, joined to a World, ended with a status."""

import ctypes
import datetime
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from base import InputError, RankError, last_resort
from base.command import refuse

from .machine import World, lost_another
from .signals import Requests


def launch(program, argv, n, max_restarts=0):
    """Start n copies of a program with torchrun, max_restarts times again if one fails; returns
    the exit status of the first that failed, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args as torchrun_args
    from torch.distributed.run import run as torchrun

    # Else a restart finds the addresses of the processes that are gone (pytorch issue 135712)
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Seconds for workers to save; 30 would be too few
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # is for the workers, who set a handler
    # The workers' own line says it all
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc_per_node={n}", f"--max-restarts={max_restarts}"]
    try:
        torchrun(torchrun_args([*options, str(Path(program).resolve()), *argv]))
    except ChildFailedError as e:
        return e.get_first_failure()[1].exitcode
    except SignalException as e:
        return 128 + e.sigval
    return 0


def join_world(gpus):
    """The World that torchrun's environment describes, with its process group.

    gpus: how many this machine has.
    """
    if sys.platform == "linux" and "RANK" in os.environ:
        # PR_SET_PDEATHSIG: if torchrun is killed, stop as it would have said
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        if local_rank >= gpus:
            raise RankError(
                f"process {local_rank} has no GPU: this machine has {gpus}, lower --nproc_per_node"
            )
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, size, device, size)

    # The first rank may be downloading for a long time while the others wait
    dist.init_process_group(
        "nccl" if gpus else "gloo",
        timeout=datetime.timedelta(hours=6),
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


def run_on_all_gpus(program, argv, body, gpus=0, max_restarts=0):
    """Call body(world, requests), in a process for each GPU if there are several.

    program: the file to start again for each process, with the same argv; gpus: how many to use, 0
    for all there are. Returns the exit status of torchrun, else 0. Raises what body raises.
    """
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if "RANK" not in os.environ:
        if gpus > here:
            raise InputError(
                f"--gpus {gpus}: this machine has {here}; leave the option out to use all"
            )
        if (gpus or here) > 1:
            return launch(program, argv, gpus or here, max_restarts)
    with Requests().listen() as requests:
        body(join_world(here), requests)
    return 0


def exit_status(program):
    """Call program() and return what it returns, or the status of how it ended, having said why: 2
    for an InputError, a signal's, 1 where another process was lost."""
    try:
        return program()
    except InputError as e:
        if int(os.environ.get("RANK", 0)) == 0 or isinstance(e, RankError):
            return refuse(e)
        time.sleep(2)  # for the first rank to say it
        return 2
    except SystemExit as e:  # a signal
        return e.code
    except RuntimeError as e:
        if not (dist.is_initialized() and lost_another(e)):
            raise
        reason = str(e).splitlines()[0]
        last_resort.say(f"error: another process has ended or cannot be reached: {reason}")
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
