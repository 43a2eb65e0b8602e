"""Training runs killed with SIGKILL at random moments and resumed: do they end with the same bits?

    python benchmarks/kill_training.py [--kills 200] [--seed 0] [--workers 3]

Processes are forked from one that has imported everything and holds no thread, so that a kill costs
milliseconds. Each run is killed again and again, at a random moment of its life (steps,
evaluation, checkpoint writing, start of a resume), until it ends; then its final weights and
optimizer state are compared with an uninterrupted run, and the next run begins.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import hotloop

EPOCHS, BATCH, SAMPLES = 3, 16, 400


def train(folder: Path, *, resume: bool, workers: int | None) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 1, 8, 8, generator=generator)
    y = (x.sum((1, 2, 3)) > 0).long()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(288, 2),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 11, gamma=0.9)
    values = {"cpu.num_threads": 1, "checkpoint.every_steps": 4, "checkpoint.every_s": 0}
    values |= {"parallel.num_workers": workers, "parallel.chunk_size": 4}
    plan = hotloop.Plan().replace(values)
    trainer = hotloop.Trainer(
        model, nn.functional.cross_entropy, optimizer, plan,
        scheduler=scheduler, scheduler_interval="step",
    )  # fmt: skip
    trainer.fit(
        (x, y), batch_size=BATCH, epochs=EPOCHS, validation=(x[:50], y[:50]),
        checkpoint_dir=folder, resume=resume,
    )  # fmt: skip


def child(folder: Path, resume: bool, workers: int | None) -> int:
    """Fork a process that trains; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        train(folder, resume=resume, workers=workers)
        code = 0
    except BaseException as error:
        print(f"child failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def final(folder: Path) -> dict[str, bytes]:
    """Files of the last checkpoint that hold tensors."""
    newest = sorted(folder.glob("step-*"))[-1]
    return {p.name: p.read_bytes() for p in sorted(newest.glob("*.safetensors"))}


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="each start has 1 to so many (default: none)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chance = random.Random(args.seed)

    def workers() -> int | None:
        return None if args.workers is None else chance.randint(1, args.workers)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        torch.set_num_threads(1)  # a forked child has no thread pool: none may exist here
        train(
            root / "warm", resume=False, workers=workers()
        )  # imports and builds what children would each do again
        started = time.monotonic()
        if wait(child(root / "whole", False, workers())):
            return 1
        life_s = time.monotonic() - started
        expected = final(root / "whole")
        kills = runs = resumed_from_nothing = 0
        while kills < args.kills:
            folder = root / f"run-{runs}"
            while True:
                started_one = any(folder.glob("step-*")) if folder.exists() else False
                pid = child(folder, folder.exists(), workers())
                time.sleep(chance.uniform(0.0, life_s * 0.8))
                os.kill(pid, signal.SIGKILL)
                code = wait(pid)
                if code == -signal.SIGKILL:
                    kills += 1
                    resumed_from_nothing += not started_one
                    if started_one and not any(folder.glob("step-*")):
                        print(f"run {runs}: a checkpoint was lost")
                        return 1
                elif code == 0:
                    break
                else:
                    print(f"run {runs}: a resume failed with exit code {code}")
                    return 1
                if kills >= args.kills:
                    if wait(child(folder, folder.exists(), workers())):
                        return 1
                    break
            runs += 1
            if final(folder) != expected:
                print(f"run {runs - 1}: the final state differs")
                return 1
            shutil.rmtree(folder)
    print(
        f"{kills} kills over {runs} runs of {life_s:.2f} s: every final state bit-identical, "
        f"no checkpoint lost ({resumed_from_nothing} kills before the first checkpoint)"
    )
    if args.out:
        document = {
            "kills": kills, "runs": runs, "run_s": round(life_s, 3), "workers": args.workers,
            "kills_before_the_first_checkpoint": resumed_from_nothing,
            "runs_with_other_bits": 0, "checkpoints_lost": 0,
            "torch": str(torch.__version__),
        }  # fmt: skip
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
