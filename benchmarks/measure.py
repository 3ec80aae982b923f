"""Measuring cases: compare every variant with the reference, time the right ones.

A variant that raises costs one line in the result. After an illegal memory access nothing on the
GPU works any more, and each case that is left says so.
"""

import dataclasses
import gc
import math
import time

import torch

from base import one_line
from benchmarks import timing
from benchmarks.cases import BF16, BOTH, FORWARD, INFERENCE, Draw
from benchmarks.report import say


@dataclasses.dataclass
class Machine:
    """Where work is timed. rates: what shares are of, in bytes or FLOPs per second."""

    device: torch.device
    clock: object
    cache_bytes: int = 0
    graphs: bool = False
    seconds: float = 0.3  # of timing for all variants of a case in one direction
    rates: dict = dataclasses.field(default_factory=dict)

    def clean(self):
        """Give memory back; raises RuntimeError where the device does not answer any more."""
        gc.collect()
        self.clock.wait()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def named(e):
    return f"{type(e).__name__}: {one_line(e)}"[:240].rstrip(": ")


def failure(case, tokens, error, direction=None, variant=None):
    """The row of what was not measured."""
    said = named(error)
    return dict(case=case, tokens=tokens, direction=direction, variant=variant, error=said)


# --- one case


def tensors(x):
    """The tensors of what a function returned."""
    if not isinstance(x, tuple | list):
        x = [x]
    return [t for t in x if isinstance(t, torch.Tensor)]


def shape_of(inputs):
    """The inputs in words: their shapes and dtypes, each once."""
    words = []
    for x in inputs:
        lengths = ", ".join(f"{n:,}" for n in x.shape)
        words.append(f"({lengths}) {str(x.dtype).removeprefix('torch.')}")
    return ", ".join(dict.fromkeys(words))


def with_gradient(outputs):
    return [y for y in tensors(outputs) if y.requires_grad]


def backward(case, outputs, inputs, upstream, retain):
    leaves = [inputs[i] for i in case.leaves]
    return torch.autograd.grad(outputs, leaves, upstream, retain_graph=retain)


def results_of(case, fn, inputs, upstream, draw):
    """What a variant is compared by: outputs and gradients; empty tensors stand for None.

    upstream: gradients of the outputs; filled by the first variant, random ones, 1 for losses.
    """
    results = tensors(fn(*inputs))
    if case.leaves:
        outputs = with_gradient(results)
        upstream += [draw.like(y) for y in outputs[len(upstream) :]]
        results += backward(case, outputs, inputs, upstream, retain=False)
    return [x.detach() for x in results if x.is_floating_point() and x.numel()]


def compare(results, reference, tolerance):
    """The largest relative error; raises ValueError where it is too large."""
    if len(results) != len(reference):
        raise ValueError(f"wrong: {len(results)} results where the reference has {len(reference)}")
    errors = [timing.relative_error(a, b) for a, b in zip(results, reference)]
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if not worst <= tolerance:
        raise ValueError(
            f"wrong: result {errors.index(worst)} is {worst:.2g} off the reference, "
            f"{tolerance:g} allowed"
        )
    return worst


