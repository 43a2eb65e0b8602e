"""Models for drawn programs: each keeps or does something beside its tensors."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, CLASSES = 12, 4


@dataclass
class Answer:
    scores: torch.Tensor
    extra: float


class Body(nn.Module):
    """A perceptron; what its kinds do beside that is in ``middle``."""

    temperature = 1.0

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, 10), self.make_norm()
        self.head = nn.Linear(10, CLASSES)
        self.drop = nn.Dropout(0.1)
        self.scale = 1.0
        self.config = {"form": "tensor", "power": 1}

    def make_norm(self):
        return nn.Identity()

    def middle(self, h):
        return torch.tanh(h)

    def forward(self, x):
        h = self.middle(self.norm(self.first(x)))
        scores = self.head(self.drop(h)) * self.scale / self.temperature
        form = self.config["form"]
        if form == "dict":
            return {"scores": scores, "hidden": h}
        if form == "tuple":
            return scores, [h, None]
        return Answer(scores, 0.5) if form == "dataclass" else scores


class Norms(Body):
    def make_norm(self):
        return nn.BatchNorm1d(10)


class FrozenNorm(Norms):
    """Statistics that stay, whatever ``train()`` says."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class LayerDrop(Body):
    def middle(self, h):
        return torch.tanh(h) if random.random() < 0.7 else h


class Mixes(Body):
    def middle(self, h):
        share = float(numpy.random.beta(2.0, 2.0))
        return torch.tanh(share * h + (1 - share) * h.flip(0))


class Cached(Body):
    """A table that the first call makes, under whatever mode there is."""

    def __init__(self):
        super().__init__()
        self.table = None

    def middle(self, h):
        if self.table is None or self.table.shape[0] != h.shape[0]:
            self.table = torch.linspace(0.5, 1.5, h.shape[0]).unsqueeze(1)
        return torch.tanh(h) * self.table


class Counts(Body):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def middle(self, h):
        self.calls += self.training
        return torch.tanh(h) * (1.0 if self.calls < 12 else 0.5)


class CountsInBuffer(Body):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def middle(self, h):
        if self.training:
            self.calls += 1
        return torch.tanh(h) / (1.0 + 0.1 * self.calls)


class Averages(Body):
    """A running mean that is a new tensor in each call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(10))

    def middle(self, h):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return torch.tanh(h - self.mean)


class Table(Body):
    """An embedding whose rows are held to a norm, in place."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(7, 10, max_norm=0.5)

    def middle(self, h):
        return torch.tanh(h) + self.rows(h.detach().mul(3).long().remainder(7)[:, 0])


class SparseTable(Table):
    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(7, 10, sparse=True)


class Graph(Body):
    def __init__(self):
        super().__init__()
        self.register_buffer("links", torch.eye(10).roll(1, 0).to_sparse())

    def middle(self, h):
        return torch.tanh(torch.sparse.mm(self.links, h.t()).t() + h)


class Rotates(Body):
    def __init__(self):
        super().__init__()
        turn = torch.polar(torch.ones(5), torch.linspace(0, 3, 5))
        self.register_buffer("turn", turn, persistent=False)

    def middle(self, h):
        turned = torch.view_as_complex(h.reshape(len(h), 5, 2)) * self.turn
        return torch.tanh(torch.view_as_real(turned).flatten(1))


class Checkpointed(Body):
    def middle(self, h):
        return checkpoint(torch.tanh, h, use_reentrant=False)


class Parametrized(Body):
    def __init__(self):
        super().__init__()
        self.head = nn.utils.parametrizations.weight_norm(self.head)


class Spectral(Body):
    def __init__(self):
        super().__init__()
        self.head = nn.utils.parametrizations.spectral_norm(self.head)


class Empty(Body):
    """A parameter without elements, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.ones(3))

    def middle(self, h):
        return torch.tanh(h) + self.nothing.sum()


class Steps(Body):
    """A recurrent net, read as a sequence of three."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRU(4, 10, batch_first=True)

    def forward(self, x):
        states, _ = self.cell(x.view(x.size(0), 3, 4))
        return self.head(self.drop(states[:, -1])) * self.scale / self.temperature


class Patches(Body):
    """Convolutions, and patches taken by their strides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Linear(4 * 4, 10)

    def forward(self, x):
        maps = torch.tanh(self.conv(x.view(-1, 1, 3, 4)))
        patches = maps.contiguous().as_strided((len(x), 4, 2, 2), (48, 12, 4, 1))
        h = self.middle(self.norm(self.first(patches.flatten(1))))
        return self.head(self.drop(h)) * self.scale / self.temperature


class Takes(Body):
    """The next value of an iterator."""

    def __init__(self):
        super().__init__()
        self.shares = itertools.cycle([1.0] * 9 + [0.5])

    def middle(self, h):
        return torch.tanh(h) * next(self.shares)


class Outside(Body):
    def __init__(self):
        super().__init__()
        self.own = threading.local()
        self.own.gain = 1.0
        self.first.weight.gain = 1.0

    def middle(self, h):
        return torch.tanh(h) * self.own.gain * self.first.weight.gain


class Reads(Body):
    """A branch that depends on a value of the batch."""

    def middle(self, h):
        return torch.tanh(h) if h.mean().item() > 0 else torch.tanh(h) * 0.9


class Writes(Body):
    """In-place operations on temporaries, and on a copy of the batch."""

    def forward(self, x):
        x = x.clone().mul_(0.5)
        x[:, 0] = 1.0
        x -= x.mean(0)
        return super().forward(x)


class Noise(Body):
    def middle(self, h):
        h = F.dropout(torch.tanh(h), 0.1)  # Whatever the mode.
        return h + 0.01 * torch.randn_like(h) * torch.rand(1)


class Shuffles(Body):
    def middle(self, h):
        return torch.tanh(0.8 * h + 0.2 * h[torch.randperm(len(h))])


class OwnGenerator(Body):
    def __init__(self):
        super().__init__()
        self.draw = torch.Generator().manual_seed(3)

    def middle(self, h):
        return torch.tanh(h + 0.01 * torch.randn(h.shape, generator=self.draw))


class Extra(Body):
    """State that is no tensor."""

    def __init__(self):
        super().__init__()
        self.seen = [0]

    def get_extra_state(self):
        return {"seen": list(self.seen)}

    def set_extra_state(self, state):
        self.seen = list(state["seen"])


class Lazy(Body):
    def __init__(self):
        super().__init__()
        self.first = nn.LazyLinear(10)


class Doubles(Body):
    def __init__(self):
        super().__init__()
        self.double()

    def forward(self, x):
        return super().forward(x.double())


class ManyParts(Body):
    """Parts in lists and dicts, one of them used twice, one chosen by its name."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(10, 10) for _ in range(2)])
        self.gains = nn.ParameterList([torch.ones(10), torch.zeros(10)])
        self.choice = nn.ModuleDict({"a": nn.GELU(), "b": nn.Tanh()})
        self.use = "a"

    def middle(self, h):
        for block in (*self.blocks, self.blocks[0]):
            h = h + 0.3 * self.choice[self.use](block(h))
        return h * self.gains[0] + self.gains[1]


MODELS = {
    kind.__name__: kind
    for kind in (
        Body, Norms, FrozenNorm, LayerDrop, Mixes, Cached, Counts, CountsInBuffer, Averages, Table,
        SparseTable, Graph, Rotates, Checkpointed, Parametrized, Spectral, Empty, Steps, Patches,
        Reads, Takes, Outside, Writes, Noise, Shuffles, OwnGenerator, Extra, Lazy, Doubles,
        ManyParts,
    )
}  # fmt: skip
