"""Writing an exported folder, whole or not at all. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HotloopError, InputError, ModelError, StorageError
from ..machine import Machine
from ..version import VERSION
from .engine import TensorSpec
from .folder_format import DOCUMENT, FORMAT, FORMAT_VERSION, files_of, setting_of, sha256
from .remembered import versions
from .report import InferenceReport, Setting

if TYPE_CHECKING:
    from .workshop import Workshop


@dataclass(frozen=True, kw_only=True)
class Export:
    """What a folder is written from; see ``InferenceRunner`` for each.

    Attributes:
        settings: one engine each.
        workshop: makes the engines' files. source: the folder that a runner was loaded from, whose
            files are copied. Without either there is nothing to keep.
    """

    settings: tuple[Setting, ...]
    by_batch_size: Mapping[int, Setting]
    exact: Mapping[int, Setting]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_structure: Any
    output_structure: Any
    report: InferenceReport
    workshop: Workshop | None
    source: Path | None


def write_folder(export: Export, folder: Path) -> Path:
    """See ``InferenceRunner.save``."""
    if folder.exists() and not (folder / DOCUMENT).is_file() and any(_listed(folder)):
        raise InputError(
            "the folder must be new, empty or an earlier export", got=folder,
            next_step="name another with --out",
        )  # fmt: skip
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(6)}")
    try:
        aside.mkdir(parents=True)
        document = _document(export, aside)
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


def _document(export: Export, folder: Path) -> dict[str, Any]:
    engines: list[dict[str, Any]] = []
    kept: list[Setting] = []
    notes = list(export.report.notes)
    failures = []
    for setting in export.settings:
        try:
            name = _write_engine(export, setting, folder)
        except HotloopError as why:
            failures.append(why)
            notes.append(f"{setting.title} is left out: {why}")
            continue
        digest = {f.name: sha256(f) for f in files_of(folder, name)}
        errors = [
            (row.error, row.accuracy_loss) for row in export.report.rows if row.setting == setting
        ]
        error, loss = errors[0] if errors else (None, None)
        engines.append(
            {
                **dataclasses.asdict(setting),
                "file": name,
                "sha256": digest,
                "error": error,
                "accuracy_loss": loss,
            }
        )
        kept.append(setting)
    if not kept:
        raise failures[0]

    def numbered(table: Mapping[int, Setting]) -> list[list[int]]:
        return [[size, kept.index(s)] for size, s in table.items() if s in kept]

    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "hotloop": VERSION,
        "goal": export.report.goal,
        "inputs": [spec.to_dict() for spec in export.inputs],
        "outputs": [spec.to_dict() for spec in export.outputs],
        "input_structure": export.input_structure,
        "output_structure": export.output_structure,
        "engines": engines,
        "by_batch_size": numbered(export.by_batch_size),
        "exact": numbered(export.exact),
        "versions": versions(),
        "machine": Machine.probe().fingerprint(),
        "report": {**export.report.to_dict(), "notes": notes},
    }


def _write_engine(export: Export, setting: Setting, folder: Path) -> str:
    if export.source is not None:
        name = json.loads((export.source / DOCUMENT).read_text(encoding="utf-8"))
        entry = next(e for e in name["engines"] if setting_of(e) == setting)
        for path in files_of(export.source, entry["file"]):
            shutil.copyfile(path, folder / path.name)
        return str(entry["file"])
    workshop = export.workshop
    if workshop is None:
        raise ModelError("this runner has no file to keep", got=setting.title)
    return _make_engine(workshop, setting, folder)


def _make_engine(workshop: Workshop, setting: Setting, folder: Path) -> str:
    int8 = setting.precision == "int8"
    if setting.engine == "hotloop":
        name = "network.safetensors"
        workshop.network().save(folder / name)
        return name
    if setting.engine in ("eager", "inductor"):
        inner = setting.precision if setting.engine == "inductor" else "float32"
        if setting.engine == "eager" and workshop.fixed_batch("float32") is not None:
            raise ModelError(
                "eager can be kept where torch.export captures the model for any batch size",
                got="a graph for one batch size",
                next_step="keep the weights as .safetensors and load them with factory",
            )
        name = "model.pt2" if inner == "float32" else f"model-{inner}.pt2"
        shutil.copyfile(workshop.archive(inner), folder / name)
        return name
    source = workshop.onnx("int8" if int8 else "float32")
    if setting.engine == "openvino":
        from .engines.openvino import write_model

        name = "model-int8.xml" if int8 else "model.xml"
        write_model(source, folder / name)
        return name
    name = "model-int8.onnx" if int8 else "model.onnx"
    shutil.copyfile(source, folder / name)
    beside = source.with_name(source.name + ".data")
    if beside.exists():
        # The graph names this file, so the name stays.
        shutil.copyfile(beside, folder / beside.name)
    return name
