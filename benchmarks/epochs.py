"""Epoch time and memory at 10,000, 50,000 and 100,000 MNIST samples, batch 64, interleaved.

    python benchmarks/epochs.py [--model cnn] [--rounds 2] [--json FILE]

Each figure comes from a fresh process of `hotloop train`. Full MNIST is used where HOTLOOP_DATA
holds it; samples beyond it are small distortions of the real ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = (10_000, 50_000, 100_000)


def one(model: str, samples: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "hotloop", "train", "mnist", "--no-download", "--json", "--quiet",
            "--model", model, "--samples", str(samples), "--epochs", "1", "--runs-dir", folder,
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    reports: dict[int, list[dict[str, object]]] = {size: [] for size in SIZES}
    for _ in range(args.rounds):
        for size in SIZES:
            reports[size].append(one(args.model, size))
    rows = []
    for size, runs in reports.items():
        times = [run["history"][0]["train_s"] for run in runs]
        peaks = [run["peak_resident_bytes"] for run in runs]
        rows.append(
            {
                "samples": size,
                "epoch_s": {"median": statistics.median(times), "min": min(times),
                            "max": max(times), "n": len(times)},
                "us_per_sample": 1e6 * statistics.median(times) / size,
                "peak_resident_bytes": {"median": statistics.median(peaks), "min": min(peaks),
                                        "max": max(peaks), "n": len(peaks)},
            }
        )  # fmt: skip
        print(
            f"{size:>7,} samples  {statistics.median(times):7.2f} s/epoch"
            f"  {rows[-1]['us_per_sample']:6.1f} us/sample"
            f"  {statistics.median(peaks) / 2**20:5.0f} MiB"
        )
    if args.json:
        last = reports[SIZES[-1]][-1]
        document = {
            "what": f"epoch time and peak resident memory, {args.model}, batch 64, Adam, float32",
            "rows": rows,
            "data": {size: runs[0]["data"] for size, runs in reports.items()},
            "plan": last["plan"],
            "machine": last["machine"],
            "versions": last["versions"],
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
