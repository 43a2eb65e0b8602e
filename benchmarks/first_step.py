"""From the start of `hotloop train` to the end of its first step, on a model compiled before.

    python benchmarks/first_step.py [--models small,big,cnn] [--rounds 5] [--out FILE]

The command trains one batch of 64 and ends: start of the interpreter, reading of the data, loading
of the compiled step, the step itself, and the last checkpoint are all in the time. The first run of
each model, which may compile, is not counted.
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


def one(model: str) -> tuple[float, str]:
    """Seconds of the command, and the path it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "hotloop", "train", "mnist", "--no-download", "--json", "--quiet",
            "--model", model, "--samples", "64", "--epochs", "1",
            "--compile", "always", "--runs-dir", folder,
        ]  # fmt: skip
        started = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return time.perf_counter() - started, json.loads(done.stdout)["path"]


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
        seconds = [s for s, _ in runs]
        document[model] = {
            "median_s": round(statistics.median(seconds), 2),
            "min_s": round(min(seconds), 2), "max_s": round(max(seconds), 2), "n": len(seconds),
            "path": runs[0][1],
        }  # fmt: skip
        print(model, document[model], flush=True)
    if args.out is not None:
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
