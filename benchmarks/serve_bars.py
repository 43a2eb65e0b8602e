"""The server's bars: saturation, latency at half load, ten times its capacity, idle, start, abuse.

    python benchmarks/serve_bars.py [--only saturation,half,overload,idle,start,abuse]
        [--models small,cnn,resnet18,encoder] [--seconds 4] [--overload-s 120] [--json FILE]

Models are exported by `compile_inference` for throughput and served by `hotloop serve` in a fresh
process on the same CPUs as the load generator, whose share of a CPU is told: on a machine of two
CPUs what it takes is missing to the server. Resident memory is the server's process, from /proc.
Exit code 1 when a bar is missed. Bars run one by one with `--only` gather in the same FILE.

saturation  most samples/s answered, over what the engine does alone in a fresh process; bar 0.85
half        p99 from the time a request fell due, at half of the capacity, small, 1 row; bar 5 ms
overload    ten times the capacity: every request answered, those with 200 within their deadline
            (from sending until the client's kernel has the answer; what the generator's own
            lateness adds is told too), resident memory after the first tenth flat within 5 %
idle        10,000 connections that say nothing, and requests beside them
start       from the start of the process to the first 200, and resident memory, cnn; 1 s, 150 MB
abuse       see serve_abuse.py
"""

import argparse
import http.client
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from serve_abuse import run_cases
from serving import ResidentWatch, Served, alone, export

from hotloop.bench.load import LoadReport, capacity_per_s, generate, ramp
from hotloop.bench.requests import Target, target_of
from hotloop.bench.turns import about
from hotloop.machine import Machine

# Samples a request: one, and as many as make HTTP cheap beside the model.
ROWS = {"small": (1, 64), "cnn": (1, 64), "resnet18": (1, 8), "encoder": (1, 8)}
DEADLINE_S = 1.0
MB = 1_000_000


def _load(target: Target, rate: float, seconds: float, **values: object) -> LoadReport:
    return generate(
        target.host, target.port, target.requests, rate_per_s=rate, duration_s=seconds,
        samples_per_request=target.rows, **values,
    )  # fmt: skip


def find_capacity(target: Target, first: float, seconds: float) -> tuple[float, list[LoadReport]]:
    """Requests a second of the step that answered most; the steps."""
    steps = ramp(lambda rate: _load(target, rate, seconds), first_per_s=first, factor=1.2)
    return capacity_per_s(steps), steps


def saturation(paths: dict[str, Path], seconds: float) -> list[dict]:
    rows = []
    for name, path in paths.items():
        for per_request in ROWS[name]:
            before = alone(path)
            own = max(before["samples_per_s"].values())
            with Served(path) as served:
                target = target_of(served.address, rows=per_request)
                # A client pays tens of microseconds a request: begin below what HTTP can do.
                first = min(own / per_request, 5_000) * 0.4
                _load(target, first, seconds)  # The server learns what batches cost.
                capacity, steps = find_capacity(target, first, seconds)
                resident = served.resident_bytes
            after = alone(path)
            # The machine may have been slower at one of the two looks: the faster is the bar.
            own = max(own, *after["samples_per_s"].values())
            best = max(steps, key=lambda step: step.answered_per_s)
            rows.append(
                {
                    "model": name, "rows_per_request": per_request,
                    "engine_alone_samples_per_s": own, "engine_alone": [before, after],
                    "capacity_per_s": capacity, "samples_per_s": capacity * per_request,
                    "share": capacity * per_request / own,
                    "generator_cpu_share": best.generator_cpu_share,
                    "resident_bytes": resident, "steps": [s.to_dict() for s in steps],
                    "holds": capacity * per_request >= 0.85 * own,
                }
            )  # fmt: skip
            print(
                f"saturation  {name} x {per_request}: {capacity * per_request:,.0f} samples/s, "
                f"{rows[-1]['share']:.0%} of {own:,.0f}; generator "
                f"{best.generator_cpu_share:.0%} of a CPU"
            )
    return rows


def half(path: Path, seconds: float) -> dict:
    with Served(path) as served:
        target = target_of(served.address, rows=1)
        _load(target, 1000, seconds)
        capacity, _ = find_capacity(target, 1000, seconds)
        report = _load(target, capacity / 2, 5 * seconds)
    p99_s = report.latency.quantile_s(0.99)
    print(f"half load   small at {capacity / 2:,.0f}/s: p99 {p99_s * 1e3:.2f} ms")
    return {"capacity_per_s": capacity, "p99_s": p99_s, "report": report.to_dict(),
            "chart": report.latency.chart(),
            "holds": p99_s < 0.005 and set(report.outcomes) == {"200"}}  # fmt: skip


