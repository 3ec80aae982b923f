"""models/llama.py against transformers' Llama and Qwen3, against a plain reference in float64, and
against itself: with and without a cache, packed and apart, compiled, recomputed."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from base import InputError
from data.loader import IGNORE
from kernels import choose_ops
from models import llama, parts
from models.parts import dropout
from optim import OptimConfig

SMALL = dict(n_layer=2, n_embd=48, n_head=4, n_kv_head=2, head_dim=16, ffn_dim=80)

# Each part in turn, and all at once
SHAPES = [
    pytest.param({}, id="llama"),
    pytest.param(dict(n_kv_head=0), id="as many keys as queries"),
    pytest.param(dict(n_kv_head=1, head_dim=8), id="one head of keys, narrow heads"),
    pytest.param(dict(tied_embeddings=False), id="untied"),
    pytest.param(dict(qk_norm=True), id="qwen3"),
    pytest.param(
        dict(qk_norm=True, tied_embeddings=False, n_embd=40, n_head=6, n_kv_head=3, norm_eps=1e-3),
        id="qwen3, untied, width no multiple of heads",
    ),
    pytest.param(dict(rope_theta=500.0), id="theta"),
    pytest.param(dict(rope_scaling="linear", rope_factor=4.0), id="linear"),
    pytest.param(dict(rope_scaling="llama3", rope_factor=8.0, rope_original_len=32), id="llama3"),
    pytest.param(dict(rope_scaling="yarn", rope_factor=4.0, rope_original_len=32), id="yarn"),
]


def small(n_vocab=131, max_len=64, dtype=torch.float32, **fields):
    """A Model with every parameter random, so that nothing is hidden behind a zero or a one."""
    c = llama.Config(**(SMALL | fields))
    model = llama.Model(c, n_vocab, max_len, dtype, choose_ops("cpu", dtype))
    model.init_weights(0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def in_float64(model):
    """The same model, with everything in float64 but what its tables were rounded to."""
    model = copy.deepcopy(model).double()
    model.dtype = torch.float64
    model.enter(0.0)
    return model


def text(rows=3, length=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(131, (rows, length), generator=g)


def rows_as_documents(inputs):
    B, T = inputs.shape
    return torch.arange(0, (B + 1) * T, T, dtype=torch.int32)


def logits(model, inputs):
    """(B, T, V): of rows that are a document each."""
    stage = model.c.stage(0.0, inputs.size(1))
    return model.logits(inputs, rows_as_documents(inputs), stage)


def state_elsewhere(model):
    """{Hugging Face's name: tensor}."""
    state = {}
    names = model.c.hf_names()
    for name, p in model.named_parameters():
        parts = [p] if isinstance(names[name], str) else p.unbind(0)
        of_parts = [names[name]] if isinstance(names[name], str) else names[name]
        if p.numel():
            for elsewhere, part in zip(of_parts, parts, strict=True):
                transposed = elsewhere.endswith(".T")
                state[elsewhere.removesuffix(".T")] = part.T if transposed else part
    return state


def transformers_config(said):
    transformers = pytest.importorskip("transformers")
    said = dict(said)
    return transformers.AutoConfig.for_model(said.pop("model_type"), **said)


def transformers_model(model, max_len=64):
    """Their model, by our configuration in their words, with our weights."""
    transformers = pytest.importorskip("transformers")
    said = model.c.hf_config(1.0) | dict(
        vocab_size=len(model.embed), max_position_embeddings=max_len
    )
    config = transformers_config(said)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, said["architectures"][0])(config).eval()
    state = state_elsewhere(model)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.c.tied_embeddings else set())
    theirs.tie_weights()
    return theirs


# --- The same as others


