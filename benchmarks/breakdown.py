"""Where a training step's time goes: a profiler's trace divided into parts, each instant to the
first part that has it.

On a GPU:
    forward, backward, guard, optimizer   a kernel launched from there runs
    other                                 a kernel launched from anywhere else runs
    communication                         nothing but NCCL runs: what is not hidden
    data                                  a copy of the batch runs, or nothing does while the host
                                          waits for a batch
    gaps                                  nothing runs
Backward is what lies between a forward pass and what the trainer calls next. The guard is what
judges a step: sums of squares of all gradients, their report to the host. The optimizer begins with
sums over ranks. On a CPU the host is the device: other is the loop itself, waiting for other ranks
counts where it happens, and there are neither gaps nor communication.
"""

import bisect

HOST = ("forward", "backward", "guard", "optimizer")  # in these the main thread spends its time
PARTS = (*HOST, "communication", "data", "gaps", "other")
MARK = "stopwatch:"  # before a part's name in the trace


def covered(intervals, start, end):
    """Length of the union of (from, to) intervals inside [start, end]."""
    total = 0.0
    at = start
    for a, b in sorted(intervals):
        a = max(a, at)
        b = min(b, end)
        if b > a:
            total += b - a
            at = b
    return total


def divide(layers, start, end):
    """{part: intervals} -> ({part: length}, the length in none).

    What lies in several goes to the first.
    """
    taken = []
    before = 0.0
    lengths = {}
    for part, intervals in layers.items():
        taken = taken + intervals
        now = covered(taken, start, end)
        lengths[part] = now - before
        before = now
    return lengths, end - start - before


def backward_spans(forward, after):
    """From the end of each forward pass to the begin of the next one, or of what comes after."""
    begins = sorted(a for a, _ in forward + after)
    spans = []
    for _, end in forward:
        following = bisect.bisect_left(begins, end)
        if following < len(begins):
            spans.append((end, begins[following]))
    return spans


def trace_parts(events, cuda):
    """Events of a Chrome trace -> {part: microseconds} of the range MARK + "profiled".

    They sum to its length.
    """
    ranges = {part: [] for part in (*PARTS, "profiled")}
    launched = {}  # correlation id -> when the host launched it
    device = []
    for e in events:
        category = e.get("cat")
        args = e.get("args", {})
        if category == "user_annotation" and e["name"].startswith(MARK):
            ranges[e["name"][len(MARK) :]].append((e["ts"], e["ts"] + e["dur"]))
        elif category in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launched[args["correlation"]] = e["ts"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            device.append(e)
    ((start, end),) = ranges.pop("profiled")
    after = ranges["guard"] + ranges["optimizer"]
    ranges["backward"] = backward_spans(ranges["forward"], after)
    empty = dict.fromkeys(PARTS, 0.0)
    if not cuda:
        layers = {part: ranges[part] for part in ("data", *HOST)}
        lengths, rest = divide(layers, start, end)
        return empty | lengths | dict(other=rest)

    # Whatever thread launched a kernel (backward has its own), the main thread was in one of these
    # meanwhile
    host = []
    for part in (*HOST, "data"):
        host += [(a, b, part) for a, b in ranges[part]]
    host.sort()
    begins = [a for a, _, _ in host]
    ran = {part: [] for part in PARTS}
    for e in device:
        at = launched.get(e.get("args", {}).get("correlation"), e["ts"])
        i = bisect.bisect_right(begins, at) - 1
        part = "other"
        if "nccl" in e["name"].lower():
            part = "communication"
        elif i >= 0 and at <= host[i][1]:
            part = host[i][2]
        ran[part].append((e["ts"], e["ts"] + e["dur"]))
    layers = {part: ran[part] for part in (*HOST, "other", "communication")}
    layers["data"] = ran["data"] + ranges["data"]
    lengths, rest = divide(layers, start, end)
    return empty | lengths | dict(gaps=rest)
