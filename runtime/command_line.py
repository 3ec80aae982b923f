"""What a command line of training says: values of a track, or of the run to go on with, and above
them those that are typed."""

import dataclasses
import os

import torch

from data.config import DataConfig
from data.sources import is_built
from models import DEFAULT_TEMPLATE, option_names
from tracks import load_track, track_names

from . import resume, warm_start
from .options import parse_options, peek


def read_options(argv, classes_of, beneath=None, **texts):
    """{option: value} of a command line, without those that have their default.

    classes_of: function of a template's name that gives the dataclasses of the options; beneath:
    {option: value} below the track's; texts: see parse_options(). Raises InputError.
    """
    # The track and the template come first, since they say which other options there are
    names = ("track", "template", "text", "data", "resume", "warm_start")
    named = {name: os.path.expanduser(x or "") for name, x in peek(argv, *names).items()}
    run = resume.options_of(named["resume"])  # of the run to go on with, if it is named
    if run and not named["track"]:
        track = run["track"]
    else:
        track = named["track"] or usual_track(named)
    fields = run or (beneath or {}) | load_track(track)

    # Another template than the track's has no use for options that it does not know
    usual = fields.get("template", DEFAULT_TEMPLATE)
    template = named["template"] or usual
    foreign = option_names(usual) - option_names(template)
    if run:  # of another version, it may have options that this one lacks
        foreign |= fields.keys() - names_of(classes_of(template))
    fields = {name: value for name, value in fields.items() if name not in foreign}

    listed = f"Tracks: {', '.join(track_names())}."
    given = parse_options(classes_of(template), argv, fields, epilog=listed, **texts)
    # Own text on a track made for other data: no target, and every token is kept
    own = "text" in given or is_built(given.get("data", ""))
    if own and fields.get("data") != "text":
        fields |= dict(data="text", target=None, tokenizer=DataConfig.tokenizer)
        fields |= dict(long_docs="split", shuffle=True, sample_prompts=())
    # Weights to begin with stand for their own tokens
    if named["warm_start"]:
        name = warm_start.tokenizer_name(named["warm_start"])
        fields["tokenizer"] = name or fields.get("tokenizer", DataConfig.tokenizer)
    # Steps that are asked for are taken
    if "steps" in given and "max_epochs" in fields:
        fields["max_epochs"] = 0.0
    return fields | given | dict(track=track)


def usual_track(named):
    """The track where none is named; named: {option: value} of what is."""
    if named["text"] or is_built(named["data"]):
        return "own-text"
    return "gpt2-small" if torch.cuda.is_available() else "laptop-counts"


def names_of(classes):
    """Names of the options of some dataclasses."""
    return {f.name for cls in classes for f in dataclasses.fields(cls)}
