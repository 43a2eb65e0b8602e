"""One-channel images are described as convolutions like them, unless the model minds."""

import copy

import pytest
import torch
from torch import nn

import hotloop
from hotloop.memory.image_layout import adjacent, preferred
from hotloop.plan import Plan


class Viewing(nn.Module):
    """Asks for the dense layout of what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * 36, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.convolution(x)).view(len(x), -1))


def _flattening() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def test_the_same_memory() -> None:
    x = torch.randn(2, 1, 4, 5)
    assert torch.equal(adjacent(x), x)
    assert adjacent(x).data_ptr() == x.data_ptr()
    assert adjacent(x).is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_minds_gets_what_it_was_written_for() -> None:
    x = torch.randn(2, 1, 8, 8)
    model = Viewing()
    before = copy.deepcopy(model.state_dict())
    assert preferred(model, x)(x).stride() == x.stride()
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert preferred(_flattening(), x) is adjacent
    three = torch.randn(2, 3, 8, 8)
    assert preferred(nn.Conv2d(3, 4, 3), three)(three) is three
    assert preferred(nn.Conv2d(3, 4, 3), three, copies=True)(three).stride(1) == 1
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert preferred(flat, three, copies=True)(three).stride(1) == 1
    assert preferred(nn.Flatten(), three, copies=True)(three) is three


@pytest.mark.parametrize("make", [Viewing, _flattening])
@pytest.mark.parametrize("compiling", ["off", "always"])
def test_training_is_that_of_pytorch(make: type[nn.Module], compiling: str) -> None:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    follower = torch.optim.SGD(plain.parameters(), lr=0.05)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 3, (16,))
    plan = Plan().replace({"step.compile": compiling})
    step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, (x, y), plan)
    for _ in range(10):
        follower.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        loss.backward()
        follower.step()
        assert step(x, y).item() == pytest.approx(loss.item(), rel=1e-5)
    assert step.path == ("plain" if compiling == "off" else "compiled"), step.reason
