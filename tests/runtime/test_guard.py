"""runtime/guard.py: which steps count, what is said of those that do not, alone and in whole
runs."""

import math
import random
import statistics

import pytest
import torch
from helpers import EVERYTHING, tiny, train_losses, write_text

import train_gpt as tg
from base import InputError
from models import gpt
from optim import Optimizer, gradient_report
from runtime import guard, setting_up
from runtime.guard import WINDOW, Guard

NAN, INF = math.nan, math.inf


def make(**options):
    return Guard(torch.device("cpu"), gradient_report, **options)


def judge(guard, step, loss=2.0, votes=(), **grads):
    """grads: numbers, each in a gradient of 2,000 elements; one if there are none."""

    def grad(x):
        g = torch.full((40, 50), 0.5)
        g[3, 7] = x
        return g

    grads = {n: x if x is None else grad(x) for n, x in (grads or dict(a=1.0)).items()}
    return guard.judge(step, torch.tensor(loss), grads, votes).item()


# --- loss and gradients


def test_a_finite_step_counts_and_is_reported():
    guard = make()
    assert judge(guard, 1, 2.5, (True, False, 3), a=1.0, b=-1e18, unused=None)
    (report,) = guard.reports(1)
    assert report == (1, 2.5, [1.0, 0.0, 3.0], None, pytest.approx(1e18))
    assert list(guard.reports(INF)) == []  # each once


@pytest.mark.parametrize(
    "loss, grads, said",
    [
        (NAN, dict(a=1.0), "the training loss is nan"),
        (INF, dict(a=1.0), "the training loss is inf"),
        (NAN, dict(a=NAN), "the training loss is nan"),
        (2.0, dict(a=1.0, b=NAN, c=1.0), "the gradient of b is not finite (loss 2.0000)"),
        (2.0, dict(a=1.0, b=-INF, c=None), "the gradient of b is not finite (loss 2.0000)"),
        (2.0, dict(a=INF, b=1.0, c=NAN), "the gradient of a, c is not finite (loss 2.0000)"),
    ],
)
def test_one_number_that_is_not_finite_and_the_step_does_not_count(loss, grads, said):
    guard = make()
    assert judge(guard, 1, a=1.0)
    assert not judge(guard, 2, loss, **grads)
    fine, bad = guard.reports(2)
    assert fine.complaint is None and bad.step == 2 and bad.complaint == said


def test_strict_lets_no_later_step_count_until_reset():
    guard = make()
    assert not judge(guard, 1, NAN)
    assert not judge(guard, 2) and not judge(guard, 3, a=1.0)
    assert [r.complaint for r in guard.reports(3)] == [
        "the training loss is nan",
        *["it follows a bad one"] * 2,
    ]
    judge(guard, 4)
    guard.reset()
    assert list(guard.reports(INF)) == []
    assert judge(guard, 1)


def test_otherwise_the_next_step_counts_again():
    guard = make(strict=False)
    counts = [judge(guard, i, loss) for i, loss in enumerate((2.0, NAN, 2.0, INF, 2.0))]
    assert counts == [True, False, True, False, True]
    assert [r.step for r in guard.reports(INF) if r.complaint] == [1, 3]


def test_what_counts_is_decided_on_the_device():
    """A tensor, for the update to look at: nothing in judge asks for its value, which meta
    tensors have none of."""
    guard = Guard(
        torch.device("meta"), lambda grads: torch.empty(len(grads), device="meta"), spike_sigmas=3.0
    )
    guard.send = lambda *args: None  # the one copy to the host, which is not waited for
    ok = guard.judge(
        1, torch.empty((), device="meta"), {"a": torch.empty(4, device="meta")}, (1, 0)
    )
    assert ok.is_meta and ok.dtype == torch.bool and ok.shape == ()


def test_reports_come_late_and_in_order_where_the_host_runs_ahead():
    guard = make()
    guard.lag = 2  # as on a GPU
    seen = []
    for step in range(1, 6):
        judge(guard, step, float(step))
        seen.append([r.step for r in guard.reports(step)])
    assert seen == [[], [], [1], [2], [3]]
    assert [(r.step, r.loss) for r in guard.reports(INF)] == [(4, 4.0), (5, 5.0)]


# --- spikes


def series(n, seed=0):
    r = random.Random(seed)
    return [4 + r.gauss(0, 0.1) for _ in range(n)]


def test_recent_losses_have_the_mean_and_variance_of_those_that_counted():
    guard, losses = make(strict=False, spike_sigmas=50.0), series(WINDOW)
    for i, loss in enumerate(losses):
        assert judge(guard, i, loss)
        assert not judge(guard, i, NAN) and not judge(guard, i, INF)
    steps, mean, variance = guard.recent.tolist()
    assert steps == WINDOW
    assert mean == pytest.approx(statistics.mean(losses), rel=1e-5)
    assert variance == pytest.approx(statistics.pvariance(losses), rel=1e-3)


@pytest.mark.parametrize("sigmas", [4.0, 8.0])
def test_a_spike_does_not_count_and_leaves_no_trace(sigmas):
    guard = make(strict=False, spike_sigmas=sigmas)
    assert all(judge(guard, i, loss) for i, loss in enumerate(series(300)))
    _, mean, variance = guard.recent.tolist()
    before = guard.recent.clone()
    sd = variance**0.5
    assert sd == pytest.approx(0.1, rel=0.2)
    assert not judge(guard, 300, mean + (sigmas + 0.1) * sd)
    assert torch.equal(guard.recent, before)
    assert judge(guard, 301, mean + (sigmas - 0.1) * sd)
    assert judge(guard, 302, mean - 50 * sd)  # down is welcome
    *_, spike, near, down = guard.reports(INF)
    assert spike.complaint == f"the training loss jumped to {spike.loss:.4f}"
    assert not near.complaint and not down.complaint


