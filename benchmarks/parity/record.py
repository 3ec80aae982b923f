"""The record's own code, from a user's checkout, on a CPU and scaled down.

Its script is run as it is, statement by statement, with other modules in place of those that need
CUDA (stand_ins.py). Where it names a constant that the smaller shape or the tokens change, that is
set right after its statement: CONSTANTS below says which. Its warm-up of compiled kernels is left
out. A script in which one of these names is missing is refused.
"""

import ast
import builtins
import contextlib
import functools
import inspect
import math
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from base import InputError

from . import stand_ins

OLDEST = "2c702746"  # record #80: Muon by head pair
OLDEST_DATE = "2026-04-08"
NEWEST = "f411b3d3"  # record #89, the newest that has been read
NEEDED = "train_gpt.py", "triton_kernels.py"
OPTIONAL = ("dc_triton_kernels.py",)
ADVICE = f"give a checkout of github.com/KellerJordan/modded-nanogpt at {OLDEST} (#80) or later"

SCRIPT = "<the record's train_gpt.py>"  # in tracebacks

# What its script says of the shape; another is refused, since its scaling would be a guess
VOCABULARY = 50257
PADDED = 50304
END_OF_TEXT = 50256
LAYERS = 11
HEADS = 6
HEAD_DIM = 128
WIDTH = 768
RANKS = 8
BLOCK = 128  # tokens in a unit of windows
STEPS = 1285  # that its momentum's warm-up and cooldown were made for


class Shape(NamedTuple):
    """What both sides have, as far as it is smaller than the record's."""

    width: int
    n_vocab: int
    eot: int
    shrink: int  # rows, documents and windows are shorter by this factor
    rows: int  # of a step, where the record has one for each of 8 GPUs
    steps: int
    extension: int  # the last so many of them
    eval_every: int
    val_tokens: int
    val_row_len: int

    @property
    def head_dim(self):
        return self.width // HEADS

    def tokens(self, full):
        """Of a step that has so many in full."""
        return full * self.rows // (RANKS * self.shrink)


# --- the checkout


def git(folder, *command):
    """Its output, None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *command], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


class Checkout(NamedTuple):
    """A commit of the record: its sources by name."""

    commit: str
    sources: dict

    @classmethod
    def read(cls, folder, commit=None, oldest=OLDEST):
        """Raises InputError for anything but a commit that parity can run."""
        folder = Path(folder).expanduser()
        where = f"--modded {folder}"
        if not folder.is_dir():
            raise InputError(f"{where}: no such folder; {ADVICE}")
        if git(folder, "rev-parse", "--git-dir") is None:
            raise InputError(f"{where}: no git repository, so its version is not known; {ADVICE}")
        name = commit or "HEAD"
        found = git(folder, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        if found is None:
            raise InputError(f"--commit {name}: not in {folder}; expected one of its commits")
        found = found.strip()
        short = found[:8]
        shallow = (git(folder, "rev-parse", "--is-shallow-repository") or "").strip() == "true"
        date = git(folder, "show", "-s", "--format=%cs", found).strip()
        if git(folder, "merge-base", "--is-ancestor", oldest, found) is None:
            if not shallow or date < OLDEST_DATE:
                raise InputError(f"{where}: commit {short} of {date} is not known; {ADVICE}")
        sources = {}
        for file in (*NEEDED, *OPTIONAL):
            sources[file] = git(folder, "show", f"{found}:{file}")
        for file in NEEDED:
            if sources[file] is None:
                raise InputError(f"{where}: commit {short} has no {file}; {ADVICE}")
        checkout = cls(found, {file: text for file, text in sources.items() if text})
        checkout.check()
        return checkout

    @property
    def what(self):
        return f"--modded: train_gpt.py of commit {self.commit[:8]}"

    def statements(self):
        """The script's, without its warm-up. Raises InputError."""
        try:
            tree = ast.parse(self.sources["train_gpt.py"])
        except SyntaxError as e:
            raise InputError(f"{self.what}: line {e.lineno} is not Python; {ADVICE}") from None
        warm_up = [node for node in tree.body if is_warm_up(node)]
        if len(warm_up) != 1:
            raise InputError(f"{self.what} has no warm-up over warmup_steps; {ADVICE}")
        return [node for node in tree.body if node is not warm_up[0]]

    def check(self):
        """Raises InputError where what is changed for a smaller shape is not there."""
        bound = [name for node in self.statements() for name in names_of(node)]
        for name in CONSTANTS:
            if bound.count(name) != 1:
                times = "no" if name not in bound else f"{bound.count(name)} statements for"
                raise InputError(f"{self.what} has {times} {name}; {ADVICE}")


