"""The runs that loss predictions stand on: several sizes of one template, each on several token
counts, every one trained to the end of its own cool-down.

    ./run.sh plan ladder --template llama --minutes 10
    ./run.sh plan ladder --text novel.txt --corpus english

A run that is in the results is not repeated, so the command goes on where it was stopped, the
cheapest runs first. Results are a JSON line each in records/scaling/TEMPLATE-CORPUS.jsonl, which is
what records/scaling.py fits.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import train_gpt
from base import InputError, to_json
from base.command import Parser, given_path, refuse
from models import outline
from records.scaling import FOLDER
from runtime.steps import n_tokens

TOKENS = tuple(2**k for k in range(18, 22))  # 262,144 to 2,097,152
N_VOCAB = 4096
UNIT = 4096  # token counts are multiples of it

# (layers, width) with heads of 32: 0.1M to 4.2M weights in matrix products
SIZES = ((1, 32), (2, 64), (4, 128), (3, 192), (4, 256))

# What the sizes have in common, by template: the plain block, no part that only the speedrun has
SHAPES = dict(
    gpt=lambda layers, width: dict(
        n_layer=layers,
        n_embd=width,
        n_head=width // 32,
        value_embed_layers=(),
        short_window=(256,),
        long_window=(256,),
    ),
    llama=lambda layers, width: dict(
        n_layer=layers, n_embd=width, n_head=width // 32, head_dim=32, qk_norm=True
    ),
)

COMMON = dict(
    val_tokens=131_072,
    val_row_len=1024,
    target=None,
    adam_lr=0.016,  # 0.008 was worse by 0.06 bits per byte at the smallest size
    normuon=True,
    compile=False,
    checkpoint_every="off",
    eval_every=10**6,
    sample_tokens=0,
    tokenizer=f"bpe:{N_VOCAB}",
)


def configuration(template, size, tokens, data):
    """A trainer's Config of one run. data: {option: value} that says which text."""
    fields = COMMON | SHAPES[template](*size) | data
    batch = UNIT if tokens > 2**19 else UNIT // 2  # short runs need their steps
    return train_gpt.configure(
        template=template, batch_tokens=(batch,), steps=tokens // batch, **fields
    )


def flops_of(config, n_vocab):
    """Training FLOPs per token, the mean over a run."""
    model = outline(config, n_vocab)
    flops = 0
    tokens = 0
    for stage in train_gpt.stages_of(config).values():
        flops += n_tokens(config, stage) * model.flops_per_token(stage.model)
        tokens += n_tokens(config, stage)
    return flops / tokens


def train(template, size, tokens, data, corpus):
    """Train one run; returns its line of the results."""
    config = configuration(template, size, tokens, data)
    with tempfile.TemporaryDirectory() as folder:
        config = train_gpt.changed(config, run_dir=str(Path(folder, "run")))
        result = train_gpt.train(config)
        about = json.loads(Path(folder, "run", "data.json").read_text())
    return dict(
        template=template,
        corpus=corpus,
        size=list(size),
        tokens=result["tokens"],
        flops_per_token=flops_of(config, about["n_vocab"]),
        params=result["params"],
        n_vocab=about["n_vocab"],
        val_bpb=round(result["val_bpb"], 5),
        val_loss=round(result["val_loss"], 5),
        seed=result["seed"],
        data_fingerprint=result["data_fingerprint"],
        device=result["device"],
        train_time_s=result["train_time_s"],
    )


def cost(run):
    """About the products of a run, (size, tokens): of its blocks, and of the head."""
    (layers, width), tokens = run
    return tokens * (12 * layers * width**2 + N_VOCAB * width)


def done(path):
    """{(size, tokens)} of the runs that are in a file of results."""
    if not path.exists():
        return set()
    runs = [json.loads(line) for line in path.read_text().splitlines()]
    return {(tuple(run["size"]), run["tokens"]) for run in runs}


def main(argv=None):
    """Train what is missing. Returns the exit status."""
    parser = Parser(
        prog="./run.sh plan ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--template", default="gpt", choices=sorted(SHAPES))
    parser.add_argument("--corpus", default="stdlib", help="what the results call the text")
    parser.add_argument("--text", type=given_path, help="a file or folder; else Python's library")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no run after that")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--to", type=given_path, default=FOLDER, help="folder of the results")
    try:
        args = parser.parse_args(argv)
        if any(n < UNIT or n % UNIT for n in args.tokens):
            listed = " ".join(map(str, args.tokens))
            raise InputError(f"--tokens {listed}: expected multiples of {UNIT}")
        data = dict(data="text", text=str(args.text)) if args.text else dict(data="stdlib")
        path = args.to / f"{args.template}-{args.corpus}.jsonl"
        runs = [(size, tokens) for size in SIZES for tokens in args.tokens]
        runs.sort(key=cost)
        begin = time.monotonic()
        for size, tokens in runs:
            if time.monotonic() - begin > 60 * args.minutes:
                break
            if (size, tokens) not in done(path):
                line = to_json(train(args.template, size, tokens, data, args.corpus))
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as f:
                    f.write(line + "\n")
                print(line, file=sys.stderr, flush=True)
    except InputError as e:
        return refuse(e)
    return 0
