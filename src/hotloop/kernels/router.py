"""Float32 matrix products of a running program by the fastest of torch's, oneDNN's and hotloop's.

Each shape is made by all three in turn until it is known which is fastest, and a few times more
later. ``cpp/router.cpp`` takes over ``mm`` and ``bmm``, below autograd; a product less than
``LEAST_WORK`` pays 0.2 us for it. torch's stable C interface cannot take over ``addmm``, whose
``beta`` and ``alpha`` are Scalars, so that goes through the interpreter, which costs 2.5 us a call,
and only as long as it pays.

Imports torch; so ``kernels`` does not import it.
"""

from __future__ import annotations

import ctypes
import functools
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import binding, loader
from .torch_settings import SettingsWatch, are_products_exact

# In the order of ProductKernel in product_choices.h.
KERNELS = ("torch", "onednn", "hotloop")
# Multiply-adds below which the call alone costs another kernel more than the product costs torch's.
LEAST_WORK = 1 << 17
# Flags of RouterRow.layout.
_TRANSPOSED_A, _TRANSPOSED_B, _ADDS, _INTO_OUT = 1, 2, 4, 8
# How many calls of addmm between two looks at whether the interpreter's part pays, and what that
# part costs.
_LOOK_EVERY = 512
_DETOUR_S = 3e-6


@dataclass(frozen=True, kw_only=True)
class ProductUse:
    """One shape of matrix product ``a[m, k] @ b[k, n]`` and what became of it.

    Attributes:
        batch: products in one call of bmm; 0: mm or addmm.
        m, k, n: shape.
        layout: two letters for a and b: ``t`` is transposed, ``n`` is not.
        adds: whether a bias is added to the product.
        into_out: whether the result goes into a tensor of the caller.
        num_threads: threads it was made with.
        kernel: of ``KERNELS``; ``None``: not yet known.
        calls: how often. seconds: of all calls.
        kernel_s: least seconds of one call by each kernel that was tried.
    """

    batch: int
    m: int
    k: int
    n: int
    layout: str
    adds: bool
    into_out: bool = False
    num_threads: int
    kernel: str | None
    calls: int = 0
    seconds: float = 0.0
    kernel_s: dict[str, float] = field(default_factory=dict)

    @property
    def flop(self) -> int:
        """Of one call."""
        return 2 * max(self.batch, 1) * self.m * self.k * self.n

    @property
    def flop_per_s(self) -> float | None:
        """Rate over all calls, those that tried the kernels included."""
        return self.flop * self.calls / self.seconds if self.seconds else None

    @property
    def saved_s(self) -> float:
        """Seconds that the kernel saved so far against torch's."""
        try:
            return self.calls * (self.kernel_s["torch"] - self.kernel_s[self.kernel or ""])
        except KeyError:
            return 0.0


class ProductRouter:
    """Takes over torch's products from ``install`` to ``remove``; see ``product_router``."""

    def __init__(self) -> None:
        loader.use_torch()
        self._library = loader.library()
        self._watch = SettingsWatch(self._set_mode)
        self._least_work = LEAST_WORK
        self._times = True
        self._addmm: Any = None
        self._addmm_calls = 0
        self._plain_addmm = torch.library.get_kernel("aten::addmm", "CPU")
        self._keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def install(
        self, known: Iterable[ProductUse], *, least_work: int = LEAST_WORK, times: bool = True
    ) -> None:
        """Take over.

        Args:
            known: choices made before.
            least_work: multiply-adds below which a product is left to torch.
            times: time the kernels of other shapes; else torch's is taken for them.

        Raises:
            RunError: this torch has not the interface that it takes.
        """
        for use in known:
            if use.kernel is not None:
                self._library.hotloop_router_know(ctypes.byref(_row(use)))
        self._least_work, self._times = least_work, times
        self._set_mode()
        self._watch.install()
        # Before the others: torch tells of the first kernel that is replaced, here as a warning.
        self._take_addmm()
        loader.call("hotloop_router_install")
        self._routed_addmm = torch.ops.hotloop.routed_addmm.default

    def remove(self) -> None:
        """Give back; what is known stays known."""
        self._leave_addmm()
        self._library.hotloop_router_remove()
        self._watch.remove()

    def forget(self) -> None:
        """Forget all choices and calls."""
        self._library.hotloop_router_clear()
        self._addmm_calls = 0

    def products(self) -> list[ProductUse]:
        """Every shape seen or known."""
        count = self._library.hotloop_router_rows(None, 0)
        rows = (binding.RouterRow * (count + 64))()  # Another thread may add some meanwhile.
        found = self._library.hotloop_router_rows(ctypes.addressof(rows), len(rows))
        return [_use(row) for row in rows[: min(found, len(rows))]]

    def _set_mode(self) -> None:
        times = self._times and not torch.are_deterministic_algorithms_enabled()
        mode = binding.RouterMode(self._least_work, are_products_exact(), times)
        self._library.hotloop_router_set_mode(ctypes.byref(mode))

    def _take_addmm(self) -> None:
        if self._addmm is not None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That a kernel is replaced is the purpose.
            self._addmm = torch.library.Library("aten", "IMPL")
            self._addmm.impl("addmm", self._call_addmm, "CPU")

    def _leave_addmm(self) -> None:
        if self._addmm is not None:
            self._addmm._destroy()
            self._addmm = None

    def _call_addmm(
        self, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: Any = 1, alpha: Any = 1
    ) -> torch.Tensor:
        self._addmm_calls += 1
        if self._addmm_calls % _LOOK_EVERY == 0 and not self._pays():
            self._leave_addmm()
        result: torch.Tensor
        if beta == 1 and alpha == 1 and a.dtype is torch.float32:
            result = self._routed_addmm(bias, a, b)
        else:
            result = self._plain_addmm.call_boxed(self._keys, bias, a, b, beta=beta, alpha=alpha)
        return result

    def _pays(self) -> bool:
        saved_s = sum(use.saved_s for use in self.products() if use.adds)
        return saved_s > self._addmm_calls * _DETOUR_S


@functools.cache
def product_router() -> ProductRouter:
    """The router; one a process, as torch's table of kernels is one.

    Raises:
        RunError: there are no kernels here.
    """
    return ProductRouter()


def _use(row: Any) -> ProductUse:
    layout = row.layout
    return ProductUse(
        batch=row.batch, m=row.m, k=row.k, n=row.n,
        layout=("t" if layout & _TRANSPOSED_A else "n") + ("t" if layout & _TRANSPOSED_B else "n"),
        adds=bool(layout & _ADDS), into_out=bool(layout & _INTO_OUT), num_threads=row.threads,
        kernel=KERNELS[row.kernel] if row.kernel >= 0 else None,
        calls=row.calls, seconds=row.ns * 1e-9,
        kernel_s={
            kernel: seconds
            for kernel, seconds in zip(KERNELS, row.best_s, strict=True)
            if math.isfinite(seconds)
        },
    )  # fmt: skip


def _row(use: ProductUse) -> Any:
    layout = (
        (use.layout[0] == "t") * _TRANSPOSED_A
        | (use.layout[1] == "t") * _TRANSPOSED_B
        | use.adds * _ADDS
        | use.into_out * _INTO_OUT
    )
    row = binding.RouterRow(
        batch=use.batch, m=use.m, k=use.k, n=use.n, layout=layout, threads=use.num_threads,
        kernel=-1 if use.kernel is None else KERNELS.index(use.kernel),
    )  # fmt: skip
    row.best_s[:] = [use.kernel_s.get(kernel, math.inf) for kernel in KERNELS]
    return row
