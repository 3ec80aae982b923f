"""sft: what `./run.sh sft` does with a run's model and conversations, for three passes or until it
no longer gets better. The learning rate falls from a fraction of training's to zero."""

TRACK = dict(
    target=None,
    data="conversations",
    row_len=512,
    val_row_len=512,
    max_doc_len=(512,),
    batch_tokens=(8192,),
    steps=200,
    stage_lr=(0.3,),
    cooldown=1.0,
    lr_floor=0.0,
    normuon=True,
    eval_every=25,
    patience=4,
    sample_prompts=(),
)
