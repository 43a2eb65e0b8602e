"""A Gramine manifest: what an SGX enclave may hold, read and see, with the hash of each file.

Keys and their meaning: Gramine 1.9, ``Documentation/manifest-syntax.rst``; what a manifest may have
at all: its own schema, ``python/graminelibos/manifest_check.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from .image import sha256_of
from .sizing import GRAMINE_STACK_BYTES, EnclaveSize

# Options that weaken an enclave, by the name that is asked for: key, value, and what is told.
INSECURE = {
    "debug": ("sgx", "debug", True, "the host can read the enclave's memory"),
    "host-env": ("loader", "insecure__use_host_env", True, "the host chooses the environment"),
    "cmdline-argv": ("loader", "insecure__use_cmdline_argv", True, "the host chooses arguments"),
    "no-aslr": ("loader", "insecure__disable_aslr", True, "addresses are the same in each run"),
    "no-pointer-checks": (
        "libos", "check_invalid_pointers", False,
        "calls with a wrong pointer crash where they would fail",
    ),
}  # fmt: skip
_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, kw_only=True)
class GramineManifest:
    """What goes into a manifest.

    Attributes:
        size: of the enclave; its kind is ``gramine-sgx``.
        entrypoint: the interpreter. arguments: all of them, the program's name first.
        trusted_files: that are read, checked against their hash.
        allowed_folders: that may be written in the clear; each is told.
        encrypted_folders: that are read and written with ``key_name``.
        environment: variables with their value inside.
        passed: variables that the host may set.
        runtime_folder: where Gramine's own C library is on the host.
        edmm: SGX2's pages on demand.
        insecure: names of ``INSECURE``.
    """

    size: EnclaveSize
    entrypoint: Path
    arguments: tuple[str, ...]
    trusted_files: tuple[Path, ...]
    allowed_folders: tuple[Path, ...] = ()
    encrypted_folders: tuple[Path, ...] = ()
    key_name: str = "default"
    environment: Mapping[str, str] = field(default_factory=dict)
    passed: tuple[str, ...] = ()
    runtime_folder: Path = Path("/usr/lib/x86_64-linux-gnu/gramine/runtime/glibc")
    edmm: bool = False
    insecure: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The manifest as tables.

        Raises:
            InputError: an insecure option is not known.
        """
        threads = 1 if self.edmm else self.size.threads
        document: dict[str, Any] = {
            "loader": {
                "entrypoint": {"uri": "file:/usr/lib/x86_64-linux-gnu/gramine/libsysdb.so"},
                "log_level": "error",
                "argv": list(self.arguments),
                "env": {
                    "LD_LIBRARY_PATH": "/lib:/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu",
                    **self.environment,
                    **{name: {"passthrough": True} for name in self.passed},
                },
            },
            "libos": {"entrypoint": str(self.entrypoint), "check_invalid_pointers": True},
            "sys": {
                "stack": {"size": f"{GRAMINE_STACK_BYTES // 1024}K"},
                "disallow_subprocesses": True,
            },
            "fs": {"mounts": self._mounts()},
            "sgx": {
                "debug": False,
                "edmm_enable": self.edmm,
                "enclave_size": f"{self.size.size_bytes // 1024}K",
                "max_threads": threads,
                "file_check_policy": "strict",
                "remote_attestation": "dcap",
                "trusted_files": [
                    {"uri": f"file:{path}", "sha256": sha256_of(path)}
                    for path in self.trusted_files
                ],
            },
        }
        if self.allowed_folders:
            document["sgx"]["allowed_files"] = [f"file:{path}/" for path in self.allowed_folders]
        for name in self.insecure:
            table, key, value, _ = _insecure(name)
            document[table][key] = value
        return document

    def warnings(self) -> list[str]:
        """What weakens the enclave, one line each."""
        lines = [f"{name}: {_insecure(name)[3]}" for name in self.insecure]
        lines += [f"{path}: written in the clear" for path in self.allowed_folders]
        return lines + [f"{name}: the host chooses its value" for name in self.passed]

    def text(self) -> str:
        """The manifest as TOML, ready for ``gramine-sgx-sign``."""
        return toml_text(self.document())

    def _mounts(self) -> list[dict[str, Any]]:
        mounts: list[dict[str, Any]] = [{"path": "/lib", "uri": f"file:{self.runtime_folder}"}]
        folders = {path.parent for path in self.trusted_files}
        roots: list[Path] = []
        for folder in sorted(folders, key=lambda path: len(path.parts)):
            if not any(folder.is_relative_to(root) for root in roots):
                roots.append(folder)
        for root in (*sorted(roots), *self.allowed_folders):
            mounts.append({"path": str(root), "uri": f"file:{root}"})
        for folder in self.encrypted_folders:
            mounts.append(
                {
                    "type": "encrypted", "path": str(folder), "uri": f"file:{folder}",
                    "key_name": self.key_name,
                }
            )  # fmt: skip
        return [*mounts, {"type": "tmpfs", "path": "/tmp"}]


def _insecure(name: str) -> tuple[str, str, bool, str]:
    if name not in INSECURE:
        raise InputError(
            "an insecure option must be one that is known", got=repr(name),
            next_step=f"use {', '.join(INSECURE)}",
        )  # fmt: skip
    return INSECURE[name]


def toml_text(document: Mapping[str, Any]) -> str:
    """Tables of strings, numbers, truth values, lists and tables as TOML 1.0."""
    lines: list[str] = []
    _table(lines, (), document)
    return "\n".join(lines).lstrip("\n") + "\n"


def _table(lines: list[str], path: tuple[str, ...], table: Mapping[str, Any]) -> None:
    nested = {k: v for k, v in table.items() if isinstance(v, Mapping) and len(path) < 1}
    if path:
        lines += ["", f"[{'.'.join(map(_key, path))}]"]
    for name, value in table.items():
        if name not in nested:
            lines.append(f"{_key(name)} = {_value(value)}")
    for name, value in nested.items():
        _table(lines, (*path, name), value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    return _list(value)


def _list(values: Iterable[Any]) -> str:
    items = [_value(value) for value in values]
    if not items or sum(map(len, items)) < 80:
        return "[" + ", ".join(items) + "]"
    return "[\n" + "".join(f"  {item},\n" for item in items) + "]"


def _string(text: str) -> str:
    # A JSON string is a TOML basic string, but for one character that TOML forbids in the clear.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