class Measurement:
    """One case on one machine: rows collects what was measured and what went wrong."""

    def __init__(self, name, case, tokens, machine, rows):
        self.name = name
        self.case = case
        self.tokens = tokens
        self.machine = machine
        self.rows = rows
        self.fns = {}  # variant -> its function, where it is right
        self.difference = {}  # variant -> its relative error
        self.draw = Draw(machine.device)

        # As many sets of inputs as no cache can hold
        self.sets = [case.inputs(self.draw)]
        self.shape = shape_of(self.sets[0])
        sizes = {x.data_ptr(): x.numel() * x.element_size() for x in self.sets[0]}
        sets = timing.sets_needed(sum(sizes.values()), machine.cache_bytes)
        for _ in range(sets - 1):
            self.sets.append(case.inputs(self.draw))
        self.upstream = [[] for _ in self.sets]
        for inputs in self.sets:
            for i in case.leaves:
                inputs[i].requires_grad_()

    def failed(self, variant, direction, e):
        self.rows.append(failure(self.name, self.tokens, e, direction, variant))

    def attempt(self, variant, direction, fn, *args):
        """fn(*args), or None and a row that says why not."""
        try:
            result = fn(*args)
            self.machine.clock.wait()
            return result
        except Exception as e:
            self.failed(variant, direction, e)
        self.machine.clean()  # out here, where the exception no longer holds memory

    def compare(self):
        """Make every variant and hold it against the reference; fns has those that are right."""
        case = self.case
        self.reference = None

        def prepare(variant, v):
            fn = v.make(*self.sets[0])
            results = results_of(case, fn, self.sets[0], self.upstream[0], self.draw)
            if variant == next(iter(case.variants)):
                self.reference = results
            if self.reference is not None:
                self.difference[variant] = compare(results, self.reference, v.tolerance)
            return fn

        with torch.set_grad_enabled(bool(case.leaves)):
            for variant, v in case.variants.items():
                fn = self.attempt(variant, None, prepare, variant, v)
                if fn is not None:
                    self.fns[variant] = fn
        del self.reference
        for upstream in self.upstream[1:]:
            upstream += [self.draw.like(dy) for dy in self.upstream[0]]
        self.machine.clean()

    def sampler(self, variant, direction, pool):
        """What times a variant: a graph of calls, or the calls where they cannot be captured."""
        call = call_of(self.case, self.fns[variant], self.sets, self.upstream, direction)
        s = timing.Sampler(call, len(self.sets), self.machine.clock)
        if pool and not timing.synchronizes(call):
            s.capture(pool)
        s.run()
        return s

    def time(self, direction):
        """A row for each variant that is right, in one direction."""
        machine = self.machine
        pool = torch.cuda.graph_pool_handle() if machine.graphs else None
        samplers = {}
        with torch.set_grad_enabled(bool(self.case.leaves) and direction != INFERENCE):
            for variant in self.fns:
                s = self.attempt(variant, direction, self.sampler, variant, direction, pool)
                if s is not None:
                    samplers[variant] = s
            args = (timing.interleaved, samplers, machine.clock, machine.seconds)
            timed = self.attempt(None, direction, *args)
        samples, errors = timed or ({}, {})
        for variant, e in errors.items():
            self.failed(variant, direction, e)
        for variant, times in samples.items():
            self.rows.append(self.row(variant, direction, timing.summary(times), samplers[variant]))

    def row(self, variant, direction, times, sampler):
        case = self.case
        v = case.variants[variant]
        work = case.work[direction]
        rate = v.rate or ("copy" if case.unit == "bytes" else "bf16")
        if isinstance(rate, dict):
            rate = rate.get(direction)
        per_second = work / times["median_us"] * 1e6
        most = self.machine.rates.get(rate)
        return dict(
            case=self.name,
            shape=self.shape,
            tokens=self.tokens,
            direction=direction,
            variant=variant,
            **times,
            calls=sampler.calls,
            method=sampler.method,
            difference=self.difference.get(variant),
            unit=case.unit,
            work=work,
            per_second=per_second,
            rate=rate,
            share=per_second / most if most else None,
        )


def measure(name, make, tokens, machine):
    """All variants of the case that make() gives, in all directions -> rows."""
    begin = time.perf_counter()
    rows = []
    try:
        torch._dynamo.reset()
        case = make()
        m = Measurement(name, case, tokens, machine, rows)
        m.compare()
        for direction in case.work:
            m.time(direction)
            machine.clean()
    except Exception as e:
        rows.append(failure(name, tokens, e))
    say(f"{name}, {tokens:,} tokens: {time.perf_counter() - begin:.1f} s")
    return rows


def call_of(case, fn, sets, upstream, direction):
    """call(i): one pass in a direction over the i-th set of inputs; returns what has to outlive
    the next calls."""
    if direction == INFERENCE:
        plain = [[x.detach() for x in inputs] for inputs in sets]
        return lambda i: fn(*plain[i])
    if direction == FORWARD:
        return lambda i: fn(*sets[i])

    def both(i):
        outputs = with_gradient(fn(*sets[i]))
        return backward(case, outputs, sets[i], upstream[i], retain=False)

    if direction == BOTH:
        return both
    outputs = [with_gradient(fn(*inputs)) for inputs in sets]
    return lambda i: backward(case, outputs[i], sets[i], upstream[i], retain=True)


def measured_rates(machine, n=8192, elements=2**28):
    """{"copy": bytes/s, "bf16": FLOP/s, "fp8": FLOP/s} of a copy and of n x n products; None for
    what fails.

    Under the clock that the ops are under; runtime.environment.machine_probe, in the trainer, takes
    the host's and so measures less.
    """
    draw = Draw(machine.device)

    def copy():
        x = draw(elements)
        y = torch.empty_like(x)
        return lambda i: y.copy_(x), 2 * x.numel() * x.element_size()

    def bf16():
        a = draw(n, n)
        b = draw(n, n)
        return lambda i: a @ b, 2 * n**3

    def fp8():
        a = draw(n, n, dtype=torch.float8_e4m3fn)
        b = draw(n, n, dtype=torch.float8_e4m3fn)
        options = dict(out_dtype=BF16, use_fast_accum=True)
        one = torch.ones((), device=machine.device)
        return lambda i: torch._scaled_mm(a, b.t(), one, one, **options), 2 * n**3

    rates = {}
    for name, make in dict(copy=copy, bf16=bf16, fp8=fp8).items():
        try:
            call, work = make()
            sampler = timing.Sampler(call, 1, machine.clock)
            samples, failed = timing.interleaved({name: sampler}, machine.clock, machine.seconds)
            if failed:
                raise failed[name]
            rates[name] = work / timing.summary(samples[name])["median_us"] * 1e6
        except Exception as e:
            say(f"rate of {name}: {named(e)}")
            rates[name] = None
        call = sampler = None  # their tensors are large
        machine.clean()
    return rates
