import argparse
import json
import os
import sys

from nanochat.dataset import documents
from nanochat.tokenizer import get_tokenizer

with open(os.environ["CALLS"], "a") as f:
    f.write(f"nanochat {' '.join(sys.argv[1:])} gpu={os.environ['CUDA_VISIBLE_DEVICES']!r}\n")


parser = argparse.ArgumentParser()
for name in (
    "--device-type",
    "--depth",
    "--aspect-ratio",
    "--head-dim",
    "--window-pattern",
    "--max-seq-len",
    "--device-batch-size",
    "--total-batch-size",
    "--num-iterations",
    "--eval-every",
    "--eval-tokens",
    "--core-metric-every",
    "--sample-every",
    "--model-tag",
    "--matrix-lr",
):
    parser.add_argument(name)
options = vars(parser.parse_args())
steps, every, length = (
    int(options[name]) for name in ("num_iterations", "eval_every", "max_seq_len")
)
fed = {split: documents(split) for split in ("train", "val")}
for texts in fed.values():  # what its loader likes: full rows
    sizes = [len(get_tokenizer().encode(text)) for text in texts]
    assert max(sizes) <= length and sum(n < length - 3 for n in sizes) < 9
with open(os.environ["CALLS"] + ".fed", "w") as f:
    json.dump(fed, f)
if dtype := os.environ.get("NANOCHAT_DTYPE"):
    print(f"COMPUTE_DTYPE: torch.{dtype} (set via NANOCHAT_DTYPE={dtype})")
seconds = 0.0
for step in range(steps + 1):
    if step % every == 0 or step == steps:
        print(f"Step {step:05d} | Validation bpb: {4 - step / 100:.6f}")
    if step < steps:
        ms = 30000 if step == 0 else 50
        seconds += ms / 1000 * (step > 10)
        print(
            f"step {step:05d}/{steps:05d} ({100 * step / steps:.2f}%) | loss: 2.0 | lrm: 1.00 | "
            f"dt: {ms:.2f}ms | "
            f"tok/sec: 1 | bf16_mfu: 0.00 | epoch: 1 pq: 0 rg: 0 | total time: {seconds / 60:.2f}m"
        )
folder = os.path.join(os.environ["NANOCHAT_BASE_DIR"], "base_checkpoints", options["model_tag"])
os.makedirs(folder)
json.dump(
    dict(model_config=dict(sequence_len=length)),
    open(os.path.join(folder, f"meta_{steps:06d}.json"), "w"),
)
