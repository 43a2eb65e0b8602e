"""The models of the benchmarks, for images of 28 by 28 and ten classes."""

from __future__ import annotations

import itertools

from torch import nn

MODELS = ("small", "big", "cnn", "large")


def build_model(name: str) -> nn.Module:
    """A fresh model for ``[batch, 1, 28, 28]`` float32 images, giving ``[batch, 10]`` scores.

    ``small``: 784-256-128-10, 235,146 parameters. ``big``: 784-3072-3072-10, 12 million.
    ``cnn``: two 3x3 convolutions of 32 and 64 channels, max pooling, 9216-128-10, 1.2 million.
    ``large``: 784-6656-6656-10, 50 million, 200 MB.

    Raises:
        KeyError: no model of that name.
    """
    return {"small": _small, "big": _big, "cnn": _cnn, "large": _large}[name]()


def _small() -> nn.Module:
    return _perceptron(784, 256, 128, 10)


def _big() -> nn.Module:
    return _perceptron(784, 3072, 3072, 10)


def _large() -> nn.Module:
    return _perceptron(784, 6656, 6656, 10)


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9216, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _perceptron(*widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
