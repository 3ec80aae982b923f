"""Finished runs to be measured."""

import shutil

import pytest
from helpers import SMALL_MODEL, tiny, write_text

import train_gpt as tg

COPIES = dict(copies=3, long_docs="split")  # a model that looks up what followed before


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(configuration, result) of a run on a folder of many documents."""
    tmp_path = tmp_path_factory.mktemp("trained")
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        write_text(text / f"{i}.txt", 150 + 5 * i, seed=i)
    config = tiny(text, tmp_path, **SMALL_MODEL | COPIES | dict(steps=30, eval_every=30))
    return config, tg.train(config)


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run's folder, which a test may break."""
    return shutil.copytree(trained[0].run.run_dir, tmp_path / "run")
