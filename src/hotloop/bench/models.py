"""The models of the inference race: those of the zoo and two larger ones, written here.

``resnet18`` has the shape of ResNet-18 (He et al. 2016, "Deep residual learning for image
recognition") at 64 by 64 pixels, so that a round of 64 images stays well below a second on two
cores; ``encoder`` has the shape of a six-layer sentence encoder (384 wide, 12 heads) on 32 tokens.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..train.zoo import build_model
from .shapes import ENCODER_HEADS, ENCODER_LAYERS, ENCODER_WIDTH, RESNET_WIDTHS, SAMPLE_SHAPES


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a skip connection, halving the image at most."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.skip = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.skip = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, channels_in, height, width] -> [batch, channels, height/stride, width/stride]."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet18(nn.Module):
    """The shape of ResNet-18: a 7x7 stem, four stages of two blocks, 1,000 scores; 11.7 million."""

    def __init__(self) -> None:
        super().__init__()
        width = RESNET_WIDTHS[0]
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks: list[nn.Module] = []
        for number, channels in enumerate(RESNET_WIDTHS):
            blocks += [
                ResidualBlock(width, channels, 1 if number == 0 else 2),
                ResidualBlock(channels, channels, 1),
            ]
            width = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] -> [batch, 1000]."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual and layer norm after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] -> the same shape."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = self.norm1(x + self.out(mixed.reshape(batch, tokens, width)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A transformer encoder of six layers on embedded tokens; mean of them, 10 scores; 10.7 M."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(EncoderLayer(ENCODER_WIDTH, ENCODER_HEADS) for _ in range(ENCODER_LAYERS))
        )
        self.head = nn.Linear(ENCODER_WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, 384] -> [batch, 10]."""
        return self.head(self.layers(x).mean(1))  # type: ignore[no-any-return]


def build_race_model(name: str) -> nn.Module:
    """A fresh model in evaluation mode for ``[batch, *SAMPLE_SHAPES[name]]``, from seed 0.

    The statistics of batch norm are those of random images, not 0 and 1, so that an engine that
    folds them wrongly is seen.

    Raises:
        KeyError: no model of that name.
    """
    shape = SAMPLE_SHAPES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = {"resnet18": ResNet18, "encoder": Encoder}.get(name, lambda: build_model(name))()
        if name == "resnet18":
            with torch.no_grad():
                for _ in range(3):
                    model.train()(torch.randn(16, *shape))
    return model.eval()
