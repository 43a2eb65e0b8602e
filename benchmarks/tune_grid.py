"""``hotloop tune`` in 120 s against an exhaustive grid over a coarse space, each model in pieces.

    python benchmarks/tune_grid.py tune small      # 120 s; keeps the result
    python benchmarks/tune_grid.py grid small 0    # a piece of the grid beside the tuned plan;
                                                   # --plans N: of so many plans
    python benchmarks/tune_grid.py final small     # the grid's best three against the tuned plan

Every piece measures its plans and the tuned plan in rounds, one slice each in turn, in fresh
processes, so that pieces can be compared: a plan's figure is its speed over the tuned plan's in
the same round. The greatest of many noisy medians is too great, so ``final`` measures the best
three again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from about import about

from hotloop.cli.recipe import Recipe, trial_source
from hotloop.machine import Machine
from hotloop.measure import compare
from hotloop.plan import Plan
from hotloop.train.trials import PlanTrials
from hotloop.train.tuner import tune_source
from hotloop.tuning import key_of, text_of

RESULTS = Path(__file__).parent / "results" / "tune.json"
BUDGET_S = 120.0


def grid(machine: Machine) -> list[dict[str, Any]]:
    """Who computes x compiled or not x arena x huge pages, each as a difference to the default.

    What is not compiled, or on one thread of several, is there with the default's arena and pages
    alone: either takes 1.6 times as long or more, which neither makes good, and each plan of the
    grid costs a process.
    """
    cpus = machine.usable_cpus
    who: list[dict[str, Any]] = [
        {"cpu.num_threads": n, "cpu.thread_affinity": a, "parallel.num_workers": None}
        for n in sorted({1, cpus})
        for a in ("none", "compact")
    ]
    if cpus > 1:
        who += [
            {"cpu.num_threads": cpus, "cpu.thread_affinity": a, "parallel.num_workers": cpus}
            for a in ("none", "compact")
        ]
    product = itertools.product(who, ("always", "off"), ("try", "never"), ("never", "try"))
    found = []
    for w, c, a, h in product:
        by_workers = w["parallel.num_workers"] is not None
        slow = c == "off" or (w["cpu.num_threads"] == 1 < cpus and not by_workers)
        # Workers that are not compiled take the plain path on one thread: the same plan as that.
        if (c == "off" and by_workers) or (slow and (a, h) != ("try", "never")):
            continue
        knobs = {"step.compile": c, "memory.tensor_arena": a, "memory.huge_pages": h}
        found.append({**w, **knobs})
    return found


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def save(model: str, key: str, value: Any) -> None:
    document = load()
    document.setdefault(model, {})[key] = value
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def source_of(model: str) -> Any:
    return trial_source(Recipe(model=model, download=False))


def run_tune(model: str, machine: Machine) -> None:
    present = Plan.auto().resolve(machine, machine.cached_ceilings())
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = tune_source(
            source_of(model), present, machine, budget_s=BUDGET_S, keep=False,
            journal=Path(folder) / "journal",
            on_progress=lambda p: print(f"{p.elapsed_s:6.0f} s  {p.text}", flush=True),
        )  # fmt: skip
    document = result.to_dict()
    document["wall_s"] = time.monotonic() - began_s
    save(model, "about", {**about(), "batch_size": 64, "data": "mnist", "budget_s": BUDGET_S})
    save(model, "tune", document)
    save(model, "grid", {})
    print(f"{document['wall_s']:.0f} s: {text_of(result.best)}; {result.summary()}")


def run_piece(model: str, machine: Machine, piece: int, plans: int) -> None:
    rows = grid(machine)[piece * plans : (piece + 1) * plans]
    if not rows:
        raise SystemExit(f"the grid has {math.ceil(len(grid(machine)) / plans)} pieces")
    tuned = Plan.from_dict(load()[model]["tune"]["plan"])
    kept = load()[model]["grid"]
    with PlanTrials(source_of(model), tuned) as trials:
        failures = trials.prepare([{}, *rows])
        ready = [row for row in rows if key_of(row) not in failures]
        ratios: dict[str, list[float]] = {key_of(row): [] for row in ready}
        for turn in range(8):
            order = [{}, *ready] if turn % 2 == 0 else [*ready[::-1], {}]
            costs = {key_of(row): trials.measure(row) for row in order}
            for row in ready:
                ratios[key_of(row)].append(costs[key_of({})] / costs[key_of(row)])
            # After each round: what is stopped keeps what it has measured.
            found = {key_of(row): recorded(row, ratios, failures) for row in rows}
            save(model, "grid", kept | found)
    for row in rows:
        print(f"{found[key_of(row)]['ratio'] or 0:.3f}  {text_of(row)}")


def recorded(
    row: dict[str, Any], ratios: dict[str, list[float]], failures: dict[str, str]
) -> dict[str, Any]:
    """What is recorded of a plan of the grid; ratios: its speed over the tuned plan's."""
    values = ratios.get(key_of(row), [])
    return {
        "candidate": row,
        "ratio": statistics.median(values) if values else None,
        "min": min(values, default=None),
        "max": max(values, default=None),
        "n": len(values),
        "failed": failures.get(key_of(row)),
    }


def run_final(model: str) -> None:
    document = load()[model]
    tuned = Plan.from_dict(document["tune"]["plan"])
    measured = [entry for entry in document["grid"].values() if entry["ratio"] is not None]
    best = sorted(measured, key=lambda entry: -entry["ratio"])[:3]
    found = []
    with PlanTrials(source_of(model), tuned) as trials:
        trials.require([{}, *(entry["candidate"] for entry in best)])
        for entry in best:
            row = entry["candidate"]
            comparison = compare(
                lambda: trials.measure({}),
                lambda row=row: trials.measure(row),
                budget_s=35, margin=0.01, min_pairs=12,
            )  # fmt: skip
            found.append({"candidate": row, "comparison": comparison.to_dict()})
            print(f"{comparison.text()} the tuned plan: {text_of(row)}", flush=True)
    best_ratio = max(entry["comparison"]["ratio"] for entry in found)
    final = {
        "grid_size": len(measured),
        "best": found,
        "tuned_over_best": 1 / best_ratio,
        "within_5_percent": 1 / best_ratio >= 0.95,
    }
    save(model, "final", final)
    print(f"{model}: tuned plan at {1 / best_ratio:.3f} of the best of {len(measured)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tune", "grid", "final"))
    parser.add_argument("model", choices=("small", "big", "cnn"))
    parser.add_argument("piece", type=int, nargs="?", default=0)
    parser.add_argument("--plans", type=int, default=11, help="of a piece")
    args = parser.parse_args()
    machine = Machine.probe()
    if args.what == "tune":
        run_tune(args.model, machine)
    elif args.what == "grid":
        run_piece(args.model, machine, args.piece, args.plans)
    else:
        run_final(args.model)


if __name__ == "__main__":
    main()
