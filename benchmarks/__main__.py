"""Benchmarks, by name: `python -m benchmarks NAME --help`. The result is one JSON object, progress
goes to stderr.

A benchmark is a module here with run(**options) -> dict, and where it needs them:
    add_arguments(parser)   its own options, named like run's arguments
    render(result) -> str   the result in Markdown, for --table
    unavailable() -> str    why it cannot run on this machine, or None
run may take save, a function to give the result to as it grows, so that a run cut short leaves what
it had;
previous, what --json FILE holds already, to go on from; and trainer_options, the options that are
not the benchmark's
own. Bad input is an InputError.
"""

import argparse
import importlib
import inspect
import json
import os
import sys
from pathlib import Path

import torch

from base import InputError
from runtime.environment import describe_environment

BENCHMARKS = {
    "kernels": "every op beside its alternatives, on a CUDA GPU",
    "loader": "the loader's tokens/s on one core",
    "resources": "registers, spills and shared memory of every kernel on every chip, without a GPU",
    "trainer": "the trainer's step, stage by stage, and where its time goes",
    "start": "from the command to the end of the first step, cold and warm",
    "cluster": "time to target on a cluster that is not here, computed from measured numbers",
    "peers": "nanoGPT, nanochat or modded-nanogpt from their checkouts beside this trainer, on the same data",
    "ablate": "what each piece of the recipe is worth: loss at equal tokens, time per step, time to the target",
    "checkpoint": "what writing and loading a checkpoint costs, and what it costs training",
}
ALL = ("kernels", "trainer", "loader", "resources")
OPTIONS = dict(
    kernels=dict(seconds=180), trainer=dict(synthetic_data=True)
)  # in all: 8 minutes, nothing downloaded


def module_of(name):
    return importlib.import_module(f"benchmarks.{name}")


def write(path, text):
    """Aside, then renamed: nobody reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(path)


def load(name, path):
    """The result of this benchmark in a file, None if there is no such file. Raises InputError
    for anything else."""
    try:
        result = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(
            f"--json {path}: {getattr(e, 'strerror', None) or 'not JSON'}; give another file"
        ) from None
    if not isinstance(result, dict) or result.get("benchmark") != name:
        raise InputError(
            f"--json {path}: holds something else than a result of {name}; give another file"
        )
    return result


def run(name, save, **options):
    """Run one benchmark; returns its result with what it was measured on. save gets it as it
    grows."""
    module = module_of(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = dict(benchmark=name, environment=describe_environment(device))
    if "save" in inspect.signature(module.run).parameters:
        options["save"] = lambda result: save(head | result)
    return head | module.run(**options)


def run_all(save):
    """Of ALL what this machine can run; what fails is one line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = dict(benchmark="all", environment=describe_environment(device), results={})
    for name in ALL:
        try:
            reason = getattr(module_of(name), "unavailable", lambda: None)()
            if reason:
                result["results"][name] = dict(skipped=reason)
            else:
                print(f"--- {name}", file=sys.stderr)
                result["results"][name] = run(
                    name,
                    lambda r: save(result | dict(results=result["results"] | {name: r})),
                    **OPTIONS.get(name, {}),
                )
        except (Exception, SystemExit) as e:
            result["results"][name] = dict(
                error=f"{type(e).__name__}: {' '.join(str(e).split())}"[:240]
            )
            print(f"{name}: {result['results'][name]['error']}", file=sys.stderr)
        save(result)
    return result


def render(result):
    """Markdown of a result, of each result in one of `all`."""
    if result["benchmark"] != "all":
        return module_of(result["benchmark"]).render(result)
    parts = []
    for name, r in result["results"].items():
        if "error" in r or "skipped" in r or not hasattr(module_of(name), "render"):
            line = r.get("error") or r.get("skipped")
            parts.append(f"# {name}\n\n{line or 'see the JSON'}\n")
        else:
            parts.append(render(r))
    return "\n".join(parts)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    everything = f"those of {', '.join(ALL)} that this machine can run, in one JSON"
    for name, about in dict(BENCHMARKS, all=everything).items():
        chosen = name == next((a for a in argv if not a.startswith("-")), None)
        module = (
            module_of(name) if chosen and name != "all" else None
        )  # importing all of them would take seconds
        sub = names.add_parser(
            name,
            help=about,
            description=getattr(module, "__doc__", about),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument(
            "--json", type=Path, metavar="FILE", help="write the result here instead of stdout"
        )
        if name == "all" or hasattr(module, "render"):
            sub.add_argument(
                "--table", type=Path, metavar="FILE.md", help="write the result as Markdown, too"
            )
        getattr(module, "add_arguments", lambda sub: None)(sub)
    options, rest = parser.parse_known_args(argv)
    options = vars(options)
    name, json_file, table = options.pop("name"), options.pop("json"), options.pop("table", None)

    def save(result):
        if json_file:
            write(json_file, json.dumps(result, indent=1) + "\n")
        if table:
            write(table, render(result))

    takes = inspect.signature(module_of(name).run).parameters if name != "all" else ()
    if rest and "trainer_options" not in takes:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if name == "all":
        result = run_all(save)
    else:
        if reason := getattr(module_of(name), "unavailable", lambda: None)():
            print(f"error: {reason}", file=sys.stderr)
            return 2
        try:
            more = dict(trainer_options=rest) if rest else {}
            if json_file and "previous" in takes:
                more["previous"] = load(name, json_file)
            result = run(name, save, **options, **more)
        except InputError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            kept = (
                f"; {json_file} has what was measured" if json_file and json_file.exists() else ""
            )
            print(f"interrupted{kept}", file=sys.stderr)
            return 130
    save(result)
    if not json_file:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
