"""``package.module:factory`` to a model."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def load_model(spec: str) -> nn.Module:
    """Call a factory named ``package.module:factory``; the working folder is importable.

    Raises:
        ModelError: the name is malformed, the module or the factory is missing or raises, or
            what it gives is no ``torch.nn.Module``.
    """
    from torch import nn

    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise ModelError(
            "--model must be cnn, small, big, or package.module:factory",
            got=repr(spec),
            next_step="write --model mypackage.models:build",
        )
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ModelError(
            f"the module of --model {spec} must import",
            got=_told(error),
            next_step=f"try: python -c 'import {module_name}' in this folder",
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ModelError(
            f"{module_name} must have a callable named {attribute}",
            got=f"callables {', '.join(sorted(names)[:10]) or 'none'}",
        )
    try:
        model = factory()
    except Exception as error:
        raise ModelError(
            f"the factory {spec} must give a model when called without arguments",
            got=_told(error),
            next_step="run again with --debug for the traceback",
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the factory {spec} must give a torch.nn.Module", got=type(model).__name__
        )
    return model


def _told(error: Exception) -> str:
    """Type, message and the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
