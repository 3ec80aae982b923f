"""The tracker that a user already has, fed with what metrics.jsonl gets: --track-with.

Their libraries are not installed with this program. What a tracker does wrong is said once and does
not end a run: the run's own files have everything.
"""

import importlib
from pathlib import Path

from base import InputError, one_line

PROJECT = "stopwatch"
PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def check(name):
    """Raises InputError where the tracker's package is not installed."""
    if not name:
        return
    try:
        importlib.import_module(PACKAGES[name])
    except ImportError as e:
        raise InputError(
            f"--track-with {name}: {e}; install it with .venv/bin/python -m pip install "
            f"{PACKAGES[name]}, or leave the option out"
        ) from None


def attach(log, name, config):
    """Have a Log's numbers sent to the tracker of this name, "" for none; config: {option:
    value}."""
    if name and log.active:
        log.tracker = Tracker(name, log.folder, config, log.say)


class Tracker:
    """One run's numbers to one tracker.

    name: of PACKAGES; folder: the run's; config: {option: value}; say: called with a line when the
    tracker fails, after which it is left alone.
    """

    def __init__(self, name, folder, config, say):
        self.name = name
        self.say = say
        self.send = None  # (numbers, step) -> None
        self.close = None
        folder = Path(folder)
        self.attempt(lambda: getattr(self, f"open_{name}")(folder, config))

    def open_tensorboard(self, folder, config):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"))
        rows = [f"| {name} | {value} |" for name, value in config.items()]
        writer.add_text("config", "\n".join(["| option | value |", "|---|---|", *rows]), 0)

        def send(numbers, step):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self.send, self.close = send, writer.close

    def open_trackio(self, folder, config):
        import trackio

        trackio.init(project=PROJECT, name=folder.name, config=config)
        self.send = lambda numbers, step: trackio.log(numbers, step=step)
        self.close = trackio.finish

    def open_wandb(self, folder, config):
        import wandb

        run = wandb.init(project=PROJECT, name=folder.name, config=config, dir=str(folder))
        self.send = lambda numbers, step: run.log(numbers, step=step)
        self.close = run.finish

    def log(self, row):
        """An object of metrics.jsonl: `step`, and numbers by name."""
        numbers = {name: value for name, value in row.items() if name != "step"}
        if self.send:
            self.attempt(lambda: self.send(numbers, row["step"]))

    def finish(self):
        """All is sent."""
        close, self.send, self.close = self.close, None, None
        if close:
            self.attempt(close)

    def attempt(self, work):
        try:
            work()
        except Exception as e:  # of whatever kind: the training is worth more
            self.send = self.close = None
            why = one_line(e)
            self.say(
                f"--track-with {self.name} failed, and gets no more: {type(e).__name__}: {why}"
            )
