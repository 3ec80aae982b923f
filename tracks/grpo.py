"""grpo: what `./run.sh grpo` does with a taught model and questions. batch_tokens are those of a
forward pass at most: how many a step has depends on how long the answers become. It is not
compiled unless --compile asks for that."""

from tracks.sft import TRACK

TRACK = TRACK | dict(
    data="questions",
    reward="exact",
    steps=200,
    stage_lr=(0.1,),
    weight_decay=0.0,
    patience=0,
    compile=False,
)
