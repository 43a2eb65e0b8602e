"""What a program needs wherever it runs: the guide's components, threads, files that are mapped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunError

if TYPE_CHECKING:
    from torch import nn

    from ..plan import Plan

# Threads of a run beside those that compute: the program's own, the one that fills batches, the
# one that writes checkpoints, and the monitor's.
SERVICE_THREADS = 4
_TIMEOUT_S = 300.0

_ANSWER = """
import importlib, json, sys
import numpy
from hotloop.infer import load_inference
from hotloop.enclave.needs import mapped_files
from hotloop.monitor.process import peak_resident_bytes, resident_bytes
for name in sys.argv[3:]:
    importlib.import_module(name)
base = resident_bytes()
runner = load_inference(sys.argv[1])
arrays = [
    numpy.zeros([int(sys.argv[2]) if n is None else n for n in spec.shape], spec.dtype)
    for spec in runner.inputs
]
for _ in range(3):
    answers = runner.run(arrays)
answers = [answers] if isinstance(answers, numpy.ndarray) else list(answers)
batch = sum(a.nbytes for a in arrays) + sum(numpy.asarray(a).nbytes for a in answers)
whole, resident = mapped_files()
threads = len(__import__("os").listdir("/proc/self/task"))
print(json.dumps({
    "base": base, "peak": peak_resident_bytes(), "batch": batch, "threads": threads,
    "mapped": whole, "mapped_resident": resident, "torch": "torch" in sys.modules,
}))
"""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What runs inside.

    Attributes:
        phase: ``"train"`` or ``"infer"``.
        batch_size, micro_batch_size: samples of a step, and of one pass.
        components: title in the guide's words and bytes; ``None``: not known, and not in the sum.
        threads: of the process, at most.
        mapped_files_bytes: files that it maps (libraries), whole.
        mapped_resident_bytes: of them what is resident, and so in the runtime base.
        needs_torch: whether PyTorch is among them.
        assumptions: one line each.
    """

    phase: str
    batch_size: int
    micro_batch_size: int
    components: tuple[tuple[str, int | None], ...]
    threads: int
    mapped_files_bytes: int
    mapped_resident_bytes: int
    needs_torch: bool
    assumptions: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Sum of the components that are known: resident memory of the process."""
        return sum(size or 0 for _, size in self.components)


def mapped_files(process: int | str = "self") -> tuple[int, int]:
    """Bytes of the files that a process maps, whole and resident."""
    whole = resident = 0
    is_file = False
    try:
        lines = Path(f"/proc/{process}/smaps").read_text().splitlines()
    except OSError:
        return 0, 0
    for line in lines:
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            is_file = len(words) > 5 and words[5].startswith("/") and words[4] != "0"
        elif is_file and words[0] == "Size:":
            whole += int(words[1]) * 1024
        elif is_file and words[0] == "Rss:":
            resident += int(words[1]) * 1024
    return whole, resident


def model_needs(
    model: nn.Module, example: Any, batch_size: int, phase: str, plan: Plan, **options: Any
) -> Needs:
    """Of training or inference with PyTorch, from shapes alone; ``options``: ``Budget.predict``'s.

    Raises:
        InputError, ModelError: as ``Budget.predict``.
    """
    from ..memory import Budget

    budget = Budget.predict(model, example, batch_size, phase, plan, **options)
    whole, resident = mapped_files()
    compute = plan.cpu.num_threads
    workers = plan.parallel.num_workers or 1
    computing = max(compute if isinstance(compute, int) else 1, workers)
    rows = [row for row in budget.table() if row[0] not in ("Enclave overhead", "Total")]
    return Needs(
        phase=phase,
        batch_size=batch_size,
        micro_batch_size=budget.micro_batch_size,
        components=tuple(rows),
        # OpenMP's team of PyTorch and hotloop's own, each with the caller as one of them.
        threads=2 * (computing - 1) + SERVICE_THREADS,
        mapped_files_bytes=whole,
        mapped_resident_bytes=resident,
        needs_torch=True,
        assumptions=budget.assumptions,
    )


def export_needs(folder: Path, batch_size: int, modules: tuple[str, ...] = ()) -> Needs:
    """Of an export, measured: it is loaded in a fresh process and answers three batches.

    Args:
        folder: of ``hotloop export``.
        batch_size: samples of a batch.
        modules: what the program imports beside ``hotloop.infer``.

    Raises:
        RunError: the export does not answer.
    """
    found = _answer(folder, batch_size, modules)
    weights = sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")
    working = found["peak"] - found["base"] - weights - found["batch"]
    # An engine that packs its weights while the file is open holds less than the sum at the end.
    return Needs(
        phase="infer",
        batch_size=batch_size,
        micro_batch_size=batch_size,
        components=(
            ("Model parameters", weights),
            ("Batch data", found["batch"]),
            ("Working memory", max(0, working)),
            ("Runtime base", found["base"] + min(0, working)),
        ),
        threads=found["threads"] + SERVICE_THREADS,
        mapped_files_bytes=found["mapped"],
        mapped_resident_bytes=found["mapped_resident"],
        needs_torch=bool(found["torch"]),
        assumptions=("measured in a fresh process on this machine",),
    )


def _answer(folder: Path, batch_size: int, modules: tuple[str, ...]) -> dict[str, int]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ANSWER, str(folder), str(batch_size), *modules],
            capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError("the measuring process must end", got=f"{_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise RunError("the export must answer", got=last)
    return dict(json.loads(done.stdout))


def largest_size(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest size up to ``most`` that fits, by bisection; ``None`` where 1 does not."""
    if fits(most):
        return most
    if not fits(1):
        return None
    low, high = 1, most - 1
    while low < high:
        size = (low + high + 1) // 2
        low, high = (size, high) if fits(size) else (low, size - 1)
    return low
