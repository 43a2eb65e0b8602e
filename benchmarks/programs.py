"""The programs of the tests, by `compile_step` and as written in PyTorch, in turn.

    python benchmarks/programs.py [--only GPT] [--rounds 7] [--out benchmarks/results/programs.json]

Those of `tests/step/test_programs.py` (a model, a loss, batches) and `tests/step/test_function.py`
(whole functions); about five minutes. Each has a process of its own, with empty caches.

`first_minute`: plain steps over hotloop's, in the same time. `import hotloop` and the first
`COLD_S` seconds are measured step by step, hotloop's recording and building among them; the rest of
the minute is reckoned with the median of the turns. `turns`: plain's seconds of a step over
hotloop's, in turn, warm: median, min, max, n.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
COLD_S, LEAST_STEPS, SLICE_S, MINUTE_S = 1.5, 40, 0.15, 60.0
Step = Callable[[], Any]


def models_and_losses() -> dict[str, Callable[[], tuple[Step, Step, Any]]]:
    """Of each program of a model and a loss what makes hotloop's step, plain's, and the former."""
    import hotloop
    from step.test_programs import PROGRAMS, STEPS, adamw
    from support.beside_loop import plain_step

    def make(name: str) -> tuple[Step, Step, Any]:
        build, loss_fn, make_batch, _ = PROGRAMS[name]
        torch.manual_seed(0)
        parts = torch.nn.ModuleList([build()])
        if isinstance(loss_fn, torch.nn.Module):
            parts.append(loss_fn)
        g = torch.Generator().manual_seed(1)
        data = [make_batch(number, g) for number in range(STEPS)]
        twins = copy.deepcopy(parts)
        twin_loss = twins[1] if len(twins) > 1 else loss_fn
        optimizer, plain = adamw(list(parts.parameters())), adamw(list(twins.parameters()))
        step = hotloop.compile_step(parts[0], loss_fn, optimizer, data[0])
        ours, theirs = itertools.cycle(data), itertools.cycle(data)
        return (
            lambda: step(*next(ours)).item(),
            lambda: plain_step(twins[0], twin_loss, plain, *next(theirs)),
            step,
        )

    return {name: lambda name=name: make(name) for name in PROGRAMS}  # type: ignore[misc]


def functions() -> dict[str, Callable[[], tuple[Step, Step, Any]]]:
    """The same of whole functions."""
    import hotloop
    from support.train_functions import PROGRAMS, batch

    def make(name: str) -> tuple[Step, Step, Any]:
        torch.manual_seed(0)
        program, twin = PROGRAMS[name](), PROGRAMS[name]()
        data = [batch(number) for number in range(30)]
        step = hotloop.compile_step(program.function)
        ours, theirs = itertools.cycle(data), itertools.cycle(data)
        return lambda: step(*next(ours)), lambda: twin.function(*next(theirs)), step

    return {name: lambda name=name: make(name) for name in PROGRAMS}  # type: ignore[misc]


def cold(step: Step, began_s: float) -> Iterator[float]:
    """Seconds after ``began_s`` at which each of the first steps was done."""
    for number in itertools.count(1):
        step()
        done_s = time.perf_counter() - began_s
        yield done_s
        if number >= LEAST_STEPS and done_s > COLD_S:
            return


def in_first_minute(ends: list[float], warm_s: float) -> float:
    """Steps done after a minute."""
    return len(ends) + max(0.0, MINUTE_S - ends[-1]) / warm_s


def child(kind: str, name: str, rounds: int) -> None:
    """Prints the row of one program."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    warm = torch.nn.Linear(8, 8)  # What torch itself does but once is nobody's.
    torch.optim.AdamW(warm.parameters()).step(lambda: warm(torch.ones(4, 8)).sum().backward())
    began_s = time.perf_counter()
    import hotloop

    assert callable(hotloop.compile_step)  # It is imported when it is asked for.
    imported_s = time.perf_counter() - began_s
    sys.path.insert(0, str(ROOT / "tests"))
    make = {"models": models_and_losses, "functions": functions}[kind]()[name]
    from hotloop.measure import Turns, there_and_back

    fast, plain, step = make()
    ends = list(cold(fast, time.perf_counter() - imported_s))
    plain_ends = list(cold(plain, time.perf_counter()))
    seconds: dict[str, list[float]] = {"hotloop": [], "pytorch": []}
    for played in Turns(
        {"hotloop": fast, "pytorch": plain}, rounds=rounds, order=there_and_back,
        warm_calls=1, span_s=SLICE_S, least_readings=2,
    ):  # fmt: skip
        for way, turn in played.items():
            seconds[way].append(statistics.mean(turn.seconds))
    gains = [b / a for a, b in zip(*seconds.values(), strict=True)]
    middle = {way: statistics.median(found) for way, found in seconds.items()}
    minute = {
        "hotloop": in_first_minute(ends, middle["hotloop"]),
        "pytorch": in_first_minute(plain_ends, middle["pytorch"]),
    }
    print(
        json.dumps(
            {
                "path": step.path, "reason": step.reason,
                "turns": {
                    "median": statistics.median(gains), "min": min(gains), "max": max(gains),
                    "n": rounds,
                },
                "step_s": middle,
                "first_minute": minute["hotloop"] / minute["pytorch"],
                "cold": {
                    "imported_s": imported_s,
                    "third_step_s": {"hotloop": ends[2], "pytorch": plain_ends[2]},
                    "ahead_after_s": ahead_after(ends, middle["hotloop"], plain_ends, middle),
                },
                "load_average": os.getloadavg()[0],
            }
        )
    )  # fmt: skip


