"""The model card: what a stranger should know of exported weights."""

import dataclasses
import shlex
from pathlib import Path

from data import sources
from data.config import DataConfig
from optim import OptimConfig
from records.add import PATHS
from records.metrics import METRICS
from records.read import read_json
from runtime.guard import GuardConfig
from runtime.machine import PrecisionConfig
from runtime.options import RunConfig
from runtime.policy import PolicyConfig
from runtime.preferences import TeachingConfig
from runtime.saved import template_config
from tracks import load_track, track_names

# Of what our own sources fetch or find
LICENCES = dict(stdlib="PSF-2.0", fineweb10B="ODC-By-1.0")
# Options of a machine or of a command, which say nothing of the model
APART = {*PATHS, "resume", "gpus", "micro_tokens", "recompute", "kernels", "compile", "repeat"}
APART |= {"checkpoint_every", "keep_last", "keep_best", "max_restarts", "sample_prompts", "earlier"}


def model_card(exported, config, licence=None, gguf=None):
    """README.md of an export. config: Hugging Face's; licence: of the weights, as the Hub names
    it; gguf: the name of the file, where it is one."""
    model = exported.model
    fields = model.fields
    library = "llama.cpp" if gguf else "transformers"
    head = ["---", f"library_name: {library}", "pipeline_tag: text-generation"]
    head += [f"license: {licence}"] if licence else []
    head += ["tags:", "- stopwatch", "---", ""]

    n = sum(t.numel() for t in exported.tensors.values())
    began = "the weights of another model" if fields.get("warm_start") else "random weights"
    body = [
        f"# {model.run.absolute().name}",
        "",
        f"A language model of {n:,} parameters ({config['architectures'][0]}), trained by "
        f"Stopwatch from {began}.",
        "It continues text. It has not been tested for any use, and what it says may be false.",
        "",
        "## Data and licence",
        "",
        *about_data(model),
        f"- Licence of the weights: {licence or 'none was named; ask whoever published them'}",
        "",
        "## Loss",
        "",
        *about_loss(model),
        "",
        "## Use",
        "",
        *(use_of_gguf(gguf) if gguf else use_of_folder(config)),
        "",
        f"Every text begins with `<|endoftext|>`, which the tokenizer adds. The context is "
        f"{model.max_len} tokens.",
        "",
        "## Command",
        "",
        "```",
        command(model),
        "```",
        "",
        f"Stopwatch at commit {model.commit}." if model.commit else "",
    ]
    return "\n".join([*head, *body]).rstrip() + "\n"


def use_of_folder(config):
    trust = ", trust_remote_code=True" if "auto_map" in config else ""
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # where this file is, or the name on the Hub',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
        "```",
    ]


def use_of_gguf(file):
    return ["```", f'llama-cli -m {file} -p "Once upon a time" -n 50', "```"]


def about_data(model):
    name = str(model.fields.get("data"))
    about = "documents that ./run.sh data build has put together"
    licences = read_json(model.run / "data.json").get("licences") or {name: LICENCES.get(name)}
    if name in sources.names():
        about = sources.find(name).about
    lines = [f"- Data: `{Path(name).name}`, {about}; fingerprint `{model.data}`"]
    for part, licence in licences.items():
        of_part = f" `{part}`" if len(licences) > 1 else " the data"
        lines.append(f"- Licence of{of_part}: {licence or 'not known to the program'}")
    if model.result.get("tokens"):
        lines.append(f"- Tokens seen in training: {model.result['tokens']:,}")
    lines.append(f"- Tokenizer: `{Path(str(model.fields.get('tokenizer'))).name}`")
    return lines


def about_loss(model):
    found = [
        f"- `{name}`: {model.result[name]:.4f}"
        for name in METRICS
        if isinstance(model.result.get(name), float)
    ]
    if not found:
        found = ["- not measured: these are weights of a checkpoint"]
    return [*found, f"- after step {model.step} of {model.fields.get('steps')}"]


def command(model):
    """The command line that trains such a model: the track, and what differs from its values."""
    fields = model.fields
    track = fields.get("track")
    values = load_track(track) if track in track_names() else {}
    classes = (
        DataConfig,
        type(template_config(fields, fields.get("template"))),
        OptimConfig,
        GuardConfig,
        PrecisionConfig,
        TeachingConfig,
        PolicyConfig,
        RunConfig,
    )
    words = ["./run.sh"]
    defaults = {}
    if values:  # else the command line would put another track's in their place
        words += ["--track", track]
        defaults = {f.name: f.default for cls in classes for f in dataclasses.fields(cls)}
    for name, value in fields.items():
        if name in APART or name == "track" or value is None:
            continue
        expected = values.get(name, defaults.get(name))
        if as_words(value) != as_words(expected):
            words += option(name, Path(value).name if name in ("data", "tokenizer") else value)
    if fields.get("text"):
        words += ["--text", "FILE"]
    return shlex.join(words)


def as_words(value):
    return [*map(str, value)] if isinstance(value, list | tuple) else str(value)


def option(name, value):
    """The words of one option."""
    dashed = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [dashed if value else f"--no-{dashed[2:]}"]
    return [dashed, *(as_words(value) if isinstance(value, list | tuple) else [str(value)])]
