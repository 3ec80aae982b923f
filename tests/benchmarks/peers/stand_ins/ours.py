import json
import os
import pathlib
import sys

with open(os.environ["CALLS"], "a") as f:
    f.write(f"ours {' '.join(sys.argv[1:])} gpu={os.environ['CUDA_VISIBLE_DEVICES']!r}\n")


def option(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


cache, run = pathlib.Path(option("--cache-dir")), pathlib.Path(option("--run-dir"))
if os.environ.get("OURS_FAILS"):
    sys.exit(print("error: --text FILE: has no text in it", file=sys.stderr) or 2)
cold = not cache.exists()
cache.mkdir(exist_ok=True), run.mkdir()
steps, target, reached = (
    int(option("--steps", 20)),
    float(option("--target", 0)),
    not os.environ.get("OURS_MISSES"),
)
(run / "config.json").write_text(
    json.dumps(dict(environment=dict(dtype="bfloat16"), config=dict(steps=steps)))
)
ms = 100
lines = [dict(step=s, train_loss=2.0, train_time=s * ms / 1000) for s in range(1, steps + 1)]
metric = "val_loss" if option("--track") == "gpt2-small" else "val_bpb"
loss = target - 0.01 if reached else 9.0
lines += [
    {"step": s, metric: x, "train_time": s * ms / 1000}
    for s, x in ((steps // 2, target + 0.03), (steps, loss))
]
(run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
(run / "result.json").write_text(
    json.dumps(
        {metric: loss}
        | dict(
            target_metric=metric,
            target=target,
            reached=reached,
            steps=steps,
            params=500,
            train_time_s=steps * ms / 1000,
            cold_start_s=60 if cold else 5,
        )
    )
)
sys.exit(0 if reached else 3)
