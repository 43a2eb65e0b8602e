"""Drawn batches: any structure, dtype, overlap and change; a step is what PyTorch makes of them."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import Arguments, kernels
from hotloop.memory import tree
from hotloop.memory.tree import call
from support import examples
from support.beside_loop import same

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

ROWS, WIDTH, STEPS = 6, 5, 9
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.uint8, torch.bool, torch.complex64,
)  # fmt: skip

# A place in the tree: what its tensor is made of. Where it begins in a signal that several share,
# or memory of its own; its dtype; the number of an earlier tensor that it is once more.
LEAVES = st.one_of(
    st.builds(lambda at, step: ("window", at, step), st.integers(0, 12), st.integers(1, 2)),
    st.builds(lambda dtype: ("own", dtype), st.sampled_from(DTYPES)),
    st.builds(lambda number: ("again", number), st.integers(0, 3)),
    st.builds(lambda value: ("plain", value), st.sampled_from([1, 2.5, True, "a", None])),
    st.just(("changing",)),
    st.just(("scalar",)),
)
TREES = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        st.builds(lambda parts: ["tuple", *parts], st.lists(below, min_size=1, max_size=3)),
        st.builds(lambda parts: ["list", *parts], st.lists(below, min_size=1, max_size=3)),
        st.builds(lambda parts: ["dict", *parts], st.lists(below, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


class Maker:
    """Makes a batch of a drawn plan; the one of step ``number``."""

    def __init__(self, number, overlaps_change):
        self.draw = torch.Generator().manual_seed(number)
        self.number, self.shift = number, (number % 2 if overlaps_change else 0)
        self.signal = torch.randn(ROWS * WIDTH * 6, generator=self.draw)
        self.made = []

    def build(self, plan):
        if isinstance(plan, list):
            parts = [self.build(part) for part in plan[1:]]
            if plan[0] == "dict":
                return {f"k{n}": part for n, part in enumerate(parts)}
            return tuple(parts) if plan[0] == "tuple" else parts
        return self.leaf(*plan)

    def leaf(self, kind, *about):
        if kind == "plain":
            return about[0]
        if kind == "changing":
            return self.number % 2
        if kind == "scalar":
            return torch.randn((), generator=self.draw)
        if kind == "again" and about[0] < len(self.made):
            return self.made[about[0]]
        if kind == "window":
            at, step = about[0] * 4 + self.shift * 7, about[1]
            window = self.signal[at : at + ROWS * WIDTH * step]
            tensor = window.view(ROWS, WIDTH * step)[:, ::step]
        else:
            dtype = about[0] if kind == "own" else torch.float32
            tensor = (3 * torch.randn(ROWS, WIDTH, generator=self.draw)).to(dtype)
        self.made.append(tensor)
        return tensor


class Mixed(nn.Module):
    """Every tensor it gets counts, with a weight of its own; so do plain values and identity."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(12, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, *args, **kwargs):
        tensors, _ = tree.flatten((args, kwargs))
        total = torch.zeros(ROWS, WIDTH)
        for number, tensor in enumerate(tensors):
            real = tensor.abs() if tensor.is_complex() else tensor
            first = next(n for n, t in enumerate(tensors) if t is tensor)
            total = total + real.float() * self.weights[number] * (1 + 0.1 * first)
        for value in _plain((args, kwargs)):
            total = total * (1.5 if value is True else 0.5) + float(value == 1)
        return {"out": (self.head(torch.tanh(total)), total)}


def _plain(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in _plain(part)]
    return [] if isinstance(value, torch.Tensor) else [value]


def loss_fn(answer, y=None):
    scores, total = answer["out"]
    if y is None:
        return scores.square().mean() + 0.01 * total.mean()
    tensors, _ = tree.flatten(y)
    return F.cross_entropy(scores, tensors[-1]) + 0.01 * sum(
        (scores.sum(1) * (t.abs() if t.is_complex() else t).float().flatten()[:ROWS].mean()).mean()
        for t in tensors
    )


@st.composite
def tasks(draw):
    has_target = draw(st.booleans())
    return {
        "x": draw(TREES),
        "y": draw(TREES) if has_target else None,
        "wrapped": draw(st.booleans()),
        "overlaps_change": draw(st.booleans()),
        "momentum": draw(st.sampled_from([0.0, 0.9])),
    }


def batch_of(task, number):
    maker = Maker(number, task["overlaps_change"])
    x = maker.build(task["x"])
    if task["wrapped"] or not isinstance(x, tuple | list | dict | torch.Tensor):
        x = Arguments(x, extra=maker.leaf("own", torch.float32))
    if task["y"] is None:
        return (x,)
    labels = torch.randint(0, 3, (ROWS,), generator=maker.draw)
    return x, {"more": maker.build(task["y"]), "labels": labels}


@settings(
    max_examples=examples(160),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(tasks())
def test_drawn_batches(task):
    if not any(t.dim() for t in tree.flatten(batch_of(task, 0)[0])[0]):
        return
    torch.manual_seed(0)
    model = Mixed()
    twin = copy.deepcopy(model)
    optimizer, plain = (
        torch.optim.SGD(m.parameters(), lr=0.05, momentum=task["momentum"]) for m in (model, twin)
    )
    step = hotloop.compile_step(model, loss_fn, optimizer, batch_of(task, 0))
    for number in range(STEPS):
        batch = batch_of(task, number)
        plain.zero_grad()
        expected = loss_fn(call(twin, batch[0]), *batch[1:])
        expected.backward()
        plain.step()
        same(step(*batch), expected.detach(), 1e-4)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        same(mine.detach(), theirs.detach(), 1e-3)
    assert step.path == "compiled", step.reason
