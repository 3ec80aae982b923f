"""runtime/energy.py and runtime/hardware.py: counters as the system has them, and the price of
time."""

import ctypes
import types

import pytest
import torch

from base import InputError
from runtime import energy, hardware
from runtime.finish import cost_in_words
from runtime.machine import World


def package(folder, number, microjoules, name="package-0", wrap=1_000_000_000):
    path = folder / f"intel-rapl:{number}"
    path.mkdir()
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    return path / "energy_uj"


class Ticking:
    """A clock that is set by hand."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def test_packages_are_summed_and_counters_that_begin_again_go_on(tmp_path):
    first = package(tmp_path, "0", 999_000_000)
    second = package(tmp_path, "1", 5_000_000, "package-1")
    part = package(tmp_path, "0:0", 1, "package-0")  # a part of the first
    board = package(tmp_path, "2", 1, "psys")  # with the packages in it
    clock = Ticking()
    meter = energy.Meter(energy.rapl_counters(tmp_path), clock=clock)
    assert meter.joules == 0
    first.write_text("2000000")  # 3 J later, after its end at 1000 J
    second.write_text("12000000")  # 7 J
    part.write_text("2000000")
    board.write_text("20000000")
    clock.seconds = 1.0
    meter.look()
    assert (meter.joules, meter.seconds) == (0, 0)  # not yet
    meter.look(now=True)
    assert meter.joules == pytest.approx(10) and meter.seconds == 1
    clock.seconds = 1.0 + energy.EVERY
    first.write_text("4000000")
    meter.look()
    assert meter.joules == pytest.approx(12) and meter.seconds == 1 + energy.EVERY


def test_what_cannot_be_read_is_no_number(tmp_path):
    assert energy.rapl_counters(tmp_path / "none") == []
    (package(tmp_path, "0", 1)).unlink()
    assert energy.rapl_counters(tmp_path) == []  # as where only root may read it
    assert energy.Meter().joules is None
    lost = package(tmp_path, "1", 1)
    meter = energy.Meter(energy.rapl_counters(tmp_path))
    lost.unlink()
    meter.look(now=True)
    assert meter.joules is None  # half a number is none


def test_a_run_that_goes_on_adds_to_what_it_took():
    counter = energy.Counter(iter([5.0, 8.0]).__next__)
    meter = energy.Meter([counter], joules=100.0, seconds=50.0, clock=Ticking())
    meter.look(now=True)
    assert (meter.joules, meter.seconds) == (103.0, 50.0)
    # Where the first part could not be read, the whole is not known
    counter = energy.Counter(iter([5.0, 8.0]).__next__)
    assert energy.Meter([counter], joules=None, seconds=50.0).joules is None


class Nvml:
    """NVML as far as it is used."""

    def __init__(self, millijoules):
        self.millijoules = millijoules  # {uuid: mJ}

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        if uuid.decode() not in self.millijoules:
            return 6
        device._obj.value = 1 + list(self.millijoules).index(uuid.decode())
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device, found):
        assert isinstance(found._obj, ctypes.c_ulonglong)
        found._obj.value = list(self.millijoules.values())[device.value - 1]
        return 0


def test_gpus_are_counted_by_nvml():
    nvml = Nvml({"GPU-a": 1000, "GPU-b": 50_000})
    meter = energy.Meter(energy.nvml_counters(["GPU-a", "GPU-b"], nvml))
    nvml.millijoules = {"GPU-a": 4000, "GPU-b": 52_000}
    meter.look(now=True)
    assert meter.joules == 5
    assert energy.nvml_counters(["GPU-a", "GPU-c"], nvml) == []
    assert energy.nvml_counters(["GPU-a"]) == []  # no NVIDIA driver here
    elsewhere = World(0, 4, torch.device("cpu"), 2)
    assert energy.counters_of(elsewhere) == []


def test_money():
    cpu = World()
    gpus = World(0, 8, torch.device("cuda", 0), 8)
    assert energy.cost(1800, cpu, "AMD EPYC") is None
    assert energy.cost(1800, cpu, "AMD EPYC", 0.5) == 0.25
    assert energy.cost(3600, gpus, "NVIDIA H100 80GB HBM3") == pytest.approx(24)
    assert energy.cost(3600, gpus, "NVIDIA H100 80GB HBM3", 2.0) == 16
    assert energy.cost(3600, gpus, "NVIDIA H200") is None  # no price in the table
    assert energy.cost(3600, gpus, "something new") is None
    # Two processes on one machine's processors pay for one machine
    assert energy.cost(3600, World(0, 2, torch.device("cpu"), 2), "a CPU", 1.0) == 1
    said = cost_in_words(dict(energy_kwh=0.5, usd=2.0))
    assert said == "; training took 0.5000 kWh by the hardware's counters, $2.00"
    assert cost_in_words(dict(energy_kwh=None, usd=None)) == ""


# --- the table of hardware


def test_hardware_by_name():
    h100, count = hardware.parse("8xH100")
    assert (h100.name, h100.usd_per_hour, count) == ("h100", 3.0, 8)
    assert hardware.parse("a100")[1] == 1
    for wrong in ("h1000", "0xh100", "8", "x", "8xh100x"):
        with pytest.raises(InputError, match=f"--hardware {wrong}: expected one of h100, h200"):
            hardware.parse(wrong)
    assert hardware.find("NVIDIA GH200 480GB").name == "h200"
    assert hardware.find("NVIDIA GeForce RTX 3090").name == "rtx3090"
    assert hardware.find("NVIDIA GeForce GTX 1080") is None


def test_every_price_has_a_date_and_a_source():
    table, rates = hardware.read()
    for kind in table.values():
        assert (kind.usd_per_hour is None) == (kind.price_source == "") == (kind.price_date == "")
        assert kind.watts_source and kind.chip and kind.memory_gb > 0
    assert all(0 < rate.share < 1 and rate.source and rate.what for rate in rates)


def test_the_nearest_rate():
    assert hardware.nearest_rate("h100", 1e9, fp8=True).fp8
    assert not hardware.nearest_rate("h100", 1e9).fp8
    assert hardware.nearest_rate("cpu", 1e9).hardware == "cpu"
    # What was measured: 393,216 tokens of 0.733 GFLOP in 0.558 s of 989 TFLOP/s
    share = 393_216 * 0.7332e9 / 0.558 / 989.4e12
    assert hardware.nearest_rate("h200", 1e9, True).share == pytest.approx(share, rel=1e-3)


def test_a_rate_in_fp8_is_for_runs_in_fp8(monkeypatch):
    table, (fp8, bf16, *_) = hardware.read()
    far = bf16._replace(flops_per_token=1e6)
    monkeypatch.setattr(hardware, "read", lambda: (table, [fp8, far]))
    assert hardware.nearest_rate("h200", fp8.flops_per_token) == far
    assert hardware.nearest_rate("h200", fp8.flops_per_token, True) == fp8


def test_a_table_that_is_none(tmp_path):
    path = tmp_path / "hardware.toml"
    path.write_text("[h100]\nspeed = 9\n")
    with pytest.raises(InputError, match="expected what its first lines describe"):
        hardware.read(path)


def test_sessions_know_what_they_cost():
    """A meter's place in a run: read where a checkpoint is made, and kept in it."""
    from runtime.session import Position, Session

    session = Session.__new__(Session)
    session.at = Position(seconds=3600.0, joules=7.2e6)
    session.meter = None
    session.options = types.SimpleNamespace(usd_per_hour=0.25)
    session.state = types.SimpleNamespace(world=World())
    session.about = dict(environment=dict(device="a CPU"))
    assert session.cost() == dict(energy_kwh=2.0, usd=0.25)
    session.at.joules = None
    assert session.cost()["energy_kwh"] is None
