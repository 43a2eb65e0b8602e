"""Losses and sums of columns against torch in float64; the same bits with any threads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.errors import RunError
from hotloop.kernels import calls
from support import examples
from support.same_bits import drawn, same_with_any_threads

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

F = torch.nn.functional


def with_stride(tensor, padding):
    rows, cols = tensor.shape
    return torch.full((rows, cols + padding), 3.0)[:, :cols].copy_(tensor)


def wanted_cross_entropy(logits, labels, scale, **options):
    exact = logits.double().requires_grad_()
    if options["weight"] is not None:
        options["weight"] = options["weight"].double()
    loss = F.cross_entropy(exact, labels, **options)
    loss.backward(torch.tensor(scale, dtype=torch.float64))
    return loss.detach(), exact.grad


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=st.integers(1, 70), classes=st.integers(1, 300), padding=st.integers(0, 3),
    weighted=st.booleans(), ignored=st.booleans(), mean=st.booleans(),
    size=st.sampled_from([1.0, 30.0, 300.0]), large=st.booleans(),
)  # fmt: skip
def test_cross_entropy(rows, classes, padding, weighted, ignored, mean, size, large):
    rows *= 8 if large else 1  # So that several threads have work.
    logits = with_stride(drawn(rows, classes, seed=rows * 301 + classes, scale=size), padding)
    labels = torch.arange(rows) * 7 % classes
    labels[::3] = -100 if ignored and rows > 1 else labels[::3]
    labels[-1] = classes - 1
    weights = torch.rand(classes) + 0.1 if weighted else None
    loss, gradient = torch.zeros(()), with_stride(torch.zeros(rows, classes), padding)

    def make(threads):
        return calls.cross_entropy(
            logits, labels, loss, gradient, weights=weights, mean=mean, scale=0.5,
            num_threads=threads,
        )  # fmt: skip

    found_loss, found = same_with_any_threads(make, loss, gradient)
    options = {"weight": weights, "reduction": "mean" if mean else "sum"}
    want_loss, want = wanted_cross_entropy(logits, labels, 0.5, **options)
    torch.testing.assert_close(found_loss.double(), want_loss, rtol=2e-6, atol=1e-6)
    # Of p - 1, with p near 1, only the absolute error is small.
    each = torch.where(
        labels < 0, 0, torch.ones(rows) if weights is None else weights[labels.clamp(0)]
    )
    size = 0.5 * float(each.max() / (each.sum() if mean else 1))
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=3e-7 * size)
    calls.cross_entropy(logits, labels, loss, weights=weights, mean=mean)()
    assert torch.equal(loss, found_loss)  # Without a gradient too.
    copy = logits.clone()
    calls.cross_entropy(copy, labels, loss, copy, weights=weights, mean=mean, scale=0.5)()
    assert torch.equal(copy, found)  # In place.


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("label", [0, 3, -100])
def test_cross_entropy_of_what_is_not_finite(value, label, mean):
    logits, labels = drawn(4, 20), torch.tensor([label, 1, 2, 19])
    logits[0, 3] = value
    loss, gradient = torch.zeros(()), torch.zeros(4, 20)
    calls.cross_entropy(logits, labels, loss, gradient, mean=mean)()
    options = {"weight": None, "reduction": "mean" if mean else "sum"}
    want_loss, want = wanted_cross_entropy(logits, labels, 1.0, **options)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("rows", [0, 3])
def test_cross_entropy_of_nothing(rows, mean):
    logits, labels = drawn(rows, 5), torch.full((rows,), -100)
    loss, gradient = torch.zeros(()), torch.full((rows, 5), -7.0)
    calls.cross_entropy(logits, labels, loss, gradient, mean=mean)()
    exact = logits.clone().requires_grad_()
    want = F.cross_entropy(exact, labels, reduction="mean" if mean else "sum")
    want.backward()
    torch.testing.assert_close(loss, want.detach(), equal_nan=True)
    torch.testing.assert_close(gradient, exact.grad, equal_nan=True)


@pytest.mark.parametrize("label", [-1, 5, -101, 2**40])
def test_a_label_outside_is_an_error_and_nothing_is_written(label):
    loss, gradient = torch.tensor(-7.0), torch.full((3, 5), -7.0)
    labels = torch.tensor([0, -100, label])
    call = calls.cross_entropy(drawn(3, 5), labels, loss, gradient)
    with pytest.raises(RunError, match=rf"labels must be in \[0, 5\) \(got: {label} in row 2\)"):
        call()
    assert loss == -7
    assert (gradient == -7).all()
    labels[2] = 4
    call()
    assert loss > 0


def test_ignore_index_may_be_a_class():
    logits, labels = drawn(6, 4), torch.tensor([0, 1, 2, 3, 2, 1])
    loss, gradient = torch.zeros(()), torch.zeros(6, 4)
    calls.cross_entropy(logits, labels, loss, gradient, ignore_index=2)()
    want_loss, want = wanted_cross_entropy(logits, labels, 1.0, weight=None, ignore_index=2)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-7)


@settings(max_examples=examples(60), deadline=None)
@given(
    count=st.sampled_from([0, 1, 15, 16, 17, 64, 2047, 2048, 2049, 10_000, 100_001]),
    mean=st.booleans(), value=st.sampled_from([1.0, 1e3, math.nan, math.inf]),
)  # fmt: skip
def test_squared_error(count, mean, value):
    output, target = drawn(count, seed=1), drawn(count, seed=2)
    output[count // 2 :][:1] *= value
    loss, gradient = torch.zeros(()), torch.zeros(count)

    def make(threads):
        return calls.squared_error(
            output, target, loss, gradient, mean=mean, scale=0.5, num_threads=threads
        )

    found_loss, found = same_with_any_threads(make, loss, gradient)
    exact = output.double().requires_grad_()
    want = F.mse_loss(exact, target.double(), reduction="mean" if mean else "sum")
    want.backward(torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(
        found_loss.double(), want.detach(), rtol=1e-6, atol=0, equal_nan=True
    )
    torch.testing.assert_close(found.double(), exact.grad, rtol=1e-6, atol=1e-9, equal_nan=True)


@settings(max_examples=examples(100), deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 7, 63, 64, 65, 128, 200, 1000, 5000]),
    cols=st.integers(0, 200) | st.sampled_from([511, 512, 513, 1030]),
    padding=st.integers(0, 3), masked=st.booleans(),
)  # fmt: skip
def test_column_sums(rows, cols, padding, masked):
    x = with_stride(drawn(rows, cols, seed=rows + cols) + 1, padding)
    mask = with_stride(drawn(rows, cols, seed=cols).relu(), padding + 1) if masked else None
    out = torch.zeros(cols)
    (found,) = same_with_any_threads(
        lambda threads: calls.column_sums(x, out, mask, num_threads=threads), out
    )
    kept = x.double() if mask is None else x.double() * (mask > 0)
    size = kept.abs().sum(0)
    assert ((found - kept.sum(0)).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("rows", [3, 300])
def test_column_sums_of_what_is_not_finite(rows):
    x, mask = torch.ones(rows, 40), torch.ones(rows, 40)
    x[1, 3], x[2, 5], x[0, 6], x[1, 6], x[2, 7] = math.nan, math.inf, math.inf, -math.inf, math.nan
    mask[2, 7], mask[0, 8], mask[1, 9] = 0, math.nan, -1
    out = torch.zeros(40)
    calls.column_sums(x, out, mask)()
    want = torch.ops.aten.threshold_backward(x, mask, 0).sum(0)
    torch.testing.assert_close(out, want, equal_nan=True)
