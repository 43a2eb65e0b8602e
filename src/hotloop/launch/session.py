"""The script's process from its start to its end: counters at both, and the report between."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    from ..kernels.router import ProductRouter, ProductUse
    from .report import RunReport


class Session:
    """Counts from its making to ``end``.

    Args:
        settings: of the run. rank: number of the process under torchrun; ``None``: no ranks.
    """

    def __init__(self, settings: Settings, rank: int | None) -> None:
        self._settings = settings
        self._rank = rank
        self._pid = os.getpid()
        # The command that became this process counts as its start-up in time, not in the rest.
        self._usage = resource.getrusage(resource.RUSAGE_SELF)
        self._children = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._delay_s = _run_delay_s()
        self._torch_at: float | None = None
        self._router: ProductRouter | None = None

    def after_torch(self, router: ProductRouter | None) -> None:
        """torch has been imported and set up."""
        self._torch_at = time.monotonic()
        self._router = router
        if self._settings.report or self._settings.report_path:
            from . import waits

            waits.install()

    def end(self) -> None:
        """Write the report; never fails, and does nothing in a process that was forked off."""
        if os.getpid() != self._pid:
            return
        settings = self._settings
        if not settings.report and not settings.report_path:
            return
        with contextlib.suppress(Exception):
            report = self._report()
            if settings.report_path and not self._rank:
                from pathlib import Path

                self._write(report, Path(settings.report_path))
            # Of ranks, which are alike, one speaks.
            if settings.report and not settings.report_path and not self._rank:
                from .report import report_text

                print(report_text(report), file=sys.__stderr__, flush=True)

    def _write(self, report: RunReport, path: Any) -> None:
        import json

        from ..errors import StorageError
        from ..files import write_text_atomically

        try:
            write_text_atomically(path, json.dumps(report.to_dict(), indent=1) + "\n")
        except StorageError as error:
            print(f"hotloop: error: {error}", file=sys.__stderr__)

    def _report(self) -> RunReport:
        import dataclasses

        from ..monitor.process import peak_resident_bytes
        from . import report as reports
        from .suggest import suggest

        now = time.monotonic()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        delay_s = _run_delay_s()
        torch_values = self._of_torch() if self._torch_at is not None else {}
        found = reports.RunReport(
            script=tuple(sys.orig_argv[1:]),
            rank=self._rank,
            changes=self._settings.lines,
            wall_s=now - self._settings.started_s,
            startup_s=(
                None if self._torch_at is None else self._torch_at - self._settings.started_s
            ),
            user_s=usage.ru_utime - self._usage.ru_utime,
            system_s=usage.ru_stime - self._usage.ru_stime,
            children_s=children.ru_utime + children.ru_stime
            - self._children.ru_utime - self._children.ru_stime,
            usable_cpus=self._settings.usable_cpus,
            run_delay_s=(
                None if delay_s is None or self._delay_s is None else delay_s - self._delay_s
            ),
            peak_resident_bytes=peak_resident_bytes(),
            minor_faults=usage.ru_minflt - self._usage.ru_minflt,
            major_faults=usage.ru_majflt - self._usage.ru_majflt,
            voluntary_switches=usage.ru_nvcsw - self._usage.ru_nvcsw,
            involuntary_switches=usage.ru_nivcsw - self._usage.ru_nivcsw,
            bfloat16=self._settings.bfloat16,
            **torch_values,
        )  # fmt: skip
        return dataclasses.replace(found, optimizations=suggest(found))

    def _of_torch(self) -> dict[str, Any]:
        import dataclasses

        import torch

        from . import loaders, operators
        from .optimizer import updates
        from .waits import waits

        products = [] if self._router is None else self._router.products()
        used = sorted((p for p in products if p.calls), key=lambda p: -p.seconds)
        seen = waits.num_workers is not None
        return {
            "num_threads": torch.get_num_threads(),
            "data_wait_s": waits.seconds if seen else None,
            "batches": waits.batches,
            "batches_at_once": loaders.reads.at_once,
            "loader_workers": waits.num_workers,
            "update_s": updates.seconds if updates.calls else None,
            "updates": updates.calls,
            "fused_updates": updates.fused,
            "product_s": sum(p.seconds for p in used),
            "routed": self._router is not None,
            "products": tuple(_row(p) for p in used),
            "operators": tuple(dataclasses.asdict(u) for u in operators.uses() if u.calls),
        }


def _row(use: ProductUse) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(use) | {"flop": use.flop, "flop_per_s": use.flop_per_s}


def _run_delay_s() -> float | None:
    """Seconds that the main thread was ready and had no CPU."""
    try:
        with open("/proc/self/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        return None
