"""A finished run, for the programs that use its model."""

import shutil

import pytest
from helpers import EVERYTHING, tiny, write_text

import train_gpt as tg
from runtime import setting_up


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(configuration, result) of a finished run with every part."""
    tmp_path = tmp_path_factory.mktemp("trained")
    text = write_text(tmp_path / "words.txt", 4000)
    config = tiny(text, tmp_path, **EVERYTHING | dict(steps=6, eval_every=6, sample_tokens=0))
    with pytest.MonkeyPatch.context() as patch:
        speed = dict(matmul=dict(float32=1e9, bfloat16=1e9), copy=1e9)
        patch.setattr(
            setting_up, "machine_probe", lambda device: speed
        )  # takes a second to measure
        return config, tg.train(config)


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run's folder, which a test may break."""
    return shutil.copytree(trained[0].run.run_dir, tmp_path / "run")
