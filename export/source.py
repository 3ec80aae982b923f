"""What is exported: the weights of a run, or the fp32 masters of one of its checkpoints."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError, one_line
from base.options import progress_of
from data import Tokenizer, sources
from records.read import read_json
from runtime.saved import snapshot_steps, step_weights, template_config

EMBEDDING = "model.embed_tokens.weight"  # what every template calls its tokens' embedding


class Model(NamedTuple):
    """What a run or a checkpoint says about itself."""

    source: Path  # the folder that was read
    run: Path  # that of the run
    tensors: dict  # parameter name -> CPU tensor
    fields: dict  # the run's options
    step: int | None  # after which the weights were such
    result: dict  # of the run, {} of a checkpoint
    data: str | None  # fingerprint
    n_vocab: int | None
    commit: str | None
    masters: bool  # whether these are the fp32 masters

    @property
    def progress(self):
        """Of the schedule, from 0 to 1, when the weights were such."""
        if not self.step:
            return 0.0
        added = self.fields.get("extension", 0), self.fields.get("earlier", ())
        return progress_of(self.step, self.fields["steps"], *added)

    @property
    def max_len(self):
        """Tokens in the longest row, of training or of validation."""
        return max(self.fields["row_len"], self.fields["val_row_len"])


class Exported(NamedTuple):
    """The same under the names that others know."""

    model: Model
    template: object  # the template's Config
    config: dict  # Hugging Face's words for the configuration
    tensors: dict  # name -> CPU tensor, a matrix for each layer
    tokenizer: Tokenizer | None
    tokenizer_json: dict | None  # its file


def open_source(run, step=None, template=None, tokenizer=None):
    """The Exported of a run's or a checkpoint's folder. Raises InputError.

    step: of weights that --snapshots kept, or of a checkpoint; template: a module that may be
    imported besides those in models/; tokenizer: a file instead of the run's own.
    """
    model = load_step(run, step) if step is not None else load_model(run)
    source = model.source
    file = tokenizer or find_tokenizer(model.run)
    text = None
    if file:
        try:
            text = Path(file).read_bytes()
        except OSError as e:
            raise InputError(f"{file}: {reason(e)}; expected a run's tokenizer.json") from None
    read = Tokenizer.from_json(text, file) if file else None
    try:
        config = template_config(model.fields, template)
        tensors = unstack(model.tensors, config)
        about = config.hf_config(model.progress)
        [name] = [name for name, field in config.hf_names().items() if field == EMBEDDING]
        embed = model.tensors[name]
        n_vocab = vocabulary(model, read)
        about |= dict(
            torch_dtype=str(embed.dtype).removeprefix("torch."),
            vocab_size=len(embed),
            bos_token_id=read.eot if read else n_vocab and n_vocab - 1,
            max_position_embeddings=model.max_len,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise InputError(
            f"{source}: not the weights and the configuration of a run of train_gpt.py ({e!r})"
        ) from None
    if read and not n_vocab <= len(embed) < n_vocab + 64:
        raise InputError(
            f"{file}: has {n_vocab} tokens, where {source} has embeddings of {len(embed)}; "
            "expected the tokenizer that the run was trained with"
        )
    model = model._replace(n_vocab=n_vocab)
    parsed = read_json(Path(file)) if file else None
    return Exported(model, config, about, tensors, read, parsed)


def load_step(run, step):
    """The Model of a run after a step, the last one or not. Raises InputError."""
    file = run / step_weights(step)
    if file.exists():
        said = read_json(run / "config.json")
        return described(run, run, read_weights(file), said, step)
    checkpoint = run / "checkpoints" / f"step-{step:06d}"
    if (checkpoint / "state.json").exists():
        return load_model(checkpoint)
    kept = {int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*[0-9]/state.json")}
    steps = " ".join(map(str, sorted(kept | {*snapshot_steps(run)})))
    expected = f"one of {steps}" if steps else "a run with checkpoints, or of --snapshots N"
    raise InputError(f"{run}: no weights of step {step}: expected {expected}")


def read_weights(file):
    """{parameter: tensor} of a file. Raises InputError."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{file}: cannot be read: {reason(e)}") from None


