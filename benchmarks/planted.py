"""Planted problems: does the first suggestion name the cause, and does applying it help?

    python benchmarks/planted.py [--only NAME] [--rounds 3] [--json benchmarks/results/planted.json]

For each problem three variants take turns, each in a fresh process: healthy, planted, and fixed:
planted with the first suggestion of the planted run applied, as a plan, as environment, as a
command (renice), or as the line of the script it names. Recovered: (fixed - planted) / (healthy -
planted), of medians.

For each healthy run, each exact suggestion is raced against the run as it is; it is proven when the
95 % interval of the mean log ratio of the pairs lies above 1.

The quota is real where control groups (v1 or v2) may be made, the neighbour is a process of ours.
Swap is not planted here: ``tests/monitor`` has its report, made by hand. Results are merged into
the JSON file, so that parts can be run one by one.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
CGROUPS = Path("/sys/fs/cgroup")
# Of the processes that plant: a name, so that the report can name it.
BURN = "import time\nwhile True: pass"
# A run during which others took more of a CPU is made again, so often.
MOST_STRANGERS, TRIES = 0.1, 5
# Two-sided 95 % of Student's t by degrees of freedom.
STUDENT = {
    2: 4.30,
    3: 3.18,
    4: 2.78,
    5: 2.57,
    6: 2.45,
    7: 2.36,
    8: 2.31,
    9: 2.26,
    10: 2.23,
    11: 2.20,
}


@contextlib.contextmanager
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    """Another process that computes on CPU 1."""
    process = subprocess.Popen(["taskset", "-c", "1", sys.executable, "-c", BURN])
    try:
        time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def quota_group(cpus: float) -> Iterator[Path]:
    """A control group that may use ``cpus``; its file of processes."""
    v1 = CGROUPS / "cpu" / "cpu.cfs_quota_us"
    folder = (CGROUPS / "cpu" if v1.exists() else CGROUPS) / "hotloop-planted"
    folder.mkdir()
    try:
        if v1.exists():
            (folder / "cpu.cfs_period_us").write_text("100000")
            (folder / "cpu.cfs_quota_us").write_text(str(int(cpus * 100_000)))
        else:
            (folder / "cpu.max").write_text(f"{int(cpus * 100_000)} 100000")
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def child(name: str, variant: str, plan: str) -> int:
    """One run in this process; the result is the last line of stdout."""
    sys.path.insert(0, str(HERE.parent))
    import planted_runs

    run = planted_runs.HEALTHY.get(name)
    if run is None:
        run = planted_runs.PLANTED[name].run
    out = run(variant, json.loads(plan))
    report = out.monitor.collect_metrics()
    document = {
        "samples_per_s": out.samples_per_s,
        "peak_resident_bytes": out.peak_resident_bytes,
        "suggestions": [s.to_dict() for s in out.monitor.suggest_optimizations()],
        "metrics": metrics(report),
        "duration_s": report.duration_s,
        "others_s": report.cpu.others_s or 0.0,
        "named_s": {o.process: o.cpu_s for o in report.cpu.others},
    }
    print(json.dumps(document))
    return 0


def metrics(report: Any) -> dict[str, Any]:
    """What thresholds are held against."""
    from hotloop.machine import Machine
    from hotloop.monitor.suggest import Facts

    facts = Facts(report, Machine.probe())
    cpu, step = report.cpu, report.step
    seconds = report.duration_s
    return {
        "run_delay": facts.run_delay,
        "data_wait": facts.data_wait,
        "checkpoint": step.checkpoint_s / (facts.train_s + step.checkpoint_s),
        "overhead": None
        if facts.floor_s is None or not facts.step_s
        else 1 - facts.floor_s / facts.step_s,
        "others_per_s": None if cpu.others_s is None else cpu.others_s / seconds,
        "steal_per_s": None if cpu.steal_s is None else cpu.steal_s / seconds,
        "migrations_per_s": None if cpu.migrations is None else cpu.migrations / seconds,
        "minor_faults_per_s": (report.memory.minor_faults or 0) / seconds,
        "system_share": cpu.system_s / seconds,
        "throttled": (cpu.throttled_periods or 0) / cpu.periods if cpu.periods else None,
        "sampling_share": (report.sampling_s or 0.0) / seconds,
    }


def one(
    name: str,
    variant: str,
    plan: dict[str, Any],
    env: dict[str, str],
    group: Path | None,
    ours: subprocess.Popen[bytes] | None = None,
) -> dict[str, Any]:
    """One run in a fresh process; again where strangers took CPUs meanwhile.

    Args:
        ours: the neighbour that was planted, which is no stranger.
    """
    for _ in range(TRIES):
        result = attempt(name, variant, plan, env, group)
        strangers = result["others_s"] - result["named_s"].get(str(ours.pid if ours else 0), 0.0)
        result["strangers_share"] = strangers / result["duration_s"]
        if result["strangers_share"] < MOST_STRANGERS:
            break
        print(f"  {name}, {variant}: strangers took {result['strangers_share']:.0%} of a CPU",
              file=sys.stderr)  # fmt: skip
    return result


def attempt(
    name: str, variant: str, plan: dict[str, Any], env: dict[str, str], group: Path | None
) -> dict[str, Any]:
    """One run in a fresh process."""

    def enter() -> None:
        if group is not None:
            group.write_text(str(os.getpid()))

    command = [sys.executable, str(HERE), "--child", name, "--variant", variant,
               "--plan", json.dumps(plan)]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **env}, preexec_fn=enter, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def applied(suggestion: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, str], list[str]]:
    """How a suggestion is applied: its kind, and a plan, an environment, or a command."""
    change = suggestion["change"]
    if change["plan"] is not None:
        return "plan", change["plan"], {}, []
    words = shlex.split((change["command"] or "").split("  (")[0].replace("...", ""))
    if words and words[0] == "renice":
        return "command", {}, {}, words
    env = dict(word.split("=", 1) for word in words if "=" in word and word[0].isupper())
    if env and "python" in words:
        return "environment", {}, env, []
    return "script", {}, {}, []


def planted(name: str, rounds: int) -> dict[str, Any]:
    """All variants of one problem, taking turns."""
    sys.path.insert(0, str(HERE.parent))
    import planted_runs

    problem = planted_runs.PLANTED[name]
    runs: dict[str, list[dict[str, Any]]] = {"healthy": [], "planted": [], "fixed": []}
    how = "none"
    for _ in range(rounds):
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(quota_group(problem.quota)) if problem.quota else None
            runs["healthy"].append(one(name, "healthy", {}, {}, group))
            other = stack.enter_context(neighbour()) if problem.neighbour else None
            runs["planted"].append(one(name, "planted", {}, {}, group, other))
            found = runs["planted"][-1]["suggestions"]
            if not found:
                continue
            how, plan, env, command = applied(found[0])
            if command:
                # Only our own process may be touched, whatever the suggestion says.
                assert other is not None
                if command[-1] != str(other.pid):
                    how = f"not applied: {shlex.join(command)} names another process"
                    continue
                subprocess.run(command, check=True, capture_output=True)
            variant = "fixed" if how == "script" else "planted"
            runs["fixed"].append(one(name, variant, plan, env, group, other))
    key = "peak_resident_bytes" if problem.in_memory else "samples_per_s"
    medians = {
        variant: statistics.median(r[key] for r in these)
        for variant, these in runs.items()
        if these
    }
    firsts = [r["suggestions"][0]["name"] if r["suggestions"] else None for r in runs["planted"]]
    lost = medians["healthy"] - medians["planted"]
    recovered = None
    if "fixed" in medians and lost:
        recovered = (medians["fixed"] - medians["planted"]) / lost
    first = next((r["suggestions"][0] for r in runs["planted"] if r["suggestions"]), None)
    return {
        "rule": problem.rule,
        "first": firsts,
        "names_the_cause": all(f == problem.rule for f in firsts),
        "suggestion": first,
        "applied_as": how,
        "measured": key,
        "healthy": summary(runs["healthy"], key),
        "planted": summary(runs["planted"], key),
        "fixed": summary(runs["fixed"], key),
        "lost_share": lost / medians["healthy"],
        "recovered": recovered,
        "all_suggestions": [[s["name"] for s in r["suggestions"]] for r in runs["planted"]],
        "metrics": {v: [r["metrics"] for r in these] for v, these in runs.items()},
        "samples_per_s": {v: summary(these, "samples_per_s") for v, these in runs.items()},
        "most_strangers_share": max(r["strangers_share"] for t in runs.values() for r in t),
    }


def healthy(name: str, rounds: int) -> dict[str, Any]:
    """Suggestions on a healthy run, each exact one raced."""
    first = one(name, "healthy", {}, {}, None)
    races = {}
    for suggestion in first["suggestions"]:
        how, plan, env, _ = applied(suggestion)
        title = f"{suggestion['name']}: {suggestion['title']}"
        if not suggestion["exact"]:
            races[title] = "not raced: it changes the results"
        elif how not in ("plan", "environment"):
            races[title] = f"not raced: {suggestion['change']['command']}"
        else:
            pairs = []
            for number in range(rounds):
                order = [({}, {}), (plan, env)]
                rates = {}
                for side in (0, 1) if number % 2 == 0 else (1, 0):
                    rates[side] = one(name, "healthy", *order[side], None)["samples_per_s"]
                pairs.append(rates[1] / rates[0])
            races[title] = verdict(pairs)
    return {
        "suggestions": [s["name"] for s in first["suggestions"]],
        "kinds": [s["kind"] for s in first["suggestions"]],
        "races": races,
        "proven": [t for t, r in races.items() if isinstance(r, dict) and r["proven"]],
        "samples_per_s": first["samples_per_s"],
        "metrics": first["metrics"],
    }


def verdict(pairs: list[float]) -> dict[str, Any]:
    """Whether the pairs' ratios show a gain."""
    logs = [math.log(ratio) for ratio in pairs]
    mean = statistics.fmean(logs)
    half = STUDENT[len(logs) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(mean - half), math.exp(mean + half)
    return {"ratios": pairs, "median": statistics.median(pairs), "low": low, "high": high,
            "confidence": 0.95, "n": len(pairs), "proven": low > 1.0}  # fmt: skip


def summary(runs: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    values = [run[key] for run in runs]
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values),
            "n": len(values)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--variant", default="planted")
    parser.add_argument("--plan", default="{}")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.variant, args.plan)
    sys.path.insert(0, str(HERE.parent))
    import planted_runs
    from about import machine_summary

    from hotloop.machine import Machine
    from hotloop.train.report import versions

    document: dict[str, Any] = {"planted": {}, "healthy": {}}
    if args.json and args.json.exists():
        document = json.loads(args.json.read_text())
    names = args.only or [*planted_runs.PLANTED, *planted_runs.HEALTHY]
    for name in names:
        if name in planted_runs.PLANTED:
            row = planted(name, args.rounds)
            document["planted"][name] = row
            recovered = "-" if row["recovered"] is None else f"{row['recovered']:.0%}"
            print(
                f"{name:34} first: {row['first']} lost {row['lost_share']:.0%},"
                f" recovered {recovered} ({row['applied_as']})",
                flush=True,
            )
        else:
            row = healthy(name, args.pairs)
            document["healthy"][name] = row
            print(f"{name:34} suggests {row['suggestions']}, proven {row['proven']}", flush=True)
        document["what"] = "first suggestion, what was lost and what applying it recovers"
        document["machine"] = machine_summary(Machine.probe())
        document["versions"] = versions()
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
