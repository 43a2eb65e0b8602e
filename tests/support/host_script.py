"""One host of the tests: trains, and leaves weights and report in a folder.

Arguments: folder, epochs, rule of shares, seconds to wait before each batch of host 1.
"""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

import hotloop

folder, epochs, shares, slow_s = (
    Path(sys.argv[1]),
    int(sys.argv[2]),
    sys.argv[3],
    float(sys.argv[4]),
)
rank = int(os.environ.get("RANK", "0"))
restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
pace_s = float(os.environ.get("PACE_S", "0")) if restarts == "0" else 0.0


class Net(nn.Module):
    """With dropout where the test asks for it."""

    def __init__(self) -> None:
        super().__init__()
        dropout = nn.Dropout(float(os.environ.get("DROPOUT", "0")))
        self.layers = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), dropout, nn.Linear(32, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class SlowLoss(nn.CrossEntropyLoss):
    """Of a host whose cores are slow; on the plain path, so that it really waits."""

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        time.sleep(slow_s * len(input) if rank == 1 else 0.0)
        return super().forward(input, target)


(folder / f"pid-{rank}-{restarts}").write_text(str(os.getpid()))
torch.manual_seed(rank)  # Host 0's weights count.
model = Net()
generator = torch.Generator().manual_seed(7)
x = torch.randn(520, 12, generator=generator)
y = (x[:, :3].argmax(1)).long()
settings = {
    "parallel.num_workers": 2,
    "parallel.chunk_size": 8,
    "parallel.host_shares": shares,
    "parallel.host_timeout_s": float(os.environ.get("TIMEOUT_S", "60")),
    "checkpoint.every_steps": 5,
}
if slow_s:
    settings["step.compile"] = "off"
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
trainer = hotloop.Trainer(
    model,
    SlowLoss() if slow_s else nn.CrossEntropyLoss(),
    optimizer,
    hotloop.Plan().replace(settings),
)


def paced(progress: object) -> None:
    time.sleep(pace_s)


report = trainer.fit(
    (x, y),
    batch_size=64,
    epochs=epochs,
    validation=(x[:100], y[:100]),
    checkpoint_dir=folder / "checkpoints",
    resume=True,
    on_progress=paced if pace_s else None,
)
torch.save(
    {"model": model.state_dict(), "loss": report.train_loss, "notes": report.notes,
     "path": report.path, "optimizer": optimizer.state_dict(), "steps": report.steps},
    folder / f"result-{rank}.pt",
)  # fmt: skip