def test_before_the_window_is_full_nothing_is_a_spike():
    guard = make(spike_sigmas=1.0)
    assert all(judge(guard, i, 1.0) for i in range(WINDOW - 1)) and judge(guard, WINDOW, 1e6)
    guard = make(spike_sigmas=1.0)
    assert all(judge(guard, i, loss) for i, loss in enumerate([1.0, 1.2] * (WINDOW // 2)))
    assert not judge(guard, WINDOW, 1e6)


def test_a_loss_that_falls_drifts_or_settles_on_a_new_level_is_followed():
    guard = make(spike_sigmas=5.0)
    r = random.Random(1)
    falling = [4 * math.exp(-i / 200) + r.gauss(0, 0.05) for i in range(600)]
    rising = [falling[-1] + i / 2000 + r.gauss(0, 0.05) for i in range(600)]
    assert all(judge(guard, i, loss) for i, loss in enumerate(falling + rising))


def test_without_sigmas_nothing_is_a_spike():
    guard = make()
    assert all(judge(guard, i, loss) for i, loss in enumerate(series(200) + [1e30]))
    assert not guard.recent.any()


# --- whole runs


class PoisonedGradient(torch.autograd.Function):
    """Zero, with a gradient of one NaN."""

    @staticmethod
    def forward(ctx, p):
        ctx.shape = p.shape
        return p.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        grad = upstream.new_zeros(ctx.shape)
        grad.view(-1)[7] = NAN
        return grad


POISON = dict(
    loss=lambda model, loss: loss * NAN,
    jump=lambda model, loss: loss * 100,
    gradient=lambda model, loss: loss + PoisonedGradient.apply(model.attn_bank),
)


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(kind, steps): from then on these steps' batches are; returns {step: state after
    it}."""

    def poison(kind, steps):
        states = {}
        forward = gpt.Model.forward
        update = Optimizer.step

        def bad(self, *args, **kwargs):
            loss = forward(self, *args, **kwargs)
            if torch.is_grad_enabled() and len(states) + 1 in steps:
                return POISON[kind](self, loss)
            return loss

        def listen(self, *args):
            update(self, *args)
            state = {name: p.detach().clone() for name, p in self.params.items()}
            for name, tensors in self.state.items():
                for key, x in tensors.items():
                    if x is not None:
                        state[f"{key}/{name}"] = x.clone()
            states[len(states) + 1] = state

        monkeypatch.setattr(gpt.Model, "forward", bad)
        monkeypatch.setattr(Optimizer, "step", listen)
        return states

    return poison


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.mark.parametrize(
    "kind, said",
    [
        ("loss", "the training loss is nan"),
        ("gradient", "the gradient of attn_bank is not finite (loss "),
    ],
)
@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["nothing", "everything"])
def test_a_poisoned_batch_stops_the_run_with_the_weights_before_it(
    text, tmp_path, poisoned, kind, said, fields
):
    states = poisoned(kind, {7})
    with pytest.raises(InputError) as e:
        tg.train(tiny(text, tmp_path, **fields))
    line = str(e.value)
    assert f"step 7: {said}" in line and "--max-skips" in line
    assert "\n" not in line
    assert max(states) == 7
    assert same(states[6], states[7]) and not same(states[5], states[6])
    assert len(train_losses(tmp_path / "run")) == 6
    assert f"error: step 7: {said}" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_max_skips_lets_so_many_pass(text, tmp_path, poisoned, kind, capsys):
    states = poisoned(kind, {4, 9})
    result = tg.train(tiny(text, tmp_path, max_skips=2))
    assert result["steps"] == 20 and math.isfinite(result["val_loss"])
    for step in range(2, 21):
        assert same(states[step - 1], states[step]) == (step in (4, 9)), step
    said = capsys.readouterr().err
    assert "step 4 does not count: the " in said and "(1 of 2)" in said
    assert "step 9 does not count: the " in said and "(2 of 2)" in said
    assert len(train_losses(tmp_path / "run")) == 20


def test_max_skips_stops_at_one_more(text, tmp_path, poisoned):
    states = poisoned("gradient", {4, 9, 12})
    with pytest.raises(InputError, match="^step 12: the gradient of attn_bank"):
        tg.train(tiny(text, tmp_path, max_skips=2))
    assert max(states) == 12 and same(states[11], states[12]) and not same(states[10], states[11])


@pytest.mark.parametrize("bad", [6, 7])
def test_a_bad_batch_spoils_no_other_where_adam_waits(text, tmp_path, poisoned, bad):
    """adam_every = 2: the bad step, first or second of a pair, is the one that is skipped."""
    states = poisoned("gradient", {bad})
    result = tg.train(tiny(text, tmp_path, max_skips=1, adam_every=2))
    assert result["steps"] == 20
    for step in range(3, 21):
        assert same(states[step - 1], states[step]) == (step == bad), step


def test_a_jump_is_skipped_where_it_is_looked_for(text, tmp_path, poisoned, monkeypatch, capsys):
    monkeypatch.setattr(guard, "WINDOW", 8)
    states = poisoned("jump", {15})
    result = tg.train(tiny(text, tmp_path, max_skips=1, spike_sigmas=6.0))
    assert result["steps"] == 20
    assert [step for step in range(2, 21) if same(states[step - 1], states[step])] == [15]
    assert "step 15 does not count: the training loss jumped to " in capsys.readouterr().err


def test_a_validation_loss_that_is_not_finite_ends_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(setting_up, "evaluate", lambda *args: dict(val_loss=NAN, val_bpb=NAN))
    with pytest.raises(InputError, match="^step 10: the validation loss is nan"):
        tg.train(tiny(text, tmp_path))
