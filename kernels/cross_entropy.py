"""Cross-entropy of softcapped logits.

    z' = a sigmoid((z + b) / c);   loss_t = logsumexp(z'_t) - z'_t[target_t]

The cap keeps logits in (0, a), which steadies training and makes the maximum pass of logsumexp unnecessary.
Source: Gemma 2's tanh softcap (a tanh is a sigmoid of twice the argument), in the record's asymmetric form
23 sigmoid((z + 5) / 7.5) (modded-nanogpt record 54).
"""

import torch
import torch.nn.functional as F


def softcap_cross_entropy(logits, targets, *, cap, ignore_index=-100):
    """Summed loss in fp32.

    logits: (N, V), fp32 or bf16; targets: (N,) int64, ignore_index where not counted; cap: (a, b, c) or None.
    """
    z = logits.float()
    if cap is not None:
        a, b, c = cap
        z = a * torch.sigmoid((z + b) / c)
    return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="sum")