@pytest.mark.parametrize("fields", SHAPES)
@torch.no_grad()
def test_logits_are_those_of_transformers(fields):
    model = small(**fields)
    inputs = text(length=64)
    theirs = transformers_model(model)(inputs).logits[..., :131]
    assert theirs.std() > 0.1
    torch.testing.assert_close(logits(model, inputs), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3", "yarn"])
def test_frequencies_are_those_of_transformers(scaling):
    """For widths and contexts where every kind of dimension is there."""
    rotary = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    for head_dim in (64, 128):
        for theta, original in ((1e4, 2048), (5e5, 8192)):
            c = llama.Config(
                head_dim=head_dim,
                n_embd=256,
                rope_theta=theta,
                rope_scaling=scaling,
                rope_factor=4.0,
                rope_original_len=original,
            )
            said = c.hf_config(1.0) | dict(max_position_embeddings=4 * original)
            theirs = rotary(transformers_config(said))
            freqs, size = llama.rope_frequencies(c)
            torch.testing.assert_close(freqs, theirs.inv_freq.float(), rtol=1e-5, atol=0)
            assert size == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("fields", [dict(), dict(qk_norm=True)])
@torch.no_grad()
def test_rounding_in_bf16_is_that_of_transformers(fields):
    """In bf16 nearly every logit is theirs to the bit, since every step rounds where theirs does;
    a product's sums may come in another order."""
    model = small(dtype=torch.bfloat16, **fields)
    for norms in model.parameters():
        norms.copy_(norms.bfloat16())  # the small ones are fp32
    inputs = text(length=32)
    theirs = transformers_model(model).bfloat16()(inputs).logits[..., :131].float()
    ours = logits(model, inputs)
    exact = logits(in_float64(model), inputs)
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()


def plain_loss(model, inputs, targets):
    """What the formula says, in float64, a document at a time and a head at a time, with no code of
    models/ or kernels/. inputs, targets: lists of ids of one document."""
    c = model.c
    w = {name: x.double() for name, x in state_elsewhere(model).items()}
    T = len(inputs)

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def turn(x):
        out = []
        for t in range(T):
            pairs = [
                torch.complex(x[t, j], x[t, j + c.head_dim // 2]) for j in range(c.head_dim // 2)
            ]
            for j, z in enumerate(pairs):
                angle = torch.tensor(t * c.rope_theta ** (-2 * j / c.head_dim), dtype=torch.float64)
                pairs[j] = z * torch.polar(torch.ones_like(angle), angle)
            out.append(torch.stack([z.real for z in pairs] + [z.imag for z in pairs]))
        return torch.stack(out)

    x = w["model.embed_tokens.weight"][inputs]
    for i in range(c.n_layer):

        def of(part):
            return w[f"model.layers.{i}.{part}.weight"]

        h = norm(x, of("input_layernorm"))
        heads = []
        for n in range(c.n_head):
            m = n // (c.n_head // c.kv_heads)
            q = h @ of("self_attn.q_proj")[n * c.head_dim : (n + 1) * c.head_dim].T
            k = h @ of("self_attn.k_proj")[m * c.head_dim : (m + 1) * c.head_dim].T
            v = h @ of("self_attn.v_proj")[m * c.head_dim : (m + 1) * c.head_dim].T
            if c.qk_norm:
                q = norm(q, of("self_attn.q_norm"))
                k = norm(k, of("self_attn.k_norm"))
            scores = turn(q) @ turn(k).T / c.head_dim**0.5
            future = torch.ones(T, T, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ of("self_attn.o_proj").T
        h = norm(x, of("post_attention_layernorm"))
        gate = h @ of("mlp.gate_proj").T
        y = gate / (1 + (-gate).exp()) * (h @ of("mlp.up_proj").T)
        x = x + y @ of("mlp.down_proj").T
    x = norm(x, w["model.norm.weight"])
    head = w["model.embed_tokens.weight" if c.tied_embeddings else "lm_head.weight"]
    return F.cross_entropy(x @ head.T, targets, reduction="sum")


@pytest.mark.parametrize(
    "fields", [{}, dict(qk_norm=True, n_embd=40, n_head=6, n_kv_head=3, tied_embeddings=False)]
)
def test_packed_documents_and_all_gradients_are_those_of_the_formula(fields):
    model = in_float64(small(**fields))
    inputs = text(rows=1, length=20)
    targets = text(rows=1, length=20, seed=1)
    documents = [(0, 7), (7, 8), (8, 20)]
    cu_seqlens = torch.tensor([0, 7, 8, 20, 20], dtype=torch.int32)
    ours = model(inputs, targets, cu_seqlens, model.c.stage(0.0, 12))
    ours.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.numel()}

    # The tables are rounded to float64 from fp32 angles: exact to some 1e-6
    model.zero_grad()
    total = sum(plain_loss(model, inputs[0, a:b], targets[0, a:b]) for a, b in documents)
    total.backward()
    assert ours.item() == pytest.approx(total.item(), rel=1e-6)
    for name, p in model.named_parameters():
        if p.numel():
            torch.testing.assert_close(
                grads[name], p.grad, rtol=1e-5, atol=1e-5, msg=lambda m: f"{name}: {m}"
            )


# --- The same in other ways


@pytest.mark.parametrize("fields", SHAPES)
@torch.no_grad()
def test_token_by_token_is_the_whole(fields):
    model = in_float64(small(**fields))
    inputs = text(length=24)
    whole = logits(model, inputs)
    stage = model.c.stage(0.0, 64)
    cache = model.new_cache(3)
    at_once = [model.decode(inputs[:, :9], [9] * 3, cache, stage)]
    for t in range(9, 24):
        at_once.append(model.decode(inputs[:, t : t + 1], [1] * 3, cache, stage))
    torch.testing.assert_close(torch.stack(at_once, 1), whole[:, 8:].float(), rtol=1e-5, atol=1e-5)
    keys, _ = cache.kv[0]
    assert keys.size(2) == model.c.kv_heads  # what it keeps is not repeated


@torch.no_grad()
def test_rows_of_different_lengths_do_not_know_of_each_other():
    model = in_float64(small(qk_norm=True))
    inputs = text(length=16)
    lengths = [3, 11, 1]
    padded = inputs[:, :11].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 99
    cache = model.new_cache(3)
    stage = model.c.stage(0.0, 64)
    found = [model.decode(padded, lengths, cache, stage)]
    new = torch.stack([inputs[row, n : n + 2] for row, n in enumerate(lengths)])
    found.append(model.decode(new, [2] * 3, cache, stage))
    for row, length in enumerate(lengths):
        alone = logits(model, inputs[row : row + 1])[0]
        for ours, at in zip(found, (length - 1, length + 1)):
            torch.testing.assert_close(ours[row], alone[at].float(), rtol=1e-5, atol=1e-5)


def loss_and_gradients(model, forward, inputs, targets, stage):
    model.zero_grad()
    loss = forward(inputs, targets, rows_as_documents(inputs), stage)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.numel())]


@pytest.mark.parametrize("recompute", [False, True])
def test_what_does_not_count_is_left_out_behind_the_last_attention(recompute, monkeypatch):
    """Loss, gradients and log probabilities stay as they are, with fewer tokens in the last MLP and
    the head; not where nearly all count."""
    model = in_float64(small(qk_norm=True))
    model.recompute = recompute
    inputs = text()
    stage = model.c.stage(0.0, 20)
    seen = []
    mlp = model.mlp
    monkeypatch.setattr(model, "mlp", lambda layer, h: seen.append(h.numel()) or mlp(layer, h))
    for ignored, left in ((slice(0, 14), 18), (slice(3, 4), 60)):
        targets = text(seed=1)
        targets[:, ignored] = IGNORE
        said = []
        for most in 0.9, 0.0:
            monkeypatch.setattr(parts, "MOST_COUNTED", most)
            seen.clear()
            said.append(loss_and_gradients(model, model, inputs, targets, stage))
            width = model.c.n_embd
            assert seen[:2] == [60 * width, (left if most else 60) * width]
            with torch.no_grad():
                of_each = model.log_probs(inputs, targets, rows_as_documents(inputs), stage, 131)
            said[-1].append(of_each)
            assert (of_each[:, ignored] == 0).all() and of_each.shape == inputs.shape
        for ours, other in zip(*said):
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12)


