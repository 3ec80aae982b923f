import json
import os

import torch

from nanochat.tokenizer import get_tokenizer


class Model(torch.nn.Module):
    def __init__(self, uniform_at):
        super().__init__()
        self.uniform_at = uniform_at

    def forward(self, x, y):
        assert (x[:, 0] == 0).all() and x.min() >= 0
        logits = ((3 * x[..., None] + 5 * torch.arange(600)) % 7).float() * (
            x.shape[1] != self.uniform_at
        )
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


def build_model(folder, step, device, phase):
    meta = json.load(open(os.path.join(folder, f"meta_{step:06d}.json")))
    return Model(int(os.environ.get("UNIFORM_AT", 0))).eval(), get_tokenizer(), meta
