"""Convolutions and poolings that are taken over are torch's, to rounding or to the bit."""

import pytest
import torch
import torch.nn.functional as F

from hotloop import kernels
from hotloop.launch import operators
from hotloop.launch.choice import Choice


@pytest.fixture
def taken(monkeypatch):
    """How often each operator was taken over: wherever it can be."""
    if not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    monkeypatch.setattr(Choice, "next", lambda self: True)
    operators.install()
    yield lambda: {use.name: (use.calls, use.taken) for use in operators.uses()}
    operators.remove()


def results(x, weight, bias, padding, pool):
    """Forward, backward, and what the user sees of it."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = F.conv2d(*leaves, padding=padding)
    z = F.max_pool2d(F.relu(y), **pool)
    (z * torch.linspace(0.5, 1.5, z.numel()).view(z.shape)).sum().backward()
    return [y, z, *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize(
    ("shape", "outputs", "filters", "padding", "pool", "bias"),
    [
        ((8, 1, 28, 28), 32, (3, 3), 0, {"kernel_size": 2}, True),
        ((4, 32, 20, 22), 17, (3, 3), 1, {"kernel_size": 3, "stride": 2, "padding": 1}, False),
        ((8, 3, 32, 32), 16, (5, 5), (2, 1), {"kernel_size": (2, 3)}, True),
        ((8, 20, 16, 18), 1, (7, 5), "same", {"kernel_size": 2, "stride": 1}, True),
        ((8, 64, 14, 14), 32, (1, 1), 0, {"kernel_size": 5, "stride": 3, "padding": 2}, True),
    ],
)
def test_a_convolution_with_its_gradients_and_a_pooling(
    taken, shape, outputs, filters, padding, pool, bias
):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(outputs, shape[1], *filters) / 8
    bias = torch.randn(outputs) if bias else None
    found = results(x, weight, bias, padding, pool)
    counts = taken()
    assert counts["convolution"] == counts["convolution_backward"] == (1, 1)
    assert counts["max_pool2d_with_indices"][0] == 1
    operators.remove()
    wanted = results(x, weight, bias, padding, pool)
    for a, b in zip(found, wanted, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize(
    ("sizes", "pool"),
    [
        ((3, 27, 24, 24), {"kernel_size": 2}),
        ((3, 27, 25, 23), {"kernel_size": 2}),
        ((2, 19, 31, 30), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((2, 19, 31, 30), {"kernel_size": (1, 4), "stride": (3, 1), "padding": (0, 2)}),
    ],
)
def test_a_pooling_gives_the_same_bits_and_indices(taken, sizes, pool):
    torch.manual_seed(0)
    x = torch.randn(sizes).mul(2).round()  # Some are equal.
    x[0, 0, 2:6, 3:9] = torch.nan
    x[0, 1] = -torch.inf
    found = F.max_pool2d(x, return_indices=True, **pool)
    assert taken()["max_pool2d_with_indices"] == (1, 1)
    operators.remove()
    for a, b in zip(found, F.max_pool2d(x, return_indices=True, **pool), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_what_is_left_to_torch(taken):
    x, weight = torch.randn(8, 16, 20, 20), torch.randn(16, 16, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    made = F.conv2d(last, weight)
    assert made.is_contiguous(memory_format=torch.channels_last)  # As torch has it.
    F.conv2d(x.double(), weight.double())
    F.conv2d(x.bfloat16(), weight.bfloat16())
    F.conv2d(x, weight, stride=2)
    F.conv2d(x, weight, dilation=2)
    F.conv2d(x, weight[:, :4].contiguous(), groups=4)
    F.conv2d(x, weight, padding=3)
    F.conv2d(x[:1, :, :4, :4].contiguous(), weight)  # Too small.
    F.conv_transpose2d(x, weight)
    F.conv1d(torch.randn(8, 16, 400), torch.randn(16, 16, 3))
    F.max_pool2d(x, 2, dilation=2)
    F.max_pool2d(x, 3, ceil_mode=True)
    F.max_pool2d(last, 2)
    F.max_pool2d(x.double(), 2)
    assert all(count == 0 for _, count in taken().values())
    torch._C._set_mkldnn_enabled(False)
    try:
        F.conv2d(x, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    torch.use_deterministic_algorithms(True)
    try:
        F.conv2d(x, weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken()["convolution"][1] == 0
    with pytest.raises(RuntimeError, match="to have 16 channels"):
        F.conv2d(x[:, :8].contiguous(), weight)
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        F.max_pool2d(x, 2, padding=2)


def test_second_derivatives_and_frozen_weights(taken):
    x = torch.randn(8, 8, 26, 26, requires_grad=True)
    weight = torch.randn(16, 8, 3, 3, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(F.conv2d(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)[0]

    found = penalty()
    frozen = torch.autograd.grad(F.conv2d(x, weight.detach()).sum() * 2, x)[0]
    assert taken()["convolution"][1] >= 2
    operators.remove()
    for a, b in (
        (found, penalty()),
        (frozen, torch.autograd.grad(F.conv2d(x, weight).sum() * 2, x)[0]),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


def test_an_operator_that_does_not_pay_is_given_back(taken, monkeypatch):
    monkeypatch.setattr(operators, "_LOOK_EVERY", 4)
    x, weight = torch.randn(1, 1, 8, 8), torch.randn(1, 1, 3, 3)
    for _ in range(9):
        F.conv2d(x, weight)
    assert taken()["convolution"] == (4, 0)


def test_an_operator_that_pays_stays_and_tells_what_it_saved(monkeypatch):
    if not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    monkeypatch.setattr(operators, "_LOOK_EVERY", 4)
    monkeypatch.setattr(operators, "_DETOUR_S", 0)
    turns = iter([True, False] * 10)
    monkeypatch.setattr(Choice, "next", lambda self: next(turns))
    monkeypatch.setattr(Choice, "note", lambda self, ours, seconds: (
        self.least_s.__setitem__(ours, 1.0 if ours else 3.0)
    ))  # fmt: skip
    operators.install()
    try:
        for _ in range(9):
            F.max_pool2d(torch.zeros(4, 8, 64, 64), 2)
        use = next(u for u in operators.uses() if u.name.startswith("max_pool"))
        assert (use.calls, use.taken, use.saved_s) == (9, 5, 8.0)  # torch's time came second.
    finally:
        operators.remove()


def test_without_memory_torch_makes_it(taken, monkeypatch):
    def refuse(*args, **options):
        raise operators.RunError("no memory")

    monkeypatch.setattr("hotloop.launch.convolutions.calls.convolve", refuse)
    x, weight = torch.randn(8, 16, 20, 20), torch.randn(16, 16, 3, 3)
    found = F.conv2d(x, weight)
    assert taken()["convolution"] == (1, 0)
    operators.remove()
    assert torch.equal(found, F.conv2d(x, weight))
