"""``hotloop enclave seal``, ``unseal``, ``key new`` and ``counter new``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import InputError
from ..sealed import (
    SUFFIX,
    key_file_from_flags,
    new_key_file,
    parse_counter,
    read_key,
    seal,
    unseal,
)
from ..units import format_bytes


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to ``hotloop enclave``."""
    parser = kinds.add_parser(
        "seal",
        help="seal a file or folder: data, weights, an export, a checkpoint",
        description="Seal a file or folder for the holder of a key (docs/sealed-files.md).",
    )
    parser.add_argument("source", type=Path, metavar="PATH", help="file or folder; it stays")
    parser.add_argument("--out", type=Path, metavar="NEW", help=f"default: PATH{SUFFIX}")
    key_file_from_flags(parser)
    parser.set_defaults(run=_seal)

    parser = kinds.add_parser(
        "unseal",
        help="write what a sealed file or folder holds, plain",
        description="Write what a sealed file or folder holds, plain, for its owner alone.",
    )
    parser.add_argument("source", type=Path, metavar="PATH", help="sealed file or folder")
    parser.add_argument("--out", type=Path, metavar="NEW", required=True, help="its plain name")
    key_file_from_flags(parser)
    parser.set_defaults(run=_unseal)

    parser = kinds.add_parser("key", help="make a key", description="Make a key.")
    parser.add_argument("action", choices=["new"], help="new: 32 random bytes")
    parser.add_argument("file", type=Path, metavar="FILE", help="new file, mode 0600")
    parser.set_defaults(run=_key)

    parser = kinds.add_parser(
        "counter",
        help="make a counter, by which older checkpoints are found",
        description="Make a counter, by which older checkpoints are found.",
    )
    parser.add_argument("action", choices=["new", "read"], help="new: begins; read: tells")
    parser.add_argument("place", metavar="FILE|tpm:INDEX", help="a file, or an NV index of a TPM")
    parser.set_defaults(run=_counter)


def _seal(args: argparse.Namespace) -> int:
    key = read_key(_key_file(args))
    source = Path(str(args.source).rstrip("/") or "/")
    target = args.out or source.with_name(source.name + SUFFIX)
    return _tell(args, "sealed", target, seal(source, target, key))


def _unseal(args: argparse.Namespace) -> int:
    return _tell(
        args, "unsealed", args.out, unseal(args.source, args.out, read_key(_key_file(args)))
    )


def _key(args: argparse.Namespace) -> int:
    new_key_file(args.file)
    return _print(args, {"key_file": str(args.file)}, f"a new key is in {args.file}")


def _counter(args: argparse.Namespace) -> int:
    counter = parse_counter(args.place)
    if args.action == "new":
        counter.create()
    number = counter.read()
    return _print(args, {"counter": args.place, "number": number}, f"{args.place} is at {number}")


def _key_file(args: argparse.Namespace) -> str:
    if args.key_file is None:
        raise InputError(
            "sealed files need a key",
            next_step="hotloop enclave key new FILE, then --key-file FILE",
        )
    return str(args.key_file)


def _tell(args: argparse.Namespace, what: str, target: Path, plain_bytes: int) -> int:
    document = {what: str(target), "plain_bytes": plain_bytes}
    return _print(args, document, f"{what} {format_bytes(plain_bytes)} as {target}")


def _print(args: argparse.Namespace, document: dict[str, object], text: str) -> int:
    print(json.dumps(document) if args.json else text)
    return 0
