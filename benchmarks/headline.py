"""MNIST to 99 % from a cold command: hotloop beside plain PyTorch, the same recipe, seed by seed.

    python benchmarks/headline.py IDX_FOLDER [--seeds 10] [--out benchmarks/results/headline.json]

Cold: each run is a new process with an empty cache folder, so that hotloop's C++ is compiled anew;
the time is that of the whole command, start of the interpreter and reading of the data included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from about import about

HERE = Path(__file__).parent
RECIPE = [
    "--model", "mnist_99:net", "--batch-size", "128", "--epochs", "2", "--lr", "0.01",
    "--schedule", "onecycle",
]  # fmt: skip


def timed(command: list[str], cwd: Path) -> tuple[float, float]:
    """Seconds of a command, with an empty cache, and the test accuracy it printed."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"XDG_CACHE_HOME": cache}
        started = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
    return seconds, json.loads(done.stdout)["validation_accuracy"]


def run(data: Path, seeds: int) -> dict[str, Any]:
    """Both, in turn, for each seed."""
    figures: dict[str, list[tuple[float, float]]] = {"hotloop": [], "pytorch": []}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as runs:
            command = [
                sys.executable, "-m", "hotloop", "train", "mnist", "--data", str(data), *RECIPE,
                "--seed", str(seed), "--num-threads", "2", "--no-ceilings", "--quiet", "--json",
                "--runs-dir", runs,
            ]  # fmt: skip
            figures["hotloop"].append(timed(command, HERE.parent / "examples"))
        command = [sys.executable, str(HERE / "mnist_99_plain.py"), str(data), str(seed)]
        figures["pytorch"].append(timed(command, HERE))
        for name, runs_ in figures.items():
            print(f"seed {seed} {name}: {runs_[-1][0]:.1f} s, {runs_[-1][1]:.2%}", flush=True)
    return {
        name: {
            "n": seeds,
            "wall_s": [round(s, 2) for s, _ in runs_],
            "median_s": round(statistics.median(s for s, _ in runs_), 2),
            "accuracy": [a for _, a in runs_],
            "median_accuracy": statistics.median(a for _, a in runs_),
            "reached_99": sum(a >= 0.99 for _, a in runs_),
        }
        for name, runs_ in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    document = {
        "recipe": " ".join(RECIPE),
        **run(options.data.resolve(), options.seeds),
        **about(),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
