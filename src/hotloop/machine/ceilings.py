"""``Ceilings``: the rates a machine can reach, as values."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Measurement:
    """``n`` timings of one thing as rates: median, least and greatest."""

    median: float
    min: float
    max: float
    n: int

    def __post_init__(self) -> None:
        rates = (self.min, self.median, self.max)
        if not all(math.isfinite(r) for r in rates) or not 0 < rates[0] <= rates[1] <= rates[2]:
            raise ValueError(f"rates must be finite and 0 < min <= median <= max: {rates}")
        if self.n < 1:
            raise ValueError("n must be at least 1")

    @classmethod
    def of(cls, rates: Iterable[float]) -> Measurement:
        """The summary of at least one rate."""
        import statistics

        values = list(rates)
        return cls(statistics.median(values), min(values), max(values), len(values))


@dataclass(frozen=True)
class MatmulCeiling:
    """Rate of a square matrix product.

    Attributes:
        dtype: ``"float32"`` or ``"bfloat16"``.
        library: kernel library that computes it: ``"mkl"``, ``"onednn"``, ``"openblas"``, ...;
            ``"native"`` is torch's own loops.
        route: the call that reached it, such as ``"torch.mm"``.
        num_threads: threads inside the product.
        size: rows and columns of the matrices.
        flop_per_s: 2 * size**3 floating-point operations over the time of one product.
    """

    dtype: str
    library: str
    route: str
    num_threads: int
    size: int
    flop_per_s: Measurement


@dataclass(frozen=True)
class BandwidthCeiling:
    """Rate at which memory is read and written.

    Attributes:
        kind: ``"copy"`` (a = b) or ``"triad"`` (a = b + s * c).
        num_threads: threads inside the operation.
        array_bytes: size of each array, well past the last-level cache.
        bytes_per_s: bytes named by the program (2 or 3 arrays) over time, as STREAM counts; that
            the processor also fetches the line it overwrites is not counted.
    """

    kind: str
    num_threads: int
    array_bytes: int
    bytes_per_s: Measurement


@dataclass(frozen=True)
class Ceilings:
    """What one machine can do. What could not be measured is absent.

    Attributes:
        matmul, bandwidth: the rates.
        fingerprint: of the machine they were measured on. torch_version: that did the work.
        measured_at_s: seconds since 1970. wall_s: how long measuring took.
    """

    matmul: tuple[MatmulCeiling, ...]
    bandwidth: tuple[BandwidthCeiling, ...]
    fingerprint: str
    torch_version: str | None
    measured_at_s: float
    wall_s: float

    def best_matmul_flop_per_s(
        self, dtype: str = "float32", num_threads: int | None = None
    ) -> float | None:
        """The greatest median over libraries, and over thread counts when none is given.

        ``None`` when that dtype or thread count was not measured.
        """
        rates = [
            ceiling.flop_per_s.median
            for ceiling in self.matmul
            if ceiling.dtype == dtype and num_threads in (None, ceiling.num_threads)
        ]
        return max(rates, default=None)

    def best_bandwidth_bytes_per_s(self, num_threads: int | None = None) -> float | None:
        """The greatest median over kinds, and over thread counts when none is given."""
        rates = [
            ceiling.bytes_per_s.median
            for ceiling in self.bandwidth
            if num_threads in (None, ceiling.num_threads)
        ]
        return max(rates, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types only; ``from_dict`` takes it back."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        plain: dict[str, Any] = json.loads(json.dumps(document))
        return plain

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Ceilings:
        """The value that ``to_dict`` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is something else, or damaged.
        """
        if document["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}")
        fields = {key: value for key, value in document.items() if key != "format"}
        fields["matmul"] = tuple(
            MatmulCeiling(**{**c, "flop_per_s": Measurement(**c["flop_per_s"])})
            for c in document["matmul"]
        )
        fields["bandwidth"] = tuple(
            BandwidthCeiling(**{**c, "bytes_per_s": Measurement(**c["bytes_per_s"])})
            for c in document["bandwidth"]
        )
        return cls(**fields)


def installed_torch_version() -> str | None:
    """Version of the installed torch, read without importing it."""
    from importlib import metadata  # 15 ms, which a command that reads no figures does not need.

    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
