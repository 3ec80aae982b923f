import json
import os

DATA_DIR = os.path.join(os.environ["NANOCHAT_BASE_DIR"], "data")


def documents(split):
    name = sorted(os.listdir(DATA_DIR))[-1 if split == "val" else 0]
    return json.load(open(os.path.join(DATA_DIR, name)))["text"]
