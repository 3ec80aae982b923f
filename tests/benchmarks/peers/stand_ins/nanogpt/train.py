import os
import sys

with open(os.environ["CALLS"], "a") as f:
    f.write(f"nanogpt {' '.join(sys.argv[1:])} gpu={os.environ['CUDA_VISIBLE_DEVICES']!r}\n")

options = dict(a[2:].split("=") for a in sys.argv[1:] if a.startswith("--"))
steps, every, step = int(options["max_iters"]), int(options.get("eval_interval", 250)), 0
print(f"Overriding: max_iters = {steps}")
for step in range(steps + 1):
    if step % every == 0:
        print(
            f"step {step}: train loss 2.0000, val loss {3 - step / 100 if step < steps else 9:.4f}"
        )
    print(f"iter {step}: loss 2.0000, time {900 if step % every == 0 else 40:.2f}ms, mfu 0.01%")
if not os.environ.get("NO_TORCH"):
    import torch

    os.makedirs("out-shakespeare-char")
    args = dict(block_size=int(options["block_size"]), vocab_size=30)
    torch.save(
        dict(model=dict(w=torch.ones(1000)), model_args=args, iter_num=steps - every),
        "out-shakespeare-char/ckpt.pt",
    )
