"""Bytes, seconds and rates as text, and sizes from text. KiB, MiB, GiB are powers of 1024."""

from __future__ import annotations

import math
import re

from .errors import InputError

KIB = 1024
MIB = 1024**2
GIB = 1024**3

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": 1024**4, "tib": 1024**4, "tb": 1000**4,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Number of bytes in ``"512MiB"``, ``"2G"``, ``"1.5 GiB"`` or ``"4096"``.

    ``K``, ``M``, ``G``, ``T`` alone are powers of 1024; ``kB``, ``MB``, ``GB``, ``TB`` of 1000.

    Raises:
        InputError: the text is not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise InputError(
            "a size is a number and a unit", got=repr(text), next_step="write 512MiB or 2GiB"
        )
    return int(float(match[1]) * factor)


def format_bytes(count: float | None) -> str:
    """``"1.5 GiB"``; ``"unknown"`` for ``None``. Three significant digits."""
    if count is None:
        return "unknown"
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{_three_digits(size)} {unit}"


def format_seconds(seconds: float | None) -> str:
    """``"3.2 ms"``, ``"41 s"``, ``"2 min 05 s"``, ``"1 h 02 min"``; ``"unknown"`` for ``None``."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds >= 3600:
        minutes = round(seconds / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if seconds >= 60:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{seconds * 1e9:.0f} ns" if seconds else "0 s"


def format_rate(per_s: float | None, noun: str) -> str:
    """``"12,300 samples/s"``; rates over a million are written with a prefix: ``"350 GFLOP/s"``."""
    if per_s is None:
        return "unknown"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if per_s >= factor:
            return f"{_three_digits(per_s / factor)} {prefix}{noun}/s"
    return f"{per_s:,.0f} {noun}/s" if per_s >= 100 else f"{per_s:.3g} {noun}/s"


def format_share(share: float | None) -> str:
    """A fraction as per cent: ``"37 %"``."""
    return "unknown" if share is None else f"{share * 100:.0f} %"


def _three_digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
