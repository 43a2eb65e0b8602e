"""Ceilings: values made by hand, the cache, and a short real measurement."""

import json
import os
import subprocess
import sys

import pytest

from hotloop.machine import (
    BandwidthCeiling,
    Cache,
    Ceilings,
    Core,
    Machine,
    MachineMemory,
    MatmulCeiling,
    Measurement,
    cache_dir,
)
from hotloop.machine.ceilings import installed_torch_version
from hotloop.machine.measure import _array_bytes, measure, thread_counts

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
        "hotloop.machine.measure.measure", lambda machine: calls.append(machine) or ceilings()
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


def test_real_measurement_is_short_and_leaves_torch_as_it_was():
    import torch

    machine = Machine.probe()
    torch.manual_seed(7)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    figures = measure(machine, budget_s=0.5, rounds=3, sizes=(64, 128), array_bytes=1 << 20)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    counts = {c.num_threads for c in figures.matmul}
    assert counts == set(thread_counts(machine))
    assert {c.kind for c in figures.bandwidth} == {"copy", "triad"}
    assert {c.dtype for c in figures.matmul} == {"float32", "bfloat16"}
    for ceiling in figures.matmul:
        assert 1 <= ceiling.flop_per_s.n <= 3
        assert ceiling.size in (64, 128)
    assert figures.fingerprint == machine.fingerprint()
    assert figures.torch_version == torch.__version__
    assert Ceilings.from_dict(figures.to_dict()) == figures


def test_threads_are_restored_when_measuring_fails(monkeypatch):
    import torch

    before = torch.get_num_threads()

    def fail(machine, array_bytes):
        raise KeyError

    monkeypatch.setattr("hotloop.machine.measure._bandwidth_candidates", fail)
    with pytest.raises(KeyError):
        measure(Machine.probe(), budget_s=0.1, rounds=1, sizes=(64,))
    assert torch.get_num_threads() == before


def test_both_routes_compute_the_same_product():
    import torch

    from hotloop.machine.measure import _has_onednn_linear, _product

    if not _has_onednn_linear(torch.float32):
        pytest.skip("this torch has no oneDNN linear")
    by_mm = _product(torch.float32, "torch.mm", 96)()
    by_linear = _product(torch.float32, "mkldnn._linear_pointwise", 96)()
    torch.testing.assert_close(by_linear, by_mm)


def test_the_library_named_is_the_one_that_ran():
    """Both libraries announce each product when asked to; that is the proof of the name."""
    code = (
        "import torch\n"
        "from hotloop.machine.measure import library_of_mm\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    square = torch.ones(256, 256, dtype=dtype)\n"
        "    print('named', library_of_mm(dtype), flush=True)\n"
        "    torch.mm(square, square)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True,
        env={**os.environ, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"},
    )  # fmt: skip
    parts = done.stdout.split("named ")[1:]
    assert len(parts) == 2
    for part in parts:
        name = part.split()[0]
        assert (name == "onednn") == ("exec,cpu,matmul" in part)
        assert (name == "mkl") == ("GEMM(" in part)


def test_a_library_that_is_missing_is_absent(monkeypatch):
    monkeypatch.setattr("hotloop.machine.measure._has_onednn_linear", lambda dtype: False)
    figures = measure(Machine.probe(), rounds=1, sizes=(64,), array_bytes=1 << 20)
    assert {c.route for c in figures.matmul} == {"torch.mm"}


def test_bandwidth_is_absent_where_memory_is_short():
    from dataclasses import replace

    machine = replace(Machine.probe(), memory=MachineMemory(available_bytes=1 << 22))
    figures = measure(machine, rounds=1, sizes=(64,), array_bytes=1 << 20)
    assert figures.bandwidth == ()
    assert figures.best_bandwidth_bytes_per_s() is None
    assert figures.matmul


def test_arrays_exceed_the_caches_in_reach():
    caches = tuple(Cache(3, "unified", 96 << 20, 64, (2 * i, 2 * i + 1)) for i in range(4))
    machine = Machine(usable_cpus=6, cpu_ids=tuple(range(6)), caches=caches)
    assert _array_bytes(machine, 1) == 4 * (96 << 20)
    assert _array_bytes(machine, 6) == 4 * 3 * (96 << 20)
    assert _array_bytes(Machine(), 1) == 64 << 20


def test_thread_counts_are_one_cores_and_all():
    cores = tuple(Core((i, i + 4), None, 0, 0) for i in range(4))
    machine = Machine(usable_cpus=8, cpu_ids=tuple(range(8)), cores=cores)
    assert thread_counts(machine) == (1, 4, 8)
    assert thread_counts(Machine()) == (1,)
    assert thread_counts(Machine(usable_cpus=2, cpu_ids=tuple(range(8)), cores=cores)) == (1, 2)
