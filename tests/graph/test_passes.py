"""Passes that give parts of a step to kernels: where they should be, right, and dispensable."""

import copy
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.graph import (
    batch_norm,
    batch_products,
    biases,
    draws,
    elementwise,
    images,
    layouts,
    native,
    product_sums,
    rows,
)
from hotloop.graph.choices import Route
from support.beside_plain import ALWAYS, called

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

LAST = torch.channels_last
PASSES = {
    "batch norm": (batch_norm, "replace"),
    "images": (images, "replace"),
    "batch products": (batch_products, "route"),
    "layouts": (layouts, "replace"),
    "product sums": (product_sums, "merge"),
    "rows": (rows, "replace"),
    "element-wise": (elementwise, "fuse"),
    "draws": (draws, "fuse"),
    "biases": (biases, "fuse"),
}


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(batch_products, "fastest", lambda work: Route("hotloop", {"hotloop": 1.0}))


class Residual(nn.Module):
    def __init__(self, channels=8, inplace=False):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.side_norm = nn.BatchNorm2d(channels, affine=False)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.head = nn.Linear(channels, 10)
        self.inplace = inplace

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)), inplace=self.inplace)
        x = F.relu(self.norm2(self.conv(x)) + x, inplace=self.inplace)
        x = F.relu(x + self.side_norm(x))
        return self.head(x.mean((2, 3)))


class Shared(nn.Module):
    """One batch norm used twice: its running values are updated in order."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.head(F.relu(self.norm(self.second(x)) + x))


class Unused(nn.Module):
    """A batch norm whose result nobody needs, but its running values."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = self.hidden(x)
        self.norm(x)
        self.drop(x)  # Draws, for nothing.
        return self.head(self.drop(x))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net = kind(6, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(32, 10)
        self.place = nn.Parameter(torch.randn(7, 32))

    def forward(self, x):
        return self.head(self.encoder(self.embed(x) + self.place).mean(1))


class Rms(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 32), nn.Linear(32, 10)
        self.norm = nn.RMSNorm(32)

    def forward(self, x):
        return self.head(F.silu(self.norm(self.hidden(x))))


CASES = {
    "residual": (Residual, (6, 3, 8, 8), False),
    "residual in place": (lambda: Residual(20, True), (6, 3, 8, 8), False),
    "shared": (Shared, (9, 12), False),
    "unused": (Unused, (9, 12), False),
    "gru": (lambda: Recurrent(nn.GRU), (5, 7, 6), False),
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 7, 6), False),
    "rnn": (lambda: Recurrent(nn.RNN), (5, 7, 6), False),
    "attention": (lambda: Attention(0.0), (5, 7, 6), False),
    "attention with dropout": (lambda: Attention(0.2), (5, 7, 6), True),
    "rms norm": (Rms, (9, 12), False),
}


def train(make, shape, steps=8):
    """Steps beside plain PyTorch: the same losses, weights, buffers and random state."""
    torch.manual_seed(0)
    model = make().train()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    x, y = torch.randn(shape), torch.randint(0, 10, shape[:1])
    step = hotloop.compile_step(model, F.cross_entropy, optimizers[0], (x, y), ALWAYS)
    for number in range(steps):
        x = torch.randn(shape)
        torch.manual_seed(number)
        loss = step(x, y)
        drawn = torch.random.get_rng_state()
        torch.manual_seed(number)
        optimizers[1].zero_grad()
        expected = F.cross_entropy(twin(x), y)
        expected.backward()
        optimizers[1].step()
        assert torch.equal(drawn, torch.random.get_rng_state())
        torch.testing.assert_close(loss, expected.detach(), rtol=2e-5, atol=2e-6)
    for (name, one), other in zip(
        model.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5, msg=name)
    assert step.path == "compiled", step.reason
    return step


@pytest.mark.parametrize("name", CASES)
def test_steps_are_plain_pytorchs(own, name):
    make, shape, _ = CASES[name]
    train(make, shape)


@pytest.mark.parametrize("left_out", PASSES)
@pytest.mark.parametrize("name", ["residual", "gru", "attention with dropout", "rms norm"])
def test_each_pass_may_be_left_out(own, monkeypatch, name, left_out):
    monkeypatch.setattr(*PASSES[left_out], lambda *_, **__: None)
    make, shape, _ = CASES[name]
    train(make, shape, steps=5)


def targets_of(name):
    make, shape, _ = CASES[name]
    return [node.target for node in called(train(make, shape, steps=3))]


def test_batch_norm_takes_relu_and_what_is_added():
    found = targets_of("residual")
    assert found.count(native.batch_norm) == found.count(native.batch_norm_gradient) == 3
    assert native.image_means in found
    assert native.image_means_gradient in found
    assert torch.ops.aten.relu.default not in found
    assert torch.ops.aten.native_batch_norm.default not in found
    # One sum is left: of what two ways back give.
    assert found.count(native.elementwise) <= 2


@pytest.mark.parametrize("name", ["gru", "rnn"])
def test_a_recurrent_step_is_hotloops_alone(name):
    make, shape, _ = CASES[name]
    step = train(make, shape, steps=3)
    program = list(step._recorded._shapes.values())[-1].program
    left = {
        str(n.target) for n in called(step)
        if n.target is not operator.getitem and str(n.target).startswith("aten")
    }  # fmt: skip
    assert program.is_native, left


def test_gradients_of_a_recurrent_weight_are_one_product(own):
    found = [str(t) for t in targets_of("gru")]
    # Of the weights that multiply what went before, and of the head.
    assert sum("gemm_update" in t for t in found) >= 2
    assert not any(t == "aten.mm.default" for t in found[-8:])


def test_dropout_is_a_draw_and_chains(own):
    found = targets_of("attention with dropout")
    assert native.draw in found
    assert torch.ops.aten.bernoulli_.float not in found


def test_running_values_of_a_frozen_batch_norm_stay():
    torch.manual_seed(0)
    model = Residual().train()
    model.norm.eval()
    kept = model.norm.running_mean.clone()
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 10, (6,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y), ALWAYS)
    for _ in range(4):
        step(x, y)
    assert step.path == "compiled", step.reason
    assert torch.equal(model.norm.running_mean, kept)
    assert int(model.norm2.num_batches_tracked) == 4
