"""shakespeare-char"""

TRACK = dict(
    target=1.4697,
    data="text",
    tokenizer="chars",
)
EASIER = {}
