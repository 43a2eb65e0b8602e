"""Plain PyTorch scripts without and with `hotloop run`, in turn: gains, and losses compared.

    python benchmarks/run_scripts.py cnn [--rounds 5] [--out benchmarks/results/run-scripts.json]
    python benchmarks/run_scripts.py cnn --rounding --out ...    # a plain run with one thread

Each script prints its losses and the seconds of its loop; both are compared, and the seconds of the
whole process. Entries of other scripts in the file are kept. ``--rounding`` adds how far the losses
of plain PyTorch move when one thread computes instead of all: the same sums in another order.
"""

import argparse
import json
import os
import re
import statistics
import sys
from pathlib import Path

from about import about

from hotloop.files import write_text_atomically
from hotloop.launch import compare

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "scripts"
SCRIPTS = {
    "cnn": ["mnist_cnn.py", "--samples", "5000"],
    "big": ["mlp.py", "--hidden", "3072", "3072", "--samples", "4000"],
    "small": ["mlp.py", "--epochs", "5"],
    "word_language_model": ["word_language_model.py", "--steps", "60"],
    "vae": ["vae.py", "--samples", "40000"],
    "vision_transformer": ["vision_transformer.py"],
    "time_series": ["time_series.py", "--samples", "10000"],
    "graph_net": ["graph_net.py", "--epochs", "200"],
    "nearest_neighbours": ["nearest_neighbours.py", "--rounds", "5"],
}


def loop_s(output):
    """Seconds of the loop, as the script prints them."""
    return sum(float(number) for number in re.findall(r" in ([\d.]+) s", output))


def losses(output):
    return [float(number) for number in re.findall(r"loss ([\d.]+)", output)]


def measure(name, rounds):
    script, *args = SCRIPTS[name]
    target = [str(FOLDER / script), *args]
    environ = compare.base_environment()
    plain = [sys.executable, *target]
    changed = [sys.executable, "-m", "hotloop", "run", "--quiet", *target]
    compare.run_once(changed, environ)  # Builds and times; not counted.
    pairs = compare.interleave(
        lambda: compare.run_once(plain, environ),
        lambda: compare.run_once(changed, environ),
        rounds,
        lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True),
    )
    loops = [[compare.Outcome(loop_s(o.output), o.output) for o in outcomes] for outcomes in pairs]
    expected = losses(pairs[0][0].output)
    differences = [
        abs(a - b) / abs(a)
        for outcome in pairs[1]
        for a, b in zip(expected, losses(outcome.output), strict=True)
    ]
    return {
        "script": " ".join(SCRIPTS[name]),
        "loop": compare.compare(*loops).to_dict(),
        "process": compare.compare(*pairs).to_dict(),
        "losses": len(expected),
        "first_loss": expected[0],
        "last_loss": expected[-1],
        "greatest_loss_difference": max(differences),
        "median_loss_difference": statistics.median(differences),
        "plain_runs_differ": any(losses(o.output) != expected for o in pairs[0]),
        "load_average": os.getloadavg()[0],
    }


def rounding(name):
    """Relative differences of the losses of plain PyTorch on one thread and on all."""
    script, *args = SCRIPTS[name]
    environ = compare.base_environment()
    plain = [sys.executable, str(FOLDER / script), *args]
    several, one = (
        losses(compare.run_once(plain, env).output)
        for env in (environ, environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    )
    differences = [abs(a - b) / abs(a) for a, b in zip(several, one, strict=True)]
    return {"greatest": max(differences), "median": statistics.median(differences)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=SCRIPTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rounding", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.rounding and args.out is None:
        parser.error("--rounding adds to the file of --out")
    document = {}
    if args.out is not None and args.out.is_file():
        document = json.loads(args.out.read_text())
    document |= about()
    document["data"] = "MNIST" if os.environ.get("HOTLOOP_DATA") else "drawn"
    for name in args.names if args.rounding else []:
        row = document["scripts"][name]
        row["plain_with_one_thread"] = rounding(name)
        print(name, row["plain_with_one_thread"])
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")
    for name in [] if args.rounding else args.names:
        row = document.setdefault("scripts", {})[name] = measure(name, args.rounds)
        loop, process = row["loop"], row["process"]
        interval = f"({loop['low'] or 0:.2f} to {loop['high'] or 0:.2f})"
        print(
            f"{name:<20} loop {loop['gain']:.2f} {interval}"
            f"  process {process['gain']:.2f}  n={args.rounds}"
            f"  losses differ by {row['greatest_loss_difference']:.1e} at most"
        )
        if args.out is not None:
            write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
