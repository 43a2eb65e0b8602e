"""Ceilings: values made by hand, and their cache."""

import json
import os

import pytest

from hotloop.errors import RunError
from hotloop.machine import (
    BandwidthCeiling,
    Ceilings,
    Machine,
    MatmulCeiling,
    Measurement,
    cache_dir,
    ceilings_cache,
)
from hotloop.machine.ceilings import installed_torch_version

MACHINE = Machine(usable_cpus=4, cpu_ids=(0, 1, 2, 3), cpu_model="made by hand")


def rate(median: float) -> Measurement:
    return Measurement(median, median / 2, median * 2, 5)


def ceilings(**changes) -> Ceilings:
    fields = {
        "matmul": (
            MatmulCeiling("float32", "mkl", "torch.mm", 1, 1024, rate(1e11)),
            MatmulCeiling("float32", "onednn", "linear", 1, 1024, rate(2e11)),
            MatmulCeiling("float32", "mkl", "torch.mm", 4, 2048, rate(3e11)),
            MatmulCeiling("bfloat16", "onednn", "torch.mm", 4, 2048, rate(8e11)),
        ),
        "bandwidth": (
            BandwidthCeiling("copy", 1, 1 << 27, rate(1e10)),
            BandwidthCeiling("triad", 4, 1 << 27, rate(3e10)),
        ),
        "fingerprint": MACHINE.fingerprint(),
        "torch_version": installed_torch_version(),
        "measured_at_s": 1e9,
        "wall_s": 10.0,
    }
    return Ceilings(**{**fields, **changes})


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hotloop" / f"ceilings-{MACHINE.fingerprint()}.json"


@pytest.fixture
def measured(monkeypatch):
    """Counts measurements and answers with the figures made by hand."""
    calls = []
    monkeypatch.setattr(
        "hotloop.machine.machine._measure_ceilings",
        lambda machine: calls.append(machine) or ceilings(),
    )
    return calls


def test_best_rates():
    best = ceilings()
    assert best.best_matmul_flop_per_s() == 3e11
    assert best.best_matmul_flop_per_s(num_threads=1) == 2e11
    assert best.best_matmul_flop_per_s("bfloat16") == 8e11
    assert best.best_bandwidth_bytes_per_s() == 3e10
    assert best.best_bandwidth_bytes_per_s(num_threads=1) == 1e10


def test_what_was_not_measured_is_none():
    best = ceilings()
    assert best.best_matmul_flop_per_s("float16") is None
    assert best.best_matmul_flop_per_s(num_threads=2) is None
    assert best.best_bandwidth_bytes_per_s(num_threads=2) is None


def test_measurement_of_rates():
    assert Measurement.of([3.0, 1.0, 2.0, 10.0]) == Measurement(2.5, 1.0, 10.0, 4)
    for bad in ((1.0, 2.0, 3.0, 4), (0.0, 0.0, 0.0, 1), (1.0, 1.0, float("nan"), 1)):
        with pytest.raises(ValueError, match="rates must be"):
            Measurement(*bad)
    with pytest.raises(ValueError, match="n must be"):
        Measurement(1.0, 1.0, 1.0, 0)


def test_dict_round_trip():
    document = ceilings().to_dict()
    assert Ceilings.from_dict(json.loads(json.dumps(document))) == ceilings()


def test_measured_once_then_read_from_the_cache(cache, measured):
    assert MACHINE.ceilings(max_age_s=None) == ceilings()
    assert cache.exists()
    assert MACHINE.ceilings(max_age_s=None) == ceilings()
    assert len(measured) == 1
    MACHINE.ceilings(use_cache=False)
    assert len(measured) == 2


def test_old_figures_are_measured_again(cache, measured):
    MACHINE.ceilings()
    MACHINE.ceilings(max_age_s=3600.0)
    assert len(measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"format": 1', '"format": 99'),
        lambda text: text.replace('"n": 5', '"n": 0'),
        lambda text: text.replace('"median"', '"middle"'),
        lambda text: text.replace('"matmul"', '"other"'),
        lambda text: text.replace('"min": 50000000000.0', '"min": NaN'),
        lambda text: text.replace('"measured_at_s": 1000000000.0', '"measured_at_s": "now"'),
        lambda text: text.replace("2.", "1."),
        lambda text: "[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_cache_is_ignored_and_rewritten(cache, measured, damage):
    MACHINE.ceilings(max_age_s=None)
    good = cache.read_text()
    assert damage(good) != good
    cache.write_text(damage(good))
    assert MACHINE.ceilings(max_age_s=None) == ceilings()
    assert len(measured) == 2
    assert cache.read_text() == good


def test_a_cache_of_another_machine_or_torch_is_not_used(cache, measured):
    for change in ({"fingerprint": "0" * 16}, {"torch_version": "0.1"}):
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(json.dumps(ceilings(**change).to_dict()))
        MACHINE.ceilings(max_age_s=None)
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written_does_not_stop_it(cache, measured):
    cache.mkdir(parents=True)
    assert MACHINE.ceilings() == ceilings()


def test_without_the_room_that_measures_it_says_so(cache, monkeypatch):
    monkeypatch.setattr("hotloop.machine.machine._measure_ceilings", None)
    with pytest.raises(RunError, match="must be imported to measure"):
        MACHINE.ceilings()


def test_clearing_is_of_all_machines(cache, measured):
    MACHINE.ceilings()
    cache.with_name("ceilings-other.json").write_text("{")
    assert ceilings_cache.clear() == 2
    assert not cache.exists()
    assert ceilings_cache.clear() == 0


def test_cache_folder_order(tmp_path, monkeypatch):
    home, xdg = tmp_path / "home", tmp_path / "xdg"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(xdg))
    assert cache_dir() == xdg / "hotloop"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_dir() == home / ".cache" / "hotloop"
    assert cache_dir().is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    home.joinpath(".cache/hotloop").rmdir()
    home.joinpath(".cache").rmdir()
    home.joinpath(".cache").write_text("a file is in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache_dir() == tmp_path / f"hotloop-{os.getuid()}"
    cache_dir().rmdir()
    (tmp_path / f"hotloop-{os.getuid()}").symlink_to(home)
    assert cache_dir().parent == tmp_path
    assert not cache_dir().is_symlink()
