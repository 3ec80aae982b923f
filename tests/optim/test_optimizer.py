"""The optimizer: which gradient is used when, masters, the guard, compiled as eager, the GPT's own
rules, and parameters that take over another's weights."""

import dataclasses

import pytest
import torch
from helpers import PIECES, RECORD
from kernel_checks import draw
from optim_helpers import (
    ADAMS,
    RULES,
    Parameters,
    accumulate,
    assert_equal,
    give,
    gradients,
    master_of,
    optimizer_of,
    rules,
    single,
    summed,
    train,
    weights,
)
from torch import nn

from models import gpt
from optim import Adam, Muon, OptimConfig, RowAdam, adam_update
from optim.masters import descend
from optim.muon import balance, nesterov
from optim.rows import row_scale

# --- Steps


@pytest.mark.parametrize("every", [2, 3])
def test_adam_every_nth_step_is_adam_on_summed_gradients(every):
    """And Muon at each step. Bit for bit, since the gradients' sums are exact."""
    model = Parameters()
    reference = Parameters()
    optimizer = optimizer_of(model, rules(every=every))
    adams = optimizer_of(reference)
    muons = optimizer_of(reference)
    waiting = []
    for step in range(2 * every + 1):
        scale = 1 - step / 10
        grads = gradients(step)
        before = weights(model)
        accumulate(model, grads)
        optimizer.step(scale, 0.9)

        waiting.append(grads)
        for name, p in reference.named_parameters():
            p.grad = None if name in ADAMS else grads[name].clone()
        muons.step(scale, 0.9)
        if (step + 1) % every == 0:
            for name, p in reference.named_parameters():
                p.grad = summed(waiting)[name] if name in ADAMS else None
            adams.step(scale, 0.9)
            waiting = []
            assert optimizer.waiting() == []
            assert optimizer.is_settled()
        else:
            assert set(optimizer.waiting()) == ADAMS
            assert not optimizer.is_settled()
            for name in ADAMS:
                assert torch.equal(before[name], model.get_parameter(name)), name
        assert_equal(weights(model), weights(reference))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reset_starts_afresh(dtype):
    """After a warm-up, old weights and reset() give bit for bit the run that had no warm-up."""
    model = Parameters(dtype=dtype)
    start = weights(model)
    optimizer = optimizer_of(model)
    train(optimizer, model, 3, seed=50)
    assert not torch.equal(model.tall, start["tall"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    optimizer.reset()
    train(optimizer, model, 3)
    other = Parameters(dtype=dtype)
    train(optimizer_of(other), other, 3)
    assert_equal(weights(model), weights(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_no_learning_rate_changes_no_weight(dtype):
    """The warm-up takes one, and training starts from these weights."""
    model = Parameters(dtype=dtype)
    before = weights(model)
    give(model, gradients(0))
    optimizer_of(model).step(0.0, 0.0)
    assert_equal(weights(model), before)


def test_lr_scale_multiplies_the_learning_rate():
    half = Parameters()
    whole = Parameters()
    halved = {name: dataclasses.replace(rule, lr=rule.lr / 2) for name, rule in RULES.items()}
    for model, table, scale in ((half, RULES, 0.5), (whole, halved, 1.0)):
        optimizer = optimizer_of(model, table)
        for k in range(3):
            give(model, gradients(k))
            optimizer.step(scale, 0.9)
    assert_equal(weights(half), weights(whole))


def test_step_clears_gradients_and_keeps_the_parameters_storage():
    """Compiled graphs hold on to the storage."""
    model = Parameters()
    where = [p.data_ptr() for p in model.parameters()]
    train(optimizer_of(model), model, 2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == where


# --- Masters


def test_bf16_weights_are_the_masters_rounded():
    """After every step; and the masters do what fp32 weights would do with the same gradients
    (Adam)."""
    model = Parameters(dtype=torch.bfloat16)
    exact = Parameters()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
    optimizer = optimizer_of(model)
    reference = optimizer_of(exact)
    for k in range(5):
        for m, o in ((model, optimizer), (exact, reference)):
            give(m, gradients(k))
            o.step(1.0, 0.9)
        for name, p in model.named_parameters():
            master = master_of(optimizer, name)
            assert master.dtype == torch.float32
            assert torch.equal(p.detach().flatten(), master.bfloat16().flatten())
            assert not torch.equal(p.detach().float().flatten(), master.flatten())
            whole = exact.get_parameter(name).detach().view(master.shape)
            if name in ADAMS:
                assert torch.equal(master, whole)
            else:
                torch.testing.assert_close(master, whole, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    "rule, shape",
    [(Adam(1e-4, betas=(0.0, 0.9)), (4,)), (Muon(1e-4), (1, 1, 1))],
    ids=["adam", "muon"],
)
def test_updates_too_small_for_bf16_add_up_in_the_master(rule, shape):
    """At 1.0 bf16 cannot take off 1e-4; a hundred of them are 1e-2."""
    model, optimizer = single(rule, torch.ones(shape), torch.bfloat16)
    for _ in range(100):
        model.w.grad = torch.ones(shape, dtype=torch.bfloat16)
        optimizer.step(1.0, 0.0)
    moved = 1 - master_of(optimizer, "w")
    assert ((0.85e-2 < moved) & (moved < 1.15e-2)).all()
    assert (model.w.float() < 1 - 0.007).all()


def test_fp32_parameters_of_a_bf16_model_stay_exact():
    """As lambdas and value_gates are."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Parameters(dtype=dtype)
        model.scalars = nn.Parameter(torch.linspace(0.1, 0.5, 5))
        train(optimizer_of(model), model, 4)
        assert model.scalars.dtype == torch.float32
        ends.append(model.scalars)
    assert torch.equal(*ends)


# --- The guard


class OnGPU(torch.Tensor):
    """Says it is on a GPU, where nobody may ask for its value."""

    device = torch.device("cuda", 0)

    def __bool__(self):
        raise AssertionError("the host waits for the device")


def judged(ok, kind):
    return torch.tensor(ok).as_subclass(OnGPU if kind == "cuda" else torch.Tensor)


def everything(model, optimizer):
    """{name: a copy} of weights, companions and moments."""
    found = weights(model)
    for name, state in optimizer.state.items():
        for key, x in state.items():
            if x is not None:
                found[f"{key}/{name}"] = x.clone()
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
def test_a_step_that_does_not_count_leaves_every_bit(dtype, normuon, kind):
    """Whatever the gradients hold; what follows is as if it had not been, but for the step count
    of Adam."""
    model = Parameters(dtype=dtype)
    optimizer = optimizer_of(model, rules(normuon=normuon))
    train(optimizer, model, 2)
    before = everything(model, optimizer)
    for bad in (float("nan"), float("inf"), 1.0):
        give(model, {name: g * bad for name, g in gradients(5).items()})
        optimizer.step(1.0, 0.9, judged(False, kind))
        assert_equal(before, everything(model, optimizer))
        assert optimizer.waiting() == []
    give(model, gradients(6))
    optimizer.step(1.0, 0.9, judged(True, kind))
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("bad", [float("nan"), 1.0], ids=["not finite", "finite"])
def test_gradients_of_a_step_that_does_not_count_do_not_wait(bad, kind):
    """With Adam at every second step, the step after a bad one updates from its own gradients:
    on a CPU the others are dropped, on a GPU masked, since nobody there knows yet."""
    model = Parameters()
    other = Parameters()
    optimizer = optimizer_of(model, rules(every=2), skips=True)
    reference = optimizer_of(other, rules(every=2), skips=True)
    give(model, {name: g * bad for name, g in gradients(1).items()})
    give(other, {name: torch.zeros_like(g) for name, g in gradients(1).items()})
    for o in (optimizer, reference):
        o.step(1.0, 0.9, judged(False, kind))
        assert set(o.waiting()) == (ADAMS if kind == "cuda" else set())
    for name in optimizer.waiting():
        assert not model.get_parameter(name).grad.any(), name

    for m, o in ((model, optimizer), (other, reference)):
        accumulate(m, gradients(2))
        o.step(1.0, 0.9, judged(True, kind))
    assert all(p.isfinite().all() for p in model.parameters())
    assert_equal(weights(model), weights(other))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_gradients_of_a_step_that_counts_wait_as_they_are(kind):
    model = Parameters()
    optimizer = optimizer_of(model, rules(every=2), skips=True)
    give(model, gradients(1))
    optimizer.step(1.0, 0.9, judged(True, kind))
    for name in ADAMS:
        assert torch.equal(model.get_parameter(name).grad, gradients(1)[name]), name


# --- The GPT's own rules

FIELDS = dict(n_layer=2, n_embd=16, n_head=2, value_embed_layers=(0, 1), short_window=(32,))
EVERYTHING = RECORD | dict(n_embd=32)
OFF = OptimConfig()
ON = OptimConfig(weight_decay=1.0, normuon=True, row_moments=True)
MODELS = dict(
    default=(dict(), OFF),
    tiny=(FIELDS, OFF),
    one_layer=(FIELDS | dict(n_layer=1, value_embed_layers=(0,)), OFF),
    no_value_embeds=(FIELDS | dict(value_embed_layers=()), OFF),
    softcap=(FIELDS | dict(softcap=(23.0, 5.0, 7.5)), OFF),
    ngrams=(FIELDS | dict(n_gram=3, ngram_rows=100), OFF),
    everything=(FIELDS | EVERYTHING, ON),
)


def model_of(fields, dtype=torch.float32, **more):
    model = gpt.Model(gpt.Config(**fields | more), 65, 32, dtype)
    model.init_weights(0)
    return model


def rules_of(optim, **fields):
    """The rules of a GPT, built on no device."""
    with torch.device("meta"):
        return gpt.Model(gpt.Config(**FIELDS | fields), 65, 32).update_rules(optim)


def test_the_rules_must_name_every_parameter_and_no_other():
    without = {name: rule for name, rule in RULES.items() if name != "gates"}
    for wrong in (without, RULES | dict(other=Adam(0.1)), {}):
        with pytest.raises(AssertionError, match="rules"):
            optimizer_of(Parameters(), wrong)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_model_has_a_rule(name):
    """Matrices by Muon, in banks; the long Muon updates last."""
    fields, optim = MODELS[name]
    with torch.device("meta"):
        model = gpt.Model(gpt.Config(**fields), 65, 32)
    params = dict(model.named_parameters())
    table = model.update_rules(optim)
    assert sorted(table) == sorted(params)
    kinds = [type(rule) for rule in table.values()]
    assert kinds == sorted(kinds, key=lambda kind: kind is Muon)
    assert set(kinds) == {Adam, Muon} | ({RowAdam} if optim.row_moments else set())
    for name, rule in table.items():
        assert rule.lr > 0, name
        assert isinstance(rule, Muon) == name.endswith("_bank"), name
        assert params[name].dim() >= 2 or name == "scalars", name
        assert rule.sharded or params[name].numel() < 10_000, name


def test_the_options_reach_the_rules():
    optim = OptimConfig(muon_lr=0.5, adam_lr=0.25, normuon=True, adam_every=3, row_moments=True)
    for name, rule in rules_of(optim).items():
        if name.endswith("_bank"):
            assert (rule.lr, rule.normuon, rule.every) == (0.5, True, 1), name
        else:
            assert rule.every == 3, name
    assert rules_of(optim)["lm_head"].lr == rules_of(optim)["smear_gate"].lr == 0.25
    assert not rules_of(OFF)["mlp_bank"].normuon


def test_the_records_options_reach_the_matrices():
    """Pairs of heads for Q and K, a factor for the MLPs' second matrices, decay by shape for both
    of theirs, and other betas for the head and what is tied to it; all of it off by default."""
    optim = OptimConfig(
        muon_head_pairs=True, mlp_down_lr=2.0, decay_by_shape=True, head_betas=(0.5, 0.9)
    )
    table = rules_of(optim, n_head=2, tied=0.5)
    attn, mlp = table["attn_bank"], table["mlp_bank"]
    assert (attn.paired, attn.heads, attn.factors) == ((True, True, False, False), 2, ())
    assert (mlp.paired, mlp.factors, mlp.decay_by_shape) == ((), (1.0, 2.0), True)
    assert table["lm_head"].betas == table["embed"].betas == (0.5, 0.9)
    assert table["value_embeds"].betas == (0.75, 0.95)
    plain = rules_of(OptimConfig(), n_head=2)
    for name in "attn_bank", "mlp_bank":
        expected = Muon(0.03, orthogonalise=plain[name].orthogonalise)
        assert plain[name] == expected, name
    assert plain["lm_head"].betas == (0.75, 0.95)


def test_small_parameters_learn_as_in_the_record():
    """(learning rate over the head's, betas) of its table."""
    expected = dict(
        qkvo_scales=(5, (0.9, 0.99)),
        xsa_strengths=(1, (0.9, 0.95)),
        smear_gate=(0.01, (0.9, 0.99)),
        value_gates=(1, (0.9, 0.99)),
        residual_lambdas=(5, (0.9, 0.95)),
        post_lambdas=(1, (0.9, 0.95)),
        inject_lambdas=(1, (0.9, 0.95)),
        mudd_in=(1 / 4, (0.9, 0.99)),
        mudd_out=(1 / 4, (0.9, 0.99)),
        mudd_gate_in=(1 / 10, (0.9, 0.99)),
        mudd_gate_out=(1 / 10, (0.9, 0.99)),
        mudd_gate_scale=(1 / 10, (0.9, 0.99)),
    )
    table = rules_of(OptimConfig(adam_lr=0.5), smear=True, smear_first=True)
    for name, (lr, betas) in expected.items():
        assert table[name].lr == pytest.approx(0.5 * lr), name
        assert table[name].betas == betas, name
    assert rules_of(OptimConfig(adam_lr=0.5), smear=True)["smear_gate"].lr == 0.5


def test_what_decays():
    """With the record's factors: tables little, the head and what is tied to it 31 times as
    much, small ones not."""
    large = {"value_embeds", "embed", "ngram_embeds", "lm_head", "attn_bank", "mlp_bank"}
    for tied in (0.0, 0.5):
        table = rules_of(OptimConfig(weight_decay=1.6), tied=tied)
        assert {name for name, rule in table.items() if rule.weight_decay} == large
        assert table["lm_head"].weight_decay == 1.0
        assert table["mlp_bank"].weight_decay == 1.6
        assert table["embed"].weight_decay == (1.0 if tied else pytest.approx(0.032))
        assert (table["embed"].lr == table["lm_head"].lr) == bool(tied)
        assert table["embed"].betas == table["lm_head"].betas  # untying takes the moments along
    assert not any(rule.weight_decay for rule in rules_of(OFF).values())


@pytest.mark.parametrize("tied", [0.0, 0.5])
def test_tables_have_a_moment_a_row(tied):
    """The head and what is tied to it keep Adam's, and nothing else changes."""
    without = rules_of(OptimConfig(weight_decay=1.0), tied=tied)
    table = rules_of(OptimConfig(weight_decay=1.0, row_moments=True), tied=tied)
    tables = {"value_embeds", "ngram_embeds"}
    if not tied:
        tables.add("embed")
    for name, rule in table.items():
        if name not in tables:
            expected = without[name]
            if isinstance(rule, Muon):  # each Model has a polar_express of its own
                expected = dataclasses.replace(expected, orthogonalise=rule.orthogonalise)
            assert rule == expected, name
            continue
        assert isinstance(rule, RowAdam), name
        assert rule.beta2 == without[name].betas[1], name
        for field in ("lr", "eps", "weight_decay", "sharded", "every"):
            assert getattr(rule, field) == getattr(without[name], field), name

    model = model_of(FIELDS | PIECES, tied=tied)
    state = optimizer_of(model, model.update_rules(OptimConfig(row_moments=True))).state
    for name, moments in state.items():
        assert ("m" in moments) == (name not in tables), name
    n_tables = len(model.c.value_embed_layers)
    assert state["value_embeds"]["v"].shape == (n_tables * 128, 1)  # 65 tokens, padded


def test_rounding_errors_hardly_move_the_scalars():
    """A gradient of 1e-8, which is what they have while the blocks' outputs are zero, would be
    a whole step of Adam's; where there is a real gradient, it is one."""
    for size, moved in ((1e-8, 0.01), (1e-3, 1.0)):
        model = model_of(FIELDS)
        optimizer = optimizer_of(model, model.update_rules(OptimConfig(adam_lr=0.008)))
        before = weights(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, size)
        optimizer.step(1.0, 0.9)
        for name in ("lambdas", "scalars"):
            step = (before[name] - model.get_parameter(name)) / (5 * 0.008)
            assert step.max().item() == pytest.approx(moved, rel=0.02), (name, size)
        step = (before["lm_head"] - model.lm_head) / 0.008
        assert step.max().item() == pytest.approx(1.0, rel=0.02)  # others have the usual eps


def model_step(model, optimizer, rows, n_tokens):
    """One step on rows (B, T + 1) of one document each; returns its share of the loss."""
    cu_seqlens = torch.arange(0, 32 * len(rows) + 1, 32, dtype=torch.int32)
    stage = model.c.stage(0.0, 32)
    loss = model(rows[:, :-1], rows[:, 1:], cu_seqlens, stage) / n_tokens
    loss.backward()
    optimizer.step(0.1, 0.85)
    return loss.item()


@pytest.mark.parametrize("name", ["tiny", "one_layer", "no_value_embeds", "softcap", "everything"])
def test_the_optimizer_trains_the_model(name):
    """Five steps on one batch: the loss falls and every parameter that is used has moved."""
    fields, optim = MODELS[name]
    model = model_of(fields)
    before = weights(model)
    optimizer = optimizer_of(model, model.update_rules(optim))
    tokens = torch.randint(65, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = [model_step(model, optimizer, tokens, 64) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    for name, w in weights(model).items():
        assert w.isfinite().all(), name
        used = w.numel() and (name != "scalars" or model.c.smear)
        assert not used or not torch.equal(w, before[name]), name


# --- Compiled


@pytest.fixture(scope="module", params=["plain", "everything"])
def graphs(request):
    """(which, counts of graphs of adam_update, row_scale, nesterov, balance, descend after each
    of three steps) of GPT's parameters, compiled as the optimizer compiles them; the weights
    must be those of the eager run."""
    torch._dynamo.reset()  # other tests' graphs count towards the limit
    functions = (adam_update, row_scale, nesterov, balance, descend)
    counts = [0] * len(functions)

    def counting(i):
        def backend(graph, inputs):
            counts[i] += 1
            return graph.forward

        return backend

    fields, optim = MODELS["everything" if request.param == "everything" else "tiny"]
    models = [model_of(fields) for _ in range(2)]
    compiled = optimizer_of(models[0], models[0].update_rules(optim), compile=True)
    eager = optimizer_of(models[1], models[1].update_rules(optim))
    for i, f in enumerate(functions):
        compiled.compiled[f] = torch.compile(f, fullgraph=True, dynamic=True, backend=counting(i))
    after = []
    for step in range(3):
        grads = gradients(step, {name: p.shape for name, p in models[0].named_parameters()})
        for model, optimizer in zip(models, (compiled, eager)):
            give(model, grads)
            optimizer.step(0.1 - 0.01 * step, 0.85 + 0.02 * step, torch.tensor(step != 1))
        after.append(tuple(counts))
    for name, w in weights(models[0]).items():
        torch.testing.assert_close(w, models[1].get_parameter(name).detach())
    assert compiled.compiled.keys() == set(functions)  # nothing else was compiled
    return request.param, after


def test_values_that_change_every_step_compile_nothing(graphs):
    """New learning rates, momenta, judgements and step counts: no graph after the first step's."""
    which, after = graphs
    assert after[0] == after[-1]


def test_one_graph_of_each_update_for_all_shapes(graphs):
    """Two of Adam where some parameters decay and others do not; NorMuon's balance has another
    for square matrices, descend for tables."""
    which, after = graphs
    assert after[0] == ((1, 0, 1, 0, 1) if which == "plain" else (2, 1, 1, 2, 2))


# --- A parameter that takes over another's weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untying_copies_weights_masters_moments_and_the_waiting_gradient(dtype):
    model = model_of(FIELDS, dtype, tied=0.5)
    optimizer = optimizer_of(model, model.update_rules(OFF))
    for k in range(3):
        for name, p in model.named_parameters():
            if name != "embed":  # as while tied: it has no gradient
                p.grad = draw(*p.shape, seed=k).to(p)
        optimizer.step(1.0, 0.9)
    model.lm_head.grad = torch.ones_like(model.lm_head)
    before = weights(model)
    assert not torch.equal(model.embed, model.lm_head)

    optimizer.copy({"embed": "lm_head"})
    assert torch.equal(model.embed, model.lm_head)
    head = optimizer.state["lm_head"]
    embed = optimizer.state["embed"]
    for key, x in head.items():
        if x is not None:
            assert torch.equal(x, embed[key]), key
            assert x.data_ptr() != embed[key].data_ptr(), key
    assert head["m"].any()
    assert head["v"].any()
    assert torch.equal(master_of(optimizer, "embed"), master_of(optimizer, "lm_head"))
    assert_equal(weights(model), before | dict(embed=before["lm_head"]))

    # The sum that waits for Adam is of both; what one gets from now on is its own
    assert torch.equal(model.embed.grad, model.lm_head.grad)
    assert model.embed.grad.data_ptr() != model.lm_head.grad.data_ptr()
    model.embed.grad.add_(1.0)
    assert (model.lm_head.grad == 1).all()
    model.embed.grad.sub_(1.0)

    # The same rule, so the same gradient still gives the same weights
    optimizer.step(1.0, 0.9)
    assert torch.equal(model.embed, model.lm_head)
    assert not torch.equal(model.embed, before["lm_head"])


def test_nobody_to_take_over_from_changes_nothing():
    model = model_of(FIELDS, tied=0.5)
    optimizer = optimizer_of(model, model.update_rules(OFF))
    before = everything(model, optimizer)
    optimizer.copy({})
    assert_equal(before, everything(model, optimizer))
    optimizer.copy({"embed": "lm_head"})
    assert model.embed.grad is None  # the head has none that waits
