"""A step that sets torch's random state: a program would go on drawing."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

import hotloop


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(checkpoint.checkpoint(self.first, x, use_reentrant=False))


def test_a_recomputed_dropout_draws_the_mask_that_it_drew_before():
    torch.manual_seed(0)
    model = Recomputed()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    x, y = torch.randn(16, 12), torch.arange(16) % 3
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y))
    for number in range(6):
        torch.manual_seed(number)
        loss = step(x, y)
        torch.manual_seed(number)
        plain.zero_grad()
        expected = F.cross_entropy(twin(x), y)
        expected.backward()
        plain.step()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(model.first[0].weight, twin.first[0].weight)
    assert step.path == "plain"
    assert "torch's random state is set" in step.reason
