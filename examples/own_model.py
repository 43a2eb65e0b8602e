"""Train a model of one's own on arrays, with the memory known first."""

import sys

import torch
from torch import nn

import hotloop


def main(checkpoint_dir: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 16, generator=generator)
    y = (x[:, :4].sum(1) > 0).long()

    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_fn = nn.functional.cross_entropy

    budget = hotloop.Budget.predict(
        model, (x[:1], y[:1]), batch_size=50, loss_fn=loss_fn, optimizer=optimizer
    )
    for component, size in budget.table():
        print(f"{component:18} {size or 0:>12,} bytes")

    trainer = hotloop.Trainer(model, loss_fn, optimizer)
    report = trainer.fit(
        (x[:1600], y[:1600]),
        batch_size=50,
        epochs=5,
        validation=(x[1600:], y[1600:]),
        checkpoint_dir=checkpoint_dir,
    )
    print(f"accuracy {report.validation_accuracy:.1%}, peak {report.peak_resident_bytes:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "run/checkpoints")
