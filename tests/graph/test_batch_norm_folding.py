"""Batch norm in the weights before it: the same answers, and only where nothing else reads them."""

import pytest
import torch
from torch import nn

from hotloop.graph.batch_norm_folding import fold
from support.exported import answer, exported


def with_statistics(model, *shape):
    """Batch norm that changes what goes through."""
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
                part.weight.uniform_(0.5, 2)
                part.bias.uniform_(-1, 1)
        for _ in range(3):
            model.train()(torch.randn(16, *shape) * 2 + 1)
    return model.eval()


def norms(graph):
    return [n for n in graph.nodes if n.target is torch.ops.aten.batch_norm.default]


def assert_folded(model, shape, left=0):
    model = with_statistics(model, *shape)
    graph, constants = exported(model, torch.randn(4, *shape))
    fold(graph, constants)
    assert len(norms(graph)) == left
    x = torch.randn(5, *shape)
    with torch.no_grad():
        want = model(x)
    torch.testing.assert_close(answer(graph, constants, x), want, rtol=1e-5, atol=1e-5)
    return graph


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_norm_goes_into_weights(bias, affine):
    torch.manual_seed(0)
    assert_folded(
        nn.Sequential(
            nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine), nn.ReLU(),
            nn.Conv2d(5, 7, (1, 2), (2, 1), bias=bias), nn.BatchNorm2d(7, affine=affine),
        ),
        (3, 9, 8),
    )  # fmt: skip
    assert_folded(
        nn.Sequential(nn.Linear(6, 4, bias=bias), nn.BatchNorm1d(4, affine=affine), nn.GELU()),
        (6,),
    )


def test_two_layers_of_one_weight_get_weights_of_their_own():
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(3), nn.ReLU(), shared, nn.BatchNorm2d(3))
    assert_folded(model, (3, 5, 6))


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Rows(nn.Module):
    """Batch norm that takes each of seven rows for a channel."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 7), nn.BatchNorm1d(7)

    def forward(self, x):
        return self.norm(self.linear(x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (ReadTwice(), (2, 5, 5)),
        (Rows(), (7, 4)),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
         (2, 5, 5)),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(2)), (2, 5, 5)),
    ],
    ids=["read twice", "rows", "statistics of the batch", "no weights"],
)  # fmt: skip
def test_other_norms_stay(model, shape):
    torch.manual_seed(0)
    assert_folded(model, shape, left=1)
