import types

import torch


class MiniMindConfig:
    bos_token_id = 1

    def __init__(self, hidden_size=768, num_hidden_layers=8):
        self.hidden_size = hidden_size


class MiniMindForCausalLM(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1000))

    def forward(self, input_ids, labels):
        assert not self.training and input_ids.shape == labels.shape
        assert (input_ids[:, 0] == 1).all() and input_ids.min() >= 0 and labels.min() >= -100
        logits = ((3 * input_ids[..., None] + 5 * torch.arange(300)) % 7).float() * self.w[0]
        x, y = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(x.flatten(0, 1), y.flatten(), ignore_index=-100)
        return types.SimpleNamespace(loss=loss)
