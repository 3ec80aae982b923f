import json
import os
import pathlib
import sys

with open(os.environ["CALLS"], "a") as f:
    f.write(f"ours {' '.join(sys.argv[1:])} gpu={os.environ.get('CUDA_VISIBLE_DEVICES')!r}\n")


def option(name):
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(name)]  # the last one counts


run, steps, target = (
    pathlib.Path(option("--run-dir")),
    int(option("--steps")),
    float(option("--target")),
)
run.mkdir()
sizes, lines, seconds, reached = [131072, 262144, 393216], [], 0.0, False
for step in range(1, steps + 1):
    seconds += 5e-7 * sizes[(step - 1) * 3 // steps]
    loss = 10 - step / (4000 if os.environ.get("OURS_MISSES") else 4 if steps < 100 else 120)
    if step == steps or step % (max(1, steps // 3) if steps < 100 else 250) == 0:
        lines.append(dict(step=step, val_loss=loss, train_time=seconds))
        reached = loss <= target
        if reached:
            break
config = dict(track="gpt2-small", steps=steps, target=target)
(run / "config.json").write_text(
    json.dumps(dict(environment=dict(dtype="bfloat16"), config=config))
)
(run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
(run / "result.json").write_text(
    json.dumps(
        dict(val_loss=loss, target=target, reached=reached, steps=step, train_time_s=seconds)
    )
)
sys.exit(0 if reached else 3)
