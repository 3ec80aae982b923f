import os
import sys

with open(os.environ["CALLS"], "a") as f:
    f.write(f"tok_train {' '.join(sys.argv[1:])} gpu={os.environ['CUDA_VISIBLE_DEVICES']!r}\n")

from nanochat.dataset import documents
from nanochat.tokenizer import path

options = dict(a[2:].split("=") for a in sys.argv[1:])
assert (
    max(map(len, documents("train"))) <= int(options["doc-cap"]) and len(documents("train")) < 9
)  # whole documents
open(path, "w").write(options["vocab-size"])
