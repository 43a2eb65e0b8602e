"""The router of matrix products where there is no C++ compiler: larger ``mm`` and ``addmm``.

A product that goes through the interpreter pays some microseconds for it. So only products that
take long are routed, and the router leaves altogether where its own cost, for all the products that
it must look at, is not well below what it saved.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from .matmul import KERNELS, ProductUse

# Multiply-adds below which the interpreter's part is a good share of the product.
LEAST_WORK = 3_000_000
_ROUNDS = 6
_MARGIN = 0.97
# How many calls between two looks at whether it pays, and what one call's detour costs: 1.8 us on
# the machine of docs/run.md, twice that to be on the safe side.
_LOOK_EVERY = 512
_DETOUR_S = 4e-6


@dataclass
class _Entry:
    choice: int | None = None
    tries: int = 0
    calls: int = 0
    seconds: float = 0.0
    best_s: list[float] = field(default_factory=lambda: [float("inf"), float("inf")])


class PythonRouter:
    """Routes ``mm`` and ``addmm`` of the CPU key from Python.

    Args:
        least_work: multiply-adds below which a product is left to torch.
    """

    name = "python"

    def __init__(self, least_work: int = LEAST_WORK) -> None:
        self._least_work = least_work
        self._entries: dict[tuple[Any, ...], _Entry] = {}
        self._library: Any = None
        self._calls = 0
        self._torch = {
            name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm")
        }
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def install(self, known: list[ProductUse]) -> None:
        """Take over; ``known`` are choices made before."""
        for use in known:
            if use.batch or use.kernel is None or use.mkl_s is None or use.onednn_s is None:
                continue
            key = (use.m, use.k, use.n, use.layout, use.adds, use.num_threads)
            choice = KERNELS.index(use.kernel)
            self._entries[key] = _Entry(choice, best_s=[use.mkl_s, use.onednn_s])
        if self._library is not None or not torch.backends.mkldnn.is_available():
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That a kernel is replaced is the purpose.
            self._library = torch.library.Library("aten", "IMPL")
            self._library.impl("mm", self._mm, "CPU")
            self._library.impl("addmm", self._addmm, "CPU")

    def remove(self) -> None:
        """Give back."""
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def products(self) -> list[ProductUse]:
        """Every shape seen or known."""
        return [
            ProductUse(
                batch=0, m=m, k=k, n=n, layout=layout, adds=adds, num_threads=threads,
                kernel=None if e.choice is None else KERNELS[e.choice], calls=e.calls,
                seconds=e.seconds,
                mkl_s=e.best_s[0] if e.best_s[0] < float("inf") else None,
                onednn_s=e.best_s[1] if e.best_s[1] < float("inf") else None,
            )
            for (m, k, n, layout, adds, threads), e in self._entries.items()
        ]  # fmt: skip

    def saved_s(self) -> float:
        """Seconds saved so far against MKL, less what the detour cost."""
        gain = sum(
            e.calls * (e.best_s[0] - e.best_s[1]) for e in self._entries.values() if e.choice == 1
        )
        return gain - self._calls * _DETOUR_S

    def _mm(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        key = self._key(a, b, None)
        if key is None:
            return self._plain("mm", a, b)
        return self._make(
            key,
            lambda: self._plain("mm", a, b),
            lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], ""),
        )

    def _addmm(
        self, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> torch.Tensor:
        key = self._key(a, b, bias) if beta == 1 and alpha == 1 else None
        if key is None:
            return self._plain("addmm", bias, a, b, beta=beta, alpha=alpha)
        return self._make(
            key,
            lambda: self._plain("addmm", bias, a, b),
            lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], ""),
        )

    def _plain(self, name: str, *args: Any, **options: Any) -> torch.Tensor:
        result: torch.Tensor = self._torch[name].call_boxed(self._keys, *args, **options)
        return result

    def _key(
        self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[Any, ...] | None:
        self._calls += 1
        if self._calls % _LOOK_EVERY == 0 and self.saved_s() <= 0:
            self.remove()
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
            return None
        (m, k), n = a.shape, b.shape[1]
        if (
            m * k * n < max(self._least_work, 1)
            or a.dtype != torch.float32
            or b.dtype != torch.float32
        ):
            return None
        if bias is not None and (bias.shape != (n,) or bias.dtype != torch.float32):
            return None
        backend: Any = torch.backends.mkldnn
        if backend.matmul.fp32_precision not in ("none", "ieee") or not backend.enabled:
            return None
        layout = ""
        for factor in (a, b):
            rows, columns = factor.stride()
            if columns == 1 and rows >= factor.shape[1]:
                layout += "n"
            elif rows == 1 and columns >= factor.shape[0]:
                layout += "t"
            else:
                return None
        return m, k, n, layout, bias is not None, torch.get_num_threads()

    def _make(self, key: tuple[Any, ...], by_mkl: Any, by_onednn: Any) -> torch.Tensor:
        entry = self._entries.setdefault(key, _Entry())
        choice = entry.choice
        timing = choice is None and not torch.are_deterministic_algorithms_enabled()
        if choice is None:
            choice = entry.tries % 2 if timing else 0
        started = time.perf_counter()
        result: torch.Tensor = (by_mkl, by_onednn)[choice]()
        seconds = time.perf_counter() - started
        entry.calls += 1
        entry.seconds += seconds
        if timing:
            if entry.tries >= 2:  # The first of each sets up.
                entry.best_s[choice] = min(entry.best_s[choice], seconds)
            entry.tries += 1
            if entry.tries >= 2 * _ROUNDS:
                entry.choice = int(entry.best_s[1] < _MARGIN * entry.best_s[0])
        return result
