"""Planted problems: does the first suggestion name the cause, and does applying it help?

    python benchmarks/planted.py [--only NAME] [--rounds 3] [--pairs 6] [--swap-file FILE]
        [--json benchmarks/results/planted.json]

For each problem three variants take turns, each in a fresh process: healthy, planted, and fixed:
planted with the first suggestion of the planted run applied, as a plan, as environment, as a
command (renice), or as the line of the script it names. Recovered: (fixed - planted) / (healthy -
planted), of medians.

For each healthy run, each exact suggestion is raced against the run as it is, by ``compare``, as
``hotloop prove`` does.

Quota and memory limit are real where control groups (v1 or v2) may be made, the neighbour is a
process of ours. Swap needs ``--swap-file FILE``, which must not exist: it is made, used and removed
(root only), and only the limited group can come to use it unless the whole machine is short of
memory. Results are merged into the JSON file, so that parts can be run one by one.
"""

import argparse
import contextlib
import json
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
# Seconds that a race may take past its least number of pairs.
RACE_S = 120.0
SWAP_BYTES = 4 * 2**30


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
def control_group(controller: str, v1: dict[str, str], v2: dict[str, str]) -> Iterator[Path]:
    """A control group with these settings; its file of processes."""
    is_v1 = (CGROUPS / controller / next(iter(v1))).exists()
    folder = (CGROUPS / controller if is_v1 else CGROUPS) / "hotloop-planted"
    folder.mkdir()
    try:
        for name, value in (v1 if is_v1 else v2).items():
            (folder / name).write_text(value)
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def quota_group(cpus: float) -> contextlib.AbstractContextManager[Path]:
    """A control group that may use ``cpus``."""
    quota = str(int(cpus * 100_000))
    return control_group(
        "cpu",
        {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": quota},
        {"cpu.max": f"{quota} 100000"},
    )


@contextlib.contextmanager
def swapping_group(limit_bytes: int, file: Path | None) -> Iterator[Path]:
    """A control group with a memory limit, what is above it goes to a swap file of ours."""
    if file is None:
        raise SystemExit("swap is planted with --swap-file FILE (root only)")
    with file.open("xb") as opened:
        os.posix_fallocate(opened.fileno(), 0, SWAP_BYTES)
    try:
        file.chmod(0o600)
        subprocess.run(["mkswap", str(file)], check=True, capture_output=True)
        subprocess.run(["swapon", str(file)], check=True)
        try:
            limit = str(limit_bytes)
            v2 = {"memory.high": limit, "memory.swap.max": "max"}
            with control_group("memory", {"memory.limit_in_bytes": limit}, v2) as group:
                yield group
        finally:
            subprocess.run(["swapoff", str(file)], check=True)
    finally:
        file.unlink()


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
    from hotloop.monitor.rules import Facts

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


def planted(name: str, rounds: int, swap_file: Path | None) -> dict[str, Any]:
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
            if problem.limit_bytes:
                group = stack.enter_context(swapping_group(problem.limit_bytes, swap_file))
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


def healthy(name: str, pairs: int) -> dict[str, Any] | None:
    """Suggestions on a healthy run, each exact one raced; ``None``: strangers ran beside it."""
    first = one(name, "healthy", {}, {}, None)
    if first["strangers_share"] >= MOST_STRANGERS:
        return None
    races = {}
    for suggestion in first["suggestions"]:
        how, plan, env, _ = applied(suggestion)
        title = f"{suggestion['name']}: {suggestion['title']}"
        if not suggestion["exact"]:
            races[title] = "not raced: it changes the results"
        elif how not in ("plan", "environment"):
            races[title] = f"not raced: {suggestion['change']['command']}"
        else:
            races[title] = race(name, plan, env, pairs)
    return {
        "suggestions": [s["name"] for s in first["suggestions"]],
        "kinds": [s["kind"] for s in first["suggestions"]],
        "races": races,
        "proven": [t for t, r in races.items() if isinstance(r, dict) and r["verdict"] == "proven"],
        "samples_per_s": first["samples_per_s"],
        "metrics": first["metrics"],
    }


def race(name: str, plan: dict[str, Any], env: dict[str, str], pairs: int) -> dict[str, Any]:
    """A healthy run against the same with a suggestion applied."""
    from hotloop.measure import compare

    comparison = compare(
        lambda: 1 / one(name, "healthy", {}, {}, None)["samples_per_s"],
        lambda: 1 / one(name, "healthy", plan, env, None)["samples_per_s"],
        budget_s=RACE_S, min_pairs=pairs, max_pairs=2 * pairs,
    )  # fmt: skip
    return comparison.to_dict()


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
    parser.add_argument("--swap-file", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child")
    parser.add_argument("--variant", default="planted")
    parser.add_argument("--plan", default="{}")
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.variant, args.plan)
    sys.path.insert(0, str(HERE.parent))
    import planted_runs
    from about import about

    document: dict[str, Any] = {"planted": {}, "healthy": {}}
    if args.json and args.json.exists():
        document = json.loads(args.json.read_text())
    names = args.only or [*planted_runs.PLANTED, *planted_runs.HEALTHY]
    for name in names:
        if name in planted_runs.PLANTED:
            row = planted(name, args.rounds, args.swap_file)
            document["planted"][name] = row
            recovered = "-" if row["recovered"] is None else f"{row['recovered']:.0%}"
            print(
                f"{name:34} first: {row['first']} lost {row['lost_share']:.0%},"
                f" recovered {recovered} ({row['applied_as']})",
                flush=True,
            )
        else:
            row = healthy(name, args.pairs)
            if row is None:
                print(f"{name:34} not recorded: never undisturbed in {TRIES} runs", flush=True)
                continue
            document["healthy"][name] = row
            print(f"{name:34} suggests {row['suggestions']}, proven {row['proven']}", flush=True)
        document["what"] = "first suggestion, what was lost and what applying it recovers"
        document |= about()
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
