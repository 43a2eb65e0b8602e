"""Generated models: the recorded step is plain PyTorch's, whatever the layers and the optimizer.

HOTLOOP_SWEEP says how many models the long sweep draws.
"""

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.graph import choices, convolutions, routes
from support import THOROUGH

if not kernels.is_available():
    pytest.skip("no kernels here", allow_module_level=True)

STEPS = 7  # Two of them are recorded.
MANY = int(os.environ.get("HOTLOOP_SWEEP", "300"))
LR = 1e-2


@pytest.fixture(scope="module", autouse=True, params=["hotloop", "torch"])
def kernel(request):
    """hotloop's kernels wherever they can be used, or torch's: here no clock decides."""
    own = request.param == "hotloop"
    product, convolution = ("hotloop", "hotloop") if own else ("mkl", "onednn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "fastest", lambda work: choices.Route(product, {product: 1.0}))
        patch.setattr(
            convolutions, "fastest", lambda work: choices.Route(convolution, {convolution: 1.0})
        )
        yield


ACTIVATIONS = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Softplus)
OPTIMIZERS = {
    "sgd": lambda p, wd: torch.optim.SGD(p, lr=LR, weight_decay=wd),
    "momentum": lambda p, wd: torch.optim.SGD(p, lr=LR, momentum=0.9, weight_decay=wd),
    "nesterov": lambda p, wd: torch.optim.SGD(p, lr=LR, momentum=0.8, nesterov=True),
    # A large eps: where a gradient is nothing but rounding, Adam would make whole steps of it.
    "adam": lambda p, wd: torch.optim.Adam(p, lr=LR, eps=1e-3, weight_decay=wd),
    "adamw": lambda p, wd: torch.optim.AdamW(p, lr=LR, eps=1e-3, weight_decay=wd),
    "rmsprop": lambda p, wd: torch.optim.RMSprop(p, lr=LR, eps=1e-3, weight_decay=wd),
    "adagrad": lambda p, wd: torch.optim.Adagrad(p, lr=LR, eps=1e-3, lr_decay=0.01),
}
widths = st.integers(1, 40)


@st.composite
def perceptrons(draw):
    layers, width = [nn.Flatten()], 64
    for _ in range(draw(st.integers(0, 3))):
        out = draw(widths)
        norm = draw(st.sampled_from([None, nn.BatchNorm1d, nn.LayerNorm]))
        layers.append(nn.Linear(width, out, bias=norm is None and draw(st.booleans())))
        if norm is not None and out > 1:
            layers.append(norm(out))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if draw(st.booleans()):
            layers.append(nn.Dropout(draw(st.sampled_from([0.1, 0.5]))))
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 5))


@st.composite
def convolutional(draw):
    layers, channels, side = [], 1, 8
    for _ in range(draw(st.integers(1, 2))):
        out, kernel = draw(st.integers(1, 20)), draw(st.sampled_from([1, 3]))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        kernel = min(kernel, side + 2 * padding)
        normed = draw(st.booleans())
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=not normed))
        side = (side + 2 * padding - kernel) // stride + 1
        if normed and side > 1:
            layers.append(nn.BatchNorm2d(out))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if side >= 4:
            layers.append(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))(2))
            side //= 2
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 5))


class Attention(nn.Module):
    def __init__(self, width, heads, dropout):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.attend = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        seen = self.attend(x, x, x, need_weights=False)[0]
        seen += x
        x = self.norm(seen)
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind, width):
        super().__init__()
        self.cell = kind(8, width, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.cell(x.squeeze(1))[0][:, -1])


class InPlace(nn.Module):
    """Writes into temporaries and views of them."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("seen", torch.zeros(width))

    def forward(self, x):
        x = F.relu_(self.first(x.flatten(1)))
        x = x + self.second(x).mul_(0.5).tanh_()
        with torch.no_grad():
            self.seen.mul_(0.9).add_(x.mean(0), alpha=0.1)
        x = x * 2
        x[:, 0] = 1
        x[1:].view(-1)[: x.shape[1]].add_(self.seen)
        return self.head(x.clamp_(max=3.0))


class Tied(nn.Module):
    """One weight used three times, once transposed; a part of it by itself."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width, 64))
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        x = x.flatten(1)
        hidden = torch.tanh(F.linear(x, self.weight))
        return self.head(hidden @ self.weight + self.weight[0])


networks = st.one_of(
    perceptrons(),
    convolutional(),
    st.builds(
        lambda h, w, p: Attention(h * w, h, p),
        st.integers(1, 3),
        st.integers(1, 8),
        st.sampled_from([0.0, 0.2]),
    ),
    st.builds(Recurrent, st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]), st.integers(1, 16)),
    st.builds(InPlace, st.integers(2, 16)),
    st.builds(Tied, st.integers(1, 16)),
)


