"""dpo: what `./run.sh dpo` does with a taught model and pairs of answers. Steps are small: the log
probabilities of a whole answer move with each."""

from tracks.sft import TRACK

TRACK = TRACK | dict(
    data="preferences",
    preference="dpo",
    row_len=1024,
    val_row_len=1024,
    max_doc_len=(1024,),
    steps=100,
    stage_lr=(0.05,),
    weight_decay=0.0,
)
