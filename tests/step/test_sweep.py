"""Generated models: the captured step is plain PyTorch's, whatever the layers and the optimizer.

The sweep runs the captured graph, hotloop's kernels included, node by node; what only the compiler
could break is covered by the examples that are compiled: ten in the full check, as many as
HOTLOOP_SWEEP says where somebody has ten seconds for each.
"""

import copy
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hotloop import kernels
from hotloop.graph import convolutions, routes
from hotloop.step.compiled import CompiledStep
from support import THOROUGH, interpreted

if not kernels.is_available():
    pytest.skip("no kernels here", allow_module_level=True)

STEPS = 6
COMPILED = int(os.environ.get("HOTLOOP_SWEEP", "10"))
LR = 1e-2


@pytest.fixture(scope="module", autouse=True)
def own_convolutions():
    """hotloop's kernel wherever it can be used: here no clock decides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            convolutions, "fastest", lambda work: routes.Route("hotloop", {"hotloop": 1.0})
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
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 5))


@st.composite
def convolutional(draw):
    layers, channels, side = [], 1, 8
    for _ in range(draw(st.integers(1, 2))):
        out, kernel = draw(st.integers(1, 20)), draw(st.sampled_from([1, 3]))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
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
    def __init__(self, width, heads):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.embed(x.squeeze(1))
        x = self.norm(x + self.attend(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind, width):
        super().__init__()
        self.cell = kind(8, width, batch_first=True)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        return self.head(self.cell(x.squeeze(1))[0][:, -1])


networks = st.one_of(
    perceptrons(),
    convolutional(),
    st.builds(lambda h, w: Attention(h * w, h), st.integers(1, 3), st.integers(1, 8)),
    st.builds(Recurrent, st.sampled_from([nn.RNN, nn.GRU]), st.integers(1, 16)),
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
    return {
        "model": model,
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        "weight_decay": draw(st.sampled_from([0.0, 0.01])),
        "loss": loss,
        "batch": draw(st.integers(2, 24)),
        "clip_norm": draw(st.sampled_from([None, None, 0.5])),
        "clip_value": draw(st.sampled_from([None, None, 0.05])),
    }


def loss_fn_of(kind):
    if kind == "mse":
        return lambda output, y: F.mse_loss(output, F.one_hot(y, 5).float())
    return lambda output, y: F.cross_entropy(
        output, y, label_smoothing=0.1 if kind == "smoothed" else 0.0
    )


def compare(task, *, compiled):
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
    step = CompiledStep(model, loss_fn, optimizer, x[0], y[0], num_threads=2, whole=True, **clips)
    if compiled:
        step.load()
    else:
        interpreted.load(step)
    for a, b in zip(x, y, strict=True):
        loss = step.run(a, b).item()
        plain_optimizer.zero_grad()
        expected = loss_fn(plain(a), b)
        expected.backward()
        trained = [p for p in plain.parameters() if p.grad is not None]
        if clips["clip_value"] is not None:
            nn.utils.clip_grad_value_(trained, clips["clip_value"])
        if clips["clip_norm"] is not None:
            nn.utils.clip_grad_norm_(trained, clips["clip_norm"])
        plain_optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        # One hundredth of what the steps may move a weight.
        torch.testing.assert_close(
            a, b, rtol=1e-4, atol=STEPS * LR / 100, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert len(optimizer.state) == len(plain_optimizer.state)
    plain_optimizer.load_state_dict(optimizer.state_dict())


@settings(
    max_examples=80 if THOROUGH else 10, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(tasks())
def test_generated_models_train_as_in_plain_pytorch(task):
    compare(task, compiled=False)


@pytest.mark.full
@settings(
    max_examples=COMPILED, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(tasks())
def test_and_as_the_compiler_makes_them(task):
    compare(task, compiled=True)
