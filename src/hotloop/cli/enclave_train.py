"""``hotloop enclave train``: train an export of ``hotloop export --training``. Imports no torch."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ..errors import DataError


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop enclave``."""
    parser = kinds.add_parser(
        "train",
        help="train an export of hotloop export --training, without torch",
        description="Train an export of hotloop export --training with NumPy alone: no torch is "
        "imported, none needs to be installed. Writes the checkpoints that hotloop train writes.",
    )
    parser.add_argument("export", metavar="EXPORT", type=Path, help="the folder of the export")
    parser.add_argument(
        "--data", metavar="DATA", default="mnist", help="mnist, an .npz file or an IDX folder"
    )
    parser.add_argument("--test-data", metavar="DATA", help="validation data of the same kind")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of samples")
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps in all")
    parser.add_argument(
        "--drop-last", action="store_true",
        help="leave out the last batch of an epoch where it is smaller",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, help="where checkpoints go")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="inside each kernel")
    parser.add_argument("--quiet", action="store_true", help="no line for each epoch")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and print; returns the exit code."""
    from ..enclave.training import load_training
    from ..enclave.training.samples import open_samples

    began_s = time.perf_counter()
    made = load_training(args.export, num_threads=args.threads)
    normalize = made.document.normalize
    samples = open_samples(args.data, "train", normalize)
    validation = None
    try:
        validation = open_samples(args.test_data or args.data, "test", normalize)
    except DataError:
        if args.test_data:
            raise
    shows = not (args.quiet or args.json)
    state = made.fit(
        samples,
        args.epochs,
        seed=args.seed,
        drop_last=args.drop_last,
        validation=validation if made.evaluates else None,
        checkpoint_dir=args.out,
        resume=args.resume,
        max_steps=args.max_steps,
        on_epoch=(lambda state: print(_line(state.history[-1]))) if shows else None,
    )
    peak_bytes = peak_resident_bytes()
    if args.json:
        document = {
            "steps": state.step, "epochs": state.to_dict()["history"], "curve": state.curve,
            "peak_resident_bytes": peak_bytes, "wall_s": time.perf_counter() - began_s,
            "out": None if args.out is None else str(args.out),
        }  # fmt: skip
        print(json.dumps(document))
        return 0
    print(f"{state.step} steps, {peak_bytes / 2**20:.1f} MiB peak resident memory")
    return 0


def _line(record: Any) -> str:
    text = f"epoch {record.epoch + 1}  loss {record.train_loss:.4f}"
    if record.validation_loss is not None:
        text += f"  validation {record.validation_loss:.4f}"
    if record.validation_accuracy is not None:
        text += f"  accuracy {record.validation_accuracy:.2%}"
    return f"{text}  {record.samples_per_s:,.0f} samples/s"


def peak_resident_bytes() -> int:
    """Of this process so far (``VmHWM`` of Linux: a fork's parent does not count)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