def is_warm_up(node):
    return (
        isinstance(node, ast.For)
        and isinstance(node.iter, ast.Name)
        and node.iter.id == "warmup_steps"
    )


def names_of(node):
    """What a statement defines or assigns."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


# --- what a smaller shape changes: each is a function of (what the script has, shape, data)


def expect(name, found, wanted):
    if found != wanted:
        raise InputError(f"--modded: its {name} is {found}, expected {wanted}; {ADVICE}")


def accumulation(found, shape, data):
    """Passes of a step, whose gradients add up with weights of 1 / passes: one for each of the 8
    ranks where there is one process."""
    expect("grad_accum_steps of one process", found, RANKS)
    return shape.rows


def end_of_text(found, shape, data):
    expect("BOS_ID", found, END_OF_TEXT)
    return shape.eot


class Places(dict):
    """Documents told apart in a row: as many as our short ones can be."""

    def get(self, tokens, default=None):
        return tokens // LEAST_DOCUMENT + 2


LEAST_DOCUMENT = 8  # tokens


def places(found, shape, data):
    return Places(found)


def hyperparameters(args, shape, data):
    """Files, steps, validation, and the rows of the bigram table, in proportion to the tokens."""
    changed = dict(
        train_files=str(Path(data, "train_*.bin")),
        val_files=str(Path(data, "val_*.bin")),
        val_tokens=shape.val_tokens,
        val_batch_size=shape.val_row_len * shape.rows,
        num_scheduled_iterations=shape.steps - shape.extension,
        num_extension_iterations=shape.extension,
        val_loss_every=shape.eval_every,
        save_checkpoint=False,
        run_evals=False,
    )
    for name in (*changed, "bigram_vocab_size"):
        if not hasattr(args, name):
            raise InputError(f"--modded: its Hyperparameters have no {name}; {ADVICE}")
    changed["bigram_vocab_size"] = args.bigram_vocab_size * shape.n_vocab // PADDED
    if hasattr(args, "bigram_dim"):
        changed["bigram_dim"] = args.bigram_dim * shape.width // WIDTH
    for name, value in changed.items():
        setattr(args, name, value)
    return args


def stages(found, shape, data):
    """Batches and documents; windows are counted in blocks, which become shorter."""
    for stage in found:
        stage.batch_size = shape.tokens(stage.batch_size)
        stage.train_max_seq_len //= shape.shrink
    return found


def momentum(function, shape, data):
    """Its warm-up and cooldown are numbers of steps."""
    known = dict(muon_warmup_steps=300, muon_cooldown_steps=50)
    found = inspect.signature(function).parameters
    for name, steps in known.items():
        default = found[name].default if name in found else None
        expect(f"{name} of get_muon_momentum", default, steps)
    scaled = {name: max(1, round(n * shape.steps / STEPS)) for name, n in known.items()}
    return functools.partial(function, **scaled)


def optimizer(kind, shape, data):
    if not hasattr(kind, "_cautious_wd_and_update_inplace"):
        raise InputError(
            f"--modded: NorMuonAndAdam has no _cautious_wd_and_update_inplace; {ADVICE}"
        )
    kind._cautious_wd_and_update_inplace = staticmethod(stand_ins.cautious_update)
    return kind


def rotary(kind, shape, data):
    """Its scale of attention is for heads of 128."""

    class Scaled(kind):
        def reset(self):
            super().reset()
            self.attn_scale *= math.sqrt(HEAD_DIM / shape.head_dim)

    return Scaled


def model(kind, shape, data):
    def build(**sizes):
        wanted = dict(
            vocab_size=VOCABULARY,
            num_layers=LAYERS,
            num_heads=HEADS,
            head_dim=HEAD_DIM,
            model_dim=WIDTH,
        )
        for name, size in wanted.items():
            expect(name, sizes.get(name), size)
        sizes |= dict(vocab_size=shape.n_vocab, head_dim=shape.head_dim, model_dim=shape.width)
        return kind(**sizes)

    return build


def manager(kind, shape, data):
    class Scaled(kind):
        def __init__(self, *args):
            super().__init__(*args)
            expect("block_size", self.block_size, BLOCK)
            self.block_size = BLOCK // shape.shrink

    return Scaled


def no_smi(function, shape, data):
    return lambda: ""


CONSTANTS = dict(
    grad_accum_steps=accumulation,
    BOS_ID=end_of_text,
    TRAIN_MAX_NUM_DOCS=places,
    args=hyperparameters,
    TRAINING_STAGES=stages,
    get_muon_momentum=momentum,
    NorMuonAndAdam=optimizer,
    Yarn=rotary,
    GPT=model,
    TrainingManager=manager,
    nvidia_smi=no_smi,
)


# --- a run


class Run:
    """The script in a namespace of its own; `points` are its validations: [(step, loss)]."""

    def __init__(self, checkout, shape, data, tokens, dc=False, progress=lambda step, loss: None):
        """data: folder with train_*.bin and val_*.bin; tokens: every id's bytes."""
        self.checkout = checkout
        self.shape = shape
        self.data = data
        self.progress = progress
        self.points = []
        found = stand_ins.modules(tokens, dc, shape.shrink)
        own = dict(
            vars(builtins),
            __import__=stand_ins.importer(found, builtins.__import__),
            print=self.print,
        )
        self.names = dict(__name__="__main__", __builtins__=own)

    def print(self, *words, file=None, **more):
        """Its lines go nowhere, but a validation's number is kept, with all of its digits."""
        text = " ".join(map(str, words))
        if file is None and text.startswith("step:") and " val_loss:" in text:
            step = self.names["step"]
            self.points.append((step, float(self.names["val_loss"])))
            self.progress(*self.points[-1])

    def execute(self, until=None, before=None):
        """All statements, or those up to where this name is defined (before: not that one
        itself). Raises InputError."""
        for node in self.checkout.statements():
            names = names_of(node)
            if before in names:
                return
            code = compile(ast.Module([node], []), SCRIPT, "exec")
            exec(code, self.names)
            for name in names:
                if name in CONSTANTS:
                    self.names[name] = CONSTANTS[name](self.names[name], self.shape, self.data)
            if until in names:
                return


