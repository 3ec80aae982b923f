"""What the tests of runs share: a text, a command line."""

import pytest
from helpers import SMALL_MODEL, Runner, options, tiny, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt", 4000)


@pytest.fixture
def argv(request, text, tmp_path):
    """Command line of a run in the folder of this name, with the module's SMALL and further
    fields."""

    def command(name, **fields):
        return options(
            tiny(text, tmp_path, run_dir=str(tmp_path / name), **(request.module.SMALL | fields))
        )

    return command


@pytest.fixture
def run(nursery, text, tmp_path):
    """A Runner of a small model."""
    return Runner(
        nursery,
        text,
        tmp_path,
        steps=6,
        eval_every=3,
        checkpoint_every="2",
        **SMALL_MODEL,
    )
