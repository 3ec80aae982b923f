"""The ladder of llama tracks: each size counted on the meta device and by the formula."""

import importlib

import pytest

import train_gpt as tg
from models import outline
from tracks import load_track

# Parameters, tokens of the vocabulary
LADDER = {
    "llama-1m": (1_049_728, 2048),
    "llama-20m": (19_960_576, 50_257),
    "llama-50m": (49_881_600, 50_257),
    "llama-100m": (99_598_080, 50_257),
    "llama-126m": (125_946_624, 50_257),
    "llama-286m": (286_569_472, 50_257),
    "llama-1b": (1_055_231_744, 65_536),
    "llama-shakespeare": (10_670_976, 66),
}


def config_of(track, **fields):
    values = load_track(track)
    text = "some.txt" if values["data"] == "text" else ""
    return tg.configure(**(values | dict(text=text) | fields))


def by_formula(c, n_vocab):
    """Embedding, then of each layer two matrices for queries and outputs, two for keys and values,
    three of the MLP and two norms, and the last norm."""
    V = -(-n_vocab // 64) * 64
    q_width = c.n_head * c.head_dim
    kv_width = c.kv_heads * c.head_dim
    layer = c.n_embd * (2 * q_width + 2 * kv_width + 3 * c.ffn_dim + 2)
    return V * c.n_embd + c.n_layer * layer + c.n_embd


@pytest.mark.parametrize("track", LADDER)
def test_the_size_is_what_the_track_says(track):
    expected, n_vocab = LADDER[track]
    config = config_of(track)
    model = outline(config, n_vocab)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert by_formula(config.model, n_vocab) == expected
    said = importlib.import_module(f"tracks.{track.replace('-', '_')}").__doc__
    assert f"{expected:,} parameters" in " ".join(said.split())


def test_the_ladder_has_the_guides_adamw():
    for track, lr, warmup in (
        ("llama-20m", 3e-4, 200),
        ("llama-50m", 2e-4, 500),
        ("llama-100m", 1.5e-4, 1000),
    ):
        config = config_of(track, optimizer="adamw")
        rules = outline(config, 50_257).update_rules(config.optim)
        assert rules["mlp_bank"].lr == lr
        assert rules["mlp_bank"].betas == (0.9, 0.95)
        assert rules["mlp_bank"].weight_decay > 0 == rules["attn_norms"].weight_decay
        assert tg.lr_at(config, warmup // 2) == 0.5
        assert tg.lr_at(config, warmup) == 1.0


@pytest.mark.parametrize("track", ["llama-20m", "llama-50m", "llama-100m"])
def test_twenty_tokens_a_parameter_and_shards_that_have_them(track):
    config = config_of(track)
    tokens = config.schedule.steps * config.schedule.batch_tokens[0]
    assert tokens / LADDER[track][0] == pytest.approx(20, rel=0.01)
    assert config.data.train_shards * 1e8 >= tokens
