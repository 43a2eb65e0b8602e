"""Training from a cold command: seconds to the first step, and samples trained after 10 and 20 s.

    python benchmarks/cold_start.py [--models small,big,cnn] [--rounds 1] [--seconds 20]

Each run is a process of its own with empty caches, from the start of the interpreter on; hotloop's
has no compiler on its path. All train on the same random digits in memory, in batches of 64, with
Adam: PyTorch as written, with its fused Adam, `torch.compile` of the model with that, JAX's jitted
step, Lightning, and a loop of `step(x, y)` by hotloop. Runs take turns. JAX and Lightning take part
where they are installed (`pip install "hotloop[peers]"`).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from about import about

from hotloop.files import write_text_atomically

PEERS = ["hotloop", "pytorch", "pytorch-fused", "torch.compile"]
PEERS += [name for name in ("jax", "lightning") if importlib.util.find_spec(name)]
MARKS_S = (10.0, 20.0)
BATCH = 64


class Progress:
    """Counts steps, and notes when the first ones and the marks were reached."""

    def __init__(self, began: float, seconds: float) -> None:
        self.began, self.count = began, 0
        self.reached: dict[str, Any] = {"steps_s": []}
        self.marks = [mark for mark in MARKS_S if mark <= seconds]

    def step_done(self) -> bool:
        """Count one; whether there are marks left."""
        self.count += 1
        now = time.time() - self.began
        if self.count <= 4:
            self.reached["steps_s"].append(round(now, 2))
        while self.marks and now >= self.marks[0]:
            self.reached[f"samples_after_{self.marks.pop(0):g}_s"] = self.count * BATCH
        return bool(self.marks)


def draw() -> tuple[Any, Any]:
    """The data of all: 100 batches."""
    import torch

    torch.manual_seed(0)
    return torch.rand(6400, 1, 28, 28), torch.randint(0, 10, (6400,))


def train(peer: str, model_name: str, progress: Progress) -> None:
    """A loop of steps, by PyTorch or hotloop."""
    import torch
    from torch.nn import functional as F

    from hotloop.train.zoo import build_model

    x, y = draw()
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

    step(*batches[0]).item()
    while progress.step_done():
        step(*batches[progress.count % len(batches)]).item()
    if peer == "hotloop":
        progress.reached |= {"path": step.path, "reason": step.reason}


def train_by_jax(model_name: str, progress: Progress) -> None:
    """A loop of JAX's jitted step on the same data."""
    import torch

    from hotloop.bench.peers import jax_jit
    from hotloop.train.zoo import build_model

    x, y = draw()
    epoch = jax_jit(build_model(model_name), model_name, x.numpy(), y.numpy(), BATCH, 2)
    orders = torch.arange(len(x)).view(-1, BATCH).numpy()
    epoch(orders[0])
    while progress.step_done():
        epoch(orders[progress.count % len(orders)])


def train_by_lightning(model_name: str, progress: Progress) -> None:
    """Lightning's Trainer with logging, checkpoints and the progress bar off."""
    import lightning  # type: ignore[import-not-found, unused-ignore]
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    from hotloop.train.zoo import build_model

    class Module(lightning.LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model(model_name)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return F.cross_entropy(self.inner(batch[0]), batch[1])

        def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
            outputs["loss"].item()
            self.trainer.should_stop = not progress.step_done()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    trainer = lightning.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(*draw()), batch_size=BATCH))


def run(peer: str, model_name: str, progress: Progress) -> None:
    """Runs in a process of its own; prints what it reached, as JSON."""
    others: dict[str, Callable[[str, Progress], None]] = {
        "jax": train_by_jax,
        "lightning": train_by_lightning,
    }
    if peer in others:
        others[peer](model_name, progress)
    else:
        train(peer, model_name, progress)
    print(json.dumps(progress.reached))


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
        run(args.peer, args.models, Progress(args.began, args.seconds))
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
