"""Text from a model."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def generate(model, stage, tokens, n, seed=0, temperature=0.8, top_k=50):
    """Continue a list of token ids by n, computing the context anew each time. stage: the last
    one. Returns all ids."""
    c, g = model.c, torch.Generator().manual_seed(seed)
    for _ in range(n):
        context = torch.tensor([tokens[-c.row_len :]], device=model.embed.device)
        cu_seqlens = torch.tensor([0, context.size(1)], dtype=torch.int32, device=context.device)
        h = model.hidden(context, cu_seqlens, stage._replace(max_doc_len=context.size(1)))[0, -1]
        logits = F.linear(h, model.lm_head[: model.n_vocab]).float().cpu()
        if c.softcap:
            a, b, s = c.softcap
            logits = a * torch.sigmoid((logits + b) / s)
        top = logits.topk(min(top_k, len(logits)))
        choice = torch.multinomial((top.values / temperature).softmax(-1), 1, generator=g)
        tokens = tokens + [top.indices[choice].item()]
    return tokens
