"""./run.sh export: trained weights for other programs.

A form is a module with check(exported, args), n_bytes(exported, args) and write(exported, path,
args): hf.py, gguf.py, torchtitan.py. What they are given is read by source.py.
"""

import argparse
import importlib
import os
import shutil

from safetensors import SafetensorError

from base import InputError, whole_file
from base.command import Parser, given_path, refuse
from base.files import sweep
from runtime.saved import newest_run

from . import source

FORMS = ("hf", "gguf", "torchtitan")
DESCRIPTION = """\
Writes the model of a run for other programs: the newest finished run, or the one that is named.

  hf          a folder for transformers, vLLM and the Hugging Face Hub
  gguf        one file for llama.cpp and what is built on it
  torchtitan  a folder from which torchtitan trains on

Nothing that is written is a pickle. docs/export.md has an example of each."""
EXAMPLES = """\
examples:
  ./run.sh export --to hf exported
  ./run.sh export --run runs/a --to gguf --type q8_0 model.gguf
  ./run.sh export --run runs/a --step 1000 --to torchtitan handed-over
  HF_TOKEN=... ./run.sh export --to hf exported --push me/my-model"""


def parse(argv):
    parser = Parser(
        prog="./run.sh export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    parser.add_argument("out", type=given_path, metavar="OUT", help="what to make; not there yet")
    parser.add_argument("--to", required=True, choices=FORMS, help="the form")
    parser.add_argument(
        "--run",
        type=given_path,
        metavar="RUN",
        help="folder of a finished run, or of a checkpoint [the newest in runs/]",
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="take the weights that --snapshots or a checkpoint kept after this step",
    )
    parser.add_argument(
        "--type", metavar="TYPE", help="of a GGUF's numbers: f32, f16, q8_0 or q4_0 [f16]"
    )
    parser.add_argument(
        "--tokenizer",
        type=given_path,
        metavar="FILE",
        help="tokenizer.json of a run with the same tokens, where the run itself has none",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="the run's template, where it is a module from outside models/: a folder does not say "
        "by itself what is imported",
    )
    parser.add_argument(
        "--licence", metavar="NAME", help="of the weights, for the model card, such as apache-2.0"
    )
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="then send it to the Hugging Face Hub as USER/NAME, private; the token is HF_TOKEN's",
    )
    parser.add_argument(
        "--public",
        metavar="NAME",
        help="make it public: the same name a second time, so that nothing is published by mistake",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, export. Returns the exit status."""
    try:
        return run(parse(argv))
    except InputError as e:
        return refuse(e)


def run(args):
    """Export, print where. Returns 0; raises InputError, and then nothing is left behind."""
    form = importlib.import_module(f".{args.to}", __package__)
    if args.type and args.to != "gguf":
        raise InputError(f"--type {args.type}: is for --to gguf, and this is --to {args.to}")
    if args.licence and args.to == "torchtitan":
        raise InputError("--licence: is for the model card, which --to torchtitan has none of")
    if os.path.lexists(args.out):
        raise InputError(f"{args.out}: is there already; choose a name that is not")
    hub = None
    if args.push or args.public:
        from .hub import Hub  # of what only pushing needs

        hub = Hub(args)
    exported = source.open_source(
        args.run or newest_run(), args.step, args.template, args.tokenizer
    )
    form.check(exported, args)
    write(form, exported, args)
    print(args.out, flush=True)
    if hub:
        print(hub.push(exported))
    return 0


def write(form, exported, args):
    """Write OUT, whole or not at all. Raises InputError."""
    out = args.out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent)
        with whole_file(out) as aside:
            need = form.n_bytes(exported, args)
            free = shutil.disk_usage(aside.parent).free
            if need > free:
                raise InputError(
                    f"{out}: {need / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free"
                )
            form.write(exported, aside, args)
            if aside.is_dir():
                for path in aside.iterdir():  # safetensors' files are for their owner alone
                    shutil.copymode(aside / "config.json", path)
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"{out}: cannot be written: {source.reason(e)}; nothing is left there"
        ) from None
