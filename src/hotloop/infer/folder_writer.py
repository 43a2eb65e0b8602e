"""An exported folder: ``model.json`` and the files of each engine, written whole or not at all.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HotloopError, InputError, ModelError, StorageError
from ..machine import Machine
from ..sealed import Sealed
from ..version import VERSION
from .remembered import versions
from .report import InferenceReport, Setting
from .signature import Signature

if TYPE_CHECKING:
    from .artifacts import ArtifactBuilder

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


def sha256(path: Path | Sealed) -> str:
    """Hex digits of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_folder(
    folder: Path,
    *,
    engines: Sequence[Setting],
    by_batch_size: Mapping[int, Setting],
    exact: Mapping[int, Setting],
    signature: Signature,
    report: InferenceReport,
    artifacts: ArtifactBuilder | None,
    source: Path | None,
) -> Path:
    """See ``InferenceRunner.save``; for all but these see ``InferenceRunner``.

    Args:
        artifacts: makes the engines' files. source: the folder that a runner was loaded from, whose
            files are copied. Without either there is nothing to keep.
    """
    if folder.exists() and not (folder / DOCUMENT).is_file() and any(_listed(folder)):
        raise InputError(
            "the folder must be new, empty or an earlier export", got=folder,
            next_step="name another with --out",
        )  # fmt: skip
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    try:
        aside.mkdir(parents=True)
        entries, notes = _write_engines(engines, report, artifacts, source, aside)
        kept = [setting_of(entry) for entry in entries]

        def numbered(table: Mapping[int, Setting]) -> list[list[int]]:
            return [[size, kept.index(s)] for size, s in table.items() if s in kept]

        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hotloop": VERSION,
            "goal": report.goal,
            **signature.to_dict(),
            "engines": entries,
            "by_batch_size": numbered(by_batch_size),
            "exact": numbered(exact),
            "versions": versions(),
            "machine": Machine.probe().fingerprint(),
            "report": {**report.to_dict(), "notes": notes},
        }
        (aside / DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
        _put_in_place(aside, folder)
    except OSError as error:
        raise StorageError(
            f"{folder} could not be written", got=error.strerror, next_step="choose another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError("the export must be a folder", got=folder)
    return list(folder.iterdir())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename; a folder that is there goes aside first and comes back if that fails."""
    old = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    if not folder.exists():
        os.rename(aside, folder)
        _sync(folder.parent)
        return
    os.rename(folder, old)
    try:
        os.rename(aside, folder)
    except OSError:
        os.rename(old, folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_engines(
    engines: Sequence[Setting],
    report: InferenceReport,
    artifacts: ArtifactBuilder | None,
    source: Path | None,
    folder: Path,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Entries of the engines whose files could be written, and notes of the report."""
    entries: list[dict[str, Any]] = []
    notes, failures = list(report.notes), []
    for setting in engines:
        try:
            if source is not None:
                name = _copy_engine(source, setting, folder)
            elif artifacts is not None:
                name = _make_engine(artifacts, setting, folder)
            else:
                raise ModelError("this runner has no file to keep", got=setting.title)
        except HotloopError as why:
            failures.append(why)
            notes.append(f"{setting.title} is left out: {why}")
            continue
        row = next((row for row in report.rows if row.setting == setting), None)
        entries.append(
            {
                **dataclasses.asdict(setting),
                "file": name,
                "sha256": {f.name: sha256(f) for f in files_of(folder, name)},
                "error": row and row.error,
                "accuracy_loss": row and row.accuracy_loss,
            }
        )
    if not entries:
        raise failures[0]
    return entries, notes


def _copy_engine(source: Path, setting: Setting, folder: Path) -> str:
    document = json.loads((source / DOCUMENT).read_text(encoding="utf-8"))
    entry = next(e for e in document["engines"] if setting_of(e) == setting)
    for path in files_of(source, entry["file"]):
        shutil.copyfile(path, folder / path.name)
    return str(entry["file"])


def _make_engine(artifacts: ArtifactBuilder, setting: Setting, folder: Path) -> str:
    if setting.engine == "hotloop":
        name = "network.safetensors"
        artifacts.network().save(folder / name)
        return name
    if setting.engine in ("eager", "inductor"):
        inner = setting.precision if setting.engine == "inductor" else "float32"
        if setting.engine == "eager" and artifacts.fixed_batch("float32") is not None:
            raise ModelError(
                "eager can be kept where torch.export captures the model for any batch size",
                got="a graph for one batch size",
                next_step="keep the weights as .safetensors and load them with factory",
            )
        name = "model.pt2" if inner == "float32" else f"model-{inner}.pt2"
        shutil.copyfile(artifacts.archive(inner), folder / name)
        return name
    int8 = setting.precision == "int8"
    source = artifacts.onnx("int8" if int8 else "float32")
    stem = "model-int8" if int8 else "model"
    if setting.engine == "openvino":
        from .engines.openvino import write_model

        write_model(source, folder / f"{stem}.xml")
        return f"{stem}.xml"
    shutil.copyfile(source, folder / f"{stem}.onnx")
    beside = source.with_name(source.name + ".data")
    if beside.exists():
        # The graph names this file, so the name stays.
        shutil.copyfile(beside, folder / beside.name)
    return f"{stem}.onnx"
