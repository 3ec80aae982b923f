import json
import os
import sys
import time

with open(os.environ["CALLS"], "a") as f:
    f.write(f"minimind {' '.join(sys.argv[1:])} gpu={os.environ['CUDA_VISIBLE_DEVICES']!r}\n")

import torch

KNOWN = "--hidden_size", "--max_seq_len", "--epochs"  # among others
options = dict(a[2:].split("=") for a in sys.argv[1:])
with open(options["data_path"]) as f:
    lines = [json.loads(line)["text"] for line in f]
with open(os.environ["CALLS"] + ".fed", "w") as f:
    json.dump(lines, f)
os.makedirs("../out", exist_ok=True)
print("Model Params: 0.01M")
for epoch in (1, 2):
    for step in range(1, 7):
        time.sleep(0.02)
        print(f"Epoch:[{epoch}/2]({step}/6), loss: 2.0000, lr: 0.00050000, epoch_time: 0.0min")
torch.save(dict(w=torch.ones(1000).half()), f"../out/pretrain_{options['hidden_size']}.pth")
