"""Products of factors rounded to bfloat16: against torch's rounding, and inside a step."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.graph.rounding import rounds_products
from hotloop.kernels import calls
from hotloop.kernels.binding import UpdateRule
from hotloop.kernels.update_kinds import UPDATE_KINDS as KINDS
from hotloop.train.zoo import build_model
from support import examples

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def products_in_bfloat16():
    if not rounds_products():
        pytest.skip("this processor has no products in bfloat16")


sides = st.integers(1, 150)


def factor(draw, rows, cols, turned, padding):
    if turned:
        return torch.randn(cols, rows + padding, generator=draw)[:, :rows].t()
    return torch.randn(rows, cols + padding, generator=draw)[:, :cols]


def product(a, b, *after, relu=False, num_threads=1):
    out = torch.full((a.shape[0], b.shape[1]), -7.0)
    calls.product(a, b, out, *after, relu=relu, num_threads=num_threads, bfloat16=True)()
    return out


@settings(max_examples=examples(150), deadline=None)
@given(
    m=sides, k=st.integers(1, 2200), n=sides, layout=st.sampled_from(["nn", "nt", "tn", "tt"]),
    after=st.sampled_from(["nothing", "bias", "bias and relu", "relu", "mask"]),
    threads=st.integers(1, 3), padding=st.integers(0, 3),
)  # fmt: skip
def test_a_product_is_that_of_rounded_factors(m, k, n, layout, after, threads, padding):
    draw = torch.Generator().manual_seed(m * 7919 + k * 31 + n)
    a = factor(draw, m, k, layout[0] == "t", padding)
    b = factor(draw, k, n, layout[1] == "t", padding)
    bias = torch.randn(n, generator=draw) if "bias" in after else None
    mask = torch.randn(m, n, generator=draw) if after == "mask" else None
    relu = "relu" in after
    out = product(a, b, bias, mask, relu=relu, num_threads=threads)
    rounded_a, rounded_b = a.bfloat16().double(), b.bfloat16().double()
    expected = rounded_a @ rounded_b
    if bias is not None:
        expected += bias
    if relu:
        expected = expected.relu()
    if mask is not None:
        expected = torch.where(mask > 0, expected, 0.0)
    # The bound of float32 sums (test_products): a factor that was not rounded, or rounded another
    # way, is 2 ** -9 of a term away, many times as much.
    size = rounded_a.abs() @ rounded_b.abs() + 1
    assert ((out.double() - expected).abs() <= 4 * 2**-24 * k**0.5 * size).all()
    # A result does not depend on the number of threads.
    assert torch.equal(out, product(a, b, bias, mask, relu=relu, num_threads=4 - threads))


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_each_number_is_rounded_as_torch_rounds(layout):
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (97, 60), generator=draw, dtype=torch.int64)
    bits[:, ::3] = bits[:, ::3] & ~0xFFFF | 0x8000  # Half-way between two: to the even one.
    values = bits.to(torch.int32).view(torch.float32)
    # What the instruction takes for zero: below the least normal number.
    values = torch.where(values.abs() < 2.0**-126, 1.0, values)
    values = torch.where(values.isfinite(), values, 2.0)
    one = torch.eye(60)
    a = values.t().contiguous().t() if layout[0] == "t" else values
    b = one.t().contiguous().t() if layout[1] == "t" else one
    torch.testing.assert_close(product(a, b), values.bfloat16().float(), rtol=0, atol=0)


def test_nan_and_infinity_stay():
    a = torch.randn(20, 30)
    a[3, 4], a[5, 6] = float("nan"), float("inf")
    out = product(a, torch.rand(40, 30).t(), relu=True)
    assert out[3].isnan().all()
    assert out[5].isinf().all()
    assert out[:3].isfinite().all()


@settings(max_examples=examples(60), deadline=None)
@given(
    m=sides, k=st.integers(1, 130), n=sides, kind=st.sampled_from(sorted(KINDS)),
    layout=st.sampled_from(["nn", "nt", "tn", "tt"]), threads=st.integers(1, 3),
)  # fmt: skip
def test_a_fused_update_is_that_of_its_gradient(m, k, n, kind, layout, threads):
    draw = torch.Generator().manual_seed(m * 7919 + k * 31 + n)
    a, b = (factor(draw, *s, t == "t", 0) for s, t in zip(((m, k), (k, n)), layout, strict=True))
    rule = UpdateRule(kind=KINDS[kind], first_step=0, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3,
                      weight_decay=0.01, bias_correction1=0.5, bias_correction2_sqrt=0.7,
                      momentum=0.8, dampening=0.1, alpha=0.9)  # fmt: skip
    tensors = [torch.rand(m, n, generator=draw) for _ in range(3)]

    def fused(num_threads):
        w, s1, s2 = (t.clone() for t in tensors)
        calls.product_update(a, b, w, (s1, s2), rule, num_threads=num_threads, bfloat16=True)()
        return w, s1, s2

    w, s1, s2 = (t.clone() for t in tensors)
    gradient = product(a, b)
    calls.update(w, gradient, (s1, s2), rule)()
    found = fused(threads)
    for one, other in zip(found, (w, s1, s2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, fused(4 - threads), strict=True):
        assert torch.equal(one, other)


def test_a_step_in_bfloat16_follows_float32_and_autocast():
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (320,), generator=draw)
    x = torch.rand(10, 784, generator=draw)[y] + 0.3 * torch.rand(320, 784, generator=draw)
    torch.manual_seed(0)
    model = build_model("small")
    losses = {}
    for precision, mode in (("float32", "always"), ("bfloat16", "always"), ("bfloat16", "off")):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3)
        plan = hotloop.Plan().replace({"step.precision": precision, "step.compile": mode})
        step = hotloop.compile_step(twin, F.cross_entropy, optimizer, (x[:64], y[:64]), plan)
        losses[precision, mode] = torch.stack(
            [step(x[s : s + 64], y[s : s + 64]) for _ in range(4) for s in range(0, 320, 64)]
        )
        if precision == "bfloat16" and mode == "always":
            assert step.path == "compiled", step.reason
            kinds = {o.kind for o in step.operations() if o.kernel == "bfloat16"}
            assert "product and update" in kinds
            assert {t.dtype for t in (*twin.parameters(), *twin.buffers())} == {torch.float32}
    own, exact = losses["bfloat16", "always"], losses["float32", "always"]
    assert not torch.equal(own, exact)
    torch.testing.assert_close(own, exact, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(own, losses["bfloat16", "off"], rtol=0.02, atol=2e-3)
    # Results are not rounded again, as autocast does: nearer to float32.
    assert (own - exact).abs().mean() < (losses["bfloat16", "off"] - exact).abs().mean()


def test_convolutions_keep_torchs_autocast():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    plan = hotloop.Plan().replace({"step.precision": "bfloat16", "step.compile": "always"})
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y), plan)
    for _ in range(4):  # The first two show what the step computes in bfloat16.
        step(x, y)
    assert (step.path, step.precision) == ("compiled", "bfloat16"), step.reason
    assert step.operations() == []
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.cross_entropy(copy.deepcopy(model)(x).float(), y)
    assert step(x, y).item() == pytest.approx(expected.item(), rel=1e-3)
