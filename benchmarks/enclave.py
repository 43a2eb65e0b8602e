"""What a sandbox costs: time and memory of training and answering, plain and inside.

    python benchmarks/enclave.py [--data DIR] [--rounds 3]

The ways take turns. Memory is predicted by ``hotloop enclave size`` and measured by ``hotloop
enclave run``. Writes benchmarks/results/enclave.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HOTLOOP = [sys.executable, "-m", "hotloop"]
KINDS = ("sandbox", "gvisor")
ANSWER = """
import json, sys, time, numpy
from hotloop.infer import load_inference
runner = load_inference(sys.argv[1])
x = []
for spec in runner.inputs:
    x.append(numpy.zeros([64 if n is None else n for n in spec.shape], spec.dtype))
for _ in range(5):
    runner.run(x)
start = time.process_time()
for _ in range(100):
    runner.run(x)
open(sys.argv[2], "w").write(json.dumps(time.process_time() - start))
"""


def asked(*words: str) -> dict[str, Any]:
    """The JSON that a command of hotloop prints last."""
    done = subprocess.run([*HOTLOOP, *words], stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout[done.stdout.index("{") :]))


def train_words(data: str, out: Path) -> list[str]:
    return [
        "train", "mnist", "--data", data, "--no-download", "--no-ceilings", "--quiet",
        "--no-monitor", "--max-steps", "60", "--model", "cnn", "--out", str(out),
    ]  # fmt: skip


def train_once(way: str, data: str, folder: Path) -> dict[str, Any]:
    """Seconds of the steps, and what the run took."""
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    words = train_words(data, out)
    taken: dict[str, Any] = {}
    if way == "plain":
        subprocess.run([*HOTLOOP, *words], stdout=subprocess.DEVNULL, check=True)
    else:
        command = [*HOTLOOP, "enclave", "run", "--kind", way, "--json", "--", *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        taken = json.loads(done.stdout[done.stdout.rindex("\n{") :])
    report = json.loads((out / "report.json").read_text())
    return {
        "steps_s": report["time_s"]["step"],
        "process_bytes": report["peak_resident_bytes"],
        "taken_bytes": taken.get("taken_bytes"),
    }


def answer_once(way: str, export: Path, folder: Path) -> dict[str, Any]:
    """Processor seconds of 100 batches of 64, and what the process took."""
    out = Path(tempfile.mkdtemp(dir=folder))
    words = ["-c", ANSWER, str(export), str(out / "seconds")]
    taken: dict[str, Any] = {}
    if way == "plain":
        subprocess.run([sys.executable, *words], check=True)
    else:
        size = asked("enclave", "size", "--kind", way, "--json", str(export))["size_bytes"]
        options = ["--kind", way, "--memory", str(size), "--json", "--write", str(out)]
        taken = asked("enclave", "run", *options, "--", "python", *words)
    return {
        "cpu_s": json.loads((out / "seconds").read_text()),
        "taken_bytes": taken.get("taken_bytes"),
    }


def summary(rounds: list[dict[str, Any]], seconds: str) -> dict[str, Any]:
    took = [r[seconds] for r in rounds if r[seconds] is not None]
    bytes_ = [r["taken_bytes"] for r in rounds if r["taken_bytes"] is not None]
    return {
        seconds: {"median": statistics.median(took), "min": min(took), "n": len(took)},
        "taken_bytes": max(bytes_) if bytes_ else None,
    }


def predicted(way: str, words: list[str]) -> dict[str, Any]:
    """The table of ``hotloop enclave size``, in MiB, with its totals."""
    size = asked("enclave", "size", "--kind", way, "--json", *words)
    rows = {**size["components"], **size["overhead"]}
    return {
        "components_mib": {name: round((n or 0) / 2**20, 2) for name, n in rows.items()},
        "needed_bytes": size["needed_bytes"],
        "size_bytes": size["size_bytes"],
    }


def main() -> None:
    from about import about

    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="data/mnist", help="folder with MNIST's IDX files")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    data = str(Path(args.data).resolve())
    ways = ("plain", *KINDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export = folder / "export"
        subprocess.run(
            [*HOTLOOP, "export", "cnn", "--engines", "hotloop", "--budget-s", "5", "--quiet",
             "--no-measure", "--out", str(export)], stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        rounds: dict[str, dict[str, list[dict[str, Any]]]] = {
            phase: {way: [] for way in ways} for phase in ("train", "infer")
        }
        for _ in range(args.rounds):
            for way in ways:
                rounds["train"][way].append(train_once(way, data, folder))
                rounds["infer"][way].append(answer_once(way, export, folder))
        words = {"train": ["--", *train_words(data, folder / "none")], "infer": [str(export)]}
        results: dict[str, Any] = {}
        for phase, seconds in (("train", "steps_s"), ("infer", "cpu_s")):
            results[phase] = {w: summary(rounds[phase][w], seconds) for w in ways}
            for way in KINDS:
                record = results[phase][way] | predicted(way, words[phase])
                record["error"] = record["needed_bytes"] / record["taken_bytes"] - 1
                plain = results[phase]["plain"][seconds]
                record["time_over_plain"] = record[seconds]["median"] / plain["median"] - 1
                results[phase][way] = record
        plain_bytes = max(r["process_bytes"] for r in rounds["train"]["plain"])
        results["train"]["plain"]["taken_bytes"] = plain_bytes
    record = {**about(), "rounds": args.rounds, "results": results}
    path = HERE / "results" / "enclave.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
