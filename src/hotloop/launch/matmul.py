"""Float32 matrix products of a running program by the faster of MKL and oneDNN (``matmul.cpp``).

Each shape is made by both in turn until it is known which is faster, and a few times more later;
what was found is kept with the machine's other winners, so that the next run starts with it.
Without a C++ compiler the larger products are routed from Python (``matmul_python``).
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..measure import Winner, winners

KERNELS = ("mkl", "onednn")
_PREFIX = "run"
# Multiply-adds below which the call alone costs oneDNN more than the product costs MKL: on the
# machine of docs/run.md 10 us, which MKL needs for 200,000 and more.
LEAST_WORK = 1 << 17
_SOURCE = Path(__file__).with_name("matmul.cpp")


@dataclass(frozen=True, kw_only=True)
class ProductUse:
    """One shape of matrix product ``a[m, k] @ b[k, n]`` and what became of it.

    Attributes:
        batch: products in one call of bmm; 0: mm or addmm.
        m, k, n: shape.
        layout: two letters for a and b: ``t`` is transposed, ``n`` is not.
        adds: whether something is added to the product.
        num_threads: threads it was made with.
        kernel: ``"mkl"`` or ``"onednn"``; ``None``: not yet known.
        calls: how often. seconds: of all calls.
        mkl_s, onednn_s: least seconds of one call by each; ``None``: not tried.
    """

    batch: int
    m: int
    k: int
    n: int
    layout: str
    adds: bool
    num_threads: int
    kernel: str | None
    calls: int = 0
    seconds: float = 0.0
    mkl_s: float | None = None
    onednn_s: float | None = None

    @property
    def flop(self) -> int:
        """Of one call."""
        return 2 * max(self.batch, 1) * self.m * self.k * self.n

    @property
    def flop_per_s(self) -> float | None:
        """Rate over all calls, those that tried both kernels included."""
        return self.flop * self.calls / self.seconds if self.seconds else None

    @property
    def key(self) -> str:
        """The question that its kernel answers, among the winners."""
        layout = f"{self.layout}{'+' if self.adds else ''}"
        parts = (_PREFIX, self.batch, self.m, self.k, self.n, layout, self.num_threads)
        return "/".join(str(part) for part in parts)

    @classmethod
    def from_winner(cls, winner: Winner) -> ProductUse | None:
        """What was found before; ``None``: damaged."""
        prefix, *numbers = winner.question.split("/")
        if prefix != _PREFIX or len(numbers) != 6:
            return None
        try:
            batch, m, k, n, threads = (int(numbers[at]) for at in (0, 1, 2, 3, 5))
            mkl_s, onednn_s = (float(winner.seconds[name]) for name in KERNELS)
        except (ValueError, TypeError, KeyError):
            return None
        layout, kernel = numbers[4], winner.answer
        if kernel not in KERNELS or layout.removesuffix("+") not in ("nn", "nt", "tn", "tt"):
            return None
        return cls(
            batch=batch, m=m, k=k, n=n, layout=layout.removesuffix("+"),
            adds=layout.endswith("+"), num_threads=threads, kernel=kernel, mkl_s=mkl_s,
            onednn_s=onednn_s,
        )  # fmt: skip


class Router(Protocol):
    """Replaces torch's products from ``install`` to ``remove``."""

    name: str

    def install(self, known: list[ProductUse]) -> None:
        """Take over; ``known`` are choices made before."""

    def remove(self) -> None:
        """Give back."""

    def products(self) -> list[ProductUse]:
        """Every shape seen or known."""


class _Row(ctypes.Structure):
    """``hotloop_matmul_row``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "m", "k", "n")),
        *((name, ctypes.c_int32) for name in ("layout", "threads", "choice", "reserved")),
        *((name, ctypes.c_int64) for name in ("calls", "ns")),
        *((name, ctypes.c_double) for name in ("mkl_s", "onednn_s")),
    )


class NativeRouter:
    """The compiled one.

    Args:
        least_work: multiply-adds below which a product is left to torch.

    Raises:
        RunError: no C++ compiler, or it refused.
    """

    name = "native"

    def __init__(self, least_work: int = LEAST_WORK) -> None:
        from ..machine import native

        self._library = native.load(_SOURCE, flags=("-ltorch_cpu",))
        self._library.hotloop_matmul_rows.restype = ctypes.c_int64
        self._least_work = least_work

    def install(self, known: list[ProductUse]) -> None:
        """Take over; ``known`` are choices made before."""
        integer = ctypes.c_int64
        for use in known:
            if use.kernel is None or use.mkl_s is None or use.onednn_s is None:
                continue
            layout = (use.layout[0] == "t") | (use.layout[1] == "t") << 1 | use.adds << 2
            self._library.hotloop_matmul_know(
                integer(use.batch), integer(use.m), integer(use.k), integer(use.n),
                ctypes.c_int32(layout), ctypes.c_int32(use.num_threads),
                ctypes.c_int32(KERNELS.index(use.kernel)), ctypes.c_double(use.mkl_s),
                ctypes.c_double(use.onednn_s),
            )  # fmt: skip
        self._library.hotloop_matmul_install(ctypes.c_int64(self._least_work))

    def remove(self) -> None:
        """Give back."""
        self._library.hotloop_matmul_remove()

    def products(self) -> list[ProductUse]:
        """Every shape seen or known."""
        count = self._library.hotloop_matmul_rows(None, ctypes.c_int64(0))
        rows = (_Row * (count + 64))()  # Another thread may add some meanwhile.
        found = self._library.hotloop_matmul_rows(rows, ctypes.c_int64(len(rows)))
        return [_use(row) for row in rows[: min(found, len(rows))]]


def _use(row: Any) -> ProductUse:
    return ProductUse(
        batch=row.batch, m=row.m, k=row.k, n=row.n,
        layout=("t" if row.layout & 1 else "n") + ("t" if row.layout & 2 else "n"),
        adds=bool(row.layout & 4), num_threads=row.threads,
        kernel=KERNELS[row.choice] if row.choice >= 0 else None,
        calls=row.calls, seconds=row.ns * 1e-9,
        mkl_s=row.mkl_s if math.isfinite(row.mkl_s) else None,
        onednn_s=row.onednn_s if math.isfinite(row.onednn_s) else None,
    )  # fmt: skip


@functools.cache
def native_router() -> NativeRouter:
    """The compiled router; one a process, as torch's table of kernels is one.

    Raises:
        RunError: no C++ compiler, or it refused.
    """
    return NativeRouter()


def recall(fingerprint: str | None = None) -> list[ProductUse]:
    """The choices that earlier runs on this machine made."""
    known = winners.recall_all(_PREFIX, winners.versions_of("torch"), fingerprint)
    uses = (ProductUse.from_winner(winner) for winner in known)
    return [use for use in uses if use is not None]


def remember(
    products: list[ProductUse], known: list[ProductUse], fingerprint: str | None = None
) -> None:
    """Keep what is new: choices made, and times less than those known."""
    versions = winners.versions_of("torch")
    before = {use.key: (use.kernel, use.mkl_s, use.onednn_s) for use in known}
    found = [
        Winner(
            question=use.key, answer=use.kernel, versions=versions,
            seconds={"mkl": use.mkl_s, "onednn": use.onednn_s},
        )
        for use in products
        if use.kernel is not None
        and use.mkl_s
        and use.onednn_s
        and before.get(use.key) != (use.kernel, use.mkl_s, use.onednn_s)
    ]  # fmt: skip
    winners.add(found, fingerprint)
