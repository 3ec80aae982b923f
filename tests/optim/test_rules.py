"""What all update rules keep: a step that is not ok never happened, compiled is eager and one
kernel, and nothing waits for a GPU."""

import functools
import typing

import pytest
import torch
from kernel_checks import DEVICE, draw
from optim_helpers import BAD, KINDS, bits, flag, start_at

from optim import adam_update, gradient_report, muon_update, row_update
from optim.masters import descend, join, store
from optim.muon import balance, nesterov, new_second_moment
from optim.rows import row_scale
from runtime.machine import lacks_for_compiling

# --- Every update once


class Call(typing.NamedTuple):
    name: str
    before: list  # what it may write
    after: list


SPECIAL = [-0.0, 0.0, 1e-42, -1e-42]  # signed zeros and subnormals


def special(x, *values):
    values = SPECIAL + list(values)
    x.view(-1)[: len(values)] = torch.tensor(values, device=DEVICE)
    return x


def guarded_calls(kind, parts, number, bad, where, ok):
    """[Call] of every update, with a `bad` entry in the gradient `where`.

    States have signed zeros, subnormals and numbers that bf16 lacks. parts: {function: what to
    call in its place}; number: float -> hyperparameter.
    """
    calls = []

    def call(name, fn, written, *args):
        written = [x for x in written if x is not None]
        before = [x.clone() for x in written]
        fn(*args)
        calls.append(Call(name, before, written))

    def fresh(*shape):
        """(p, companion, gradient)."""
        p, companion = start_at(kind, torch.zeros(shape, device=DEVICE))
        store(p, companion, special(draw(*shape, seed=5), 3.3e38))
        grad = draw(*shape, seed=6).to(p.dtype)
        grad.view(-1)[where] = bad
        return p, companion, grad

    def numbers(*values):
        return map(number, values)

    def given(function, *names):
        """The function with those of its parts that there are others for."""
        return functools.partial(function, **{f.__name__: parts[f] for f in names if f in parts})

    # On flat tensors
    p, c, g = fresh(40)
    m = special(draw(40, seed=7))
    v = draw(40, seed=8).square()
    fn = parts.get(adam_update, adam_update)
    hyperparameters = numbers(0.1, 0.9, 0.99, 1e-8, 0.1, 0.01, 0.01)
    call("adam_update", fn, (p, c, m, v), p, c, g, m, v, *hyperparameters, ok)
    p, c, g = fresh(40)
    fn = parts.get(descend, descend)
    call("descend", fn, (p, c), p, c, g, *numbers(0.1, 0.01), None, ok)
    fn = parts.get(nesterov, nesterov)
    call("nesterov", fn, (m,), g, m, number(0.9), ok)

    # On a table
    p, c, g = fresh(10, 4)
    v = draw(10, 1, seed=8).square()
    fn = given(row_update, row_scale, descend)
    hyperparameters = numbers(0.1, 0.99, 1e-8, 0.01, 0.01)
    call("row_update", fn, (p, c, v), p, c, g, v, *hyperparameters, ok)

    # On matrices
    fn = given(muon_update, nesterov, balance, descend)
    for shape in ((2, 5, 4), (2, 4, 5)):
        p, c, g = fresh(*shape)
        m = special(draw(*shape, seed=7))
        v = new_second_moment(p) + 1e-3
        hyperparameters = numbers(0.1, 0.9)
        more = numbers(0.9, 0.01)
        name = f"muon_update {shape}"
        call(name, fn, (p, c, m, v), p, c, g, m, *hyperparameters, v, *more, ok)
    return calls


def same(before, after):
    return all(torch.equal(bits(b), bits(a)) for b, a in zip(before, after))


def check_guard(kind, parts, number):
    for bad in BAD:
        for where in (0, 17, -1, slice(None)):
            for call in guarded_calls(kind, parts, number, bad, where, flag(False)):
                assert same(call.before, call.after), (call.name, bad, where)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_ok_never_happened(kind):
    """No bit changes, whatever is in the gradient, and True is no guard."""
    check_guard(kind, {}, float)
    plain = guarded_calls(kind, {}, float, 0.5, 0, None)
    guarded = guarded_calls(kind, {}, float, 0.5, 0, flag(True))
    for a, b in zip(plain, guarded):
        assert same(a.after, b.after), a.name
        assert not same(a.before, a.after), a.name

    for call in guarded_calls(kind, {}, float, BAD[0], 0, None):  # nobody stops these
        assert any(x.isnan().any() for x in call.after), call.name


