"""nanochat's chat_sft on conversations of a file, for teaching.py, in a copy of its checkout.

    python teaching_nanochat.py prepare SPEC.json      a model as its base_train saves it, untrained
    python teaching_nanochat.py train SPEC.json OPTIONS   its chat_sft, with these options

SPEC: dict(data=a .jsonl file, tag, model=its GPTConfig's fields). Its tasks, which it would load
from the Hub, are the file; each pass's tokens, and those that count, are printed as a line.
"""

import json
import runpy
import sys
from pathlib import Path


def prepare(spec):
    import os

    import torch
    from nanochat.checkpoint_manager import save_checkpoint
    from nanochat.common import get_base_dir
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import get_tokenizer

    fields = spec["model"] | dict(vocab_size=get_tokenizer().get_vocab_size())
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(GPTConfig(**fields))
    model.to_empty(device="cpu")
    model.init_weights()
    folder = os.path.join(get_base_dir(), "base_checkpoints", spec["tag"])
    save_checkpoint(folder, 0, model.state_dict(), None, dict(model_config=fields, user_config={}))


def train(spec, options):
    import nanochat.tokenizer  # noqa: F401  its own functions that it compiles come first
    import tasks.gsm8k
    import tasks.mmlu
    import tasks.smoltalk
    import torch
    from tasks.common import Task

    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    conversations = [json.loads(line) for line in lines]

    def of(rows):
        class File(Task):
            def __init__(self, *args, **kwargs):
                super().__init__()

            def num_examples(self):
                return len(rows)

            def get_example(self, index):
                return rows[index]

        return File

    tasks.smoltalk.SmolTalk = of(conversations)
    tasks.mmlu.MMLU = tasks.gsm8k.GSM8K = of(conversations[:1])
    compiled = torch.compile

    class Counting:
        """A model that says how much it is given."""

        def __init__(self, model):
            self.model = compiled(model, dynamic=False)

        def __call__(self, x, y, *args, **kwargs):
            if self.model.training and not args and not kwargs:
                print(f"counted {real(x)} {int((y >= 0).sum())}")
            return self.model(x, y, *args, **kwargs)

        def __getattr__(self, name):
            return getattr(self.model, name)

    def real(x):
        """Tokens without the row's end, which is filled up with the token it begins with."""
        return sum(int((row != row[0]).nonzero().max()) + 1 for row in x)

    def compile_(model=None, **kwargs):
        if isinstance(model, torch.nn.Module):
            return Counting(model)
        return compiled(model, **kwargs) if model is not None else compiled(**kwargs)

    torch.compile = compile_
    sys.argv = ["chat_sft", *options]
    runpy.run_module("scripts.chat_sft", run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, ".")
    what, path, *rest = sys.argv[1:]
    said = json.loads(Path(path).read_text(encoding="utf-8"))
    if what == "prepare":
        prepare(said)
    else:
        train(said, rest)
