"""Winners of earlier races, kept under the machine, the model's structure and the question."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..measure import Winner, winners
from .engines.hotloop import kernels_key
from .report import InferenceReport, Setting

if TYPE_CHECKING:
    from torch import nn

    from .signature import Signature

LIBRARIES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """Installed versions of what an engine may use."""
    return winners.versions_of(*LIBRARIES)


def question(
    model: nn.Module,
    signature: Signature,
    goal: str,
    batch_sizes: Sequence[int],
    settings: Sequence[Setting],
    *others: Any,
) -> str:
    """Names a race: the model's structure (not its values), and all that was asked."""
    parts = [
        [(name, _form(value)) for name, value in model.state_dict().items()],
        str(model),
        [spec.to_dict() for spec in (*signature.inputs, *signature.outputs)],
        [dataclasses.astuple(setting) for setting in settings],
        list(others),
        kernels_key() if any(setting.engine == "hotloop" for setting in settings) else "",
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    sizes = ",".join(map(str, batch_sizes))
    return f"inference/{goal}/batch {sizes}/{type(model).__name__} {digest}"


def _form(value: Any) -> list[Any]:
    """Shape and dtype of a tensor; of a module's extra state, which may be anything, the type."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return [type(value).__qualname__]
    return [list(shape), str(dtype)]


def remember(question: str, report: InferenceReport) -> None:
    """Keep the winners, and what each candidate took at each batch size."""
    answer = [[size, dataclasses.asdict(setting)] for size, setting in report.winners.items()]
    seconds = {
        f"batch {row.batch_size}: {row.setting.title}": row.median_s
        for row in report.rows
        if row.median_s is not None
    }
    found = Winner(question=question, answer=answer, versions=versions(), seconds=seconds)
    winners.add([found])


def recall(question: str) -> dict[int, Setting] | None:
    """What was kept; a damaged answer is none."""
    found = winners.recall(question, versions())
    try:
        if found is None:
            return None
        return {int(size): Setting(**values) for size, values in found.answer}
    except (ValueError, TypeError):
        return None