@st.composite
def tasks(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = draw(networks).train()
    if draw(st.booleans()):  # Drawn again: another initial scale than the default.
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(draw(st.sampled_from([0.5, 1.0, 1.5])))
    frozen = draw(st.integers(0, 5))
    parameters = list(model.parameters())
    if frozen == 0 and len(parameters) > 2:
        parameters[0].requires_grad_(False)
    loss = draw(st.sampled_from(["cross_entropy", "smoothed", "mse"]))
    micro = draw(st.sampled_from([None, None, None, 4]))
    batch = draw(st.integers(3, 24))
    # Of one row some of these models make nothing; of two, batch norm leaves gradients that are
    # nothing but rounding.
    rest = batch % 4 if micro else 0
    batch += 3 - rest if rest in (1, 2) else 0
    return {
        "model": model,
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        "weight_decay": draw(st.sampled_from([0.0, 0.01])),
        "loss": loss,
        "batch": batch,
        "clip_norm": draw(st.sampled_from([None, None, 0.5])),
        "micro": micro,
        "clip_value": draw(st.sampled_from([None, None, 0.05])),
    }


def loss_fn_of(kind):
    if kind == "mse":
        return lambda output, y: F.mse_loss(output, torch.eye(5)[y])
    return lambda output, y: F.cross_entropy(
        output, y, label_smoothing=0.1 if kind == "smoothed" else 0.0
    )


def compare(task, slack=1.0):
    """Train both; ``slack``: of the tolerances, for a sweep so long that it meets models which
    magnify rounding.
    """
    model, size = task["model"], task["batch"]
    plain, loss_fn = copy.deepcopy(model), loss_fn_of(task["loss"])
    optimizer, plain_optimizer = (
        OPTIMIZERS[task["optimizer"]](
            [p for p in m.parameters() if p.requires_grad], task["weight_decay"]
        )
        for m in (model, plain)
    )
    clips = {name: task[name] for name in ("clip_norm", "clip_value")}
    x, y = torch.rand(STEPS, size, 1, 8, 8), torch.randint(0, 5, (STEPS, size))
    plan = hotloop.Plan().replace(
        {"step.compile": "always", "memory.micro_batch_size": task["micro"]}
    )
    step = hotloop.compile_step(model, loss_fn, optimizer, (x[0], y[0]), plan, **clips)
    for number, (a, b) in enumerate(zip(x, y, strict=True)):
        torch.manual_seed(number)
        loss = step(a, b).item()
        drawn = torch.get_rng_state()
        torch.manual_seed(number)
        expected = plain_step(plain, loss_fn, plain_optimizer, a, b, task["micro"] or size, **clips)
        assert torch.equal(drawn, torch.get_rng_state())
        assert loss == pytest.approx(expected, rel=slack * 1e-4, abs=1e-6)
        same_weights_and_state(model, optimizer, plain, plain_optimizer, slack)
    assert step.path == "compiled", step.reason
    plain_optimizer.load_state_dict(optimizer.state_dict())


def plain_step(model, loss_fn, optimizer, x, y, micro, *, clip_norm, clip_value):
    optimizer.zero_grad()
    total = 0.0
    for a, b in zip(x.split(micro), y.split(micro), strict=True):
        loss = loss_fn(model(a), b) * (len(a) / len(x))
        loss.backward()
        total += loss.item()
    trained = [p for p in model.parameters() if p.grad is not None]
    if clip_value is not None:
        nn.utils.clip_grad_value_(trained, clip_value)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(trained, clip_norm)
    optimizer.step()
    return total


def same_weights_and_state(model, optimizer, plain, plain_optimizer, slack):
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        # One hundredth of what the steps may move a weight.
        torch.testing.assert_close(
            a,
            b,
            rtol=slack * 1e-4,
            atol=slack * STEPS * LR / 100,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    assert len(optimizer.state) == len(plain_optimizer.state)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        ours, theirs = optimizer.state.get(a, {}), plain_optimizer.state.get(b, {})
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = slack * 1e-3 * (1.0 + float(value.abs().max()))
            torch.testing.assert_close(ours[name], value, rtol=slack * 1e-3, atol=scale)


OPTIONS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@settings(max_examples=60 if THOROUGH else 8, **OPTIONS)
@given(tasks())
def test_generated_models_train_as_in_plain_pytorch(task):
    compare(task)


@pytest.mark.full
@settings(max_examples=MANY, **OPTIONS | {"derandomize": False})
@given(tasks())
def test_many_more_of_them(task):
    compare(task, slack=5.0)
