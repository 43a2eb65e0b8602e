"""Models beside the zoo's three: batch norm, attention, a recurrent net, an autoencoder."""

import torch
from torch import nn

from hotloop.train.zoo import MODELS, build_model


class ResidualNet(nn.Module):
    """Three 3x3 convolutions of 32 channels with batch norm and one skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(32, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.BatchNorm2d(32),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 28, 28] -> [batch, 10]."""
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.head(x.mean((2, 3)))


class RowTransformer(nn.Module):
    """Two encoder layers over the 28 rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(28, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 28, 28] -> [batch, 10]."""
        return self.head(self.encoder(self.embed(x.squeeze(1))).mean(1))


class RowRecurrent(nn.Module):
    """A GRU of 128 over the 28 rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.GRU(28, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 28, 28] -> [batch, 10]."""
        return self.head(self.rows(x.squeeze(1))[0][:, -1])


class Autoencoder(nn.Module):
    """784 - 256 - 32 - 256 - 784."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 32), nn.ReLU(),
            nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 784), nn.Unflatten(1, (1, 28, 28)),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 1, 28, 28] -> the same."""
        return self.layers(x)


ALL_MODELS = (*MODELS, "residual", "transformer")


def build(name: str) -> nn.Module:
    """A fresh model by name."""
    own = {
        "residual": ResidualNet, "transformer": RowTransformer,
        "gru": RowRecurrent, "autoencoder": Autoencoder,
    }  # fmt: skip
    return own[name]() if name in own else build_model(name)