def test_compiled_it_is_one_graph_and_recomputed_the_same():
    model = small(n_layer=1, qk_norm=True, tied_embeddings=False, dropout=0.3)
    inputs = text()
    targets = text(seed=1)
    targets[0, :5] = IGNORE
    stage = model.c.stage(0.0, 20)
    plain = loss_and_gradients(model, model, inputs, targets, stage)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    for ours, other in zip(loss_and_gradients(model, compiled, inputs, targets, stage), plain):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
    model.recompute = True
    for ours, other in zip(loss_and_gradients(model, model, inputs, targets, stage), plain):
        torch.testing.assert_close(ours, other)


def test_in_fp8_the_gradients_are_near_and_validation_is_the_same():
    fields = SMALL | dict(ffn_dim=96)
    model = small(dtype=torch.bfloat16, **fields)
    inputs, targets = text(rows=4), text(rows=4, seed=1)
    args = inputs, targets, model.c.stage(0.0, 20)
    plain = loss_and_gradients(model, model, *args)
    with torch.no_grad():
        exact = model(inputs, targets, rows_as_documents(inputs), args[2])
    model.ops = model.ops.replace(forms=model.ops.forms | dict(relu2_mlp="fp8"))
    eight_bits = loss_and_gradients(model, model, *args)
    for ours, other in zip(eight_bits, plain):
        assert not torch.equal(ours, other)
        assert (ours - other).norm() < 0.2 * other.norm()
    with torch.no_grad():
        found = model(inputs, targets, rows_as_documents(inputs), args[2])
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    with pytest.raises(InputError, match="--fp8: .* a multiple of 16 and a ffn_dim of 8, not 48"):
        c = llama.Config(**(SMALL | dict(ffn_dim=84)))
        llama.Model(c, 131, 64, torch.bfloat16, model.ops)


