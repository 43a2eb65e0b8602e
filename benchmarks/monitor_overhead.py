"""What the monitor costs: the same training with and without it, interleaved.

    python benchmarks/monitor_overhead.py [--models small,cnn] [--rounds 8] [--json FILE]

Each round trains once without a monitor, once with it, and once with a JSON line a second besides,
in an order that turns from round to round, all in one process after a warm-up. The figure is the
median of the paired ratios of throughput, with their least and greatest.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from about import about
from torch.nn import functional as F

import hotloop
from hotloop.monitor import PerformanceMonitor
from hotloop.monitor.sinks import JsonLines
from hotloop.train.zoo import build_model

EPOCHS = {"small": 60, "cnn": 1, "plain": 20}
KINDS = ("without", "monitor", "monitor and JSON lines")


def one(name: str, kind: str, data: tuple[torch.Tensor, torch.Tensor], folder: str) -> dict:
    torch.manual_seed(0)
    model = build_model("small" if name == "plain" else name)
    optimizer = torch.optim.Adam(model.parameters())
    plan = hotloop.Plan().replace(
        {"cpu.num_threads": 2, "step.compile": "off" if name == "plain" else "always"}
    )
    monitor: PerformanceMonitor | bool = kind != "without"
    if kind == "monitor and JSON lines":
        monitor = PerformanceMonitor()
        lines = JsonLines(Path(folder) / f"{time.monotonic()}.jsonl", monitor)
        monitor.every(1.0, lines.write)
    trainer = hotloop.Trainer(model, F.cross_entropy, optimizer, plan)
    report = trainer.fit(data, batch_size=64, epochs=EPOCHS[name], monitor=monitor)
    sampling_s = report.performance and report.performance.sampling_s
    return {"samples_per_s": report.samples_per_s, "wall_s": report.wall_s,
            "sampling_s": sampling_s, "train_s": report.train_s}  # fmt: skip


def ratios(runs: dict[str, list[dict]], kind: str) -> dict:
    pairs = [
        b["samples_per_s"] / a["samples_per_s"]
        for a, b in zip(runs["without"], runs[kind], strict=True)
    ]
    shares = [r["sampling_s"] / r["train_s"] for r in runs[kind] if r["sampling_s"]]
    return {
        "throughput_ratio": {"median": statistics.median(pairs), "min": min(pairs),
                             "max": max(pairs), "n": len(pairs)},
        "sampling_cpu_share": statistics.median(shares),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="small,plain,cnn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(6400, 1, 28, 28, generator=generator)
    y = torch.randint(0, 10, (6400,), generator=generator)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models.split(","):
            one(name, "monitor", (x, y), folder)
            runs: dict[str, list[dict]] = {kind: [] for kind in KINDS}
            for number in range(args.rounds):
                for k in range(len(KINDS)):
                    kind = KINDS[(number + k) % len(KINDS)]
                    runs[kind].append(one(name, kind, (x, y), folder))
            rows[name] = {kind: ratios(runs, kind) for kind in KINDS[1:]}
            rates = [r["samples_per_s"] for r in runs["without"]]
            rows[name]["without_samples_per_s"] = {
                "median": statistics.median(rates), "min": min(rates), "max": max(rates),
                "n": len(rates)}  # fmt: skip
            for kind in KINDS[1:]:
                row = rows[name][kind]
                ratio = row["throughput_ratio"]
                print(
                    f"{name:6} {kind:24} x{ratio['median']:.4f}"
                    f" ({ratio['min']:.3f} to {ratio['max']:.3f}, n={ratio['n']}),"
                    f" its thread {row['sampling_cpu_share']:.3%} of a CPU"
                )
    if args.json:
        document = {
            "what": "throughput with the monitor over without, paired; plain: small, not compiled",
            "rows": rows,
            **about(),
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
