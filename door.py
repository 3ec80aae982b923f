"""What ./run.sh hands a verb to: `python door.py VERB [OPTIONS]`.

Streams, signals and threads are put right before anything large is imported, and an error that no
program expected ends in one line: see base/last_resort.py. --debug shows all of it.
"""

import os
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
LIBRARY = os.path.dirname(os.__file__)


def place(folder):
    """What sorts sys.path: Python's library, this checkout, packages, then folders of the user's:
    a random.py or data.py in one of those, on PYTHONPATH say, is not what is meant here."""
    if "site-packages" in folder or "dist-packages" in folder:
        return 2
    if os.path.abspath(folder).startswith(ROOT):
        return 1
    return 0 if folder.startswith(LIBRARY) else 3


sys.path.sort(key=place)  # before anything is imported that Python has not loaded by itself

import atexit  # noqa: E402
import gc  # noqa: E402
import importlib  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402

from base import clock as clock  # noqa: E402  start-up is counted from its import
from base import last_resort, streams  # noqa: E402

# Of verbs that are no package with a __main__
MODULES = dict(train="train_gpt", eval="evals.__main__", report="records.report")
MODULES |= {"import": "export.from_hf", "teach-demo": "posttrain.teach_demo"}
MODULES |= {verb: f"posttrain.{verb}" for verb in ("sft", "dpo", "orpo", "grpo")}
MODULES |= {verb: f"inference.{verb}" for verb in ("sample", "chat", "serve")}
# They compute by PyTorch alone, on GPUs as well, and need not load Triton and take in all kernels
# for it, which takes a tenth of the time that their imports take
WITHOUT_TRITON = "sample", "chat", "serve", "eval"
# The same where there is no GPU that its kernels could run on, unless kernels are asked for
TRAINS = "train", "sft", "dpo", "orpo", "grpo", "teach-demo"

DRIVER = "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"  # the last one under WSL


def main(argv):
    """Run a verb; argv: its name and its options. Returns the exit status."""
    verb, *argv = argv
    if "--debug" in argv:
        argv.remove("--debug")
        os.environ[last_resort.DEBUG] = "1"
    if not wants_triton(verb, argv):
        sys.modules["triton"] = None  # importing it is an ImportError now
    streams.mend()
    do_not_spin()
    use_large_pages()
    try:
        status = on_all_gpus(argv) if verb == "train" else None
        if status is None:
            status = run(MODULES.get(verb, f"{verb}.__main__"), argv)
    except SystemExit as e:  # after --help
        status = e.code or 0
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError as e:
        # As if SIGPIPE had ended it, which Python ignores
        status = 128 + 13 if streams.reader_is_gone() else last_resort.end(e)
    except Exception as e:
        status = last_resort.end(e)
    lost = streams.close()
    if lost is not None:
        last_resort.say(f"error: stdout cannot be written: {last_resort.explain(lost)}")
        status = status or 1
    return status


def wants_triton(verb, argv):
    """Whether a verb may run Triton's kernels on this machine."""
    if verb in WITHOUT_TRITON:
        return False
    asked = "--kernels" in argv or "TRITON_INTERPRET" in os.environ
    return verb not in TRAINS or asked or may_have_gpu()


def may_have_gpu():
    """Whether there is a sign of NVIDIA's driver, which containers may have without nvidia-smi."""
    return any(map(os.path.exists, DRIVER)) or shutil.which("nvidia-smi") is not None


def run(module, argv):
    """Import a module and call its main(argv)."""
    # Imports take seconds, in which a Ctrl-C would come out of anywhere. There is nothing to save
    # yet: it ends the process as it ends any other. Under nohup and the like it is ignored.
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # What is imported stays, so looking for garbage among it is in vain, and takes 0.2 s
    gc.disable()
    try:
        program = importlib.import_module(module)
    finally:
        gc.enable()
        gc.freeze()
        signal.signal(signal.SIGINT, interrupt)
    return program.main(argv)


def on_all_gpus(argv):
    """Train in a process for each GPU, all of them started before one has imported PyTorch.
    Returns the exit status; None where this process is one of them, or enough."""
    workers = importlib.import_module("runtime.workers")
    return workers.start_on_all_gpus(os.path.join(ROOT, "train_gpt.py"), argv)


# Turns that a thread waits for others before it sleeps. The more, the fewer sleep between two small
# operations; the fewer, the less a second program loses: on two cores of an Intel Xeon a step of
# laptop takes 60, 51 and 44 ms with 1,000, 5,000 and 20,000, two of them at a time 82, 105 and
# 172 ms
SPINS = "5000"


def do_not_spin():
    """Have threads that wait for others sleep soon, which leaves the cores to other programs.

    OpenMP reads this once, when PyTorch is loaded. What the user has set stays.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = SPINS


def use_large_pages():
    """Have PyTorch ask Linux for pages of 2 MB where tensors on a CPU have so much: a training step
    gets 0.8 GB of them, and takes 0.85 of its time.

    PyTorch reads this with its first tensor. What the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def end_at_once(ended):
    """End the process when all that waits for its end has been called, with the exit status in
    `ended`: Python would forget one module after the other, 0.4 s with PyTorch among them."""
    if ended and isinstance(ended[0], int):
        streams.close()
        os._exit(ended[0])


if __name__ == "__main__":
    ended = []
    atexit.register(end_at_once, ended)  # the first is called last
    ended.append(main(sys.argv[1:]))
    sys.exit(ended[0])