# --- Dropout


def test_dropout_is_of_the_batch_and_the_place():
    inputs = text(rows=8, length=40)
    x = torch.randn(8, 40, 48)
    once = dropout(x, 0.25, inputs, 3)
    assert torch.equal(once, dropout(x, 0.25, inputs, 3))
    kept = once != 0
    assert kept.float().mean() == pytest.approx(0.75, abs=0.05)
    torch.testing.assert_close(once[kept], x[kept] / 0.75)
    # Neither places nor batches nor neighbours have anything in common
    swapped = inputs.clone()
    swapped[0, 0], swapped[0, 1] = inputs[0, 1], inputs[0, 0]
    for other in (dropout(x, 0.25, inputs, 4), dropout(x, 0.25, swapped, 3), once.roll(1, -1)):
        both = kept & (other != 0)
        assert both.float().mean() == pytest.approx(0.75**2, abs=0.05)


def test_every_place_has_dropout_of_its_own(monkeypatch):
    places = []
    monkeypatch.setattr(llama, "dropout", lambda x, p, inputs, place: places.append(place) or x)
    model = small(dropout=0.5)
    model(text(), text(seed=1), rows_as_documents(text()), model.c.stage(0.0, 20))
    assert len(places) == len(set(places)) == 1 + 2 * model.c.n_layer


def test_dropout_is_for_training_only():
    model = small(dropout=0.5)
    inputs, targets = text(), text(seed=1)
    args = inputs, targets, rows_as_documents(inputs), model.c.stage(0.0, 20)
    trained = model(*args).item()
    with torch.no_grad():
        validated = model(*args)
        assert validated != trained
        model.c = dataclasses.replace(model.c, dropout=0.0)
        assert model(*args) == validated


# --- What others are told


def test_every_parameter_has_names_a_rule_and_is_counted():
    for fields in ({}, dict(qk_norm=True, tied_embeddings=False)):
        model = small(n_vocab=128, **fields)
        c = model.c
        rules = model.update_rules(OptimConfig())
        assert rules.keys() == c.hf_names().keys() == dict(model.named_parameters()).keys()
        matrices = c.n_embd * c.head_dim * 2 * (c.n_head + c.kv_heads) + 3 * c.n_embd * c.ffn
        norms = 2 * c.n_embd + c.qk_norm * 2 * c.head_dim
        tables = (1 if c.tied_embeddings else 2) * 128 * c.n_embd
        expected = tables + c.n_layer * (matrices + norms) + c.n_embd
        assert sum(p.numel() for p in model.parameters()) == expected
        # 6 for each weight that multiplies, the head once; 12 H D a key, half of them seen
        flops = 6 * (c.n_layer * matrices + 128 * c.n_embd)
        flops += 6 * c.n_layer * c.n_head * c.head_dim * 100
        assert model.flops_per_token(c.stage(0.0, 100)) == flops


@pytest.mark.parametrize(
    ["fields", "said"],
    [
        (dict(n_kv_head=3), "--n-kv-head 3: expected a number that divides n_head"),
        (dict(head_dim=7), "--head-dim 7: expected an even number"),
        (dict(n_embd=50), "--n-embd 50: expected a multiple of n_head"),
        (dict(dropout=1.0), "--dropout 1.0: expected a fraction below 1"),
        (dict(rope_scaling="ntk"), "--rope-scaling ntk: expected none, linear, llama3 or yarn"),
        (dict(rope_factor=0.5), "--rope-factor 0.5: expected 1 or more"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        llama.Config(**(SMALL | fields))


def test_the_first_loss_is_that_of_a_uniform_guess():
    model = small(n_vocab=192)
    model.init_weights(3)
    inputs, targets = text(), text(seed=1)
    loss = model(inputs, targets, rows_as_documents(inputs), model.c.stage(0.0, 20))
    assert loss.item() / inputs.numel() == pytest.approx(math.log(192), abs=0.05)