@contextlib.contextmanager
def surroundings(sources, folder):
    """The script's sources, environment and modes, in a folder that it may write to."""
    for file, text in sources.items():
        Path(folder, file).write_text(text, encoding="utf-8")
    alone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DISABLE_FP8="1")
    before = dict(os.environ), os.getcwd(), sys.argv
    os.environ.update(alone)
    os.chdir(folder)
    sys.argv = [str(Path(folder, "train_gpt.py"))]
    try:
        with stand_ins.InFloat32():
            yield
    finally:
        os.chdir(before[1])
        sys.argv = before[2]
        for name in os.environ.keys() - before[0].keys():
            del os.environ[name]
        os.environ.update(before[0])


def train(checkout, shape, data, tokens, seed, folder, dc=False, progress=lambda step, loss: None):
    """[(step, validation loss)] of one run. Raises InputError, with its line where the script
    fails."""
    run = Run(checkout, shape, Path(data).absolute(), tokens, dc, progress)
    torch.manual_seed(seed)
    try:
        with surroundings(checkout.sources, folder):
            run.execute()
    except InputError:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == SCRIPT]
        at = f", line {lines[-1]}" if lines else ""
        said = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise InputError(f"{checkout.what}{at}: {said}; {ADVICE}") from e
    if not run.points or run.points[-1][0] != shape.steps:
        raise InputError(f"{checkout.what} ended without a validation at step {shape.steps}")
    return run.points
