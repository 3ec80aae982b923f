"""own-text: what `--text FILE_OR_FOLDER` trains, laptop-deep's model, to the last step."""

from tracks.laptop_deep import TRACK

TRACK = TRACK | dict(data="text", target=None, sample_prompts=())