@pytest.mark.parametrize("kind", KINDS)
def test_adam_without_decay_and_guard_is_adam_with_none(kind):
    def five_steps(**kwargs):
        p, companion = start_at(kind, draw(50))
        moments = torch.zeros(2, 50, device=DEVICE)
        for i in range(5):
            grad = draw(50, seed=i).to(p.dtype)
            adam_update(p, companion, grad, *moments, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.01, **kwargs)
        return bits(join(p, companion)), bits(moments)

    expected = five_steps()
    for ok in (None, True, flag(True)):
        assert all(map(torch.equal, expected, five_steps(shrink=0.0, ok=ok)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_dropped_step(kind):
    """With bad batches in between, and a guard from the gradients themselves, all ends as
    without them."""
    found = []
    for bad in (False, True):
        p, companion = start_at(kind, draw(2, 6, 4))
        m = torch.zeros(2, 6, 4, device=DEVICE)
        v = new_second_moment(p)
        for i in range(6):
            grads = [draw(2, 6, 4, seed=i)]
            if bad:
                spoiled = torch.where(draw(2, 6, 4, seed=50 + i) > 1, BAD[i % 3], grads[0])
                grads.insert(0, spoiled)
            for g in grads:
                ok = gradient_report([g]).sum().isfinite()
                muon_update(p, companion, g.to(p.dtype), m, 0.1, 0.9, v, 0.9, 0.01, ok)
        found.append([bits(x) for x in (p, m, v)])
    assert all(map(torch.equal, *found))


def test_on_a_gpu_scalars_on_the_cpu_and_the_guard_beside_the_weights(monkeypatch):
    """Shapes and devices only, so on any machine: nothing mixes what PyTorch will not, and
    nothing asks for a value, which fake tensors do not have."""
    from torch._subclasses import FakeTensorMode

    def copy_(self, other):  # the real one asks for a CUDA driver
        assert self.device == other.device
        assert self.shape == other.shape
        return self

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")

    with FakeTensorMode(), torch.no_grad():
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)
        scalar = torch.empty(())
        ok = empty(dtype=torch.bool)
        for dtype, low in ((torch.bfloat16, torch.int16), (torch.float32, None)):
            p = empty(2, 8, 4, dtype=dtype)
            m = empty(2, 8, 4)
            c = empty(2, 8, 4, dtype=low) if low else None
            flat_c = c.view(-1) if low else None
            flat_m = m.view(-1)
            adam_update(p.view(-1), flat_c, p.view(-1), flat_m, flat_m, *[scalar] * 7, ok)
            rows_c = c.view(16, 4) if low else None
            rows = p.view(16, 4)
            row_update(rows, rows_c, rows, empty(16, 1), *[scalar] * 5, ok)
            for v in (None, empty(2, 8, 1)):
                muon_update(p, c, p, m, scalar, scalar, v, scalar, scalar, ok)
            report = gradient_report([p, m])
            assert report.shape == (2,)
            assert report.device.type == "cuda"


# --- Compiled


def number(x):
    return torch.tensor(x, dtype=torch.float32)


def compile_parts(dynamic=True):
    """Each part compiled, as the trainer does it; each says on its own when it needs more than
    one kernel."""
    from torch._inductor import metrics

    def part(fn):
        compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic)
        allowed = 4 if fn is row_scale else 1

        def wrapped(*args, **kwargs):
            metrics.reset()
            with torch.no_grad():
                result = compiled(*args, **kwargs)
            # None if this graph was there already
            assert fn is balance or metrics.generated_kernel_count <= allowed
            return result

        return wrapped

    return {fn: part(fn) for fn in (adam_update, row_scale, nesterov, balance, descend)}


@pytest.fixture(scope="module")
def compiled():
    if DEVICE.type == "cpu" and (why := lacks_for_compiling()):
        pytest.skip(why)
    with torch._dynamo.config.patch(recompile_limit=64):
        yield compile_parts()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1003, pytest.param(520, marks=pytest.mark.slow)])
def test_compiled_is_eager_and_one_kernel(n, kind, compiled):
    grads = [draw(n, seed=i) for i in range(4)]
    results = []
    for parts in ({f: f for f in compiled}, compiled):
        p, companion = start_at(kind, draw(n))
        moments = torch.zeros(2, n, device=DEVICE)
        for t, lr in enumerate([0.1, 0.1, 0.05, 0.0], start=1):
            grad = grads[t - 1].to(p.dtype)
            hyperparameters = map(number, (lr, 0.9, 0.99, 1e-8, 1 - 0.9**t, 1 - 0.99**t))
            shrink = number(0.01)
            parts[adam_update](
                p, companion, grad, *moments, *hyperparameters, shrink=shrink, ok=None
            )
        m = torch.zeros(n, device=DEVICE)
        ahead = parts[nesterov](grads[0].to(p.dtype), m, number(0.9), None)
        parts[descend](p, companion, ahead, number(0.05), number(0.01), None, None)
        results.append([join(p, companion), m, ahead, moments])
    for a, b in zip(*results):
        rtol = 1e-6 if a.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(a, b, atol=1e-6, rtol=rtol)


@pytest.mark.parametrize(
    "kind, dynamic",
    [
        pytest.param(KINDS[2], True, marks=pytest.mark.slow),
        pytest.param(KINDS[1], False, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_that_are_not_ok_never_happened(kind, dynamic, compiled):
    """Bit for bit, and in one kernel; sizes known, as on a GPU, or not, as on a CPU. All others
    are as eager ones."""
    parts = compiled if dynamic else compile_parts(False)
    check_guard(kind, parts, number)
    eager = guarded_calls(kind, {}, number, 0.5, 0, flag(True))
    ours = guarded_calls(kind, parts, number, 0.5, 0, flag(True))
    for a, b in zip(eager, ours):
        for x, y in zip(a.after, b.after):
            if x.dtype == torch.int16:
                continue
            rtol = 1e-5 if x.dtype == torch.float32 else 1e-2
            named = functools.partial("{}: {}".format, a.name)
            torch.testing.assert_close(x, y, atol=1e-5, rtol=rtol, msg=named)


def test_compiled_weights_keep_inf_and_nan(compiled):
    inf = float("inf")
    nan = float("nan")
    p, low = start_at(KINDS[1], torch.tensor([1.0, 3.3895e38, -1.0, 0.0] * 5, device=DEVICE))
    update = torch.tensor([nan, -1e36, inf, 0.0] * 5, device=DEVICE)
    compiled[descend](p, low, update, number(1.0), number(0.0), None, None)
    start = torch.tensor([nan, 3.3895e38, -inf, 0.0] * 5, device=DEVICE).bfloat16().float()
    master = torch.where(update.isinf(), -inf, start - update)
    torch.testing.assert_close(join(p, low), master, equal_nan=True, rtol=1e-6, atol=0)
    assert p[0].isnan()
    assert p[1].isinf()
    assert p[2] == -inf
    assert p[3] == 0
