"""Measuring cases: compare every variant with the reference, time the right ones, survive the
others.

The work is done by a second process. A variant that raises costs one line in the result. One that
hangs, or takes its process along (after an illegal memory access nothing on the GPU works any
more), costs one line too: the watching process starts another one, which leaves that variant out
and goes on.
"""

import collections
import dataclasses
import gc
import math
import multiprocessing
import os
import time

import torch

from benchmarks import timing
from benchmarks.cases import BF16, BOTH, CASES, FORWARD, GPT2_SMALL, INFERENCE, Draw
from benchmarks.report import say

PROCESSES = 16  # at most, one after the other


class Lost(Exception):
    """The device does not answer any more, or a capture failed, which leaves allocator and random
    numbers unusable: only a new process can go on."""


@dataclasses.dataclass
class Machine:
    """Where work is timed. rates: what shares are of, in bytes or FLOPs per second."""

    device: torch.device
    clock: object
    cache_bytes: int = 0
    memory_bytes: float = math.inf
    graphs: bool = False
    seconds: float = 0.3  # of timing for all variants of a case in one direction
    rates: dict = dataclasses.field(default_factory=dict)

    def clean(self):
        """Give memory back; raises Lost where the device is."""
        gc.collect()
        try:
            self.clock.wait()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as e:
            raise Lost(one_line(e)) from None


def one_line(e):
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:240].rstrip(": ")


def failure(case, tokens, error, direction=None, variant=None):
    """The row of what was not measured."""
    return dict(case=case, tokens=tokens, direction=direction, variant=variant, error=error)


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
    """What a variant is compared by: outputs, gradients, inputs if it changes them; empty tensors
    stand for None.

    upstream: gradients of the outputs; filled by the first variant, random ones, 1 for losses.
    """
    if case.mutates:
        inputs = [x.clone() for x in inputs]
    results = tensors(fn(*inputs))
    if case.leaves:
        outputs = with_gradient(results)
        upstream += [draw.like(y) for y in outputs[len(upstream) :]]
        results += backward(case, outputs, inputs, upstream, retain=False)
    if case.mutates:
        results += inputs
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

    def __init__(self, name, case, tokens, machine, tell, broken):
        self.name = name
        self.case = case
        self.tokens = tokens
        self.machine = machine
        self.tell = tell
        self.broken = broken
        self.rows = []
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
        self.rows.append(failure(self.name, self.tokens, one_line(e), direction, variant))

    def attempt(self, variant, direction, what, fn, *args):
        """fn(*args), or None and a row that says why not."""
        self.tell(variant, what)
        try:
            result = fn(*args)
            self.machine.clock.wait()
            return result
        except Lost:
            raise
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
            if v.tolerance is not None and self.reference is not None:
                self.difference[variant] = compare(results, self.reference, v.tolerance)
            return fn

        with torch.set_grad_enabled(bool(case.leaves)):
            for variant, v in case.variants.items():
                if variant not in self.broken:
                    fn = self.attempt(variant, None, "comparing", prepare, variant, v)
                    if fn is not None:
                        self.fns[variant] = fn
        del self.reference
        for upstream in self.upstream[1:]:
            upstream += [self.draw.like(dy) for dy in self.upstream[0]]
        self.machine.clean()

    def sampler(self, variant, direction, pool):
        """What times a variant: a graph of calls, or the calls where they cannot be captured."""
        v = self.case.variants[variant]
        call = call_of(self.case, self.fns[variant], self.sets, self.upstream, direction)
        s = timing.Sampler(call, len(self.sets), self.machine.clock)
        if v.graph and pool and not timing.synchronizes(call):
            self.tell(variant, f"capturing {direction}")
            try:
                s.capture(pool)
            except Exception as e:
                raise Lost(one_line(e)) from None
        s.run()
        return s

    def time(self, direction):
        """A row for each variant that is right, in one direction."""
        machine = self.machine
        pool = torch.cuda.graph_pool_handle() if machine.graphs else None
        samplers = {}
        with torch.set_grad_enabled(bool(self.case.leaves) and direction != INFERENCE):
            for variant in self.fns:
                args = (self.sampler, variant, direction, pool)
                s = self.attempt(variant, direction, direction, *args)
                if s is not None:
                    samplers[variant] = s
            args = (timing.interleaved, samplers, machine.clock, machine.seconds)
            timed = self.attempt(None, direction, direction, *args)
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


def measure(name, case, tokens, machine, tell=lambda variant, what: None, broken=()):
    """All variants of a case in all directions -> rows.

    broken: variants to leave out; tell(variant, what): called before anything that may not return.
    Raises Lost.
    """
    begin = time.perf_counter()
    m = Measurement(name, case, tokens, machine, tell, broken)
    m.compare()
    for direction in case.work:
        m.time(direction)
        machine.clean()
    say(f"{name}, {tokens:,} tokens: {time.perf_counter() - begin:.1f} s")
    return m.rows


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