def load_model(source):
    """The Model in a run's or a checkpoint's folder. Raises InputError."""
    checkpoint = (source / "state.json").exists()
    if not checkpoint and not (source / "model.safetensors").exists():
        inside = sorted(source.glob("checkpoints/step-*[0-9]/state.json"))
        hint = ""
        if inside:
            hint = f"; its last checkpoint is --step {int(inside[-1].parent.name[5:])}"
        raise InputError(
            f"{source}: has no model.safetensors; expected a finished run or a checkpoint{hint}"
        )
    if not checkpoint:
        result = read_json(source / "result.json")
        step = result.get("best_step", result.get("steps"))
        said = read_json(source / "config.json")
        tensors = read_weights(source / "model.safetensors")
        return described(source, source, tensors, said, step, result)

    from runtime.checkpoints import load  # compares checksums

    run = source.absolute().parent.parent
    try:
        stored, meta = load(source)
    except ValueError as e:
        raise InputError(str(e)) from None
    tensors = {}
    for name, tensor in stored.items():
        if name.startswith("weights/"):
            tensors[name.removeprefix("weights/")] = tensor
    said = read_json(run / "config.json")
    said |= dict(config=meta.get("config"), data=meta.get("data_fingerprint"))
    step = read_json(source / "state.json")["step"]
    return described(source, run, tensors, said, step, masters=True)


def described(source, run, tensors, said, step, result=None, masters=False):
    """The Model of these weights; said: the run's config.json. Raises InputError."""
    if not isinstance(said.get("config"), dict) or not tensors:
        raise InputError(
            f"{source}: expected weights and the run's configuration, found only one of them"
        )
    environment = said.get("environment")
    commit = environment.get("git_commit") if isinstance(environment, dict) else None
    return Model(
        source=source,
        run=run,
        tensors=tensors,
        fields=said["config"],
        step=step,
        result=result or {},
        data=said.get("data"),
        n_vocab=said.get("n_vocab"),
        commit=commit,
        masters=masters,
    )


def unstack(tensors, config):
    """{exported name: view} of every element of the parameters; config: the template's.

    Raises InputError where a bank does not have the matrices that the configuration promises:
    names would be wrong.
    """
    elsewhere = config.hf_names()
    out = {}
    for name, tensor in tensors.items():
        if not tensor.numel():  # a part that is switched off
            continue
        names = elsewhere.get(name, name)
        parts = tensor
        if isinstance(names, str):
            names = [names]
            parts = [tensor]
        if len(names) != len(parts):
            raise InputError(
                f"{name} has {len(parts)} matrices, expected {len(names)} by the configuration: "
                f"{', '.join(names)}"
            )
        for matrix, part in zip(names, parts):
            out[matrix.removesuffix(".T")] = part.T if matrix.endswith(".T") else part
    elements = sum(t.numel() for t in tensors.values())
    assert sum(t.numel() for t in out.values()) == elements, "two of one name"
    return out


# --------------------------------------------------------------------------------------------------
# The tokenizer


def vocabulary(model, tokenizer):
    """How many tokens there are, without the rows that pad the table; None if nothing says."""
    if tokenizer:
        return tokenizer.n_vocab
    return model.n_vocab or (50257 if uses_gpt2(model.fields) else None)


def uses_gpt2(fields):
    """Whether a run's tokens are GPT-2's: its source says so, or its --tokenizer."""
    source = fields.get("data")
    own = ""
    # Of this program's sources only: a folder from elsewhere must not name a module to import
    if source in sources.names():
        own = sources.find(source).tokenizer
    return (own or fields.get("tokenizer")) == "gpt2"


def find_tokenizer(run):
    """The tokenizer.json of a run; None if it has none."""
    file = run / "tokenizer.json"
    return file if file.exists() else None


def reason(e):
    """What an error says, in one line."""
    return getattr(e, "strerror", None) or one_line(e)
