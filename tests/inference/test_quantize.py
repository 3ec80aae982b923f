"""inference/quantize.py: codes that are near the weights, products that are those of the codes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import compiled_decoding, tiny_model

from base import InputError
from inference.quantize import GROUP, Quantized, quantize
from models import llama


def matrix(n=64, k=96, seed=0, dtype=torch.float32):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind, steps", [("int8", 127), ("int4", 7)])
def test_each_weight_is_within_half_a_step(kind, steps):
    w = matrix()
    made = Quantized(w, kind).dequantized()
    groups = w.view(64, -1, GROUP) if kind == "int4" else w.view(64, 1, -1)
    made = made.view_as(groups)
    span = groups.amax(2) - groups.amin(2) if kind == "int4" else 2 * groups.abs().amax(2)
    step = span / (15 if kind == "int4" else 254)
    within = (made - groups).abs() <= 0.5 * step[..., None] * 1.02 + 0.01 * groups.abs()
    # Narrowed ranges cut off a few, in exchange for less error of the others
    assert within.float().mean() > (0.999 if kind == "int8" else 0.9)
    plain = (span[..., None] / (15 if kind == "int4" else 254)) ** 2 / 12
    assert (made - groups).square().mean() < 1.1 * plain.mean()


@pytest.mark.parametrize("n_out, n_in", [(3, 20), (7, 100), (31, 190), (2, 36)])
def test_shapes_that_crash_an_op_of_pytorch_are_kept_from_it(n_out, n_in):
    w = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))
    q = Quantized(w, "int8")
    x = torch.randn(1, n_in, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(q.linear(x), x @ q.dequantized().t())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_matrix(kind, rows, dtype):
    w = matrix(dtype=dtype)
    x = matrix(rows, 96, seed=1, dtype=dtype)
    q = Quantized(w, kind)
    assert q.has_op  # torch 2.13 has both for these shapes
    expected = x.double() @ q.dequantized().double().t()
    scale = expected.abs().mean()
    for found in (F.linear(x, q), q.linear(x[None])[0]):
        assert found.dtype == dtype and found.shape == (rows, 64)
        assert (found.double() - expected).abs().max() < 0.05 * scale
    q.has_op = False
    assert (F.linear(x, q).double() - expected).abs().max() < 0.05 * scale
    t = Quantized(w.t().contiguous(), kind, transposed=True)
    assert t.shape == (96, 64) and t.has_op
    torch.testing.assert_close(x @ t, F.linear(x, Quantized(w, kind)))


def test_rows_of_a_table():
    q = Quantized(matrix(), "int8")
    index = torch.tensor([[3, 0], [63, 3]])
    torch.testing.assert_close(F.embedding(index, q), q.dequantized()[index])
    first = q[:50]
    assert first.shape == (50, 96) and len(first) == 50
    x = matrix(2, 96, seed=2)
    torch.testing.assert_close(F.linear(x, first), F.linear(x, q)[:, :50])


def model_of(dtype=torch.float32, **fields):
    shape = dict(n_layer=2, n_embd=64, n_head=2, n_kv_head=1, head_dim=32, ffn_dim=96)
    c = llama.Config(**shape | fields)
    model = llama.Model(c, 500, 32, dtype)
    model.init_weights(0)
    with torch.no_grad():  # what begins at zero
        g = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g).to(p.dtype))
    return c, model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind, worst", [("int8", 0.02), ("int4", 0.2)])
def test_a_quantized_model_says_nearly_the_same(tied, kind, worst):
    c, model = model_of(tied_embeddings=tied)
    inputs = torch.randint(500, (2, 32), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 32, 64], dtype=torch.int32)
    stage = c.stage(1.0, 32)
    targets = inputs.roll(-1, 1)
    with torch.no_grad():
        before = model.logits(inputs, cu_seqlens, stage)
        losses = model.log_probs(inputs, targets, cu_seqlens, stage)
        bits = quantize(model, kind)
        after = model.logits(inputs, cu_seqlens, stage)
        spread = before.std()
        assert 0 < (after - before).abs().mean() < worst * spread
        found = model.log_probs(inputs, targets, cu_seqlens, stage)
        assert (found - losses).abs().mean() < worst
        # Decoding says the same as reading all at once, but for the ops' bf16
        cache = model.new_cache(2)
        for t in range(8):
            step = model.decode(inputs[:, t : t + 1], [1, 1], cache, stage)
        assert (step - after[:, 7]).abs().max() < 0.05 * spread
    n_tables = (512 if tied else 1024) * 64
    n = n_tables + 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64)
    own = 8.3 if kind == "int8" else 5.1  # bits of a weight of a matrix, with its scales
    assert bits == pytest.approx((n_tables * 8.3 + (n - n_tables) * own) / n, rel=0.03)


@pytest.fixture(scope="module")
def compiled():
    return compiled_decoding()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_codes_in_one_piece_are_the_same(compiled, kind):
    _, model = model_of()
    _, other = model_of()
    model.ops = compiled.ops(model.ops)
    quantize(model, kind)
    quantize(other, kind)
    pieces = set()
    for ours, theirs in zip(model.layers(), other.layers()):
        for x, y in zip(ours[2:5] + ours[8:], theirs[2:5] + theirs[8:]):
            assert torch.equal(x.codes, y.codes)
            pieces.add(x.codes.untyped_storage().data_ptr())
    assert len(pieces) == 1


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_tokens_in_c_are_those_of_the_model_without_a_cache(compiled, kind, dtype, qk_norm):
    c, model = model_of(dtype, qk_norm=qk_norm, n_kv_head=2)
    stage = c.stage(1.0, 32)
    model.ops = compiled.ops(model.ops)
    if kind:
        quantize(model, kind)
    tokens = torch.randint(500, (3, 30), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        cu_seqlens = torch.tensor([0, 30, 60, 90], dtype=torch.int32)
        expected = model.logits(tokens, cu_seqlens, stage)
        # Rows begin with prompts of several lengths
        cache = model.new_cache(3)
        model.decode(tokens[:, :9], [2, 9, 5], cache, stage)
        for _ in range(20):
            at = torch.tensor(cache.lengths)
            step = model.decode(tokens.gather(1, at[:, None]), [1, 1, 1], cache, stage)
            wanted = expected[torch.arange(3), at]
            off = (step - wanted).abs().max() / expected.std()
            exact = dtype == torch.float32
            assert off < (2e-3 if exact else 0.12)
            if exact:
                assert torch.equal(step.argmax(-1), wanted.argmax(-1))


def test_other_templates_are_rounded_to_the_same_values():
    c, model = tiny_model(n_embd=64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bits = quantize(model, "int8")
    assert 8 < bits < 12
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"attn_bank", "mlp_bank"} <= changed and "scalars" not in changed
    bank = before["attn_bank"]
    expected = Quantized(bank.flatten(0, -2), "int8").dequantized().view_as(bank)
    torch.testing.assert_close(model.attn_bank.detach(), expected)


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="--quantize int3: expected int8 or int4"):
        quantize(torch.nn.Linear(2, 2), "int3")
