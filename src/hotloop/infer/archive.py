"""``.pt2`` archives of ``torch.export``, written and read without pickle.

``torch.export.load`` unpickles example inputs, some weights and custom objects, and evaluates the
texts of symbolic sizes. Hence an archive is looked through first, and what could run code is
refused; the example inputs are left out.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import ModelError, SealedError
from ..sealed import Sealed

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_RAW = re.compile(r"data/(weights/weight_\d+|constants/tensor_\d+)")
_TEXT = re.compile(r"(models/\w+\.json|data/(weights|constants)/\w+_config\.json)")
_PLAIN = re.compile(r"(byteorder|archive_format|archive_version|\.data/\w+|\.format_version)")
_EXAMPLES = re.compile(r"data/sample_inputs/\w+\.pt")
# Sizes as sympy writes them: symbols s0 or u1, numbers, and these functions.
_SYMBOL = re.compile(r"Symbol\('[a-z]{1,5}\d{1,9}'")
_WORDS = re.compile(
    r"oo|int_oo|Integer|Rational|Add|Mul|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|"
    r"CeilToInt|FloorToInt|TruncToInt|IntTrueDiv|ToFloat|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|"
    r"[sS]ymbol|positive|nonnegative|integer|negative|True|False|true|false|[suz][a-z]{0,4}\d{1,9}"
)
_EXPRESSION = re.compile(r"[\w\s+\-*/(),<>=&|~%]{0,4096}")
_MAX_JSON_BYTES = 256 * 1024**2


def write_archive(program: ExportedProgram, path: Path) -> None:
    """Write an archive without example inputs; ``read_archive`` reads it.

    Raises:
        ModelError: the program holds what only a pickle could keep.
    """
    import torch

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.pt2"
        torch.export.save(program, whole)
        _copy_checked(whole, path, path)


def read_archive(path: Path | Sealed) -> ExportedProgram:
    """The program in an archive.

    Raises:
        ModelError: damaged, or it holds what could run code when it is read.
    """
    import torch

    # In memory: what was sealed must not lie in a folder of temporary files.
    clean = io.BytesIO()
    try:
        with path.open("rb") as file:
            _copy_checked(file, clean, path)
    except OSError as error:
        raise ModelError(f"{path} must be a torch.export archive", got=error) from None
    clean.seek(0)
    try:
        return torch.export.load(clean)
    except Exception as error:
        raise ModelError(f"{path} must be a torch.export archive", got=error) from None


def _copy_checked(source: Path | IO[bytes], target: Path | IO[bytes], named: Path | Sealed) -> None:
    try:
        with (
            zipfile.ZipFile(source) as before,
            zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as after,
        ):
            for entry in before.infolist():
                inner = entry.filename.partition("/")[2]
                if _EXAMPLES.fullmatch(inner):
                    _write(after, f"model/{inner}", b"")
                    continue
                _check(before, entry, inner)
                _write(after, f"model/{inner}", before.read(entry))
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, RecursionError) as error:
        if isinstance(error, ModelError | SealedError):
            raise
        raise ModelError(f"{named} must be a torch.export archive", got=error) from None


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    # A fixed date: the same model gives the same bytes.
    archive.writestr(zipfile.ZipInfo(name), data)


def _check(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, inner: str) -> None:
    if entry.compress_type != zipfile.ZIP_STORED:
        raise _refused("a compressed entry", entry.filename)
    if _RAW.fullmatch(inner) or _PLAIN.fullmatch(inner):
        return
    if not _TEXT.fullmatch(inner) or entry.file_size > _MAX_JSON_BYTES:
        raise _refused("an entry of another kind", entry.filename)
    for key, value in _items(json.loads(archive.read(entry))):
        if key == "use_pickle" and value:
            raise _refused("a pickle", entry.filename)
        if key == "expr_str" and not _is_size(value):
            raise _refused("a size that is no formula", value)


def _is_size(text: Any) -> bool:
    if not isinstance(text, str):
        return False
    # What is in quotes is a plain name; no other quote may be left.
    text = _SYMBOL.sub("Symbol(s0", text)
    words = re.findall(r"[A-Za-z_]\w*", text)
    return all(map(_WORDS.fullmatch, words)) and bool(_EXPRESSION.fullmatch(text))


def _refused(what: str, got: object) -> ModelError:
    return ModelError(
        f"a .pt2 archive must hold a graph and plain tensors alone, not {what}", got=got,
        next_step="export the model again, or use ONNX",
    )  # fmt: skip


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield key, part
            yield from _items(part)
    elif isinstance(value, list):
        for part in value:
            yield from _items(part)
