"""Training from a cold command: seconds to the first step, and samples trained after 10 and 20 s.

    python benchmarks/cold_start.py [--models small,big,cnn] [--rounds 1] [--seconds 20]

Each run is a process of its own with empty caches, from the start of the interpreter on; hotloop's
has no compiler on its path. All train on the same random digits in memory, in batches of 64, with
Adam: PyTorch as written, with its fused Adam, `torch.compile` of the model with that, and a loop of
`step(x, y)` by hotloop. Runs take turns. JAX and Lightning are not among the peers here: neither is
installed with this repository.
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

from hotloop.files import write_text_atomically

PEERS = ("hotloop", "pytorch", "pytorch-fused", "torch.compile")
MARKS_S = (10.0, 20.0)
BATCH = 64


def train(peer: str, model_name: str, seconds: float, began: float) -> None:
    """Runs in a process of its own; prints what it reached, as JSON."""
    import torch
    from torch.nn import functional as F

    from hotloop.train.zoo import build_model

    torch.manual_seed(0)
    x, y = torch.rand(6400, 1, 28, 28), torch.randint(0, 10, (6400,))
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    model = build_model(model_name).train()
    fused = True if peer in ("pytorch-fused", "torch.compile") else None
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    step: Any
    if peer == "hotloop":
        import hotloop

        step = hotloop.compile_step(model, F.cross_entropy, optimizer, example=batches[0])
    else:
        forward = torch.compile(model) if peer == "torch.compile" else model

        def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(a), b)
            loss.backward()
            optimizer.step()
            return loss

    reached: dict[str, Any] = {"steps_s": []}
    count = 0
    marks = [mark for mark in MARKS_S if mark <= seconds]
    while marks:
        step(*batches[count % len(batches)]).item()
        count += 1
        now = time.time() - began
        if count <= 4:
            reached["steps_s"].append(round(now, 2))
        while marks and now >= marks[0]:
            reached[f"samples_after_{marks.pop(0):g}_s"] = count * BATCH
    if peer == "hotloop":
        reached |= {"path": step.path, "reason": step.reason}
    print(json.dumps(reached))


def one(peer: str, model: str, seconds: float) -> dict[str, Any]:
    """One cold run."""
    with tempfile.TemporaryDirectory() as caches:
        env = os.environ | {"XDG_CACHE_HOME": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/t"}
        if peer == "hotloop":
            env["PATH"] = "/nonexistent"
        command = [sys.executable, __file__, "--peer", peer, "--models", model]
        command += ["--seconds", str(seconds), "--began", str(time.time())]
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="small,big,cnn")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.peer:
        train(args.peer, args.models, args.seconds, args.began)
        return
    document: dict[str, Any] = about()
    for model in args.models.split(","):
        runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
        for _ in range(args.rounds):
            for peer in PEERS:
                runs[peer].append(one(peer, model, args.seconds))
                print(model, peer, runs[peer][-1], flush=True)
        document[model] = {"runs": runs, "ratios": ratios(runs)}
        print(model, document[model]["ratios"], flush=True)
    if args.out is not None:
        write_text_atomically(args.out, json.dumps(document, indent=1) + "\n")


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """hotloop over the best of the others, medians."""
    found = {}
    for mark in (f"samples_after_{mark:g}_s" for mark in MARKS_S):
        if mark in runs["hotloop"][0]:
            middle = {p: statistics.median(r[mark] for r in made) for p, made in runs.items()}
            best = max(value for peer, value in middle.items() if peer != "hotloop")
            found[mark] = round(middle["hotloop"] / best, 2) if best else float("inf")
    return found


if __name__ == "__main__":
    main()
