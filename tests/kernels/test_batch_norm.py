"""Batch norm and means over pixels against float64; the same bits with any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.kernels import calls
from support import examples
from support.same_bits import drawn, same_with_any_threads

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

aten = torch.ops.aten
rows_of = st.sampled_from([2, 3, 17, 127, 128, 129, 1000])
columns = st.integers(1, 70) | st.sampled_from([96, 128, 300])


def close(found, want, atol=1e-6, rtol=1e-5):
    torch.testing.assert_close(found.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=rows_of, cols=columns, affine=st.booleans(), running=st.booleans(), added=st.booleans(),
    relu=st.booleans(), offset=st.sampled_from([0.0, 100.0]),
    momentum=st.sampled_from([0.1, 0.0, 1.0]),
)  # fmt: skip
def test_forward(rows, cols, affine, running, added, relu, offset, momentum):
    x = drawn(rows, cols, seed=cols) + offset
    weight, bias = (drawn(cols, seed=n) if affine else None for n in (1, 2))
    addend = drawn(rows, cols, seed=3) if added else None
    before = [drawn(cols, seed=4), drawn(cols, seed=5).abs()] if running else [None, None]
    kept = [None if t is None else t.clone() for t in before]
    out, mean, rstd = torch.empty_like(x), torch.empty(cols), torch.empty(cols)

    def make(threads):
        for one, other in zip(kept, before, strict=True):
            if one is not None:
                one.copy_(other)
        return calls.batch_norm(
            x, weight, bias, out, mean, rstd, running=tuple(kept), momentum=momentum,
            addend=addend, relu=relu, num_threads=threads,
        )  # fmt: skip

    found = same_with_any_threads(make, out, mean, rstd)
    exact = [None if t is None else t.double() for t in (x, weight, bias, *before)]
    want = aten.native_batch_norm(*exact, True, momentum, 1e-5)
    whole = want[0] + (0 if addend is None else addend.double())
    loose = 2e-6 * (1 + offset)
    for one, other in zip(found, (whole.relu() if relu else whole, *want[1:]), strict=True):
        close(one, other, loose * max(1.0, float(want[2].max())), 1e-4 if offset else 1e-5)
    if running:  # ATen has updated them.
        close(kept[0], exact[3], loose)
        close(kept[1], exact[4], loose)


def test_moments_of_a_large_level_are_those_of_float64():
    # A difference of squares would leave nothing of a deviation of 1.
    x = drawn(5000, 48) + 1e4
    out, mean, rstd = torch.empty_like(x), torch.empty(48), torch.empty(48)
    calls.batch_norm(x, None, None, out, mean, rstd, num_threads=2)()
    close(mean, x.double().mean(0), rtol=1e-7)
    close(rstd, (x.double().var(0, correction=0) + 1e-5).rsqrt(), rtol=1e-4)


@settings(max_examples=examples(80), deadline=None)
@given(
    rows=rows_of, cols=columns, affine=st.booleans(), masked=st.sampled_from(["no", "yes", "kept"]),
    wanted=st.lists(st.booleans(), min_size=3, max_size=3),
)  # fmt: skip
def test_backward(rows, cols, affine, masked, wanted):
    x, gradient = drawn(rows, cols, seed=cols), drawn(rows, cols, seed=1)
    weight = drawn(cols, seed=2) if affine else None
    mask = None if masked == "no" else drawn(rows, cols, seed=3).relu()
    mean = x.mean(0)
    rstd = (x.var(0, correction=0) + 1e-5).rsqrt()
    left = torch.zeros_like(x) if masked == "kept" else None
    outs = [torch.zeros_like(x), torch.zeros(cols), torch.zeros(cols)]
    outs = [t if keep else None for t, keep in zip(outs, wanted, strict=True)]
    found = same_with_any_threads(
        lambda n: calls.batch_norm_gradient(
            gradient, x, mean, rstd, weight, outs, mask=mask, masked_gradient=left, num_threads=n
        ),
        *(t for t in (*outs, left) if t is not None),
    )
    g = gradient if mask is None else gradient * (mask > 0)
    exact = [None if t is None else t.double() for t in (g, x, weight)]
    want = aten.native_batch_norm_backward(
        *exact, None, None, mean.double(), rstd.double(), True, 1e-5, [True] * 3
    )
    kept = [t for t, keep in zip(want, wanted, strict=True) if keep]
    for one, other in zip(found, [*kept, *([] if left is None else [g])], strict=True):
        close(one, other, 2e-5 * max(1.0, float(other.abs().max())))


def test_images_with_adjacent_channels():
    x = drawn(3, 20, 5, 7).contiguous(memory_format=torch.channels_last)
    out, mean, rstd = torch.empty_like(x), torch.empty(20), torch.empty(20)
    calls.batch_norm(x, None, None, out, mean, rstd)()
    close(out, aten.native_batch_norm(x.double(), *[None] * 4, True, 0.1, 1e-5)[0])


@settings(max_examples=examples(40), deadline=None)
@given(n=st.integers(1, 5), cols=columns, h=st.integers(1, 12), w=st.integers(1, 12),
       masked=st.booleans())  # fmt: skip
def test_means_over_pixels(n, cols, h, w, masked):
    x = drawn(n, cols, h, w).contiguous(memory_format=torch.channels_last)
    out = torch.empty(n, cols)
    (found,) = same_with_any_threads(
        lambda k: calls.image_means(x, out, divisor=h * w, num_threads=k), out
    )
    close(found, x.double().mean((2, 3)), 1e-6)
    spread = torch.empty_like(x)
    gradient = drawn(n, 2 * cols, seed=1)[:, :cols]
    (found,) = same_with_any_threads(
        lambda k: calls.image_means_gradient(
            gradient, spread, x if masked else None, divisor=h * w, num_threads=k
        ),
        spread,
    )
    want = (gradient / (h * w))[:, :, None, None].expand_as(x)
    assert torch.equal(found, want * (x > 0) if masked else want)
