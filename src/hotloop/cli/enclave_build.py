"""``hotloop enclave build``: what an enclave is built from, sized for the command inside."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from ..enclave.gramine import INSECURE, GramineManifest
from ..enclave.guests import Guest
from ..enclave.image import environment, image_files
from ..enclave.sizing import EnclaveSize
from ..errors import InputError
from ..files import write_text_atomically
from ..machine import Machine
from .enclave_size import add_size_flags, size_of
from .enclave_target import COMMANDS, add_target_flags, read_target

KINDS = ("gramine-sgx", "nitro", "sev-snp", "tdx")


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop enclave``."""
    parser = kinds.add_parser(
        "build",
        help="the manifest or image description of an enclave",
        description="Write what an enclave is built from: a Gramine manifest with the hash of each "
        "file, Nitro's image description and allocator, or a unit and QEMU command line of a "
        "confidential virtual machine. Needs no such hardware.",
    )
    add_target_flags(parser)
    add_size_flags(parser, KINDS)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it goes")
    parser.add_argument("--name", default="hotloop", help="of the enclave (default: hotloop)")
    parser.add_argument(
        "--encrypted", action="append", default=[], type=Path, metavar="DIR",
        help="Gramine: a folder of encrypted files; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--allowed", action="append", default=[], type=Path, metavar="DIR",
        help="Gramine: a folder written in the clear (told); may be repeated",
    )  # fmt: skip
    parser.add_argument("--pass", dest="passed", action="append", default=[], metavar="NAME",
                        help="Gramine: a variable that the host may set (told)")  # fmt: skip
    parser.add_argument(
        "--insecure", action="append", default=[], choices=tuple(INSECURE), metavar="NAME",
        help=f"weaken it by name, and be told: {', '.join(INSECURE)}",
    )  # fmt: skip
    parser.add_argument("--base-image", default="", metavar="NAME@sha256:DIGEST",
                        help="Nitro: what the image is made from")  # fmt: skip
    for flag, default in (
        ("--kernel", "/boot/vmlinuz"),
        ("--initrd", "initramfs.img"),
        ("--firmware", "/usr/share/ovmf/OVMF.fd"),
    ):
        parser.add_argument(flag, type=Path, default=Path(default), metavar="FILE",
                            help=f"SEV-SNP, TDX (default: {default})")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the files; returns the exit code."""
    words: list[str] = args.target
    if words[0] not in COMMANDS:
        raise InputError(
            "an enclave is built for a command", got=" ".join(words),
            next_step="end with -- train ... or -- serve ...",
        )  # fmt: skip
    if args.kind != "gramine-sgx" and set(args.insecure) - {"debug"}:
        raise InputError(f"--kind {args.kind} has one insecure option", next_step="debug")
    size = size_of(args, read_target(args))
    python = os.path.realpath(sys.executable)
    command = (python, "-m", "hotloop", *words)
    if args.kind == "gramine-sgx":
        files, warnings = _gramine(args, size, command)
    else:
        files, warnings = _guest(args, size, command)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_text_atomically(args.out / name, text)
    for line in warnings:
        print(f"hotloop: weaker: {line}", file=sys.stderr)
    written = [str(args.out / name) for name in files]
    if args.json:
        document = {"files": written, "warnings": warnings, "size": size.to_dict()}
        print(json.dumps(document, indent=2))
    else:
        print("\n".join(f"wrote  {path}" for path in written))
    return 0


def _gramine(
    args: argparse.Namespace, size: EnclaveSize, command: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    manifest = GramineManifest(
        size=size,
        entrypoint=Path(command[0]),
        arguments=command,
        trusted_files=(*image_files(size.needs.needs_torch), *_inputs(command[3:])),
        allowed_folders=tuple(path.absolute() for path in args.allowed),
        encrypted_folders=tuple(path.absolute() for path in args.encrypted),
        passed=tuple(args.passed),
        environment=environment(),
        edmm=args.edmm,
        insecure=tuple(args.insecure),
    )
    return {f"{args.name}.manifest": manifest.text()}, manifest.warnings()


def _inputs(words: tuple[str, ...]) -> list[Path]:
    """Files that the command names, those in folders too."""
    files: set[Path] = set()
    for path in (Path(word).absolute() for word in words if "\0" not in word):
        if path.is_file():
            files.add(path)
        elif path.is_dir():
            files |= {file for file in path.rglob("*") if file.is_file()}
    return sorted(files)


def _guest(
    args: argparse.Namespace, size: EnclaveSize, command: tuple[str, ...]
) -> tuple[dict[str, str], list[str]]:
    guest = Guest(
        name=args.name,
        size=size,
        command=command,
        num_cpus=Machine.probe().usable_cpus,
        kernel=args.kernel,
        initrd=args.initrd,
        firmware=args.firmware,
        environment=environment(),
        base_image=args.base_image,
        debug="debug" in args.insecure,
    )
    warnings = ["debug: the host can read the guest's memory"] if guest.debug else []
    if args.kind == "nitro":
        return guest.nitro_files(), warnings
    script = "#!/bin/sh\nexec " + shlex.join(guest.qemu_command()) + "\n"
    return {f"{args.name}.service": guest.unit(), "run.sh": script}, warnings
