"""Generated models: the captured step is plain PyTorch's, whatever the layers and the optimizer.

The sweep runs the captured graph, hotloop's kernels included, node by node; what only the compiler
could break is covered by the examples that are compiled: a few here, as many as HOTLOOP_SWEEP says
where somebody has ten seconds for each.
"""

import copy
import ctypes
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from hotloop.machine import native
from hotloop.step import convolutions, operators, routes
from hotloop.step.compiled import CompiledStep
from hotloop.step.convolutions import Convolution
from hotloop.step.program import UpdateRule, kernels
from hotloop.step.updates import COLUMNS

if not native.has_compiler():
    pytest.skip("no C++ compiler here", allow_module_level=True)
LIBRARY = kernels()

STEPS = 6
COMPILED = int(os.environ.get("HOTLOOP_SWEEP", "3"))
LR = 1e-2


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def integers(*values):
    return [ctypes.c_int64(v) for v in values]


@pytest.fixture(scope="module", autouse=True)
def own_convolutions():
    """hotloop's kernel wherever it can be used: here no clock decides."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            convolutions, "fastest", lambda work: routes.Route("hotloop", {"hotloop": 1.0})
        )
        yield


class Nodes(fx.Interpreter):
    """Runs a captured graph; hotloop's operators by the kernels a compiled step would call."""

    def call_function(self, target, args, kwargs):
        name = getattr(target, "__name__", "")
        if str(target).startswith("hotloop."):
            return getattr(self, name.split(".")[0].rstrip("_012"))(*args)
        return super().call_function(target, args, kwargs)

    def gemm(self, a, b, bias, mask, act):
        out = a.new_empty(a.shape[0], b.shape[1])
        routes.gemm(a, b, out, bias, mask, act=act, num_threads=2)
        return out

    def onednn(self, a, b, bias):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")

    def pool(self, x, kh, kw, relu, last):
        out, places = operators._fake_pool(x, kh, kw, relu, last)
        LIBRARY.hotloop_pool_f32(
            (ctypes.c_int64 * 12)(*x.shape, kh, kw, relu, last, *x.stride()),
            address(x), address(out), address(places), ctypes.c_int32(2),
        )  # fmt: skip
        return out, places

    def pool_backward(self, g, places, h, w, kh, kw):
        gx = operators._dense([*places.shape[:2], h, w], places, g.dtype)
        LIBRARY.hotloop_pool_backward_f32(
            (ctypes.c_int64 * 12)(*gx.shape, kh, kw, 0, 0, *gx.stride()),
            address(g), (ctypes.c_int64 * 4)(*g.stride()),
            address(places), address(gx), ctypes.c_int32(2),
        )  # fmt: skip
        return gx

    def conv3x3(self, x, w, bias, ph, pw, relu):
        work = self.convolution("convolution", x, w, ph, pw)
        out = operators._dense(list(work.out), x, x.dtype, True)
        convolutions.run(work, x, w, None, bias, [out], relu=bool(relu))
        return out

    def conv3x3_pool(self, x, w, bias, ph, pw, relu, last):
        out, places = operators._fake_conv_pool(x, w, bias, ph, pw, relu, last)
        work = self.convolution("convolution", x, w, ph, pw)
        convolutions.run(work, x, w, None, bias, [out], relu=bool(relu), places=places)
        return out, places

    def conv3x3_input_gradient(self, x, g, w, places, mask, ph, pw):
        out = operators._dense(list(x.shape), x, x.dtype, True)
        work = self.convolution("input gradient", x, w, ph, pw)
        convolutions.run(work, x, w, g, None, [out], mask=mask, places=places)
        return out

    def conv3x3_weight_gradient(self, x, g, w, places, ph, pw, last):
        out = [operators._dense(list(w.shape), w, w.dtype, bool(last)), w.new_empty(len(w))]
        work = self.convolution("weight gradient", x, w, ph, pw)
        convolutions.run(work, x, w, g, None, out, places=places)
        return out

    @staticmethod
    def convolution(part, x, w, ph, pw):
        return Convolution(part, tuple(x.shape), tuple(w.shape), (ph, pw), 2)

    def update(self, w, g, *rest):
        *states, control, scale, group = rest
        first, second = [*states, None, None][:2]
        assert w.stride() == g.stride()
        factor = 1.0 if scale is None else scale.item()
        LIBRARY.hotloop_update_f32(
            *integers(w.numel()), address(w), address(g), address(first), address(second),
            ctypes.byref(self.rule(control, group)), ctypes.c_float(factor), ctypes.c_int32(2),
        )  # fmt: skip

    def gemm_update(self, w, a, b, *rest):
        *states, control, group = rest
        first, second = [*states, None, None][:2]
        if w.stride(1) != 1:
            w, a, b = w.t(), b.t(), a.t()
        LIBRARY.hotloop_gemm_update_f32(
            *integers(a.shape[0], b.shape[1], a.shape[1]),
            address(a), *integers(*a.stride()), address(b), *integers(*b.stride()),
            address(w), *integers(w.stride(0)), address(first), address(second),
            *integers(w.stride(0)), address(None), ctypes.byref(self.rule(control, group)),
            ctypes.c_float(1.0), ctypes.c_int32(2),
        )  # fmt: skip

    @staticmethod
    def rule(control, group):
        row = dict(zip(COLUMNS, control[group].tolist(), strict=False))
        return UpdateRule(**row | {n: int(row[n]) for n in ("kind", "first_step")})


class Interpreted:
    """Stands for ``Program``: the same inputs, without the compiler."""

    def __init__(self, graph):
        self.graph = graph

    def bind(self, tensors, control, counters):
        self.tensors, self.control, self.counters = tensors, control, counters

    def run(self, x, y, tables, steps=1):
        assert steps == 1
        self.control.copy_(tables[0])
        with torch.no_grad():
            (loss,) = Nodes(self.graph).run(*self.tensors, x, y)
        for counter in self.counters:
            counter += 1
        return loss.reshape(1).clone()


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
        step._program = Interpreted(step.captured.graph)
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
    max_examples=80, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(tasks())
def test_eighty_generated_models_train_as_in_plain_pytorch(task):
    compare(task, compiled=False)


@settings(
    max_examples=COMPILED, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(tasks())
def test_and_as_the_compiler_makes_them(task):
    compare(task, compiled=True)
