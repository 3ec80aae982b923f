"""How fast: kernels, training steps, start-up, and this trainer beside others.

The result is one JSON object on stdout, progress goes to stderr. Options of training that a
benchmark takes are those of ./run.sh train --help. docs/benchmarks.md says what was measured.
"""

# A benchmark is a module here with run(**options) -> dict, render(result) -> its Markdown,
# and where it needs them:
#     add_arguments(parser)   its own options, named like run's arguments
#     unavailable() -> str    why it cannot run on this machine, or None
# run may take save, a function to give the result to as it grows, so that a run cut short leaves
# what it had; previous, what --json FILE holds already, to go on from; and trainer_options, the
# options that are not the benchmark's own. Bad input is an InputError.

import functools
import importlib
import inspect
import json
import sys
import tempfile
from pathlib import Path

from base import InputError, one_line, streams
from base.command import refuse
from base.files import write_text
from benchmarks.options import Parser
from benchmarks.report import say

BENCHMARKS = {
    "kernels": "every op beside its alternatives, on a CUDA GPU",
    "loader": "the loader's tokens/s on one core",
    "resources": "registers and shared memory of every kernel on every chip, without a GPU",
    "trainer": "the trainer's step, stage by stage, and where its time goes",
    "start": "the whole process and its parts, with empty caches and again",
    "gpu-day": "all that wants a look when a GPU can be had, in ten minutes, part by part",
    "cluster": "time to target on a cluster that is not here, computed from measured numbers",
    "peers": "nanoGPT, nanochat, minimind or modded-nanogpt beside this trainer, whole processes",
    "parity": "this trainer's recipe beside the public record's own code, at equal steps",
    "ablate": "what each piece of the recipe is worth, in loss and in time",
    "inference": "prefill and decode by batch and context, beside the memory's floor and others",
    "serving": "a server's tokens/s for many clients at once, beside one after another",
    "dedup": "finding near duplicates, beside datatrove, rensa and datasketch",
    "tokenizer": "learning a vocabulary and encoding, beside tokenizers, rustbpe and tiktoken",
    "teaching": "SFT and GRPO beside trl's, and SFT beside nanochat's",
    "checkpoint": "what writing and loading a checkpoint costs, and what it costs training",
}
# in `all`: 8 minutes, nothing downloaded; kernels last, since one may leave the GPU unusable
ALL = ("trainer", "loader", "resources", "kernels")
OPTIONS = dict(trainer=dict(synthetic_data=True))


def module_of(name):
    return importlib.import_module(f"benchmarks.{name.replace('-', '_')}")


def takes(name):
    """The arguments of a benchmark's run()."""
    return inspect.signature(module_of(name).run).parameters


def unavailable(name):
    """Why a benchmark cannot run on this machine, or None."""
    return getattr(module_of(name), "unavailable", lambda: None)()


def load(name, path):
    """The result of this benchmark in a file, None if there is no such file. Raises InputError
    for anything else."""
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise InputError(f"--json {path}: {e.strerror}; give another file") from None
    except (ValueError, RecursionError):
        raise InputError(f"--json {path}: not JSON; give another file") from None
    if not isinstance(result, dict) or result.get("benchmark") != name:
        raise InputError(
            f"--json {path}: holds something else than a result of {name}; give another file"
        )
    return result


def head_of(name):
    """What every result begins with: the benchmark's name and where it was measured."""
    import torch

    from runtime.environment import describe_environment

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict(benchmark=name, environment=describe_environment(device))


def run(name, save, **options):
    """Run one benchmark; returns its result with what it was measured on. save gets it as it
    grows."""
    head = head_of(name)
    if "save" in takes(name):
        options["save"] = lambda result: save(head | result)
    return head | module_of(name).run(**options)


def run_all(save):
    """Of ALL what this machine can run; what fails is one line."""
    result = head_of("all") | dict(results={})

    def keep(name, part):
        result["results"][name] = part
        save(result)

    for name in ALL:
        try:
            reason = unavailable(name)
            if reason:
                keep(name, dict(skipped=reason))
                continue
            say(f"--- {name}")
            options = OPTIONS.get(name, {})
            keep(name, run(name, functools.partial(keep, name), **options))
        except (Exception, SystemExit) as e:
            error = f"{type(e).__name__}: {one_line(e)}"[:240]
            say(f"{name}: {error}")
            keep(name, dict(error=error))
    return result


def render(result):
    """Markdown of a result, of each result in one of `all`."""
    if result["benchmark"] != "all":
        return module_of(result["benchmark"]).render(result)
    parts = []
    for name, r in result["results"].items():
        line = r.get("error") or r.get("skipped")
        parts.append(f"# {name}\n\n{line}\n" if line else render(r))
    return "\n".join(parts)


def parse(argv):
    """(benchmark, --json, --table, {option of run(): value}, the trainer's options) of a command
    line. Only the benchmark that argv names has its options, since importing all of them would
    take seconds. Raises InputError."""
    parser = Parser(prog="./run.sh benchmarks", description=__doc__)
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    everything = f"those of {', '.join(ALL)} that this machine can run, in one JSON"
    chosen = next((arg for arg in argv if not arg.startswith("-")), None)
    for name, about in dict(BENCHMARKS, all=everything).items():
        module = module_of(name) if name == chosen and name != "all" else None
        sub = names.add_parser(name, help=about, description=module.__doc__ if module else about)
        sub.option("--json", Path, None, "FILE", "write the result here instead of stdout")
        sub.option("--table", Path, None, "FILE.md", "write the result as Markdown, too")
        if hasattr(module, "add_arguments"):
            module.add_arguments(sub)
    options, rest = parser.parse_known_args(argv)
    options = vars(options)
    name = options.pop("name")
    json_file = options.pop("json")
    table = options.pop("table")
    if rest and (name == "all" or "trainer_options" not in takes(name)):
        raise InputError(f"unrecognized arguments: {' '.join(rest)}")
    return name, json_file, table, options, rest


def main(argv=None):
    """Parse, run the benchmark, write its result. Returns the exit status."""
    json_file = None

    def write(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)

    def save(result):
        if json_file:
            write(json_file, json.dumps(result, indent=1) + "\n")
        if table:
            write(table, render(result))

    try:
        name, json_file, table, options, rest = parse(sys.argv[1:] if argv is None else argv)
        if name == "all":
            result = run_all(save)
        else:
            reason = unavailable(name)
            if reason:
                raise InputError(reason)
            if rest:
                options["trainer_options"] = rest
            if json_file and "previous" in takes(name):
                options["previous"] = load(name, json_file)
            result = run(name, save, **options)
        save(result)
    except InputError as e:
        return refuse(e)
    except KeyboardInterrupt:
        kept = f"; {json_file} has what was measured" if json_file and json_file.exists() else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    if json_file:
        return 0
    why = streams.put(json.dumps(result, indent=1))
    if why is None:
        return 0
    # What took minutes to measure is worth a file
    kept = Path(tempfile.mkdtemp(prefix=f"{name}-"), "result.json")
    write(kept, json.dumps(result, indent=1) + "\n")
    say(f"note: the result cannot be written to stdout ({why}); it is in {kept}")
    return 1


if __name__ == "__main__":  # as torchrun starts it
    import door

    sys.exit(door.main(["benchmarks", *sys.argv[1:]]))