def overload(name: str, path: Path, seconds: float, overload_s: float) -> dict:
    deadline = {"X-Request-Timeout-Ms": str(int(DEADLINE_S * 1e3))}
    with Served(path) as served:
        target = target_of(served.address, rows=1, headers=deadline)
        own = max(alone(path, 0.5)["samples_per_s"].values())
        capacity, _ = find_capacity(target, 0.4 * own, seconds)
        with ResidentWatch(served) as watch:
            report = _load(
                target, 10 * capacity, overload_s, max_connections=8_000, timeout_s=20.0,
                stamped=True,
            )  # fmt: skip
        counted = served.metrics()
        found = watch.flatness(after_s=overload_s / 10)
        after = _load(target, capacity / 2, seconds)
    dropped = {
        outcome: count for outcome, count in report.outcomes.items() if not outcome.isdigit()
    }
    # From sending until the kernel had the answer: what waits in a generator that is short of CPU,
    # to be sent or to be read, does not wait for the server.
    late = report.came.above(DEADLINE_S)
    print(
        f"overload    {name} at {10 * capacity:,.0f}/s for {overload_s:g} s: {report.outcomes}, "
        f"slowest 200 {report.came.max_s * 1e3:.0f} ms from sending to its arrival, "
        f"{report.service.max_s * 1e3:.0f} ms to its being read, "
        f"{report.latency.max_s * 1e3:.0f} ms from due to being read; "
        f"resident {found['min_bytes'] / MB:.0f} to "
        f"{found['max_bytes'] / MB:.0f} MB ({found['spread']:.1%}); after it "
        f"{after.outcomes}"
    )
    return {
        "model": name, "capacity_per_s": capacity, "deadline_s": DEADLINE_S,
        "report": report.to_dict(), "not_answered": dropped, "answered_late": late,
        "read_late": report.service.above(DEADLINE_S),
        "late_from_due": report.latency.above(DEADLINE_S), "server_counted": counted,
        "resident": found, "after": after.to_dict(),
        "holds": not dropped and late == 0 and found["spread"] <= 0.05
        and set(after.outcomes) == {"200"},
    }  # fmt: skip


def idle(path: Path, count: int, seconds: float) -> dict:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, count + 2_000), hard))
    try:
        with Served(path) as served:
            target = target_of(served.address)
            _load(target, 200, 1)
            before = served.resident_bytes
            started = time.perf_counter()
            connections = [served.connect() for _ in range(count)]
            opened_s = time.perf_counter() - started
            during = served.resident_bytes
            report = _load(target, 200, seconds)
            for connection in connections:
                connection.close()
            time.sleep(1)
            report_after = _load(target, 200, seconds)
            after = served.resident_bytes
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    p99_s = report.latency.quantile_s(0.99) or float("inf")
    print(
        f"idle        {count:,} connections in {opened_s:.1f} s: {report.outcomes}, p99 "
        f"{p99_s * 1e3:.1f} ms; resident {before / MB:.0f} -> {during / MB:.0f} -> "
        f"{after / MB:.0f} MB, {(during - before) / count:,.0f} bytes each"
    )
    return {"connections": count, "opened_s": opened_s, "resident_before_bytes": before,
            "resident_during_bytes": during, "resident_after_bytes": after,
            "report": report.to_dict(), "report_after": report_after.to_dict(),
            "holds": set(report.outcomes) == {"200"} == set(report_after.outcomes)
            and during - before < 64 * 2**20}  # fmt: skip


def start(path: Path, times: int = 5) -> dict:
    seconds, resident, peaks = [], [], []
    for _ in range(times):
        started = time.perf_counter()
        with Served(path) as served:
            ready_s = time.perf_counter() - started
            # What a request holds is made outside the clock; the model's name is in what it told.
            model = {"X-Nothing": "1"}
            target = target_of(f"{served.address}/v2/models/{served.told['name']}", headers=model)
            again = time.perf_counter()
            connection = http.client.HTTPConnection(served.host, served.port)
            head, _, body = target.requests[0].partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in lines[1:])
            connection.request("POST", lines[0].split()[1], body, headers)
            status = connection.getresponse().status
            seconds.append(ready_s + time.perf_counter() - again)
            connection.close()
            if status != 200:
                raise RuntimeError(f"the first answer must be 200; got {status}")
            _load(target, 200, 2)
            resident.append(served.resident_bytes)
            peaks.append(served.peak_bytes)
    print(
        f"start       cnn: first answer after {statistics.median(seconds):.2f} s "
        f"({min(seconds):.2f} to {max(seconds):.2f}); resident {max(resident) / MB:.0f} MB"
    )
    return {"first_answer_s": seconds, "resident_bytes": resident, "peak_bytes": peaks,
            "holds": statistics.median(seconds) < 1 and max(resident) <= 150 * MB}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="saturation,half,overload,idle,start,abuse")
    parser.add_argument("--models", default="small,cnn,resnet18,encoder", help="of saturation")
    parser.add_argument("--overload-model", default="resnet18")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each step of load")
    parser.add_argument("--overload-s", type=float, default=120.0)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--exports", type=Path, help="keep exported models here, or take them")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    only = args.only.split(",")
    libraries = ("torch", "onnxruntime", "openvino", "httptools", "uvloop", "numpy")
    document: dict = {"about": about(Machine.probe(), libraries)}
    with tempfile.TemporaryDirectory(prefix="hotloop-serve-") as temporary:
        folder = args.exports or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "saturation" in only:
            paths = {name: export(name, folder) for name in args.models.split(",")}
            document["saturation"] = saturation(paths, args.seconds)
        if "half" in only:
            document["half"] = half(export("small", folder), args.seconds)
        if "overload" in only:
            name = args.overload_model
            document["overload"] = overload(
                name, export(name, folder), args.seconds, args.overload_s
            )
        if "idle" in only:
            document["idle"] = idle(export("small", folder), args.connections, args.seconds)
        if "start" in only:
            document["start"] = start(export("cnn", folder))
        if "abuse" in only:
            document["abuse"] = run_cases(export("small", folder))
    if args.json:
        # Bars measured one by one gather in one file.
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps({**before, **document}, indent=1) + "\n")
    held = [
        entry["holds"]
        for name in only
        for entry in (document[name] if isinstance(document[name], list) else [document[name]])
    ]
    print(f"{sum(held)} of {len(held)} bars and cases hold")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