def fit(build, size, memory_bytes):
    """The case at size.tokens, or at the largest power-of-two part of them that memory is enough
    for."""
    while True:
        case = build(size)
        if case.peak_bytes <= 0.8 * memory_bytes or size.tokens < 256:
            return case, size.tokens
        size = size._replace(tokens=size.tokens // 2)


def measured_rates(machine, n=8192, elements=2**30):
    """{"copy": bytes/s, "bf16": FLOP/s, "fp8": FLOP/s} of a copy and of n x n products; None for
    what fails.

    Under the clock that the ops are under; runtime.environment.machine_probe, in the trainer, takes
    the host's and so measures less.
    """
    draw = Draw(machine.device)

    def copy():
        x = draw(elements if machine.memory_bytes > 16e9 else elements // 4)
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
            say(f"rate of {name}: {one_line(e)}")
            rates[name] = None
        call = sampler = None  # their tensors are large
        machine.clean()
    return rates


# --- the process that works and the one that watches


def work(plan, broken, deadline, connection):
    """The process that works: measure [(name, tokens), ...] on the GPU; what happens goes into
    the connection."""
    send = connection.send
    try:
        send(dict(kind="at", item=None, variant=None, what="measuring the machine's rates"))
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default one
        from torch._functorch import config as functorch_config

        # compiled backward passes are run many times over
        functorch_config.donated_buffer = False
        machine = Machine(
            device=torch.device("cuda"),
            clock=timing.CudaClock(),
            cache_bytes=torch.cuda.get_device_properties(0).L2_cache_size,
            memory_bytes=torch.cuda.mem_get_info()[0],
            graphs=True,
        )
        machine.rates = measured_rates(machine)
        send(dict(kind="rates", rates=machine.rates))
        work_off(plan, broken, machine, deadline, send)
        send(dict(kind="rates", rates=measured_rates(machine)))  # again, to see a drift
        send(dict(kind="end"))
    except Lost as e:
        send(dict(kind="lost", error=str(e)))
        connection.close()
        os._exit(1)  # leaving in order would wait for the device


def work_off(plan, broken, machine, deadline, send, size=GPT2_SMALL):
    """Measure case after case until the deadline, and send what happens."""
    gc.collect()
    gc.freeze()  # torch's own objects need no second look; collecting is part of every case
    for name, tokens in plan:
        if time.time() > deadline:
            break

        def tell(variant, what):
            send(dict(kind="at", item=(name, tokens), variant=variant, what=what))

        try:
            tell(None, "building")
            torch._dynamo.reset()
            size = size._replace(tokens=tokens)
            case, fitting = fit(CASES[name], size, machine.memory_bytes)
            rows = measure(name, case, fitting, machine, tell, broken.get(name, ()))
            if fitting != tokens:
                memory = f"{machine.memory_bytes / 1e9:.0f} GB"
                error = f"too many for {memory}: measured with {fitting:,}"
                rows.append(failure(name, tokens, error))
        except Lost:
            raise
        except Exception as e:
            rows = [failure(name, tokens, one_line(e))]
        case = None
        send(dict(kind="rows", item=(name, tokens), rows=rows))
        machine.clean()
        gc.freeze()


def supervise(
    plan, deadline, *, worker=work, start="spawn", silence=75.0, saw=lambda rows, rates: None
):
    """Have the plan worked off in a process of its own, in another one where that dies or hangs.

    silence: seconds without a sign of life after which it counts as hanging; saw(rows, rates):
    called on news. Returns (rows, rates).
    """
    context = multiprocessing.get_context(start)  # CUDA does not survive a fork
    rows = []
    rates = []
    left = list(plan)
    broken = collections.defaultdict(set)  # name of a case -> variants to leave out
    reason = "out of time"

    def news(message):
        if message["kind"] == "rates":
            rates.append(message["rates"])
        elif message["kind"] == "rows":
            rows.extend(message["rows"])
            left.remove(message["item"])
            saw(rows, rates)

    for _ in range(PROCESSES):
        if not left or time.time() > deadline:
            break
        args = (left[:], dict(broken), deadline)
        ended, at, reason = watch(context, worker, args, deadline, silence, news)
        if ended == "end":
            break
        item = at["item"]
        variant = at["variant"]
        say(f"{item or 'start'}, {variant}, {at['what']}: {reason}")
        if item is None:
            break
        rows.append(failure(*item, f"{at['what']}: {reason}", variant=variant))
        if variant is None:
            left.remove(item)
        else:
            broken[item[0]].add(variant)
        saw(rows, rates)
    rows += [failure(name, tokens, f"not run: {reason}") for name, tokens in left]
    saw(rows, rates)
    return rows, rates


def watch(context, worker, args, deadline, silence, news):
    """One process that works, to its end; news(message) is called for what it sends.

    Returns (the kind of its last message, or None where it died or went silent, what it was at,
    the reason of its end).
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=worker, args=(*args, sender))
    process.start()
    sender.close()
    at = dict(item=None, variant=None, what="starting")
    ended = None
    reason = "out of time"
    try:
        while ended is None:
            patience = min(silence, deadline + 30 - time.time())
            if patience < 0 or not receiver.poll(patience):
                if patience == silence:
                    reason = f"no answer in {silence:g} s"
                break
            message = receiver.recv()
            if message["kind"] == "at":
                at = message
            elif message["kind"] in ("end", "lost"):
                ended = message["kind"]
                reason = message.get("error", reason)
            else:
                news(message)
    except (EOFError, OSError):
        process.join(5)
        reason = f"the process died, exit status {process.exitcode}"
    finally:
        process.join(5 if ended == "end" else 0)
        process.kill()
        process.join()
    return ended, at, reason
