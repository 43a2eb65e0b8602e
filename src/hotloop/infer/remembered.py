"""Winners of earlier races, in the cache under the machine's and the model's fingerprint."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ..errors import StorageError
from ..files import write_text_atomically
from ..machine import Machine, cache_dir
from .engines.hotloop import kernels_key
from .report import Setting

if TYPE_CHECKING:
    from torch import nn

    from .capture import Signature

FORMAT = 1
LIBRARIES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """Installed versions of what an engine may use."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def key(
    model: nn.Module,
    signature: Signature,
    goal: str,
    batch_sizes: Sequence[int],
    settings: Sequence[Setting],
    *others: Any,
) -> str:
    """Names a race: the machine, the model's structure (not its values), the question, versions."""
    parts = [
        FORMAT,
        Machine.probe().fingerprint(),
        versions(),
        [(name, list(t.shape), str(t.dtype)) for name, t in model.state_dict().items()],
        str(model),
        [spec.to_dict() for spec in (*signature.inputs, *signature.outputs)],
        goal,
        list(batch_sizes),
        [dataclasses.astuple(setting) for setting in settings],
        list(others),
        kernels_key() if any(setting.engine == "hotloop" for setting in settings) else "",
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def remember(key: str, winners: Mapping[int, Setting]) -> None:
    """Keep the winners; a cache that cannot be written only means another race."""
    rows = [[size, dataclasses.asdict(setting)] for size, setting in winners.items()]
    with contextlib.suppress(StorageError, OSError):
        path = cache_dir() / "inference" / f"{key}.json"
        write_text_atomically(path, json.dumps({"format": FORMAT, "winners": rows}, indent=1))


def recall(key: str) -> dict[int, Setting] | None:
    """What was kept; a damaged file is no file."""
    try:
        text = (cache_dir() / "inference" / f"{key}.json").read_text(encoding="utf-8")
        document: Any = json.loads(text)
        if document["format"] != FORMAT:
            return None
        return {int(size): Setting(**values) for size, values in document["winners"]}
    except (OSError, ValueError, TypeError, KeyError):
        return None
