"""Which kernel won for each shape of product, kept for the next process (``kernels.router``)."""

from __future__ import annotations

from collections.abc import Iterable

from .. import kernels
from ..kernels.router import KERNELS, ProductUse
from . import winners
from .winners import Winner

_PREFIX = "run"
# After the two letters of the layout: a bias is added, the result goes into a tensor of the caller.
_ADDS, _INTO_OUT = "+", ">"


def recall(fingerprint: str | None = None) -> list[ProductUse]:
    """The choices that earlier processes on this machine made.

    Args:
        fingerprint: of the machine, where the caller has it.
    """
    known = winners.recall_all(_PREFIX, versions(), fingerprint)
    uses = (use_of(w.question, w.answer, dict(w.seconds)) for w in known)
    return [use for use in uses if use is not None]


def remember(
    products: Iterable[ProductUse], known: Iterable[ProductUse], fingerprint: str | None = None
) -> None:
    """Keep what is new: choices made, and times less than those known."""
    timed = versions()
    before = {question_of(use): (use.kernel, use.kernel_s) for use in known}
    found = [
        Winner(question=question_of(use), answer=use.kernel, versions=timed, seconds=use.kernel_s)
        for use in products
        if use.kernel in use.kernel_s and before.get(question_of(use)) != (use.kernel, use.kernel_s)
    ]
    winners.add(found, fingerprint)


def versions() -> dict[str, str]:
    """Of what was timed: torch with its libraries, and hotloop's kernels where they are."""
    own = {"kernels": kernels.build_hash()[:8]} if kernels.is_available() else {}
    return {**winners.versions_of("torch"), **own}


def question_of(use: ProductUse) -> str:
    """The name of a shape of product: ``"run/0/64/784/128/nt+/2"``."""
    layout = use.layout + _ADDS * use.adds + _INTO_OUT * use.into_out
    parts = (_PREFIX, use.batch, use.m, use.k, use.n, layout, use.num_threads)
    return "/".join(str(part) for part in parts)


def use_of(question: str, kernel: object, kernel_s: dict[str, float]) -> ProductUse | None:
    """The shape of that name and its kernel; ``None``: no such name, or no such kernel."""
    prefix, *parts = question.split("/")
    if prefix != _PREFIX or len(parts) != 6 or kernel not in KERNELS:
        return None
    try:
        batch, m, k, n, threads = (int(parts[at]) for at in (0, 1, 2, 3, 5))
    except ValueError:
        return None
    layout, flags = parts[4][:2], parts[4][2:]
    if layout not in ("nn", "nt", "tn", "tt") or not set(flags) <= {_ADDS, _INTO_OUT}:
        return None
    return ProductUse(
        batch=batch, m=m, k=k, n=n, layout=layout, adds=_ADDS in flags,
        into_out=_INTO_OUT in flags, num_threads=threads, kernel=str(kernel),
        kernel_s={name: s for name, s in kernel_s.items() if name in KERNELS},
    )  # fmt: skip
