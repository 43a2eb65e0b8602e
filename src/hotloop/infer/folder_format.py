"""What an exported folder looks like: ``model.json`` and the files of each engine."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import Setting

DOCUMENT = "model.json"
FORMAT = "hotloop-inference"
FORMAT_VERSION = 1


def setting_of(entry: Mapping[str, Any]) -> Setting:
    """The setting of an engine's entry in the document."""
    return Setting(**{f.name: entry[f.name] for f in dataclasses.fields(Setting)})


def files_of(folder: Path, name: str) -> list[Path]:
    """An engine's file, and the weights beside it."""
    path = folder / name
    sources = [path]
    if path.suffix == ".xml":
        sources.append(path.with_suffix(".bin"))
    if path.suffix == ".onnx":
        precision = "int8" if path.stem.endswith("int8") else "float32"
        beside = folder / f"{precision}.onnx.data"
        sources += [beside] if beside.exists() else []
    return sources


def sha256(path: Path) -> str:
    """Hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
