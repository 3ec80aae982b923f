"""Machines by name: what they can do, what they cost. hardware.toml is the table, to edit.

Nothing here is measured: docs/planning.md says where the numbers are from. Does without torch.
"""

import functools
import math
import re
import tomllib
from pathlib import Path
from typing import NamedTuple

from base import InputError

TABLE = Path(__file__).with_name("hardware.toml")


class Hardware(NamedTuple):
    """One GPU of a kind, or this machine's processor. What is not known is None."""

    name: str
    tflops: float | None = None  # bf16, data sheet
    memory_gb: float | None = None
    watts: float | None = None  # at load
    watts_source: str = ""
    usd_per_hour: float | None = None
    price_date: str = ""
    price_source: str = ""
    link: float = 360.0  # GB/s inside a machine
    network: float = 50.0  # GB/s to other machines
    node: int = 8  # GPUs in a machine
    chip: int | None = None  # compute capability times 10
    found_as: tuple = ()  # words in the product's name


class Rate(NamedTuple):
    """A rate that was measured with this trainer."""

    hardware: str
    share: float  # of peak
    what: str
    source: str
    fp8: bool
    flops_per_token: float


@functools.cache
def read(path=TABLE):
    """({name: Hardware}, [Rate, ...]) of a table. Raises InputError."""
    try:
        said = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        rates = said.pop("measured", [])
        table = {}
        for name, fields in said.items():
            fields["found_as"] = tuple(fields.get("found_as", ()))
            table[name] = Hardware(name, **fields)
        measured = []
        for rate in rates:
            share = rate.pop("share", None)
            speed = rate.pop("tokens_per_s", None)
            if share is None:
                flops = speed * rate["flops_per_token"]
                share = flops / (table[rate["hardware"]].tflops * 1e12)
            measured.append(Rate(share=share, **rate))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as e:
        why = getattr(e, "strerror", None) or e
        raise InputError(f"{path}: {why}; expected what its first lines describe") from None
    return table, measured


def parse(text, path=TABLE):
    """(Hardware, how many) of words such as h100 or 8xh100. Raises InputError."""
    table, _ = read(path)
    found = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?([a-z0-9-]+)", text.strip().lower())
    count = int(found[1] or 1) if found else 0
    if count < 1 or found[2] not in table:
        raise InputError(
            f"--hardware {text}: expected one of {', '.join(table)}, or several as in 8xh100; "
            f"{TABLE.name} takes more"
        )
    return table[found[2]], count


def find(product):
    """The Hardware of a GPU by its product's name, or None. Of several the longest word counts:
    GH200 is no H100, RTX 4090 no other 40."""
    table, _ = read()
    best = None
    length = 0
    for hardware in table.values():
        for word in hardware.found_as:
            if word.lower() in product.lower() and len(word) > length:
                best = hardware
                length = len(word)
    return best


def nearest_rate(hardware, flops_per_token, fp8=False):
    """The Rate to go by: of this hardware if there is one, else of another GPU's, of those the one
    nearest in FLOPs per token. None if there is none."""
    _, rates = read()
    kind = [rate for rate in rates if (rate.hardware == "cpu") == (hardware == "cpu")]
    kind = [rate for rate in kind if rate.fp8 <= fp8]
    own = [rate for rate in kind if rate.hardware == hardware] or kind

    def distance(rate):
        return abs(math.log(rate.flops_per_token / flops_per_token)), fp8 != rate.fp8

    return min(own, key=distance, default=None)
