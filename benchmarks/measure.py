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
import sys
import time

import torch

from benchmarks import timing
from benchmarks.cases import BF16, BOTH, CASES, FORWARD, GPT2_SMALL, INFERENCE, Draw


class Lost(Exception):
    """The device does not answer any more: only a new process can go on."""


class Uncaptured(Exception):
    """A failed capture, which leaves allocator and random numbers unusable: a new process has to
    launch instead."""


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


def tensors(x):
    return [t for t in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(t, torch.Tensor)]


def results_of(case, fn, inputs, upstream, draw):
    """What a variant is compared by: outputs, gradients, inputs if it changes them; empty tensors
    stand for None.

    upstream: gradients of the outputs; filled by the first variant, random ones, 1 for losses.
    """
    if case.mutates:
        inputs = [x.clone() for x in inputs]
    outputs, gradients = tensors(fn(*inputs)), ()
    if case.leaves:
        upstream += [draw.like(y) for y in with_gradient(outputs)[len(upstream) :]]
        gradients = backward(case, with_gradient(outputs), inputs, upstream, retain=False)
    return [
        x.detach()
        for x in (*outputs, *gradients, *(inputs if case.mutates else ()))
        if x.is_floating_point() and x.numel()
    ]


def backward(case, outputs, inputs, upstream, retain):
    return torch.autograd.grad(
        outputs, [inputs[i] for i in case.leaves], upstream, retain_graph=retain
    )


def with_gradient(outputs):
    return [y for y in tensors(outputs) if y.requires_grad]


def compare(results, reference, tolerance):
    """The largest relative error; raises ValueError where it is too large."""
    if len(results) != len(reference):
        raise ValueError(f"wrong: {len(results)} results where the reference has {len(reference)}")
    errors = [timing.relative_error(a, b) for a, b in zip(results, reference)]
    worst = max(errors, key=lambda e: math.inf if math.isnan(e) else e)
    if not worst <= tolerance:
        raise ValueError(
            f"wrong: result {errors.index(worst)} is {worst:.2g} off the reference, {tolerance:g} allowed"
        )
    return worst


class Measurement:
    """One case on one machine: rows collects what was measured and what went wrong."""

    def __init__(self, name, case, tokens, machine, tell, broken, launched):
        self.name, self.case, self.tokens, self.machine = name, case, tokens, machine
        self.tell, self.broken, self.launched = tell, broken, launched
        self.rows, self.fns, self.difference = [], {}, {}
        self.draw = Draw(machine.device)
        self.sets = [case.inputs(self.draw)]
        bytes_per_set = sum(
            {x.data_ptr(): x.numel() * x.element_size() for x in self.sets[0]}.values()
        )
        self.sets += [
            case.inputs(self.draw)
            for _ in range(timing.sets_needed(bytes_per_set, machine.cache_bytes) - 1)
        ]
        self.upstream = [[] for _ in self.sets]
        for inputs in self.sets:
            for i in case.leaves:
                inputs[i].requires_grad_()

    def failed(self, variant, direction, e):
        self.rows.append(
            dict(
                case=self.name,
                tokens=self.tokens,
                direction=direction,
                variant=variant,
                error=one_line(e),
            )
        )

    def attempt(self, variant, direction, what, fn, *args):
        """fn(*args), or None and a row that says why not."""
        self.tell(variant, what)
        try:
            result = fn(*args)
            self.machine.clock.wait()
            return result
        except Uncaptured:
            raise
        except Exception as e:
            self.failed(variant, direction, e)
        self.machine.clean()  # out here, where the exception no longer holds memory

    def compare(self):
        """Make every variant and hold it against the reference; fns has those that are right."""
        case, self.reference = self.case, None

        def prepare(variant, v):
            fn = v.make(*self.sets[0])
            results = v.restore(results_of(case, fn, self.sets[0], self.upstream[0], self.draw))
            if variant == next(iter(case.variants)):
                self.reference = results
            if v.tolerance is not None and self.reference is not None:
                self.difference[variant] = compare(results, self.reference, v.tolerance)
            return fn

        with torch.set_grad_enabled(bool(case.leaves)):
            for variant, v in case.variants.items():
                fn = (
                    None
                    if variant in self.broken
                    else self.attempt(variant, None, "comparing", prepare, variant, v)
                )
                if fn is not None:
                    self.fns[variant] = fn
        del self.reference
        for upstream in self.upstream[1:]:
            upstream += [self.draw.like(dy) for dy in self.upstream[0]]
        self.machine.clean()

    def sampler(self, variant, direction, pool):
        v, clock = self.case.variants[variant], self.machine.clock
        call = call_of(self.case, self.fns[variant], self.sets, self.upstream, direction)
        s = timing.Sampler(call, len(self.sets), clock)
        if v.graph and pool and variant not in self.launched and not timing.synchronizes(call):
            self.tell(variant, f"capturing {direction}")
            try:
                s.capture(pool)
            except Exception as e:
                raise Uncaptured(one_line(e)) from None
        s.run()
        return s

    def time(self, direction):
        pool = torch.cuda.graph_pool_handle() if self.machine.graphs else None
        with torch.set_grad_enabled(bool(self.case.leaves) and direction != INFERENCE):
            samplers = {
                v: self.attempt(v, direction, direction, self.sampler, v, direction, pool)
                for v in self.fns
            }
            samplers = {v: s for v, s in samplers.items() if s is not None}
            timed = self.attempt(
                None,
                direction,
                direction,
                timing.interleaved,
                samplers,
                self.machine.clock,
                self.machine.seconds,
            )
        samples, errors = timed or ({}, {})
        for variant, e in errors.items():
            self.failed(variant, direction, e)
        for variant, times in samples.items():
            self.rows.append(self.row(variant, direction, timing.summary(times), samplers[variant]))

    def row(self, variant, direction, times, sampler):
        case, v = self.case, self.case.variants[variant]
        work = v.work.get(direction, case.work[direction])
        rate = v.rate or ("copy" if case.unit == "bytes" else "bf16")
        rate = rate.get(direction) if isinstance(rate, dict) else rate
        per_second, of = work / times["median_us"] * 1e6, self.machine.rates.get(rate)
        return dict(
            case=self.name,
            shape=case.shape,
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
            share=per_second / of if of else None,
        )


