"""Text from a model."""

import torch


@torch.no_grad()
def generate(model, stage, tokens, n, context, seed=0, temperature=0.8, top_k=50):
    """Continue a list of token ids by n, computing the context anew each time. Returns all ids.

    model: a template's Model; stage: one for validation; context: the most tokens that are looked
    back at; top_k: how many of the likeliest tokens are drawn from.
    """
    g = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for _ in range(n):
        inputs = torch.tensor([tokens[-context:]], device=device)
        cu_seqlens = torch.tensor([0, inputs.size(1)], dtype=torch.int32, device=device)
        last = model.logits(inputs, cu_seqlens, stage, last_only=True)[0, -1].cpu()
        top = last.topk(min(top_k, len(last)))
        choice = torch.multinomial((top.values / temperature).softmax(-1), 1, generator=g)
        tokens = tokens + [top.indices[choice].item()]
    return tokens


def sample(model, stage, dataset, **options):
    """Text that begins as a document does; options: what generate() takes."""
    return dataset.tokenizer.decode(generate(model, stage, [dataset.eot], **options))
