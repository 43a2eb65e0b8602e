"""An exported folder: ``model.json`` and the engines' files. Reading it imports no torch.

Nothing in it is code: weights are in ONNX, OpenVINO's xml and bin, or a ``.pt2`` archive that is
looked through before it is read (``archive``). Compiled code comes from hotloop's own cache.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, ModelError, SealedError
from ..machine import Machine
from ..sealed import Sealed
from .engine import Engine
from .folder_writer import DOCUMENT, FORMAT, FORMAT_VERSION, setting_of, sha256
from .opening import open_engine
from .report import InferenceReport, Setting
from .runner import InferenceRunner
from .signature import Signature

_MAX_DOCUMENT_BYTES = 64 * 1024**2


def local_path(path: str | Path | Sealed) -> Path | Sealed:
    """The path, if it is one and something is there.

    Raises:
        InputError: an address on the network.
        ModelError: nothing is there.
    """
    if "://" in str(path):
        raise InputError(
            "a model is loaded by path, never from an address", got=path,
            next_step="fetch the file, check it, and name its path",
        )  # fmt: skip
    path = path if isinstance(path, Sealed) else Path(path)
    if not path.exists():
        raise ModelError("the model must be there", got=path, next_step="name an existing path")
    return path


def load_inference(
    folder: str | Path | Sealed,
    *,
    num_threads: int | None = None,
    num_instances: int | None = None,
    spinning: bool | None = None,
    alike: bool = False,
) -> InferenceRunner:
    """A runner from a folder of ``runner.save`` or ``hotloop export``.

    Torch is imported only where an engine is ``eager`` or ``inductor``.

    Args:
        folder: the export; ``Sealed``: a sealed one, of which nothing plain is written.
        num_threads, num_instances: other than exported; never more threads than usable CPUs.
        spinning: ``False``: idle threads of ONNX Runtime and of hotloop's own engine sleep at once,
            whatever won the race; for a process that has other work for those CPUs between calls.
        alike: every engine has the threads and instances of the main one: for a server, whose
            instances call beside each other at any batch size. A small batch that is fastest on
            all CPUs, raced alone, would have each instance's call wait for threads of the others.

    Raises:
        InputError: the path is an address.
        ModelError: missing, damaged, or of another version.
        MissingExtraError: an engine's library is not installed.
    """
    folder = local_path(folder)
    document = _read(folder)
    usable = Machine.probe().usable_cpus
    try:
        found = [setting_of(entry) for entry in document["engines"]]
        files = [(_plain_name(e["file"]), dict(e["sha256"])) for e in document["engines"]]
        signature = Signature.from_dict(document)
        ranges = {int(n): found[int(i)] for n, i in document["by_batch_size"]}
        exact = {int(n): found[int(i)] for n, i in document["exact"]}
        report = InferenceReport(
            goal=str(document["goal"]),
            winners=dict(sorted((ranges | exact).items())),
            notes=[str(note) for note in document["report"]["notes"]],
        )
        other_machine = document["machine"] != Machine.probe().fingerprint()
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from None
    if not found or (not ranges and not exact):
        raise _damaged(folder, "no engine")
    if other_machine:
        report.notes.append("raced on another machine: export it here for this one's fastest")
    primary = report.winners[(max if report.goal == "throughput" else min)(report.winners)]
    if alike and primary.num_instances > 1:
        # Settings that then are one engine are opened once.
        found = [_as(setting, primary) for setting in found]
        ranges = {n: _as(setting, primary) for n, setting in ranges.items()}
        exact = {n: _as(setting, primary) for n, setting in exact.items()}
    engines: dict[Setting, Engine] = {}
    for setting, (name, wanted) in zip(found, files, strict=True):
        if setting in engines:
            continue
        _verify(folder, name, wanted)
        opened = dataclasses.replace(
            setting,
            num_threads=min(num_threads or setting.num_threads, usable),
            num_instances=min(num_instances or setting.num_instances, usable),
            spinning=setting.spinning if spinning is None else spinning,
        )
        engines[setting] = open_engine(opened, _source(folder / name, setting), signature)
    return InferenceRunner(
        engines,
        ranges,
        signature,
        report,
        primary=primary,
        exact=exact,
        source=None if isinstance(folder, Sealed) else folder,  # Its files are never copied plain.
    )


def _as(setting: Setting, main: Setting) -> Setting:
    return dataclasses.replace(
        setting, num_threads=main.num_threads, num_instances=main.num_instances
    )


def _source(path: Path | Sealed, setting: Setting) -> Any:
    """What ``open_engine`` takes: the file, or what an archive holds."""
    if setting.engine not in ("eager", "inductor"):
        return path
    if setting.engine == "inductor" and isinstance(path, Sealed):
        raise ModelError(
            "a sealed export must have another engine than inductor, whose compiler writes files",
            got=path,
            next_step="export it with another engine: --engines",
        )
    from .archive import read_archive

    program = read_archive(path)
    if setting.engine == "eager":
        return program.module()
    from .capture import compiled_package

    assert not isinstance(path, Sealed)
    return compiled_package(program, path, setting.precision)


def _read(folder: Path | Sealed) -> dict[str, Any]:
    path = folder / DOCUMENT
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, io.SEEK_END)
        if size_bytes > _MAX_DOCUMENT_BYTES:
            raise _damaged(folder, "a document of more than 64 MiB")
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise _damaged(folder, document["format"])
        if document["format_version"] != FORMAT_VERSION:
            raise ModelError(
                f"the export must be of format version {FORMAT_VERSION}",
                got=document["format_version"], next_step="export the model again",
            )  # fmt: skip
    except (ModelError, SealedError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from None
    return dict(document)


def _damaged(folder: Path | Sealed, got: object) -> ModelError:
    return ModelError(
        f"{folder} must be a folder of hotloop export", got=got, next_step="export the model again"
    )


def _plain_name(name: Any) -> str:
    """A file inside the folder itself, never a path out of it."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"file name {name!r}")
    return name


def _verify(folder: Path | Sealed, name: str, wanted: Mapping[str, Any]) -> None:
    if name not in wanted:
        raise _damaged(folder, f"no checksum of {name}")
    for part, digest in wanted.items():
        try:
            if sha256(folder / _plain_name(part)) != digest:
                raise _damaged(folder, f"another checksum of {part}")
        except OSError as error:
            raise _damaged(folder, f"{part}: {error.strerror}") from None
