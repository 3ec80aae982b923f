"""What a user waits for: seconds of the whole process and of its parts, first and again.

    ./run.sh benchmarks start                                  this machine's track
    ./run.sh benchmarks start --steps 1                        start-up and one step
    ./run.sh benchmarks start --track gpt2-small --synthetic   with no data and no network

Options other than those below are the trainer's own (./run.sh train --help). The trainer runs
twice, each time as a process of its own, on a fresh cache folder that holds prepared data, compiled
code and Triton's kernels: the first run finds it empty (cold), the second finds it filled (warm).
What the system itself keeps of files in memory is warm both times. On several GPUs one is measured.

The process is timed from its start to its exit, the parts by the trainer: docs/results.md says what
each includes. They do not overlap; choosing kernels, building the model and measuring the machine
are in the rest. `to the first step` is its start-up: from the start of the process to that step.
"""

import statistics
import tempfile

from benchmarks.options import COUNT
from benchmarks.process import train
from benchmarks.report import document, say, table
from runtime.finish import PARTS

REST = "rest_s"


def start(options, folder, synthetic):
    """{"process_s", each part, the rest of the process, "cold_start_s": seconds} of one training
    with the caches in this folder."""
    result = train("the trainer", options, folder, synthetic=synthetic)
    seconds = {name: result[name] for name in ("process_s", *PARTS)}
    seconds[REST] = result["process_s"] - sum(result[name] for name in PARTS)
    return seconds | dict(cold_start_s=result["cold_start_s"])


def run(repeats=1, synthetic_data=False, trainer_options=(), save=lambda result: None):
    """dict(options, runs={cold: [{name: seconds}, ...], warm: ...}, cold={name: median}, warm=...);
    save is given the same as it grows."""
    import torch

    options = list(trainer_options)
    if torch.cuda.device_count() > 1 and "--gpus" not in options:
        options += ["--gpus", "1"]
    result = dict(options=options, runs=dict(cold=[], warm=[]))
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            for state, runs in result["runs"].items():
                say(f"--- {state}")
                runs.append(start(options, folder, synthetic_data))
                medians = {}
                for name in runs[0]:
                    medians[name] = statistics.median(seconds[name] for seconds in runs)
                result[state] = medians
                say(f"{state}: process {runs[-1]['process_s']:.2f} s")
        save(result)
    say(f"\n{render(result)}")
    return result


def render(result):
    """A line for the process and for each part of it, cold beside warm."""
    labels = dict(process_s="**process**", cold_start_s="to the first step")
    rows = []
    for name, cold in result["cold"].items():
        label = labels.get(name, name.removesuffix("_s"))
        rows.append([label, f"{cold:.2f}", f"{result['warm'][name]:.2f}"])
    return document(
        f"# The whole process: ./run.sh {' '.join(result['options'])}".rstrip(),
        f"Seconds, {len(result['runs']['cold'])} of each (medians).",
        table(["", "cold", "warm"], rows),
    )


def add_arguments(parser):
    parser.option("--repeats", COUNT, 1, "N", "cold and warm pairs, for medians")
    about = "random tokens in place of the track's data"
    parser.flag("--synthetic", about, dest="synthetic_data")
