"""Predicted against measured peak memory: seven models, batch 16 to 512, each in a fresh process.

Each run trains 12 steps and evaluates after every epoch; kernels that this machine has not timed
yet are timed in it.

python benchmarks/memory_budget.py [--json FILE] [--models cnn,...] [--batches 16,64,...]
    [--compile always]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

BATCHES = (16, 64, 128, 256, 512)


def measure(model_name: str, batch_size: int, arena: str, compiles: str) -> dict[str, object]:
    import torch
    from models import build

    from hotloop import Plan, Trainer
    from hotloop.data import load_mnist

    torch.manual_seed(0)
    model = build(model_name)
    optimizer = torch.optim.Adam(model.parameters())
    plan = Plan.auto().replace({"memory.tensor_arena": arena, "step.compile": compiles})
    data: object = load_mnist("train", prefer="shipped", num_samples=max(2048, 4 * batch_size))
    test: object = load_mnist("test", prefer="shipped", num_samples=1000)
    loss = torch.nn.functional.cross_entropy
    if model_name == "autoencoder":
        loss = torch.nn.functional.mse_loss
        images = torch.rand(max(2048, 4 * batch_size), 1, 28, 28)
        data, test = (images, images), (images[:1000], images[:1000])
    trainer = Trainer(model, loss, optimizer, plan)
    report = trainer.fit(data, batch_size=batch_size, validation=test, max_steps=12)
    return {
        "model": model_name,
        "batch_size": batch_size,
        "predicted_bytes": report.budget.total_bytes,
        "measured_bytes": report.peak_resident_bytes,
        "error": report.prediction_error,
        "budget": report.budget.to_dict(),
        "arena": report.arena,
        "path": report.path,
        "machine": report.machine,
        "versions": report.versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default="small,big,cnn,residual,transformer,gru,autoencoder")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--arena", default="try")
    parser.add_argument("--compile", default="auto", choices=("auto", "always", "off"))
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], int(args.child[1]), args.arena, args.compile)))
        return 0
    rows = []
    print(f"{'model':12} {'batch':>5} {'predicted':>10} {'measured':>10} {'error':>7}")
    for model in args.models.split(","):
        for batch in args.batches.split(","):
            command = [sys.executable, __file__, "--arena", args.arena, "--compile", args.compile]
            command += ["--child", model, batch]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout)
            rows.append(row)
            predicted, measured = row["predicted_bytes"] / 2**20, row["measured_bytes"] / 2**20
            print(
                f"{model:12} {batch:>5} {predicted:8.0f}Mi {measured:8.0f}Mi {row['error']:+7.1%}",
                flush=True,
            )
    worst = max(abs(row["error"]) for row in rows)
    print(f"largest error: {worst:.1%}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
