"""plan/torchtitan.py: a configuration that torchtitan takes, of the same model."""

import importlib
import sys

import pytest
import torch

from base import InputError
from plan import estimate, torchtitan
from plan.__main__ import main


def text(*options, on="32xh100"):
    config = estimate.configured(options)
    place = estimate.place_of(on)
    plan = estimate.make_plan(config, place)
    return torchtitan.text_of(config, plan, place, "titan")


def test_it_is_python_with_the_tracks_numbers():
    said = text("--track", "llama-1b")
    compile(said, "titan.py", "exec")
    for line in (
        "width = 1792",
        "n_kv_heads=2,",
        "RoPE.Config(dim=128, max_seq_len=8192, theta=500000.0)",
        "hidden_dim=4864",
        "enable_weight_tying=True",
        "local_batch_size=1,",
        "global_batch_size=32,",
        "data_parallel_shard_degree=8, data_parallel_replicate_degree=4",
        "1,055,231,744 parameters, 27,540,324,352 tokens",
    ):
        assert line in said, line
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(
    "options, on, said",
    [
        (["--track", "gpt2-small"], "8xh100", "which torchtitan has no model for"),
        (["--track", "llama-1b"], "12xh100", "expected whole machines of 8"),
        (["--track", "llama-1b"], "64xh100", "that divides the 32 rows of a batch"),
        (["--track", "llama-1b", "--rope-scaling", "linear"], "8xh100", "expected none there"),
    ],
)
def test_what_cannot_be_handed_over_is_one_line(options, on, said):
    with pytest.raises(InputError, match=said):
        text(*options, on=on)


def test_the_option(tmp_path, capsys):
    path = tmp_path / "titan.py"
    options = ["--track", "llama-20m", "--hardware", "8xh100", "--torchtitan"]
    assert main([*options, str(path)]) == 0
    assert "def run() -> Trainer.Config:" in path.read_text()
    assert main([*options, str(tmp_path / "1-titan.py")]) == 2
    assert "expected a module's name that ends in .py" in capsys.readouterr().err
    assert main([*options, str(tmp_path / "none" / "titan.py")]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--qk-norm",)], ids=["llama", "qwen"])
def test_torchtitan_makes_the_same_model_of_it(more, tmp_path, monkeypatch):
    pytest.importorskip("torchtitan")
    (tmp_path / "titan.py").write_text(text("--track", "llama-1b", *more))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("titan", None)
    manager = importlib.import_module("torchtitan.config.manager").ConfigManager()
    taken = manager.parse_args(["--module", "titan", "--config", "run"])
    spec = taken.model_spec
    with torch.device("meta"):
        model = spec.model.build()
    theirs = spec.state_dict_adapter(spec.model, None).to_hf(dict(model.state_dict()))

    # Under Hugging Face's names every tensor has the shape of ours
    config = estimate.configured(["--track", "llama-1b", *more])
    ours = estimate.build(config, 65536, estimate.place_of("h100"))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ours.parameters())
    parameters = dict(ours.named_parameters())
    expected = {}
    for name, names in config.model.hf_names().items():
        parts = [names] if isinstance(names, str) else names
        if not parameters[name].numel():
            continue
        whole = parameters[name]
        pieces = [whole] if isinstance(names, str) else whole.chunk(len(parts))
        for part, piece in zip(parts, pieces):
            shape = tuple(piece.squeeze(0).shape) if not isinstance(names, str) else whole.shape
            shape = shape[::-1] if part.endswith(".T") else shape
            expected[part.removesuffix(".T")] = tuple(shape)
    assert {name: tuple(x.shape) for name, x in theirs.items()} == expected
