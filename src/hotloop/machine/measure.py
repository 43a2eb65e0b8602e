"""Times matrix products and memory streams on this machine, candidates in turn. Loads torch.

Every candidate gets one untimed call and one timed call in each round, so that a change of clock
or a neighbour's load hits all candidates alike.
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..units import MIB
from .ceilings import (
    BandwidthCeiling,
    Ceilings,
    MatmulCeiling,
    Measurement,
    installed_torch_version,
)
from .hardware import Hardware
from .heap import give_back_memory

if TYPE_CHECKING:
    import torch

SIZES = (512, 1024, 2048, 4096)
BUDGET_S = 12.0
ROUNDS = 9
# A product this long drowns the cost of the call and of waking the threads.
_LONG_ENOUGH_S = 0.02
_LEAST_ARRAY_BYTES = 64 * MIB

_BLAS_NAMES = {"open": "openblas"}


@dataclass
class _Candidate:
    """One thing to time: ``work`` units (flop or bytes) a call."""

    run: Callable[[], object]
    work: float
    num_threads: int
    finish: Callable[[Measurement], MatmulCeiling | BandwidthCeiling]
    rates: list[float] = field(default_factory=list)


def measure(
    machine: Hardware,
    *,
    budget_s: float = BUDGET_S,
    rounds: int = ROUNDS,
    sizes: Sequence[int] = SIZES,
    array_bytes: int | None = None,
) -> Ceilings:
    """Measure at one thread, at one thread per usable core, and at all usable CPUs.

    torch's thread count, random state and precision setting are afterwards what they were.

    Args:
        machine: this machine.
        budget_s: no round is begun that would end later; the first always runs.
        rounds: timed calls of each candidate, at most.
        sizes: matrix sizes, ascending; each candidate takes the first that runs long enough.
        array_bytes: size of each streamed array; ``None``: 4 times the last-level cache that the
            threads can reach, as the STREAM benchmark asks, at least 64 MiB. Where three of
            these take over half of the memory left, bandwidth is not measured.
    """
    began_s = time.perf_counter()
    with _torch_settings_kept():
        candidates = _matmul_candidates(machine, sizes)
        candidates += _bandwidth_candidates(machine, array_bytes)
        _time_in_turn(candidates, rounds, began_s + budget_s)
    done = [c.finish(Measurement.of(c.rates)) for c in candidates if c.rates]
    del candidates
    gc.collect()
    give_back_memory()
    return Ceilings(
        matmul=tuple(c for c in done if isinstance(c, MatmulCeiling)),
        bandwidth=tuple(c for c in done if isinstance(c, BandwidthCeiling)),
        fingerprint=machine.fingerprint(),
        torch_version=installed_torch_version(),
        measured_at_s=time.time(),
        wall_s=time.perf_counter() - began_s,
    )


def thread_counts(machine: Hardware) -> tuple[int, ...]:
    """1, the usable cores where that is another number, and all usable CPUs; ascending."""
    cores = min(machine.usable_cores or machine.usable_cpus, machine.usable_cpus)
    return tuple(sorted({1, cores, machine.usable_cpus}))


def library_of_mm(dtype: torch.dtype) -> str:
    """The library behind ``torch.mm`` on CPU for this dtype, as this build of torch is wired.

    ``addmm_impl_cpu_`` in ``aten/src/ATen/native/LinearAlgebra.cpp`` hands bfloat16 to oneDNN
    where the processor has the instructions, on Arm with the Compute Library float32 as well; the
    rest goes to the BLAS the build names, or for bfloat16 to torch's own loops.
    """
    import torch

    if torch._C._has_mkldnn and torch._C._get_mkldnn_enabled():
        if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "onednn"
        if torch.ops.mkldnn._is_mkldnn_acl_supported():
            return "onednn"
    if dtype == torch.bfloat16:
        return "native"
    named = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    if named is None:
        return "mkl" if torch._C.has_mkl else "native"
    return _BLAS_NAMES.get(named[1].lower(), named[1].lower())


@contextlib.contextmanager
def _torch_settings_kept() -> Iterator[None]:
    """Inside, float32 means float32; on leaving, threads and precision are as found."""
    import torch

    num_threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    try:
        if precision != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(num_threads)
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def _matmul_candidates(machine: Hardware, sizes: Sequence[int]) -> list[_Candidate]:
    import torch

    candidates = []
    for dtype in (torch.float32, torch.bfloat16):
        routes = [("torch.mm", library_of_mm(dtype))]
        if _has_onednn_linear(dtype):
            routes.append(("mkldnn._linear_pointwise", "onednn"))
        for num_threads in thread_counts(machine):
            for route, library in routes:
                # A kernel missing on this processor shows as an error: then it is absent.
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    candidates.append(
                        _matmul_candidate(machine, dtype, route, library, num_threads, sizes)
                    )
    return candidates


def _has_onednn_linear(dtype: torch.dtype) -> bool:
    import torch

    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _matmul_candidate(
    machine: Hardware,
    dtype: torch.dtype,
    route: str,
    library: str,
    num_threads: int,
    sizes: Sequence[int],
) -> _Candidate:
    import torch

    torch.set_num_threads(num_threads)
    for size in sizes:
        run = _product(dtype, route, size)
        run()
        took_s = _timed(run)
        larger_bytes = 3 * 4 * (2 * size) ** 2
        if took_s >= _LONG_ENOUGH_S or larger_bytes * 8 > _headroom_bytes(machine):
            break
    name = str(dtype).removeprefix("torch.")
    return _Candidate(
        run=run,
        work=2.0 * size**3,
        num_threads=num_threads,
        finish=lambda rate: MatmulCeiling(name, library, route, num_threads, size, rate),
    )


def _product(dtype: torch.dtype, route: str, size: int) -> Callable[[], object]:
    """One product of two [size, size] matrices of random numbers."""
    import torch

    # A generator of its own: the caller's random state is not touched.
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=draw).to(dtype)
    right = torch.randn(size, size, generator=draw).to(dtype)
    if route == "torch.mm":
        out = torch.empty(size, size, dtype=dtype)
        return lambda: torch.mm(left, right, out=out)
    linear = torch.ops.mkldnn._linear_pointwise
    weight = right.t()  # linear multiplies by the transpose of its weight
    return lambda: linear(left, weight, None, "none", [], "")


def _bandwidth_candidates(machine: Hardware, array_bytes: int | None) -> list[_Candidate]:
    import torch

    counts = thread_counts(machine)
    sizes = {n: array_bytes or _array_bytes(machine, n) for n in counts}
    largest = max(sizes.values())
    if 3 * largest > _headroom_bytes(machine) / 2:
        return []
    torch.set_num_threads(counts[-1])
    # Filling with all threads places each page on the node of the thread that streams it later.
    arrays = [torch.empty(largest // 4).fill_(i + 1.0) for i in range(3)]
    candidates = []
    for num_threads, size in sizes.items():
        a, b, c = (array[: size // 4] for array in arrays)
        candidates.append(_stream("copy", _copy_into(a, b), 2, num_threads, size))
        candidates.append(_stream("triad", _triad_into(a, b, c), 3, num_threads, size))
    return candidates


def _copy_into(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    return lambda: a.copy_(b)


def _triad_into(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Callable[[], object]:
    import torch

    return lambda: torch.add(b, c, alpha=3.0, out=a)


def _stream(
    kind: str, run: Callable[[], object], num_arrays: int, num_threads: int, size: int
) -> _Candidate:
    return _Candidate(
        run=run,
        work=float(num_arrays * size),
        num_threads=num_threads,
        finish=lambda rate: BandwidthCeiling(kind, num_threads, size, rate),
    )


def _array_bytes(machine: Hardware, num_threads: int) -> int:
    """4 times the last-level cache in reach: of one CPU, or of all usable CPUs together."""
    usable = set(machine.cpu_ids)
    sizes = [
        cache.size_bytes or 0
        for cache in machine.last_level_caches
        if usable & set(cache.shared_by)
    ]
    reach = max(sizes, default=0) if num_threads == 1 else sum(sizes)
    return max(_LEAST_ARRAY_BYTES, 4 * reach)


def _headroom_bytes(machine: Hardware) -> float:
    headroom = machine.memory.headroom_bytes
    return float("inf") if headroom is None else float(headroom)


def _time_in_turn(candidates: Sequence[_Candidate], rounds: int, deadline_s: float) -> None:
    import torch

    round_s = 0.0
    for done in range(rounds):
        began_s = time.perf_counter()
        if done and began_s + round_s > deadline_s:
            break
        for candidate in candidates:
            torch.set_num_threads(candidate.num_threads)
            candidate.run()
            candidate.rates.append(candidate.work / _timed(candidate.run))
        round_s = time.perf_counter() - began_s


def _timed(run: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s
