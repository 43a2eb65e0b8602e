"""``hotloop enclave size``: how large an enclave must be, before it is built."""

from __future__ import annotations

import argparse
import json

from ..enclave.image import image_bytes
from ..enclave.needs import Needs, largest_size
from ..enclave.sizing import KINDS, EnclaveSize, size_enclave
from ..errors import InputError
from ..units import format_bytes, parse_bytes
from .enclave_target import Target, add_target_flags, read_target
from .text import aligned


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop enclave``."""
    parser = kinds.add_parser(
        "size",
        help="the memory and threads that an enclave must have",
        description="Predict the memory of a model, run, export or command inside an enclave, and "
        "the size to ask for. Nothing is trained or built.",
    )
    add_target_flags(parser)
    add_size_flags(parser)
    parser.add_argument("--fits", metavar="SIZE", help="exit code 2 where it is larger than SIZE")
    parser.set_defaults(run=run)


def add_size_flags(parser: argparse.ArgumentParser, kinds: tuple[str, ...] = KINDS) -> None:
    """Add the flags that say in what it runs."""
    parser.add_argument("--kind", choices=kinds, default=kinds[0], help=f"default: {kinds[0]}")
    parser.add_argument(
        "--tmp", default="0", metavar="SIZE", help="files that it keeps in memory (default: 0)"
    )
    parser.add_argument(
        "--malloc-arenas", type=int, default=1, metavar="N",
        help="MALLOC_ARENA_MAX of Gramine's C library (default: 1)",
    )  # fmt: skip
    parser.add_argument("--edmm", action="store_true", help="SGX adds pages when needed (SGX2)")


def run(args: argparse.Namespace) -> int:
    """Print the size; returns the exit code: 2 when it does not fit ``--fits``."""
    limit = None if args.fits is None else parse_bytes(args.fits)
    target = read_target(args)
    size = size_of(args, target)
    fits = limit is None or size.size_bytes <= limit
    largest = None if limit is None else _largest(args, target, limit)
    if args.json:
        document = size.to_dict()
        document |= {"fits": fits, "limit_bytes": limit, "largest_batch_size": largest}
        print(json.dumps(document, indent=2))
    else:
        print(_text(size))
        if largest is not None:
            what = "micro-batch" if size.needs.phase == "train" else "batch"
            print(f"Largest {what} in {format_bytes(limit)}: {largest}")
    if limit is not None and not fits:
        if args.json:
            return 2
        size.require_fit(limit, largest)
    return 0


def size_of(
    args: argparse.Namespace, target: Target, needs: Needs | None = None, kind: str | None = None
) -> EnclaveSize:
    """The enclave for what the target needs, or for other ``needs`` of it."""
    kind = kind or args.kind
    needs = needs or target.needs
    image = image_bytes(needs.needs_torch) if kind in ("nitro", "sev-snp", "tdx") else 0
    if args.malloc_arenas < 1:
        raise InputError("--malloc-arenas must be at least 1", got=args.malloc_arenas)
    return size_enclave(
        needs,
        kind,
        tmp_bytes=parse_bytes(args.tmp),
        image_bytes=image,
        malloc_arenas=args.malloc_arenas,
        edmm=args.edmm,
    )


def _largest(args: argparse.Namespace, target: Target, limit: int) -> int | None:
    needs = target.needs

    def fits(size: int) -> bool:
        tried = needs if size == needs.micro_batch_size else target.at(size)
        return size_of(args, target, tried).size_bytes <= limit

    return largest_size(fits, needs.batch_size)


def _text(size: EnclaveSize) -> str:
    needs = size.needs
    phase = {"train": "Training", "infer": "Inference"}[needs.phase]
    cut = (
        f", micro-batch {needs.micro_batch_size}"
        if needs.micro_batch_size < needs.batch_size
        else ""
    )
    return "\n".join(
        [
            f"{phase} at batch {needs.batch_size}{cut} in {size.kind}",
            aligned([(title, format_bytes(count)) for title, count in size.table()], right=(1,)),
            f"Threads: {size.threads}",
            *size.notes,
        ]
    )
