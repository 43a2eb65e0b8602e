"""From the start of `hotloop train` to the end of its first step, on a model compiled before.

    python benchmarks/first_step.py [--models small,big,cnn] [--rounds 5] [--out FILE]

The command trains one batch of 64 and ends. Two times: of the whole command, and that less what its
report says for evaluation and checkpoint, which come after the step. Start of the interpreter,
reading of the data, loading of the compiled step, the step itself, the report and the end of the
process are all in both. The first run of each model, which may compile, is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import about

from hotloop.files import write_text_atomically


def one(model: str) -> tuple[float, float, str]:
    """Seconds of the command, seconds to the first step at most, and the path it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "hotloop", "train", "mnist", "--no-download", "--json", "--quiet",
            "--model", model, "--samples", "64", "--epochs", "1",
            "--compile", "always", "--runs-dir", folder,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        took, report = time.perf_counter() - started, json.loads(done.stdout)
        after = sum(report["time_s"].get(phase, 0.0) for phase in ("evaluate", "checkpoint"))
        return took, took - after, report["path"]


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "median_s": round(statistics.median(seconds), 2), "min_s": round(min(seconds), 2),
        "max_s": round(max(seconds), 2), "n": len(seconds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="small,big,cnn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = about()
    for model in args.models.split(","):
        one(model)
        runs = [one(model) for _ in range(args.rounds)]
        document[model] = {
            "first_step": spread([first for _, first, _ in runs]),
            "command": spread([whole for whole, _, _ in runs]),
            "path": runs[0][2],
        }
        print(model, document[model], flush=True)
    if args.out is not None:
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
