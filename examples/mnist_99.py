"""A small network that learns MNIST to 99 % in two epochs:

hotloop train mnist --model mnist_99:net --batch-size 128 --epochs 2 --lr 0.01 --schedule onecycle
"""

from torch import nn


def net() -> nn.Module:
    """LeNet's shape; pooling before the ReLU gives the same and is a quarter of the work."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
