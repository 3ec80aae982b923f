"""shakespeare-char-ngrams: the same text to 1.62 with two layers and 5-grams.

N-grams learn fastest, and overfit before they reach shakespeare-char's own target.
"""

from tracks.shakespeare_char import TRACK

TRACK = TRACK | dict(
    target=1.62,
    n_layer=2,
    value_embed_layers=(0, 1),
    n_gram=5,
    steps=40,
    batch_tokens=(8192,),
    row_moments=True,
    eval_every=4,
)
