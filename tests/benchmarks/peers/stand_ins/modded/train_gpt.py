import glob
import os
import sys
from dataclasses import dataclass

with open(sys.argv[0]) as f:
    code = f.read()
from kernels import get_kernel


def block():
    return get_kernel("kernels-community/flash-attn3", version=1).flash_attn_interface


@dataclass(slots=True)
class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", ".")
    train_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_train_*.bin")
    val_tokens: int = 10485760  # fixed
    num_scheduled_iterations: int = 9  # number of steps
    num_extension_iterations: int = 1
    run_id: str = "abc"
    val_loss_every: int = 3  # every how many steps


args = Hyperparameters()


class TrainingStage:
    def __init__(self, **kw):
        self.__dict__.update(kw)


TRAINING_STAGES = [
    TrainingStage(
        duration=1 / 3,
        train_max_seq_len=896,
        batch_size=8 * 2048 * 8,
        window_sizes=(1, 3),
        lr_mul=1.0,
    ),
    TrainingStage(
        duration=1 / 3,
        train_max_seq_len=2048,
        batch_size=16 * 2048 * 8,
        window_sizes=(3, 7),
        lr_mul=1.52,
    ),
    TrainingStage(
        duration=1 / 3,
        train_max_seq_len=2048,
        batch_size=24 * 2048 * 8,
        window_sizes=(5, 11),
        lr_mul=1.73,
    ),
    TrainingStage(
        train_max_seq_len=2048, batch_size=24 * 2048 * 8, window_sizes=(6, 13), lr_mul=1.0
    ),
]

with open(os.environ["CALLS"], "a") as f:
    shards = sorted(map(os.path.basename, glob.glob(args.train_files)))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    f.write(f"modded {' '.join(sys.argv)} gpu={gpus!r} {' '.join(shards)}\n")
rounds = len([c for c in open(os.environ["CALLS"]) if c.startswith("modded")])
if os.environ.get("MODDED_FAILS") and rounds == int(os.environ["MODDED_FAILS"]):
    raise RuntimeError("CUDA error: out of luck")
sched = args.num_scheduled_iterations
total = sched + args.num_extension_iterations
os.makedirs("logs", exist_ok=True)
out = open(f"logs/{args.run_id}.txt", "w")


def print0(s):
    print(s), print(s, file=out, flush=True)


print0(code)
print0("=" * 100)
print0("|   0  NVIDIA H100 80GB HBM3          On  |")
print0("=" * 100)
ms = 0.0
for step in range(total + 1):
    if step == total or step % args.val_loss_every == 0:
        loss = f"val_loss:{10 - 0.5 * step:.4f}"
        print0(f"step:{step}/{total} {loss} train_time:{ms:.0f}ms step_avg:1.00ms")
    if step == total:
        break
    stage = TRAINING_STAGES[min(3, 3 * step // sched)]
    us = 2 if stage.lr_mul == 1.0 else 1  # a token
    ms += stage.batch_size * rounds * us / 1000
    # the host is ahead
    print0(f"step:{step + 1}/{total} train_time:{max(0, ms - 50):.0f}ms step_avg:1.00ms")
print0("peak memory allocated: 30220 MiB reserved: 38672 MiB")
