"""kernels/decoding.py's Blocks: a model's tokens by one call, beside the model's own blocks."""

import copy

import pytest
import torch
from helpers import compiled_decoding

from inference.quantize import Quantized, quantize
from models import llama
from models.cache import KVCache

HALF = torch.bfloat16
SHAPE = dict(n_layer=3, n_embd=64, n_head=4, n_kv_head=2, head_dim=16, ffn_dim=100)


@pytest.fixture(scope="module")
def compiled():
    return compiled_decoding()


def model_of(dtype=torch.float32, n_vocab=500, max_len=64, **fields):
    c = llama.Config(**SHAPE | fields)
    model = llama.Model(c, n_vocab, max_len, dtype)
    model.init_weights(0)
    with torch.no_grad():  # what begins at zero, and norms that differ
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g).to(p.dtype))
    return model, c.stage(1.0, max_len)


def tokens_of(rows, n, seed=0):
    return torch.randint(500, (rows, n), generator=torch.Generator().manual_seed(seed))


class Counting:
    """Blocks that count their calls."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.takes = blocks.takes
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return self.blocks(*args)


def decoded(model, stage, pieces, lengths):
    """Hidden states of new tokens, (B, S, C) for each piece, of rows that have so many before."""
    n = max(lengths)
    cache = model.new_cache(len(lengths))
    model.decode(tokens_of(len(lengths), n, seed=5), lengths, cache, stage)
    if cache.blocks:
        cache.blocks = Counting(cache.blocks)
    states = []
    for piece in pieces:
        cache.begin(piece.size(1), [piece.size(1)] * len(piece))
        states.append(model.hidden(piece, None, stage, cache))
        cache.end()
    if cache.blocks:
        assert cache.blocks.calls == len(pieces)
    return torch.cat(states, 1), cache


CASES = [
    pytest.param([0], {}, 64, id="one"),
    pytest.param([40, 3, 17], {}, 64, id="rows"),
    pytest.param([40, 3], {}, 7, id="window"),
    pytest.param([9, 2], dict(qk_norm=True), 64, id="qk-norm"),
    pytest.param([9], dict(n_kv_head=4, head_dim=64, n_embd=256), 64, id="head-64"),
    pytest.param([9], dict(n_kv_head=1, head_dim=128, qk_norm=True), 64, id="head-128"),
    pytest.param([9, 20], dict(rope_scaling="yarn", rope_factor=4.0), 64, id="yarn"),
]


@pytest.mark.parametrize("lengths, fields, window", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.no_grad()
def test_as_exact_as_the_models_blocks(compiled, lengths, fields, window, dtype):
    """No further from float64 than twice as far as PyTorch is."""
    model, stage = model_of(dtype, **fields)
    stage = stage._replace(max_doc_len=window)
    lengths = [max(1, n) for n in lengths]
    # One token, two, one
    pieces = tokens_of(len(lengths), 4, seed=2).split([1, 2, 1], 1)
    check(compiled, model, stage, pieces, lengths)


IN_TILES = [
    pytest.param([5, 9, 2], [20], {}, 256, id="rows"),
    pytest.param([1], [33, 1, 120], {}, 256, id="parts-of-a-prompt"),
    pytest.param([100, 7], [50], {}, 256, id="long"),
    pytest.param([3, 90], [70], {}, 40, id="window"),
    pytest.param([30] * 40, [1, 1], {}, 256, id="many"),
    pytest.param([3] * 9, [7], dict(n_kv_head=4, qk_norm=True), 256, id="qk-norm"),
    pytest.param([9], [64], dict(n_kv_head=1, head_dim=128), 256, id="head-128"),
]


@pytest.mark.parametrize("lengths, steps, fields, window", IN_TILES)
@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@torch.no_grad()
def test_as_exact_in_tiles(compiled, lengths, steps, fields, window, kind):
    if not compiled.has_tiles:
        pytest.skip("the processor has no tiles")
    fields = dict(n_embd=128, head_dim=32, ffn_dim=224) | fields
    model, stage = model_of(HALF, max_len=256, **fields)
    stage = stage._replace(max_doc_len=window)
    pieces = tokens_of(len(lengths), sum(steps), seed=2).split(steps, 1)
    check(compiled, model, stage, pieces, lengths, kind)


def check(compiled, model, stage, pieces, lengths, kind=None):
    """States, keys and values by the library and by the model's blocks beside float64's."""
    dtype = model.dtype
    exact_model = llama.Model(model.c, 500, len(model.cos), torch.float64)
    for own, exact in zip(model.parameters(), exact_model.parameters()):
        exact.data = own.data.double()
    in_c = copy.deepcopy(model)
    in_c.ops = compiled.ops(model.ops)
    if kind:
        quantize(in_c, kind)
        quantize(model, kind)
        layers = []
        for layer in model.layers():
            fields = layer._asdict()
            layers.append(layer._replace(**{name: numbers(x) for name, x in fields.items()}))
        exact_model.layers = lambda: layers
        exact_model.embed.data = numbers(model.embed)
    exact_model.cos.copy_(model.cos)
    exact_model.sin.copy_(model.sin)
    exact, past = decoded(exact_model, stage, pieces, lengths)
    for found, eager in zip(
        decoded(in_c, stage, pieces, lengths), decoded(model, stage, pieces, lengths)
    ):
        if isinstance(found, KVCache):
            kept = [[at.kv[layer] for layer in range(3)] for at in (found, eager, past)]
            checks = [t for layers in zip(*kept) for t in zip(*layers)]
        else:
            checks = [(found, eager, exact)]
        for ours, pytorch, wanted in checks:
            assert ours.dtype == dtype and ours.shape == wanted.shape
            error, eager_error = ((t.double() - wanted).abs().max() for t in (ours, pytorch))
            assert error <= 2 * eager_error + 4 * torch.finfo(dtype).eps * wanted.abs().max()


def numbers(x):
    """What a matrix of codes stands for, and what else a Layer has, in float64."""
    if isinstance(x, Quantized):
        dequantized = x.dequantized().double()
        return dequantized.t() if x.transposed else dequantized
    return x.double() if isinstance(x, torch.Tensor) else x


@torch.no_grad()
def test_rows_steps_and_threads_change_no_bit(compiled):
    """What is said to one does not depend on the others."""
    model, stage = model_of(torch.float32)
    model.ops = compiled.ops(model.ops)
    pieces = [tokens_of(4, 2, seed=2)]
    together, _ = decoded(model, stage, pieces, [8, 8, 8, 8])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    in_parallel, _ = decoded(model, stage, pieces, [8, 8, 8, 8])
    torch.set_num_threads(before)
    in_turn, _ = decoded(model, stage, pieces[0].split(1, 1), [8, 8, 8, 8])
    assert torch.equal(together, in_parallel)
    assert torch.equal(together, in_turn)


@torch.no_grad()
def test_what_is_not_for_it_is_left_to_the_model(compiled):
    model, stage = model_of(torch.float32, max_len=16)
    ours = compiled.ops(model.ops)
    for layers in (
        [model.layers()[0]._replace(w_o=torch.zeros(64, 64, dtype=torch.float64))],
        [model.layers()[0]._replace(w_q=torch.zeros(64, 128)[:, ::2])],
    ):
        about = model.final_norm, model.cos, model.sin, 4, 2, 1e-6
        assert compiled.blocks(layers, *about) is None
    model.ops = ours
    blocks = model.new_cache(1).blocks
    assert blocks.takes(torch.zeros(2, 4, 64), [3, 5])
    assert not blocks.takes(torch.zeros(3, 3, 64), [3, 5, 0])  # many
    assert not blocks.takes(torch.zeros(1, 1, 64), [16])  # no position for it
    assert not blocks.takes(torch.zeros(1, 1, 64, dtype=HALF), [3])
    with torch.enable_grad():
        assert not blocks.takes(torch.zeros(1, 1, 64), [3])


@pytest.mark.parametrize("kind", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@torch.no_grad()
def test_five_hundred_greedy_tokens_are_those_without_a_cache(compiled, kind, dtype):
    """Of a model whose logits are far apart; in bf16, where two may round to the same number, those
    that differ are among the two likeliest."""
    model, stage = model_of(dtype, max_len=512)
    model.ops = compiled.ops(model.ops)
    if kind:
        quantize(model, kind)
    # Noise at each step, since a model that learnt nothing repeats a token for ever
    noise = 4 * torch.randn(501, 500, generator=torch.Generator().manual_seed(1))
    tokens = [7]
    cache = model.new_cache(1)
    cache.blocks = Counting(cache.blocks)
    for step in range(500):
        logits = model.decode(torch.tensor([tokens[-1:]]), [1], cache, stage)
        tokens.append((logits[0] + noise[step]).argmax().item())
    assert len(set(tokens)) > 50 and cache.blocks.calls == 500
    cu_seqlens = torch.tensor([0, 501], dtype=torch.int32)
    without = model.logits(torch.tensor([tokens]), cu_seqlens, stage)[0] + noise
    same = without.argmax(-1)[:-1] == torch.tensor(tokens[1:])
    if dtype == torch.float32:
        assert same.all()
    else:
        chosen = without[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert same.float().mean() > 0.98
        assert (without[:-1].amax(1) - chosen).max() < 0.05 * without.std()


@torch.no_grad()
def test_an_empty_cache_takes_the_blocks_of_what_joins_it(compiled):
    """Weights may have changed since it was made."""
    model, stage = model_of(HALF)
    model.ops = compiled.ops(model.ops)
    cache, reading = model.new_cache(0), model.new_cache(1)
    model.decode(tokens_of(1, 5), [5], reading, stage)
    cache.join(reading)
    assert cache.blocks is reading.blocks
