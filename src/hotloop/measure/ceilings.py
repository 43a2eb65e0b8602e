"""``Machine.ceilings``: the best rates that anything reached here. Measuring loads torch.

Matrix products by every library at hand, hotloop's own kernels among them, and memory streams: in
turn, one untimed and one timed call each in a round.
"""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .. import kernels
from ..kernels import calls
from ..machine import BandwidthCeiling, Ceilings, Machine, MatmulCeiling, Measurement
from ..machine.ceilings import installed_torch_version
from ..machine.heap import give_back_memory
from ..machine.machine import ceilings_measured_by
from ..units import MIB
from .clock import now
from .turns import Candidate, Turns, take_turn

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
class _Rate:
    """A rate to measure: ``work`` units (flop or bytes) a call."""

    run: Callable[[], object]
    work: float
    num_threads: int
    finish: Callable[[Measurement], MatmulCeiling | BandwidthCeiling]
    rates: list[float] = field(default_factory=list)


def measure(
    machine: Machine,
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
    began_s = now()
    with _torch_settings_kept():
        wanted = _matmul_rates(machine, sizes)
        wanted += _bandwidth_rates(machine, array_bytes)
        _time_in_turn(wanted, rounds, began_s + budget_s - now())
    done = [rate.finish(Measurement.of(rate.rates)) for rate in wanted if rate.rates]
    del wanted
    gc.collect()
    give_back_memory()
    return Ceilings(
        matmul=tuple(c for c in done if isinstance(c, MatmulCeiling)),
        bandwidth=tuple(c for c in done if isinstance(c, BandwidthCeiling)),
        fingerprint=machine.fingerprint(),
        torch_version=installed_torch_version(),
        measured_at_s=time.time(),
        wall_s=now() - began_s,
    )


def thread_counts(machine: Machine) -> tuple[int, ...]:
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


def _matmul_rates(machine: Machine, sizes: Sequence[int]) -> list[_Rate]:
    import torch

    wanted = []
    for dtype in (torch.float32, torch.bfloat16):
        for num_threads in thread_counts(machine):
            for route, library in routes_of(dtype):
                # A kernel missing on this processor shows as an error: then it is absent.
                with contextlib.suppress(RuntimeError, NotImplementedError):
                    wanted.append(_matmul_rate(machine, dtype, route, library, num_threads, sizes))
    return wanted


def routes_of(dtype: torch.dtype) -> list[tuple[str, str]]:
    """Every way to make a product of this dtype here: ``(route, library)``, see ``product``."""
    routes = [("torch.mm", library_of_mm(dtype))]
    if _has_onednn_linear(dtype):
        routes.append(("mkldnn._linear_pointwise", "onednn"))
    return routes + own_products(dtype)


def own_products(dtype: torch.dtype) -> list[tuple[str, str]]:
    """``(route, library)`` of hotloop's own product, where the processor has one of this dtype."""
    import torch

    if not kernels.is_available():
        return []
    has = dtype == torch.float32 or calls.has_bfloat16()
    return [("hotloop.kernels", "hotloop")] if has else []


def _has_onednn_linear(dtype: torch.dtype) -> bool:
    import torch

    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _matmul_rate(
    machine: Machine,
    dtype: torch.dtype,
    route: str,
    library: str,
    num_threads: int,
    sizes: Sequence[int],
) -> _Rate:
    import torch

    torch.set_num_threads(num_threads)
    for size in sizes:
        run = product(dtype, route, size, num_threads)
        took_s = take_turn(Candidate([run]), settle_s=0.0).median_s
        larger_bytes = 3 * 4 * (2 * size) ** 2
        if took_s >= _LONG_ENOUGH_S or larger_bytes * 8 > _headroom_bytes(machine):
            break
    name = str(dtype).removeprefix("torch.")
    return _Rate(
        run=run,
        work=2.0 * size**3,
        num_threads=num_threads,
        finish=lambda rate: MatmulCeiling(name, library, route, num_threads, size, rate),
    )


def product(
    dtype: torch.dtype, route: str, size: int, num_threads: int
) -> Callable[[], torch.Tensor]:
    """One product of two [size, size] matrices of random numbers, by a route of ``routes_of``.

    hotloop's own product takes float32 and, for bfloat16, rounds both factors itself.
    """
    import torch

    # A generator of its own: the caller's random state is not touched.
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=draw)
    right = torch.randn(size, size, generator=draw)
    if route == "hotloop.kernels":
        out = torch.empty(size, size)
        low = dtype == torch.bfloat16
        own = calls.product(left, right, out, num_threads=num_threads, bfloat16=low)

        def run() -> torch.Tensor:
            own()
            return out

        return run
    left, right = left.to(dtype), right.to(dtype)
    if route == "torch.mm":
        into = torch.empty(size, size, dtype=dtype)
        return lambda: torch.mm(left, right, out=into)
    linear = torch.ops.mkldnn._linear_pointwise
    weight = right.t()  # linear multiplies by the transpose of its weight
    return lambda: linear(left, weight, None, "none", [], "")


def _bandwidth_rates(machine: Machine, array_bytes: int | None) -> list[_Rate]:
    import torch

    counts = thread_counts(machine)
    sizes = {n: array_bytes or _array_bytes(machine, n) for n in counts}
    largest = max(sizes.values())
    if 3 * largest > _headroom_bytes(machine) / 2:
        return []
    torch.set_num_threads(counts[-1])
    # Filling with all threads places each page on the node of the thread that streams it later.
    arrays = [torch.empty(largest // 4).fill_(i + 1.0) for i in range(3)]
    wanted = []
    for num_threads, size in sizes.items():
        a, b, c = (array[: size // 4] for array in arrays)
        wanted.append(_stream("copy", _copy_into(a, b), 2, num_threads, size))
        wanted.append(_stream("triad", _triad_into(a, b, c), 3, num_threads, size))
    return wanted


def _copy_into(a: torch.Tensor, b: torch.Tensor) -> Callable[[], object]:
    return lambda: a.copy_(b)


def _triad_into(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Callable[[], object]:
    import torch

    return lambda: torch.add(b, c, alpha=3.0, out=a)


def _stream(
    kind: str, run: Callable[[], object], num_arrays: int, num_threads: int, size: int
) -> _Rate:
    return _Rate(
        run=run,
        work=float(num_arrays * size),
        num_threads=num_threads,
        finish=lambda rate: BandwidthCeiling(kind, num_threads, size, rate),
    )


def _array_bytes(machine: Machine, num_threads: int) -> int:
    """4 times the last-level cache in reach: of one CPU, or of all usable CPUs together."""
    usable = set(machine.cpu_ids)
    sizes = [
        cache.size_bytes or 0
        for cache in machine.last_level_caches
        if usable & set(cache.shared_by)
    ]
    reach = max(sizes, default=0) if num_threads == 1 else sum(sizes)
    return max(_LEAST_ARRAY_BYTES, 4 * reach)


def _headroom_bytes(machine: Machine) -> float:
    headroom = machine.memory.headroom_bytes
    return float("inf") if headroom is None else float(headroom)


def _time_in_turn(wanted: Sequence[_Rate], rounds: int, limit_s: float) -> None:
    import torch

    turns = Turns(
        {number: rate.run for number, rate in enumerate(wanted)}, rounds=rounds, limit_s=limit_s,
        before=lambda number: torch.set_num_threads(wanted[number].num_threads), settle_s=0.0,
    )  # fmt: skip
    for played in turns:
        for number, turn in played.items():
            wanted[number].rates.append(wanted[number].work / turn.median_s)


ceilings_measured_by(measure)
