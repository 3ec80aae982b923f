"""laptop: a GPT on Python's own source in seconds on two CPU cores, with no network.

The target is in bits per byte, so that another tokenizer or another version of Python's library is
comparable. One layer needs twice as many steps to it as four, but each takes a fraction of the
time; laptop-deep goes on to a lower target.
"""

TRACK = dict(
    target=1.5,
    target_metric="val_bpb",
    # data
    data="stdlib",
    tokenizer="bpe:4096",
    val_tokens=131_072,
    val_row_len=2048,
    # model
    n_layer=1,
    n_embd=128,
    n_head=2,
    mlp_ratio=1,
    value_embed_layers=(0,),
    smear=True,
    attn_gate=True,
    key_offset=True,
    short_window=(128,),
    long_window=(256,),
    sampled_softmax=(1536,),
    copies=4,
    # schedule and optimizer
    steps=48,
    batch_tokens=(4096,),
    adam_lr=0.014,
    weight_decay=1.2,
    normuon=True,
    row_moments=True,
    eval_every=6,
    quick_val=8192,
    sample_prompts=("def ", "class ", "import "),
)
