"""What a run writes: log.txt, metrics.jsonl and progress while it trains, result.json and the weights at the end.

Step lines in log.txt are the field's (modded-nanogpt's), so its readers read ours:
    step:S/N train_loss:4.1234 train_time:1234ms step_avg:12.34ms
    step:S/N val_loss:4.1234 train_time:1234ms step_avg:12.34ms val_bpb:1.2345
metrics.jsonl has one object per step with `step`, `train_loss`, `train_time` (seconds), and one per validation with
`step`, `train_time`, `val_loss`, `val_bpb`.
"""

import json
import os
import sys
import time

from safetensors.torch import save_file
from tqdm import tqdm

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"


class Log:
    """Writes into `folder`; with active=False (ranks other than the first) it does nothing."""

    def __init__(self, folder, steps, active=True):
        self.folder, self.active = folder, active
        if active:
            folder.mkdir(parents=True, exist_ok=True)
            self.text, self.metrics = open(folder / "log.txt", "w"), open(folder / "metrics.jsonl", "w", 1)
            self.shown = time.perf_counter()
            self.bar = tqdm(total=steps, disable=None, dynamic_ncols=True, leave=False, bar_format=BAR)

    def header(self, source, **described):
        """The recipe's source and what it runs on, into log.txt; the latter into config.json as well."""
        if self.active:
            text = json.dumps(described, indent=1)
            (self.folder / "config.json").write_text(text)
            line = "=" * 100
            self.say(f"{source}\n{line}\n{text}\n{line}", quiet=True)

    def say(self, message, quiet=False):
        """A line in log.txt, and on stderr unless quiet."""
        if self.active:
            print(message, file=self.text, flush=True)
            if not quiet:
                tqdm.write(message, file=sys.stderr)

    def step(self, step, total, kind, loss, seconds, **more):
        """One step line and one metrics object. kind: train or val; more: further metrics by name."""
        line = (f"step:{step}/{total} {kind}_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
                f"step_avg:{1000 * seconds / max(step, 1):.2f}ms")
        more = {name: value for name, value in more.items() if value is not None}
        self.say(line + "".join(f" {name}:{value:.4f}" for name, value in more.items()), quiet=kind == "train")
        if self.active:
            print(json.dumps({"step": step, f"{kind}_loss": loss, **more, "train_time": seconds}), file=self.metrics)

    def progress(self, step, text):
        """Show where training is; text: what to put beside the bar."""
        if not self.active:
            return
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(step - self.bar.n)
        now = time.perf_counter()
        if self.bar.disable and now - self.shown > 15:  # nobody watches a terminal: a line now and then
            print(f"step {step}/{self.bar.total}  {text}", file=sys.stderr, flush=True)
            self.shown = now

    def finish(self, result, weights):
        """Write result.json and model.safetensors (name -> CPU tensor), each aside and renamed."""
        def write(name, save):
            aside = self.folder / f"{name}.tmp"
            try:
                save(aside)
                os.replace(aside, self.folder / name)
            except Exception as e:  # safetensors has errors of its own; the run is done and its result still counts
                aside.unlink(missing_ok=True)
                self.say(f"{name} could not be written: {e}")

        write("result.json", lambda path: path.write_text(json.dumps(result, indent=1)))
        write("model.safetensors", lambda path: save_file(weights, path))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.active:
            self.bar.close()
            self.text.close()
            self.metrics.close()
