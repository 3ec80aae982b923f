"""What each step reports: whether its update counts, judged on the device, and what the host
learns without waiting."""

import dataclasses
import math
import typing

import torch
import torch.distributed as dist

from base.options import COUNT, RATE, Options, option

from .machine import to_device

WINDOW = 128  # steps over which a loss is compared with those before


@dataclasses.dataclass(frozen=True)
class GuardConfig(Options):
    """Which steps may fail without ending the run."""

    max_skips: int = option(
        0,
        "so many steps may have a loss or gradient that is not finite and do not count; 0 stops at "
        "the first",
        COUNT,
        group="optimizer",
    )
    spike_sigmas: float = option(
        0.0,
        "the same for a loss so many standard deviations above the mean of the last 128 steps; 0 "
        "is off",
        RATE,
    )


class Report(typing.NamedTuple):
    """Of one step, over all ranks."""

    step: int
    loss: float
    votes: list  # added up
    complaint: str | None  # why its update did not count; None if it did
    grad_norm: float = math.nan  # root of the sum of squares of all ranks' gradients

    def refusal(self):
        """Why the run stopped, and what to do."""
        return (
            f"step {self.step}: {self.complaint}, so the run stopped there, with the weights as "
            "they were before; lower the learning rates, try --dtype float32, or let it pass "
            "with --max-skips"
        )


class Guard:
    """Judges each step before its update.

    The update counts if loss and all gradients are finite and, with spike_sigmas, the loss is not
    that many standard deviations above its recent mean.

    strict: after one bad step none counts any more, so that until the host has stopped the run
    nothing changes.
    """

    def __init__(self, device, sums_of_squares, strict=True, spike_sigmas=0.0):
        """sums_of_squares: list of tensors -> (n,) fp32, finite where the tensor is."""
        self.device = device
        self.sums_of_squares = sums_of_squares
        self.strict = strict
        self.spike_sigmas = spike_sigmas
        self.waiting = []  # reports on their way to the host
        self.lag = 2 if device.type == "cuda" else 0  # steps after which a report has arrived
        self.reset()

    def reset(self):
        self.waiting.clear()
        self.alive = torch.ones((), dtype=torch.bool, device=self.device)
        self.recent = torch.zeros(3, device=self.device)  # steps seen, mean loss, variance

    def forget(self):
        """The loss begins a new series: what it was before says nothing about what it will be."""
        self.recent.zero_()

    def judge(self, step, loss, grads, votes=()):
        """Whether the step's update counts: a 0-d bool tensor, the same on all ranks; nothing
        waits for it.

        loss: this rank's share, 0-d; grads: {name: tensor or None}; votes: this rank's,
        0 or 1 each.
        """
        grads = {name: grad for name, grad in grads.items() if grad is not None}
        sums = self.sums_of_squares(list(grads.values()))

        # One message over all ranks: the loss, a number for each gradient, the votes
        report = torch.cat([loss[None], sums, to_device(votes, self.device)])
        if dist.is_initialized():
            dist.all_reduce(report)
        ok = report[: 1 + len(sums)].isfinite().all()
        if self.spike_sigmas:
            ok &= self.is_no_spike(report[0])
            self.remember(report[0], ok)
        if self.strict:
            ok &= self.alive
            self.alive.copy_(ok)
        self.send(step, torch.cat([report, ok[None].float()]), list(grads))
        return ok

    def is_no_spike(self, loss):
        """0-d bool: whether the loss is near its recent mean; true while there are few."""
        steps, mean, variance = self.recent.unbind()
        return (steps < WINDOW) | (loss < mean + self.spike_sigmas * variance.sqrt())

    def remember(self, loss, ok):
        """Take the loss into the running mean and variance, if ok."""
        steps, mean, variance = self.recent.unbind()
        share = 1 / (steps + 1).clamp(max=WINDOW)
        off = loss - mean
        mean = mean + share * off
        variance = (1 - share) * (variance + share * off * off)
        later = torch.stack([steps + 1, mean, variance])
        self.recent.copy_(torch.where(ok, later, self.recent))

    def send(self, step, report, names):
        """Start the report's way to the host."""
        cuda = self.device.type == "cuda"
        host = torch.empty(report.shape, dtype=torch.float32, pin_memory=cuda)
        host.copy_(report, non_blocking=True)
        event = None  # when it is there
        if cuda:
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((step, host, event, names))

    def reports(self, step):
        """Yield the Reports of all steps up to step - lag, when they have long arrived; infinity:
        all there are.

        So every rank sees a report in the same step as the others, and all can act on it together.
        """
        while self.waiting and self.waiting[0][0] <= step - self.lag:
            at, host, event, names = self.waiting.pop(0)
            if event:
                event.synchronize()
            loss, *rest, ok = host.tolist()
            sums = rest[: len(names)]
            votes = rest[len(names) :]
            complaint = None if ok else self.complaint(loss, names, sums)
            yield Report(at, loss, votes, complaint, math.sqrt(max(0.0, sum(sums))))

    def complaint(self, loss, names, sums):
        """Why a step did not count, in words."""
        if not math.isfinite(loss):
            return f"the training loss is {loss}"
        bad = [name for name, s in zip(names, sums) if not math.isfinite(s)]
        if bad:
            return f"the gradient of {', '.join(bad)} is not finite (loss {loss:.4f})"
        if self.spike_sigmas:
            return f"the training loss jumped to {loss:.4f}"
        return "it follows a bad one"
