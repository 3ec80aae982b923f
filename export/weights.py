"""Safetensors as on the Hugging Face Hub, in one file or in several with their index."""

from safetensors.torch import save_file
from tqdm import tqdm

from base import to_json

SHARD_BYTES = 5_000_000_000  # of a file, as on the Hub; a larger tensor has one to itself


def write_json(path, value):
    path.write_text(to_json(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(tensors, folder):
    """Write safetensors of at most SHARD_BYTES, and the Hub's index if there are several."""
    shards = [[]]
    size = 0  # of the last shard
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes

    total = sum(t.nbytes for t in tensors.values())
    where = {}  # name -> file
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="exporting", delay=2, disable=None)
    with bar:
        for i, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            contiguous = {name: tensors[name].contiguous() for name in names}
            # transformers 4 refuses a file whose metadata do not say so
            save_file(contiguous, folder / file, {"format": "pt"})
            where |= dict.fromkeys(names, file)
            bar.update(sum(tensors[name].nbytes for name in names))
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=total), weight_map=where)
        write_json(folder / "model.safetensors.index.json", index)
