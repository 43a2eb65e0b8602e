"""A ``LightningModule`` as it is, on hotloop's step: the same losses as Lightning alone.

pip install 'hotloop[lightning]'
"""

import lightning.pytorch as pl
import torch
from torch import nn

from hotloop.integrations.lightning import HotloopStrategy


class Classifier(pl.LightningModule):
    """Two layers; it logs its loss."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, batch_idx):
        """The loss of one batch."""
        x, y = batch
        loss = nn.functional.cross_entropy(self.body(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Losses(pl.Callback):
    """Keeps what was logged."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        """One loss a batch."""
        self.losses.append(float(trainer.callback_metrics["loss"]))


def train(strategy):
    """Train for two epochs; the losses that were logged."""
    torch.manual_seed(0)
    x = torch.randn(64 * 20, 64)
    data = torch.utils.data.TensorDataset(x, x[:, :10].argmax(1))
    seen = Losses()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[seen],
    )  # fmt: skip
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=64))
    return seen.losses


def main() -> None:
    expected = train("auto")
    losses = train(HotloopStrategy())  # or by its name: strategy="hotloop"
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    print(f"{len(losses)} losses, the last {losses[-1]:.4f}; greatest difference {difference:.1e}")
    assert difference < 1e-4


if __name__ == "__main__":
    main()