def ahead_after(
    ends: list[float], warm_s: float, plain_ends: list[float], middle: dict[str, float]
) -> float | None:
    """Seconds after which hotloop has made as many steps as plain; ``None``: it never has."""
    if warm_s >= middle["pytorch"]:
        return None
    for number in itertools.count(1):
        ours, theirs = (
            found[number - 1] if number <= len(found) else found[-1] + (number - len(found)) * each
            for found, each in ((ends, warm_s), (plain_ends, middle["pytorch"]))
        )
        if ours <= theirs:
            return ours
        if theirs > 10 * MINUTE_S:
            return None
    return None


def one(kind: str, name: str, rounds: int) -> dict[str, Any]:
    """A program in a process of its own."""
    with tempfile.TemporaryDirectory() as caches:
        done = subprocess.run(
            [sys.executable, __file__, "--child", kind, "--only", name, "--rounds", str(rounds)],
            env=os.environ | {"XDG_CACHE_HOME": caches},
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", choices=("models", "functions"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.only, args.rounds)
        return
    from about import about

    from hotloop.files import write_text_atomically

    sys.path.insert(0, str(ROOT / "tests"))
    kinds = {"models": list(models_and_losses()), "functions": list(functions())}
    document: dict[str, Any] = about() | {"cold_s": COLD_S, "programs": {}}
    rows = document["programs"]
    for kind, names in kinds.items():
        for name in names:
            if args.only not in name:
                continue
            row = rows[name] = {"kind": kind, **one(kind, name, args.rounds)}
            gain, cold_row = row["turns"], row["cold"]
            print(
                f"{name:<32}{row['path']:<9} {gain['median']:.2f} ({gain['min']:.2f}-"
                f"{gain['max']:.2f}), first minute {row['first_minute']:.2f}, third step after "
                f"{cold_row['third_step_s']['hotloop']:.2f} s, plain "
                f"{cold_row['third_step_s']['pytorch']:.2f}",
                flush=True,
            )
    document["median_gain"] = statistics.median(row["turns"]["median"] for row in rows.values())
    document["least_first_minute"] = min(row["first_minute"] for row in rows.values())
    print(f"median gain {document['median_gain']:.2f}, least in the first minute "
          f"{document['least_first_minute']:.2f}")  # fmt: skip
    if args.out is not None:
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
