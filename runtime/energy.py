"""What a run has taken of the wall socket, as the hardware counts it, and of the purse.

GPUs: NVML's counter of each, the card alone. CPUs: RAPL's counter of each package, where the system
lets it be read (Linux keeps it from all but root; many virtual machines have none). Both count what
other programs took meanwhile as well. Where nothing can be read there is no number.
"""

import ctypes
import time
from pathlib import Path

from . import hardware

RAPL = Path("/sys/class/powercap")
EVERY = 60.0  # seconds between two looks: RAPL's counters begin again after some ten minutes
KWH = 3.6e6  # joules


class Counter:
    """One counter of energy, in joules, that begins again at `wrap`; 0 if it does not."""

    def __init__(self, read, wrap=0.0):
        self.read = read  # () -> joules; raises OSError or ValueError
        self.wrap = wrap
        self.last = read()

    def since(self):
        """Joules since the last call."""
        now = self.read()
        step = now - self.last
        if step < 0 and self.wrap:
            step += self.wrap
        self.last = now
        return max(0.0, step)


def rapl_counters(folder=RAPL):
    """A Counter for each package that can be read."""
    counters = []
    for package in sorted(Path(folder).glob("intel-rapl:*")):
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it
        if package.name.count(":") != 1:
            continue
        try:
            name = (package / "name").read_text().strip()
            wrap = int((package / "max_energy_range_uj").read_text()) / 1e6
            if name.startswith("package"):  # psys is the whole board, packages included
                read = joules_of(package / "energy_uj")
                counters.append(Counter(read, wrap))
        except (OSError, ValueError):
            continue
    return counters


def joules_of(path):
    return lambda: int(path.read_text()) / 1e6


def nvml_counters(uuids, library=None):
    """A Counter for each GPU of these UUIDs ("GPU-..."), or none at all where one has no counter,
    as GPUs before Volta."""
    try:
        nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return []
        return [Counter(joules_of_gpu(nvml, uuid)) for uuid in uuids]
    except (OSError, AttributeError):
        return []


def joules_of_gpu(nvml, uuid):
    device = ctypes.c_void_p()
    if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)):
        raise OSError(f"{uuid}: no such GPU")

    def read():
        millijoules = ctypes.c_ulonglong()
        if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
            raise OSError(f"{uuid}: its energy cannot be read")
        return millijoules.value / 1e3

    return read


def counters_of(world):
    """Counters of what this machine's devices take in a run: the GPUs in use, or the processors;
    none where some of the run's devices are on other machines. world: a World."""
    if world.size != world.local_size:
        return []
    if world.device.type != "cuda":
        return rapl_counters()
    import torch

    first = world.device.index or 0
    try:
        places = range(first, first + world.size)
        uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in places]
    except (AttributeError, RuntimeError, AssertionError):
        return []
    return nvml_counters(uuids)


class Meter:
    """Energy and time of a run, over all processes that it took."""

    def __init__(self, counters=(), joules=None, seconds=0.0, clock=time.monotonic):
        """joules, seconds: of processes before this one; joules is None where one of them, or
        this one, could not read them."""
        self.counters = list(counters)
        self.joules = joules if joules is not None and self.counters else None
        if joules is None and not seconds and self.counters:
            self.joules = 0.0  # a new run
        self.clock = clock
        self.seconds = seconds
        self.looked = clock()

    def look(self, now=False):
        """Read the counters, if the last time is a while ago."""
        elapsed = self.clock() - self.looked
        if elapsed < EVERY and not now:
            return
        self.looked += elapsed
        self.seconds += elapsed
        if self.joules is None:
            return
        try:
            self.joules += sum(counter.since() for counter in self.counters)
        except (OSError, ValueError):
            self.joules = None  # half a number is none


def cost(seconds, world, device, usd_per_hour=0.0):
    """Dollars of so many seconds, None without a price.

    usd_per_hour: of one GPU, or of the machine where there is none; 0: what hardware.toml has for
    this product, if it knows it. world: a World; device: the product's name.
    """
    if not usd_per_hour and world.device.type == "cuda":
        found = hardware.find(device)
        usd_per_hour = found.usd_per_hour if found else None
    if not usd_per_hour:
        return None
    gpus = world.size if world.device.type == "cuda" else world.size / world.local_size
    return seconds / 3600 * gpus * usd_per_hour
