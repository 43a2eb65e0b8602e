"""The library of each level that this machine runs: equal to rounding, and pooling exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.kernels import binding, calls, loader
from hotloop.kernels.elementwise import OPERATIONS, Operation
from support import examples
from support.levels import usable_levels

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


LIBRARIES = {level.name: loader.load(level) for level in usable_levels()}
sides = st.integers(1, 100)


def by_each_level(call, *written):
    """What each level's library writes to these tensors."""
    before = [t.clone() for t in written]
    found = {}
    for name, library in LIBRARIES.items():
        for tensor, value in zip(written, before, strict=True):
            tensor.copy_(value)
        call.by(library)
        found[name] = [t.clone() for t in written]
    return found


def assert_alike(found, count):
    """As far as sums of ``count`` products of numbers of size 1 may be off (see test_products)."""
    best, *others = found.values()
    for other in others:
        for one, two in zip(best, other, strict=True):
            assert torch.isfinite(one).all()
            assert (one - two).abs().max() <= 8 * 2**-24 * (1 + count**0.5) * (1 + count)


@settings(max_examples=examples(60), deadline=None)
@given(
    m=sides, k=st.integers(1, 700), n=sides, layout=st.sampled_from(["nn", "nt", "tn", "tt"]),
    relu=st.booleans(), threads=st.integers(1, 2),
)  # fmt: skip
def test_products(m, k, n, layout, relu, threads):
    draw = torch.Generator().manual_seed(m * 7919 + k * 31 + n)
    a = torch.randn(k, m, generator=draw).t() if layout[0] == "t" else torch.randn(m, k)
    b = torch.randn(n, k, generator=draw).t() if layout[1] == "t" else torch.randn(k, n)
    out = torch.full((m, n), -7.0)
    call = calls.product(a, b, out, torch.randn(n), relu=relu, num_threads=threads)
    found = by_each_level(call, out)
    assert_alike(found, k)
    if {"x86-64-v3", "x86-64-v4"} <= found.keys():  # The same order, the same instructions.
        assert torch.equal(found["x86-64-v3"][0], found["x86-64-v4"][0])


