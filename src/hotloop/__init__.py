"""hotloop: train and serve PyTorch models as fast as the machine allows, in a known memory budget.

This file is the table of contents. Every public name is imported on first use, so that
``import hotloop`` changes nothing and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import HotloopError as HotloopError

__version__ = "0.1.0"

_ROOM_OF = {
    "HotloopError": "errors",
    "InputError": "errors",
    "PlanError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "CheckpointError": "errors",
    "BudgetError": "errors",
    "MissingExtraError": "errors",
    "RunError": "errors",
    "StorageError": "errors",
    "PoolError": "errors",
    "DivergedError": "errors",
}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        raise AttributeError(f"module 'hotloop' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{room}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
