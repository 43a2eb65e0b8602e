"""Layers of a train step against torch in float64; the same bits with any number of threads."""

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

aten = torch.ops.aten
columns = st.integers(1, 130) | st.sampled_from([512, 1000])
few_rows = st.sampled_from([0, 1, 2, 63, 64, 65, 300])


def close(found, want, atol=1e-6, rtol=1e-5):
    torch.testing.assert_close(found.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


@settings(max_examples=examples(60), deadline=None)
@given(
    rows=few_rows, cols=columns, size=st.sampled_from([1.0, 100.0]), logarithm=st.booleans(),
    value=st.sampled_from([1.0, math.nan, math.inf, -math.inf, -1e38]),
)  # fmt: skip
def test_softmax(rows, cols, size, logarithm, value):
    x, gradient = drawn(rows, cols, seed=cols, scale=size), drawn(rows, cols, seed=1)
    x[rows // 2 :][:1, cols // 2] = value
    out, to_input = torch.zeros_like(x), torch.zeros_like(x)
    make = aten._log_softmax if logarithm else aten._softmax
    (found,) = same_with_any_threads(
        lambda n: calls.softmax(x, out, logarithm=logarithm, num_threads=n), out
    )
    want = make(x.double(), -1, False)
    close(found, want, rtol=1e-6 if logarithm else 1e-5)
    (found,) = same_with_any_threads(
        lambda n: calls.softmax_gradient(
            out, gradient, to_input, logarithm=logarithm, num_threads=n
        ),
        to_input,
    )
    backward = aten._log_softmax_backward_data if logarithm else aten._softmax_backward_data
    close(found, backward(gradient.double(), want, -1, torch.float64), 1e-5, 1e-5)
    calls.softmax_gradient(out, gradient, gradient, logarithm=logarithm)()
    assert torch.equal(gradient.nan_to_num(), found.nan_to_num())
    calls.softmax(x, x, logarithm=logarithm)()
    assert torch.equal(x.nan_to_num(), out.nan_to_num())


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=few_rows, cols=columns, affine=st.sampled_from(["none", "weight", "both"]),
    offset=st.sampled_from([0.0, 100.0]), wanted=st.lists(st.booleans(), min_size=3, max_size=3),
    value=st.sampled_from([1.0, math.nan, math.inf]),
)  # fmt: skip
def test_layer_norm(rows, cols, affine, offset, wanted, value):
    x, gradient = drawn(rows, cols, seed=cols) + offset, drawn(rows, cols, seed=1)
    x[rows // 2 :][:1, cols // 2] *= value
    weight = None if affine == "none" else drawn(cols, seed=2)
    bias = drawn(cols, seed=3) if affine == "both" else None
    out, mean, rstd = torch.zeros_like(x), torch.zeros(rows), torch.zeros(rows)
    found = same_with_any_threads(
        lambda n: calls.layer_norm(x, weight, bias, out, mean, rstd, num_threads=n), out, mean, rstd
    )
    exact = [None if t is None else t.double() for t in (x, weight, bias)]
    want = aten.native_layer_norm(exact[0], [cols], *exact[1:], 1e-5)
    # Of a row of one element all is rounding: it is less its mean.
    loose = 1e-5 * (1 + offset) * (300 if cols < 3 else 1)
    for one, other in zip(found, want, strict=True):
        close(one, other.flatten() if one.dim() == 1 else other, loose, 1e-4)
    outs = [torch.zeros_like(x), torch.zeros(cols), torch.zeros(cols)]
    outs = [t if keep else None for t, keep in zip(outs, wanted, strict=True)]
    found = same_with_any_threads(
        lambda n: calls.layer_norm_gradient(gradient, x, mean, rstd, weight, outs, num_threads=n),
        *(t for t in outs if t is not None),
    )
    # From the same moments: how well they are known is another question.
    normal = (x.double() - mean.double()[:, None]) * rstd.double()[:, None]
    g = gradient.double() * (1 if weight is None else exact[1])
    level, slope = g.mean(1, keepdim=True), (g * normal).mean(1, keepdim=True)
    exact = [
        rstd.double()[:, None] * (g - level - normal * slope),
        (gradient.double() * normal).sum(0),
        gradient.double().sum(0),
    ]
    kept = [t for t, keep in zip(exact, wanted, strict=True) if keep]
    for one, other in zip(found, kept, strict=True):
        size = float(other.nan_to_num().abs().max()) if other.numel() else 0.0
        close(one, other, 1e-4 * max(1.0, size))


def test_layer_norm_gradient_is_torchs():
    x, gradient, weight, bias = drawn(70, 96), drawn(70, 96, seed=1), drawn(96), drawn(96)
    out, mean, rstd = torch.zeros_like(x), torch.zeros(70), torch.zeros(70)
    calls.layer_norm(x, weight, bias, out, mean, rstd)()
    outs = [torch.zeros_like(x), torch.zeros(96), torch.zeros(96)]
    calls.layer_norm_gradient(gradient, x, mean, rstd, weight, outs)()
    exact = [t.double() for t in (gradient, x)]
    moments = aten.native_layer_norm(exact[1], [96], weight.double(), bias.double(), 1e-5)[1:]
    want = aten.native_layer_norm_backward(
        *exact, [96], *moments, weight.double(), bias.double(), [True] * 3
    )
    for one, other in zip(outs, want, strict=True):
        close(one, other, 5e-6)


@settings(max_examples=examples(60), deadline=None)
@given(
    rows=few_rows, cols=columns, affine=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=2, max_size=2),
)  # fmt: skip
def test_rms_norm(rows, cols, affine, wanted):
    x, gradient = drawn(rows, cols, seed=cols), drawn(rows, cols, seed=1)
    weight = drawn(cols, seed=2) if affine else None
    out, rstd = torch.zeros_like(x), torch.zeros(rows)
    found = same_with_any_threads(
        lambda n: calls.rms_norm(x, weight, out, rstd, epsilon=1e-6, num_threads=n), out, rstd
    )
    exact = x.double()
    want_rstd = (exact.square().mean(1) + 1e-6).rsqrt()
    scale = 1.0 if weight is None else weight.double()
    for one, other in zip(found, (exact * want_rstd[:, None] * scale, want_rstd), strict=True):
        close(one, other)
    outs = [torch.zeros_like(x), torch.zeros(cols)]
    outs = [t if keep else None for t, keep in zip(outs, wanted, strict=True)]
    found = same_with_any_threads(
        lambda n: calls.rms_norm_gradient(gradient, x, rstd, weight, outs, num_threads=n),
        *(t for t in outs if t is not None),
    )
    normal, g = exact * want_rstd[:, None], gradient.double() * scale
    to_x = want_rstd[:, None] * (g - normal * (g * normal).mean(1, keepdim=True))
    kept = [to_x, (gradient.double() * normal).sum(0)]
    for one, other in zip(found, [t for t, k in zip(kept, wanted, strict=True) if k], strict=True):
        size = float(other.abs().max()) if other.numel() else 0.0
        close(one, other, 2e-5 * max(1.0, size))


@settings(max_examples=examples(30), deadline=None)
@given(rows=few_rows, cols=columns | st.sampled_from([100_000]), mean=st.booleans())
def test_sums_of_rows(rows, cols, mean):
    x = drawn(min(rows, 3) if cols > 2000 else rows, cols, seed=cols) + 1
    out = torch.zeros(len(x))
    (found,) = same_with_any_threads(
        lambda n: calls.row_sums(x, out, divisor=cols if mean else 1, num_threads=n), out
    )
    close(found, x.double().mean(1) if mean else x.double().sum(1), 1e-5, 1e-6)


@settings(max_examples=examples(60), deadline=None)
@given(
    count=st.sampled_from([0, 1, 30, 700]), rows=st.sampled_from([1, 2, 50, 1000]),
    cols=st.integers(0, 130) | st.sampled_from([512]), padding=st.sampled_from([-1, 0, 1]),
)  # fmt: skip
def test_embedding(count, rows, cols, padding):
    draw = torch.Generator().manual_seed(count + rows)
    indices = torch.randint(0, rows, (count,), generator=draw)
    table, gradient = drawn(rows, cols, seed=cols), drawn(count, cols, seed=1)
    out = torch.zeros(count, cols)
    (found,) = same_with_any_threads(
        lambda n: calls.embedding(table, indices, out, num_threads=n), out
    )
    assert torch.equal(found, table[indices])
    out = torch.zeros(rows, cols)
    (found,) = same_with_any_threads(
        lambda n: calls.embedding_gradient(
            gradient, indices, out, padding_index=padding, num_threads=n
        ),
        out,
    )
    want = torch.zeros(rows, cols, dtype=torch.float64)
    kept = indices != padding
    want.index_add_(0, indices[kept], gradient.double()[kept])
    close(found, want, 1e-4)
    eager = aten.embedding_dense_backward(gradient, indices, rows, padding, False)
    assert torch.equal(found, eager)


@pytest.mark.parametrize("index", [-1, 4, 2**40])
def test_an_index_outside_is_an_error_and_nothing_is_written(index):
    table, indices, out = drawn(4, 8), torch.tensor([0, 3, index]), torch.full((3, 8), -7.0)
    with pytest.raises(RunError, match=rf"in \[0, 4\) \(got: {index} at place 2\)"):
        calls.embedding(table, indices, out)()
    assert (out == -7).all()
    with pytest.raises(RunError, match=rf"in \[0, 4\) \(got: {index} at place 2\)"):
        calls.embedding_gradient(out, indices, table)()
    assert torch.equal(table, drawn(4, 8))