@settings(max_examples=examples(40), deadline=None)
@given(m=sides, k=st.integers(1, 100), n=sides, kind=st.integers(0, 10))
def test_updates(m, k, n, kind):
    draw = torch.Generator().manual_seed(m * 7919 + k * 31 + n)
    a, b = torch.randn(k, m, generator=draw).t(), torch.randn(k, n, generator=draw)
    rule = binding.UpdateRule(
        kind=kind, lr=0.1, beta1=0.9, beta2=0.99, eps=0.1, weight_decay=0.01,
        bias_correction1=0.5, bias_correction2_sqrt=0.7, momentum=0.8, dampening=0.1, alpha=0.9,
        gradient_rate=0.02, moment_rate=0.05,
    )  # fmt: skip
    weight, *states = (torch.rand(m, n, generator=draw) for _ in range(3))
    fused = calls.product_update(a, b, weight, states, rule, num_threads=2)
    found = by_each_level(fused, weight, *states)
    alone = calls.update(weight, a @ b, states, rule, num_threads=2)
    for made in (found, by_each_level(alone, weight, *states)):
        best, *others = made.values()
        for other in others:  # Squares of gradients, roots and quotients: relative to their size.
            for one, two in zip(best, other, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@settings(max_examples=examples(40), deadline=None)
@given(
    n=st.integers(1, 2), c=st.integers(1, 40), o=st.integers(1, 70), h=st.integers(6, 12),
    w=st.integers(6, 12), size=st.sampled_from([3, 3, 2, 5, 6]), pad=st.integers(0, 1),
    relu=st.booleans(), pooled=st.booleans(),
)  # fmt: skip
def test_convolutions(n, c, o, h, w, size, pad, relu, pooled):
    draw = torch.Generator().manual_seed(n * 7919 + c * 31 + o)

    def images(*shape):
        made = torch.randn(*shape, generator=draw)
        return made.contiguous(memory_format=torch.channels_last)

    x, filters = images(n, c, h, w), torch.randn(o, c, size, size, generator=draw)
    out = images(n, o, h + 2 * pad - size + 1, w + 2 * pad - size + 1)
    shared = {"padding": (pad, pad), "num_threads": 2}
    forward = calls.convolve(x, filters, torch.randn(o), out, relu=relu, **shared)
    assert_alike(by_each_level(forward, out), size**2 * c)
    argmax = None
    if pooled and min(out.shape[2:]) > 1:
        out = images(n, o, out.shape[2] // 2, out.shape[3] // 2)
        argmax = torch.randint(0, 4, (n, *out.shape[2:], o), generator=draw).to(torch.uint8)
        argmax[::2, ::2, ::2] = 255
    g, gx, gw, gb = (
        images(*out.shape),
        torch.empty_like(x),
        torch.empty_like(filters),
        torch.ones(o),
    )
    to_input = calls.convolve_input_gradient(g, filters, gx, argmax, **shared)
    assert_alike(by_each_level(to_input, gx), size**2 * o)
    to_filters = calls.convolve_filter_gradient(x, g, gw, gb, argmax, **shared)
    assert_alike(by_each_level(to_filters, gw, gb), 4 * out[:, 0].numel())


@settings(max_examples=examples(40), deadline=None)
@given(rows=sides, cols=sides)
def test_layers_of_a_train_step(rows, cols):
    draw = torch.Generator().manual_seed(rows * 101 + cols)
    x, gradient, weight, out = (torch.randn(rows, cols, generator=draw) for _ in range(4))
    labels = torch.randint(0, cols, (rows,), generator=draw)
    loss, mean, rstd, sums = torch.zeros(1), torch.zeros(rows), torch.ones(rows), torch.zeros(cols)
    norm = calls.layer_norm(x, weight[0], sums.clone(), out, mean, rstd)
    assert_alike(by_each_level(norm, out, mean), 4 * cols)
    outs = [out, sums, torch.zeros(cols)]
    backward = calls.layer_norm_gradient(gradient, x, mean, mean.cos(), weight[0], outs)
    assert_alike(by_each_level(backward, *outs), 4 * rows * cols)
    for call, written in (
        (calls.cross_entropy(x, labels, loss, out), (loss, out)),
        (calls.squared_error(x, gradient, loss, out), (loss, out)),
        (calls.column_sums(x, sums, gradient), (sums,)),
        (calls.softmax(x, out, logarithm=True), (out,)),
        (calls.softmax_gradient(x, gradient, out), (out,)),
    ):
        assert_alike(by_each_level(call, *written), rows + cols)
    table = torch.zeros(cols, cols)
    rows_of = calls.embedding(weight[:1].expand(cols, cols), labels, out)
    assert_alike(by_each_level(rows_of, out), 0)
    assert_alike(by_each_level(calls.embedding_gradient(x, labels, table), table), rows)


def test_each_operation_of_an_element_wise_program():
    x, y = torch.linspace(-9, 9, 1001)[None], torch.linspace(0.1, 5, 1001)[None]
    out = torch.zeros(1, 1001)
    for name in OPERATIONS[3:]:
        operations = [Operation("load", n, n) for n in range(2)]
        operations += [Operation(name, 2, 1, 0, 0, 2.0), Operation("store", 2, 2)]
        call = calls.elementwise(operations, [x, y, out], (1, 1001))
        best, *others = by_each_level(call, out).values()
        for other in others:
            torch.testing.assert_close(best[0], other[0], rtol=1e-6, atol=1e-6)


@settings(max_examples=examples(40), deadline=None)
@given(
    c=st.integers(1, 40), h=st.integers(4, 12), w=st.integers(4, 12), kernel=st.integers(1, 3),
    last=st.booleans(), relu=st.booleans(),
)  # fmt: skip
def test_pooling_has_the_same_bits(c, h, w, kernel, last, relu):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, c, h, w).contiguous(memory_format=layout)
    shape = (2, c, h // kernel, w // kernel)
    out = torch.empty(shape).contiguous(memory_format=layout)
    argmax = torch.empty(shape, dtype=torch.uint8)
    call = calls.max_pool(x, out, argmax, kernel=(kernel, kernel), relu=relu)
    best, *others = by_each_level(call, out, argmax).values()
    for other in others:
        assert torch.equal(best[0], other[0])
        assert torch.equal(best[1], other[1])
