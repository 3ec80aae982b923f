"""Timing work on a GPU: CUDA graphs between events, variants in turn, inputs that no cache can
hold.

One sample of a variant is one replay of a graph of many calls, so that launching costs nothing and
events are far apart; calls walk over several sets of inputs, together three times the L2 cache, and
hold their outputs as long. In every round each variant gives one sample, another one first each
time: a drifting clock hits them alike. The result of many rounds is a median with the 20th and the
80th percentile. What cannot be captured is launched call by call and says so; launching is then
part of its time.
"""

import math
import time

import numpy as np
import torch


class CudaClock:
    """Marks are events on the current stream."""

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end):
        """Microseconds; after wait()."""
        return 1e3 * start.elapsed_time(end)

    def wait(self):
        torch.cuda.synchronize()

    def backlog(self):
        """Keep the device busy for about 0.1 ms, so that it never waits for the host at the
        first mark."""
        torch.cuda._sleep(200_000)


class HostClock:
    """The same for work that is done when the call returns."""

    def mark(self):
        return time.perf_counter()

    def between(self, start, end):
        return 1e6 * (end - start)

    def wait(self):
        pass

    def backlog(self):
        pass


def summary(samples):
    """Microseconds -> their median, 20th and 80th percentile, and how many there are."""
    p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return dict(median_us=median, p20_us=p20, p80_us=p80, samples=len(samples))


def sets_needed(bytes_per_set, cache_bytes, most=16):
    """How many sets of inputs make three times the cache."""
    return max(1, min(most, -(-3 * cache_bytes // max(1, bytes_per_set))))


def calls_needed(us_per_call, sets, sample_us=3000, most=64):
    """How many calls make a sample: whole walks over the sets, about sample_us in all."""
    calls = min(most, max(1, round(sample_us / max(us_per_call, 1e-3))))
    return -(-calls // sets) * sets


def rotate(call, sets, calls):
    """call(0), call(1), ..., from the start again after `sets`; each result is held until its
    set is next in turn."""
    held = [None] * sets
    for i in range(calls):
        held[i % sets] = call(i % sets)


def estimate(call, clock, repeats=3):
    """Microseconds of one call, launching included: the least of a few, after one to warm up."""
    call(0)
    times = []
    for _ in range(repeats):
        clock.wait()
        start = clock.mark()
        call(0)
        end = clock.mark()
        clock.wait()
        times.append(clock.between(start, end))
    return min(times)


class Sampler:
    """What is timed: run() makes `calls` calls; method says how ("graph" or "launches")."""

    def __init__(self, call, sets, clock):
        """call(i) works on the i-th set of inputs."""
        self.calls = calls_needed(estimate(call, clock), sets)
        self.method = "launches"
        self.run = lambda: rotate(call, sets, self.calls)

    def capture(self, pool):
        """From now on run() replays a CUDA graph of the calls, captured on the current stream (not
        the default one).

        pool: memory pool that graphs share: they never run at one time, and nobody reads what they
        leave.
        """
        graph = torch.cuda.CUDAGraph()
        # relaxed: modules may load and memory may grow meanwhile; gradients are computed on a
        # thread of their own
        with torch.cuda.graph(
            graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"
        ):
            self.run()
        self.run = graph.replay
        self.method = "graph"


def synchronizes(call):
    """Whether call(0) makes the host wait, which cannot be captured."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(0)
    except RuntimeError as e:
        if "synchronizing" not in str(e):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def interleaved(samplers, clock, seconds=0.5, least=5, most=30):
    """{name: Sampler} -> ({name: [microseconds per call, ...]}, {name: exception}), in turn until
    seconds are over.

    A sampler that raises is left out from then on.
    """
    samples = {name: [] for name in samplers}
    failed = {}
    rounds = least
    done = -1  # the first round warms up, and shows how long one takes
    while done < rounds:
        names = [name for name in samplers if name not in failed]
        shift = done % len(names) if names else 0
        clock.wait()
        clock.backlog()
        marks = {}
        begin = clock.mark()
        for name in names[shift:] + names[:shift]:
            start = clock.mark()
            try:
                samplers[name].run()
            except Exception as e:
                failed[name] = e.with_traceback(None)  # whose frames would hold memory
                continue
            marks[name] = start, clock.mark()
        end = clock.mark()
        clock.wait()
        if done < 0:
            fit = int(1e6 * seconds / max(clock.between(begin, end), 1e-3))
            rounds = max(least, min(most, fit))
        else:
            for name, (start, stop) in marks.items():
                samples[name].append(clock.between(start, stop) / samplers[name].calls)
        done += 1
    return {name: s for name, s in samples.items() if name not in failed}, failed


def relative_error(result, reference, chunk=1 << 26):
    """|result - reference| / |reference| over all elements, in fp64 sums of fp32 chunks; NaN
    anywhere gives NaN."""
    if result.shape != reference.shape:
        raise ValueError(
            f"shape {tuple(result.shape)} where the reference has {tuple(reference.shape)}"
        )
    results = result.detach().reshape(-1).split(chunk)
    references = reference.detach().reshape(-1).split(chunk)
    square_of_difference = 0.0
    square_of_norm = 0.0
    for a, b in zip(results, references):
        b = b.float()
        square_of_difference += (a.float() - b).square().sum(dtype=torch.float64)
        square_of_norm += b.square().sum(dtype=torch.float64)
    difference = float(square_of_difference) ** 0.5
    norm = float(square_of_norm) ** 0.5
    if norm:
        return difference / norm
    return math.inf if difference > 0 else difference  # 0 or NaN
