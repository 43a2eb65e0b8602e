"""Small models of each kind that inference must take."""

import torch
from torch import nn


class Pair(nn.Module):
    """Two inputs, a tuple of results."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 8)
        self.b = nn.Linear(3, 8)

    def forward(self, left, right):
        both = torch.relu(self.a(left) + self.b(right))
        return both, both.argmax(-1)


class Named(nn.Module):
    """Token ids and a mask by name, a dict of results."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        x = x.mean(1)
        return {"scores": self.head(x), "pooled": x}


class Residual(nn.Module):
    """Convolutions, batch norm, dropout: eval mode matters."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 5))

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


class BoundToFour(nn.Module):
    """Takes any batch, but a graph of it is one for batches of four alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x):
        return self.linear(x) if x.shape[0] == 4 else self.linear(x) + 1


class DependsOnValues(nn.Module):
    """No graph at all: which layer runs depends on what comes in."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 2)
        self.two = nn.Linear(4, 2)

    def forward(self, x):
        return self.one(x) if float(x.sum()) > 0 else self.two(x)


def perceptron(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3))


def with_example():
    """A factory as `.safetensors` files need it."""
    return perceptron(), torch.randn(2, 12)


def without_example():
    return perceptron()
