"""Measuring ceilings: short real measurements, and what is timed."""

import os
import subprocess
import sys

import pytest

from hotloop import kernels
from hotloop.machine import Cache, Ceilings, Core, Machine, MachineMemory
from hotloop.measure.ceilings import (
    _array_bytes,
    measure,
    own_products,
    product,
    routes_of,
    thread_counts,
)


def test_the_public_machine_brings_the_room_that_measures_and_no_torch():
    code = (
        "import hotloop, sys\n"
        "machine = hotloop.Machine.probe()\n"
        "assert 'torch' not in sys.modules\n"
        "assert hotloop.machine.machine._measure_ceilings is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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
    if kernels.is_available():
        assert "hotloop" in {c.library for c in figures.matmul if c.dtype == "float32"}
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

    monkeypatch.setattr("hotloop.measure.ceilings._bandwidth_rates", fail)
    with pytest.raises(KeyError):
        measure(Machine.probe(), budget_s=0.1, rounds=1, sizes=(64,))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_route_computes_the_same_product(dtype):
    import torch

    kind = getattr(torch, dtype)
    with torch.no_grad():
        results = {route: product(kind, route, 96, 1)() for route, _ in routes_of(kind)}
    reference = results.pop("torch.mm").float()
    for route, result in results.items():
        # Sums of bfloat16 products are rounded to it by torch, and stay float32 here.
        error = (result.float() - reference).abs().max() / reference.abs().max()
        assert error < (1e-6 if dtype == "float32" else 1e-2), route


def test_own_kernels_count_where_they_are(monkeypatch):
    import torch

    found = own_products(torch.float32)
    assert found == ([("hotloop.kernels", "hotloop")] if kernels.is_available() else [])
    monkeypatch.setattr(kernels, "is_available", lambda: False)
    assert own_products(torch.float32) == []


def test_the_library_named_is_the_one_that_ran():
    """Both libraries announce each product when asked to; that is the proof of the name."""
    code = (
        "import torch\n"
        "from hotloop.measure.ceilings import library_of_mm\n"
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
    monkeypatch.setattr("hotloop.measure.ceilings._has_onednn_linear", lambda dtype: False)
    figures = measure(Machine.probe(), rounds=1, sizes=(64,), array_bytes=1 << 20)
    assert "mkldnn._linear_pointwise" not in {c.route for c in figures.matmul}


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
