"""Several machines under Ray; needs ``pip install 'ray[train]'``.

    python examples/hosts/ray_hosts.py --hosts 4 --cpus 32 --folder /shared/runs/a

Ray Train starts one process on each machine and joins them; hotloop takes the process group that it
finds. When a machine is lost Ray starts all again, and the run goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import ray.train.torch
import torch

import hotloop
from hotloop.train.zoo import build_model


def train(options: dict) -> None:
    """What runs on each machine."""
    torch.manual_seed(0)
    model = build_model("small")
    plan = hotloop.Plan().replace(
        {"parallel.num_workers": options["cpus"], "checkpoint.every_s": 60.0}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = hotloop.Trainer(model, torch.nn.functional.cross_entropy, optimizer, plan)
    report = trainer.fit(
        "mnist",
        batch_size=options["batch_size"],
        epochs=options["epochs"],
        checkpoint_dir=Path(options["folder"]) / "checkpoints",
        resume=True,
    )
    if ray.train.get_context().get_world_rank() == 0:
        print(f"{report.stopped} after {report.steps} steps, loss {report.train_loss:.4f}")
        print(*report.notes, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=1, help="of each host")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", default="runs/ray", help="seen by all hosts")
    options = parser.parse_args()

    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config=vars(options) | {"folder": str(Path(options.folder).absolute())},
        torch_config=ray.train.torch.TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=options.hosts,
            resources_per_worker={"CPU": options.cpus},
            placement_strategy="SPREAD",
        ),
        run_config=ray.train.RunConfig(failure_config=ray.train.FailureConfig(max_failures=3)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
