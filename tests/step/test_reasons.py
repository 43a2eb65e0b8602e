"""What a step does not take is named: the line of the user's code, the parameter, the buffer."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

HERE = "test_reasons.py"


def line_of(mark):
    """The line of this file that ends in a comment with the mark."""
    with open(__file__, encoding="utf-8") as file:
        (number,) = (n for n, text in enumerate(file, 1) if text.rstrip().endswith(f"# {mark}"))
    return f"{HERE}:{number}"


class Net(nn.Module):
    """A layer, and something that a program cannot take."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 3)
        self.embed = nn.Embedding(5, 4, sparse=True)
        self.generator = np.random.default_rng(0)
        if kind == "sparse buffer":
            self.register_buffer("adjacency", torch.eye(8).to_sparse())

    def forward(self, x):
        return getattr(self, self.kind.replace(" ", "_"))(x)

    def python_draws(self, x):
        scale = random.random()
        return self.linear(x) * (1 + 0 * scale)

    def numpy_draws(self, x):
        x = x + 1
        scale = self.generator.random()
        x = x * 2  # numpy draws
        return self.linear(x) * (1 + 0 * scale)

    def reads(self, x):
        return self.linear(x) * (2.0 if x.sum() > 0 else 1.0)  # reads

    def mask(self, x):
        return self.linear(x) + x[x > 0].mean()  # mask

    def writes(self, x):
        x.clamp_(min=-5)  # writes
        return self.linear(x)

    def sparse_buffer(self, x):
        return torch.sparse.mm(self.adjacency, self.linear(x))

    def lists(self, x):
        return self.linear(x) * len(x.tolist())  # lists

    def alternates(self, x):
        self.kind = "turns"
        return self.linear(x)

    def turns(self, x):
        self.kind = "alternates"
        return self.linear(x).exp()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("python draws", "the module random"),
        ("numpy draws", None),
        ("reads", None),
        ("mask", None),
        ("writes", None),
        ("lists", None),
        ("sparse buffer", "buffer adjacency is not dense on the CPU"),
        ("alternates", "kind"),
    ],
)
def test_it_is_named(kind, told):
    torch.manual_seed(0)
    model = Net(kind)
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    step = hotloop.compile_step(
        model, F.cross_entropy, torch.optim.SGD(model.linear.parameters(), 0.1), (x, y)
    )
    for _ in range(5):
        step(x, y)
    assert step.path == "plain"
    assert (told or line_of(kind)) in step.reason
    if "draws" in kind:
        assert HERE in step.reason
