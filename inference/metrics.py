"""What a server has done, in Prometheus's text format."""

import collections

BUCKETS = 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0  # seconds


class Histogram:
    """Counts of durations."""

    def __init__(self):
        self.counts = [0] * len(BUCKETS)
        self.n = 0
        self.total = 0.0

    def add(self, seconds):
        self.n += 1
        self.total += seconds
        for i, most in enumerate(BUCKETS):
            if seconds <= most:
                self.counts[i] += 1

    def lines(self, name):
        for most, count in zip(BUCKETS, self.counts):
            yield f'{name}_bucket{{le="{most:g}"}} {count}'
        yield f'{name}_bucket{{le="+Inf"}} {self.n}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {self.n}"


class Metrics:
    """Counted around every route; what the worker knows is read when it is asked for."""

    def __init__(self, worker, paths):
        """paths: of routes; requests for others are counted together."""
        self.worker = worker
        self.paths = paths
        self.requests = collections.Counter()  # (path, status)
        self.seconds = Histogram()

    def count(self, path, status, seconds):
        self.requests[path if path in self.paths else "other", status] += 1
        self.seconds.add(seconds)

    def text(self):
        worker = self.worker
        engine = worker.engine
        counters = {
            "steps": ("Steps of decoding", worker.steps),
            "prompt_tokens": ("Tokens of prompts of requests that are done", worker.n_read),
            "generated_tokens": ("Tokens written for requests that are done", worker.n_written),
        }
        gauges = {
            "requests_running": ("Requests that have a place", len(engine.live)),
            "requests_waiting": ("Requests that wait for a place", len(engine.waiting)),
            "places": ("Requests that are decoded together at most", engine.places),
        }
        lines = ["# HELP stopwatch_requests_total HTTP requests"]
        lines.append("# TYPE stopwatch_requests_total counter")
        for (path, status), n in sorted(self.requests.items()):
            lines.append(f'stopwatch_requests_total{{path="{path}",status="{status}"}} {n}')
        for name, (help, n) in counters.items():
            lines += described(f"stopwatch_{name}_total", help, "counter")
            lines.append(f"stopwatch_{name}_total {n}")
        for name, (help, n) in gauges.items():
            lines += described(f"stopwatch_{name}", help, "gauge")
            lines.append(f"stopwatch_{name} {n}")
        histograms = {
            "request_seconds": ("Seconds from a request to the end of its answer", self.seconds),
            "first_text_seconds": ("Seconds until an answer's first text", worker.first_text),
        }
        for name, (help, histogram) in histograms.items():
            lines += described(f"stopwatch_{name}", help, "histogram")
            lines += histogram.lines(f"stopwatch_{name}")
        return "\n".join(lines) + "\n"


def described(name, help, kind):
    return [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
