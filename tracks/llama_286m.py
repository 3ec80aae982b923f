"""llama-286m: 286,569,472 parameters on 655 million tokens, 10,000 steps of 65,536.

The size and the length of a run that was published as less than an hour on one H100.
"""

from tracks.llama_126m import TRACK

TRACK = TRACK | dict(
    n_layer=22,
    n_embd=1024,
    n_head=16,
    n_kv_head=4,
    ffn_dim=2624,
    adamw_lr=4e-4,
)
