"""hotloop's own matrix product against torch, on drawn shapes, layouts and what follows it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.kernels import calls
from support import examples

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

sides = st.integers(1, 150)


@settings(max_examples=examples(150), deadline=None)
@given(
    m=sides, k=st.integers(1, 1100), n=sides, layout=st.sampled_from(["nn", "nt", "tn", "tt"]),
    after=st.sampled_from(["nothing", "bias", "bias and relu", "relu", "mask"]),
    threads=st.integers(1, 3), padding=st.integers(0, 3),
)  # fmt: skip
def test_a_product_is_torchs(
    m: int, k: int, n: int, layout: str, after: str, threads: int, padding: int
) -> None:
    draw = torch.Generator().manual_seed(m * 7919 + k * 31 + n)

    def factor(rows: int, cols: int, turned: bool) -> torch.Tensor:
        if turned:
            return torch.randn(cols, rows + padding, generator=draw)[:, :rows].t()
        return torch.randn(rows, cols + padding, generator=draw)[:, :cols]

    a, b = factor(m, k, layout[0] == "t"), factor(k, n, layout[1] == "t")
    bias = torch.randn(n, generator=draw) if "bias" in after else None
    mask = torch.randn(m, n, generator=draw) if after == "mask" else None
    out = torch.full((m, n + padding), -7.0)[:, :n]
    calls.product(a, b, out, bias, mask, relu="relu" in after, num_threads=threads)()
    expected = a.double() @ b.double()
    if bias is not None:
        expected += bias
    if "relu" in after:
        expected = expected.relu()
    if mask is not None:
        expected = torch.where(mask > 0, expected, 0.0)
    # Rounding errors of k additions grow as sqrt(k) u |a||b| (Higham and Mary, A New Approach to
    # Probabilistic Rounding Error Analysis, 2019); a product left out or counted twice is larger.
    size = a.abs().double() @ b.abs().double() + 1
    assert ((out.double() - expected).abs() <= 4 * 2**-24 * k**0.5 * size).all()
    # A result does not depend on the number of threads.
    again = torch.empty_like(out)
    calls.product(a, b, again, bias, mask, relu="relu" in after, num_threads=4 - threads)()
    assert torch.equal(out, again)


def test_nan_and_infinity_stay() -> None:
    a = torch.randn(20, 30)
    a[3, 4], a[5, 6] = float("nan"), float("inf")
    b = torch.rand(40, 30).t()
    out = torch.empty(20, 40)
    calls.product(a, b, out, relu=True)()
    assert out[3].isnan().all()
    assert out[5].isinf().all()
    assert out[:3].isfinite().all()
