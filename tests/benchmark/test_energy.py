"""Counters of energy, as Linux and NVIDIA's library show them."""

import sys
import types

import pytest

from engine.benchmark import energy


def package(folder, name, energy_uj, around=1_000_000, kind="package-0"):
    (folder / name).mkdir(parents=True)
    (folder / name / "name").write_text(f"{kind}\n")
    (folder / name / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{around}\n")
    return folder / name / "energy_uj"


def test_processors_are_added_up_and_their_parts_left_out(tmp_path):
    """0.2 J of the first, and 0.3 J of the second, whose counter began again; in two calls."""
    first, second = package(tmp_path, "intel-rapl:0", 100_000), package(tmp_path, "intel-rapl:1", 900_000)
    part = package(tmp_path, "intel-rapl:0:0", 0)
    (tmp_path / "intel-rapl:2").mkdir()  # that nobody may read
    machine = package(tmp_path, "intel-rapl:3", 0, kind="psys")
    found = energy.counters("cpu", [0], tmp_path)
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 2:
            first.write_text("300000")
            second.write_text("200000")
            part.write_text("900000")
            machine.write_text("900000")

    assert energy.joules(call, 2, found) == pytest.approx((0.2 + 0.3) / 2)


def test_nothing_is_called_where_nothing_counts(tmp_path):
    assert energy.counters("cpu", [0], tmp_path / "none") == []
    assert energy.joules(lambda: pytest.fail("called"), 2, []) is None


def test_gpus_by_their_number(monkeypatch):
    spent = {0: 5_000, 3: 7_000}  # mJ
    library = types.ModuleType("pynvml")
    library.NVMLError = RuntimeError
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByIndex = lambda number: number
    library.nvmlDeviceGetHandleByUUID = {"GPU-abc": 3}.__getitem__
    library.nvmlDeviceGetTotalEnergyConsumption = lambda handle: spent[handle]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    found = energy.counters("gpu", [0, 3])

    def call():
        spent[0] += 1_000
        spent[3] += 2_500

    assert energy.joules(call, 4, found) == pytest.approx(3.5)

    for told in ("3", "GPU-abc"):  # which CUDA counts as its first
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        (counter,) = energy.counters("gpu", [0])
        assert counter.read() == pytest.approx(spent[3] / 1e3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def old(handle):
        raise RuntimeError("not supported")

    library.nvmlDeviceGetTotalEnergyConsumption = old
    assert energy.counters("gpu", [0]) == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.counters("gpu", [0]) == []
    assert energy.counters("tpu", [0]) == []
