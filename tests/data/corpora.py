"""Text corpora for the tests of data/."""

from pathlib import Path

from data import DataConfig, open_dataset
from data.prepare import prepare_files
from data.sources.text import list_files


def open_text(source, tokenizer, cache):
    """The Dataset of a text file or folder, as --data text has it."""
    return open_dataset(DataConfig(data="text", text=str(source), tokenizer=tokenizer), cache)


def prepare_text(source, tokenizer, cache):
    """(folder, meta dict, Tokenizer) of a text file or folder."""
    path = Path(source)
    return prepare_files(str(path), lambda: list_files(path), tokenizer, cache)
