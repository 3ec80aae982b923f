"""./run.sh sample: text from a run's model."""

import itertools
import time

from base import InputError, to_json
from base.command import given_path, refuse
from base.terminal import on_screen

from .engine import Request
from .options import (
    FIXED,
    FIXED_PROMPTS,
    check,
    fixed_prompts,
    is_text,
    make_parser,
    open_run,
    say,
)
from .sampling import default_sampling

BATCH = 32  # samples that are written together

DESCRIPTION = """\
Continues text with the model of a finished run: the newest one, or the one that is named. Without
a prompt it begins as the samples at the end of the run do. Text goes to stdout."""

EXAMPLES = """\
examples:
  ./run.sh sample --prompt "def " -n 300
  ./run.sh sample --prompt "class " --temperature 0.5 --stop $'\\nclass'
  ./run.sh sample --prompts prompts.txt --json > samples.jsonl
  ./run.sh sample --prompts fixed --temperature 0 -n 40"""


def parse(argv):
    parser = make_parser("sample", DESCRIPTION, EXAMPLES, tokens=200)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be given again"
    )
    parser.add_argument(
        "--prompts",
        type=given_path,
        metavar="FILE",
        help=f"a file with a prompt on each line; {FIXED}: those of {FIXED_PROMPTS.name}, the same "
        "for every run",
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="continuations of each prompt [1]"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each sample")
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, sample, print. Returns the exit status."""
    try:
        run(parse(argv))
    except InputError as e:
        return refuse(e)
    return 0


def run(args):
    """Print the samples that the options ask for. Raises InputError."""
    given = check(args)
    if args.samples < 1:
        raise InputError(f"--samples {args.samples}: expected a positive number")
    prompts = given_prompts(args)
    saved, engine = open_run(args)
    sampling = default_sampling(saved.tokenizer, **given)

    # Each continuation has a seed of its own
    completions = []
    for prompt in prompts or saved.options.get("sample_prompts") or [""]:
        for _ in range(args.samples):
            seed = args.seed + len(completions)
            request = Request(prompt, args.tokens, sampling, seed, tuple(args.stop))
            completions.append(engine.begin(request))
    for completion in completions:
        if completion.n_cut:
            say(
                f"note: the model looks back at {saved.max_len} tokens: the first "
                f"{completion.n_cut} of {completion.request.prompt[:20]!r}... are cut"
            )

    # One is shown while it is written, several when all of a batch are done
    start = time.perf_counter()
    if len(completions) == 1 and not args.json:
        show(engine, completions[0])
    else:
        for i in range(0, len(completions), BATCH):
            batch = completions[i : i + BATCH]
            for _ in engine.run(batch):
                pass
            for completion in batch:
                said = as_json(completion, saved) if args.json else as_block(completion)
                print(*on_screen([said]), sep="", flush=True)
    seconds = time.perf_counter() - start
    n = sum(completion.n_new for completion in completions)
    say(f"{saved.folder}: {n} tokens in {seconds:.2f} s, {n / seconds:.0f} a second")


def given_prompts(args):
    """The prompts of the command line and of its file. Raises InputError."""
    prompts = list(args.prompt or [])
    for prompt in prompts:
        if not is_text(prompt):
            raise InputError(f"--prompt {ascii(prompt)}: expected UTF-8")
    if not args.prompts:
        return prompts
    if str(args.prompts) == FIXED:
        return prompts + fixed_prompts()
    expected = "expected a text file with a prompt on each line"
    try:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"--prompts {args.prompts}: {reason}; {expected}") from None
    if not lines:
        raise InputError(f"--prompts {args.prompts}: is empty; {expected}")
    return prompts + lines


def show(engine, completion):
    """Print a prompt and its continuation as it is written."""
    written = (text for _, text in engine.run([completion]))
    for text in on_screen(itertools.chain([completion.request.prompt], written)):
        print(text, end="", flush=True)
    print()


def as_block(completion):
    return f"--- {completion.request.prompt!r}\n{completion.request.prompt}{completion.text}\n"


def as_json(completion, saved):
    request = completion.request
    return to_json(
        dict(
            prompt=request.prompt,
            text=completion.text,
            finish_reason=completion.finish_reason,
            tokens=completion.n_new,
            prompt_tokens_cut=completion.n_cut,
            seed=request.seed,
            run=str(saved.folder),
        )
    )