def measure(name, case, tokens, machine, tell=lambda variant, what: None, broken=(), launched=()):
    """All variants of a case in all directions -> rows. broken: variants to leave out; launched:
    not to be captured.

    tell(variant, what) is called before anything that may not return. Raises Lost and Uncaptured.
    """
    begin = time.perf_counter()
    m = Measurement(name, case, tokens, machine, tell, broken, launched)
    m.compare()
    for direction in case.work:
        m.time(direction)
        machine.clean()
    print(f"{name}, {tokens:,} tokens: {time.perf_counter() - begin:.1f} s", file=sys.stderr)
    return m.rows


def call_of(case, fn, sets, upstream, direction):
    """call(i): one pass in a direction over the i-th set of inputs; returns what has to outlive
    the next calls."""
    if direction == INFERENCE:
        plain = [[x.detach() for x in inputs] for inputs in sets]
        return lambda i: fn(*plain[i])
    if direction == FORWARD:
        return lambda i: fn(*sets[i])
    if direction == BOTH:
        return lambda i: backward(
            case, with_gradient(fn(*sets[i])), sets[i], upstream[i], retain=False
        )
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

    Under the clock that the ops are under. records.machine_probe, in the trainer, takes the host's
    and so measures less.
    """
    draw, rates = Draw(machine.device), {}

    def copy():
        x = draw(elements if machine.memory_bytes > 16e9 else elements // 4)
        y = torch.empty_like(x)
        return lambda i: y.copy_(x), 2 * x.numel() * x.element_size()

    def bf16():
        a, b = draw(n, n), draw(n, n)
        return lambda i: a @ b, 2 * n**3

    def fp8():
        a, b = (draw(n, n, dtype=torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=machine.device)
        return lambda i: torch._scaled_mm(
            a, b.t(), one, one, out_dtype=BF16, use_fast_accum=True
        ), 2 * n**3

    for name, make in dict(copy=copy, bf16=bf16, fp8=fp8).items():
        try:
            call, work = make()
            sampler = timing.Sampler(call, 1, machine.clock)
            samples, failed = timing.interleaved({name: sampler}, machine.clock, machine.seconds)
            if failed:
                raise failed[name]
            rates[name] = work / timing.summary(samples[name])["median_us"] * 1e6
        except Exception as e:
            print(f"rate of {name}: {one_line(e)}", file=sys.stderr)
            rates[name] = None
        call = sampler = None
        machine.clean()
    return rates


def try_a_graph(machine):
    """Raises Uncaptured where not even a copy can be captured."""
    try:
        x, y = torch.ones(2, 1 << 20, device=machine.device)
        s = timing.Sampler(lambda i: y.copy_(x), 1, machine.clock)
        s.capture(torch.cuda.graph_pool_handle())
        s.run()
        machine.clock.wait()
    except Exception as e:
        raise Uncaptured(one_line(e)) from None


# --------------------------------------------------------------------------------------------------
# The process that works and the one that watches


def work(plan, broken, launched, graphs, deadline, connection):
    """The process that works: measure [(name, tokens), ...] on the GPU; what happens goes into
    the connection."""
    try:
        connection.send(
            dict(kind="at", item=None, variant=None, what="measuring the machine's rates")
        )
        torch.cuda.set_stream(torch.cuda.Stream())  # graphs cannot be captured on the default one
        from torch._functorch import config as functorch_config

        # compiled backward passes are run many times over
        functorch_config.donated_buffer = False
        machine = Machine(
            torch.device("cuda"),
            timing.CudaClock(),
            torch.cuda.get_device_properties(0).L2_cache_size,
            torch.cuda.mem_get_info()[0],
            graphs,
        )
        machine.rates = measured_rates(machine)
        if graphs:
            try_a_graph(machine)
        connection.send(dict(kind="rates", rates=machine.rates))
        work_off(plan, broken, launched, machine, deadline, connection.send)
        connection.send(dict(kind="rates", rates=measured_rates(machine)))  # again, to see a drift
        connection.send(dict(kind="end"))
    except (Lost, Uncaptured) as e:
        connection.send(dict(kind=type(e).__name__.lower(), error=str(e)))
        connection.close()
        os._exit(1)  # leaving in order would wait for the device


def work_off(plan, broken, launched, machine, deadline, send, size=GPT2_SMALL):
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
            case, fitting = fit(CASES[name][0], size._replace(tokens=tokens), machine.memory_bytes)
            rows = measure(
                name, case, fitting, machine, tell, broken.get(name, ()), launched.get(name, ())
            )
            if fitting != tokens:
                rows.append(
                    dict(
                        case=name,
                        tokens=tokens,
                        direction=None,
                        variant=None,
                        error=f"too many for {machine.memory_bytes / 1e9:.0f} GB: measured with {fitting:,}",
                    )
                )
        except (Lost, Uncaptured):
            raise
        except Exception as e:
            rows = [dict(case=name, tokens=tokens, direction=None, variant=None, error=one_line(e))]
        case = None
        send(dict(kind="rows", item=(name, tokens), rows=rows))
        machine.clean()
        gc.freeze()


def supervise(
    plan, deadline, *, worker=work, start="spawn", silence=75.0, saw=lambda rows, rates: None
):
    """Have the plan worked off in a process of its own, in another one where that dies or hangs ->
    (rows, rates).

    silence: seconds without a sign of life after which it counts as hanging. saw(rows, rates):
    called on news.
    """
    context = multiprocessing.get_context(start)  # CUDA does not survive a fork
    rows, rates, left, graphs = [], [], list(plan), True
    broken, launched = (
        collections.defaultdict(set),
        collections.defaultdict(set),
    )  # names of cases -> variants
    reason = "out of time"
    for _ in range(16):  # processes
        if not left or time.time() > deadline:
            break
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=worker, args=(left[:], dict(broken), dict(launched), graphs, deadline, sender)
        )
        process.start()
        sender.close()
        at, message = dict(item=None, variant=None, what="starting"), {}
        reason = "out of time"
        try:
            while message.get("kind") not in ("end", "lost", "uncaptured"):
                patience = min(silence, deadline + 30 - time.time())
                if patience < 0 or not receiver.poll(patience):
                    reason = f"no answer in {silence:g} s" if patience == silence else "out of time"
                    break
                message = receiver.recv()
                if message["kind"] == "at":
                    at = message
                elif message["kind"] == "rates":
                    rates.append(message["rates"])
                elif message["kind"] == "rows":
                    rows += message["rows"]
                    left.remove(message["item"])
                    saw(rows, rates)
                else:
                    reason = message.get("error", "out of time")
        except (EOFError, OSError):
            process.join(5)
            reason = f"the process died, exit status {process.exitcode}"
        finally:
            process.join(5 if message.get("kind") == "end" else 0)
            process.kill()
            process.join()
        if message.get("kind") == "end":
            break
        item, variant = at["item"], at["variant"]
        print(f"{item or 'start'}, {variant}, {at['what']}: {reason}", file=sys.stderr)
        if message.get("kind") == "uncaptured" and item:
            launched[item[0]].add(variant)
        elif message.get("kind") == "uncaptured" and graphs:
            graphs = False
        elif item is None:
            break
        else:
            rows.append(
                dict(
                    case=item[0],
                    tokens=item[1],
                    direction=None,
                    variant=variant,
                    error=f"{at['what']}: {reason}",
                )
            )
            if variant is None:
                left.remove(item)
            else:
                broken[item[0]].add(variant)
            saw(rows, rates)
    rows += [
        dict(case=name, tokens=tokens, direction=None, variant=None, error=f"not run: {reason}")
        for name, tokens in left
    ]
    saw(rows, rates)
    return rows, rates
