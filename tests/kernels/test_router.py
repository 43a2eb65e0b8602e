"""The routed products against torch's own, on drawn shapes, layouts and variants."""

import contextlib
import itertools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.kernels.router import KERNELS, ProductRouter, ProductUse, product_router
from hotloop.kernels.torch_settings import are_products_exact
from support import examples

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="no kernels here")
# Calls that are timed, so that each kernel makes the product.
TURNS = 4


class Forced:
    """The router with all products taken, and a kernel that is known beforehand for a product."""

    def __init__(self, router: ProductRouter) -> None:
        self.router = router
        self.products = router.products
        self.remove = router.remove

    def install(self, known=()):
        self.router.install(known, least_work=1)

    def calls(self):
        return sum(use.calls for use in self.products())


@pytest.fixture(scope="module")
def made():
    """The router of this process."""
    return Forced(product_router())


@pytest.fixture
def router(made):
    """A router of all sizes, installed, that knows nothing."""
    made.router.forget()
    made.install()
    yield made
    made.remove()


def close(found, expected, depth):
    """Equal to the rounding of sums of ``depth`` float32 products."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * (depth + 4), equal_nan=True)


def draw_matrix(draw, *shape):
    """A float32 tensor of that shape in one of the ways that programs make one."""
    kind = draw(st.sampled_from(["plain", "turned", "slice", "step", "expanded", "offset"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    *batch, rows, columns = shape
    if kind == "turned":
        return torch.randn(*batch, columns, rows, generator=generator).transpose(-1, -2)
    if kind == "slice":
        return torch.randn(*batch, rows, columns + 3, generator=generator)[..., 1 : columns + 1]
    if kind == "step":
        return torch.randn(*batch, rows, 2 * columns, generator=generator)[..., ::2]
    if kind == "expanded":
        return torch.randn(*batch, 1, columns, generator=generator).expand(*batch, rows, columns)
    if kind == "offset":
        return torch.randn(*batch, rows + 1, columns, generator=generator)[..., 1:, :]
    return torch.randn(*batch, rows, columns, generator=generator)


SIZES = st.sampled_from([0, 1, 1, 2, 3, 7, 16, 33, 64])


@st.composite
def products(draw):
    """Two factors, and something to add."""
    batch = draw(st.sampled_from([(), (), (1,), (3,), (0,)]))
    m, k, n = draw(SIZES), draw(SIZES), draw(SIZES)
    a, b = draw_matrix(draw, *batch, m, k), draw_matrix(draw, *batch, k, n)
    shape = draw(st.sampled_from([(n,), (1, n), (m, n), (m, 1), (*batch, m, n), ()]))
    generator = torch.Generator().manual_seed(1)
    extra = torch.randn(shape, generator=generator)
    beta, alpha = draw(st.sampled_from([(1, 1), (0, 1), (0.5, 2), (1, -1), (2, 0), (0, 0.25)]))
    return a, b, extra, beta, alpha


def calls(a, b, extra, beta, alpha):
    """Every variant of the operators, as functions without arguments."""
    two = a.dim() == 2
    product, added = (torch.mm, torch.addmm) if two else (torch.bmm, torch.baddbmm)
    shape = (*a.shape[:-1], b.shape[-1])

    def in_place():
        target = extra.expand(shape).clone()
        return target.addmm_(a, b, beta=beta, alpha=alpha) if two else target.baddbmm_(
            a, b, beta=beta, alpha=alpha
        )  # fmt: skip

    return {
        "product": lambda: product(a, b),
        "out": lambda: product(a, b, out=torch.full(shape, 7.0)),
        "out resized": lambda: product(a, b, out=torch.empty(0)),
        "out turned": lambda: product(
            a, b, out=torch.zeros((*shape[:-2], shape[-1], shape[-2])).transpose(-1, -2)
        ),
        "added": lambda: added(extra, a, b, beta=beta, alpha=alpha),
        "added out": lambda: added(
            extra, a, b, beta=beta, alpha=alpha, out=torch.full(shape, float("nan"))
        ),
        "in place": in_place,
    }


@settings(max_examples=examples(100))
@given(products())
def test_every_variant_is_torchs(made, drawn):
    a = drawn[0]
    expected = {name: call() for name, call in calls(*drawn).items()}
    made.install()
    try:
        for _, (name, call) in itertools.product(range(TURNS), calls(*drawn).items()):
            close(call(), expected[name], a.shape[-1])
    finally:
        made.remove()


def test_a_product_is_made_by_all_and_the_fastest_is_known(router):
    a, b = torch.randn(64, 300), torch.randn(200, 300).t()
    expected = (a.double() @ b.double()).float()
    for _ in range(20):
        close(a @ b, expected, 300)
    (use,) = [p for p in router.products() if (p.m, p.k, p.n) == (64, 300, 200) and not p.adds]
    assert use.calls >= 20
    assert use.layout == "nt"
    assert set(use.kernel_s) == set(KERNELS)
    assert use.kernel_s[use.kernel] <= use.kernel_s["torch"]
    assert use.flop_per_s > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_known_choice_is_taken_and_gives_the_same(router, kernel):
    router.remove()
    a, b, bias = torch.randn(40, 90), torch.randn(90, 50), torch.randn(50)
    expected = torch.addmm(bias, a, b)
    threads = torch.get_num_threads()
    known = ProductUse(
        batch=0, m=40, k=90, n=50, layout="nn", adds=True, num_threads=threads, kernel=kernel,
        kernel_s=dict.fromkeys(KERNELS, 1.0),
    )  # fmt: skip
    router.install([known])
    close(torch.addmm(bias, a, b), expected, 90)
    (use,) = [p for p in router.products() if (p.m, p.k, p.n) == (40, 90, 50)]
    assert use.kernel == kernel
    assert use.kernel_s == dict.fromkeys(KERNELS, 1.0)


def test_a_wrong_choice_is_found_out(router):
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    threads = torch.get_num_threads()
    # For tiny factors oneDNN is several times slower, whatever was noted.
    wrong = ProductUse(
        batch=0, m=8, k=8, n=8, layout="nn", adds=False, num_threads=threads, kernel="onednn",
        kernel_s={"torch": 1.0, "onednn": 0.5},
    )  # fmt: skip
    router.install([wrong])
    for _ in range(300):
        torch.mm(a, b)
    (use,) = [p for p in router.products() if (p.m, p.k, p.n) == (8, 8, 8) and not p.adds]
    assert max(use.kernel_s.values()) < 0.1
    assert use.kernel != "onednn"


def test_gradients_are_torchs(router):
    router.remove()

    def gradients():
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(24, 70, generator=generator, requires_grad=True)
        w = torch.randn(30, 70, generator=generator, requires_grad=True)
        bias = torch.randn(30, generator=generator, requires_grad=True)
        y = torch.nn.functional.linear(x, w, bias)
        z = torch.nn.functional.linear(torch.stack([y, y.sin()]), w.t(), None)
        z.square().mean().backward()
        return x.grad, w.grad, bias.grad

    expected = gradients()
    router.install()
    for _ in range(TURNS):
        for found, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_second_derivatives_and_functional_transforms(router):
    w = torch.randn(20, 20, dtype=torch.float64)

    def energy(x):
        return (torch.tanh(x @ w.to(x.dtype))).sum()

    x = torch.randn(6, 20)
    found = torch.func.hessian(energy)(x)
    router.remove()
    torch.testing.assert_close(found, torch.func.hessian(energy)(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.int64]
)
def test_other_types_are_left_alone(router, dtype):
    a = torch.randint(-4, 5, (20, 30)).to(dtype)
    b = torch.randint(-4, 5, (30, 25)).to(dtype)
    before = router.calls()
    found = torch.mm(a, b)
    assert router.calls() == before
    router.remove()
    assert torch.equal(found, torch.mm(a, b))


def test_conjugated_and_negated_views(router):
    z = torch.randn(9, 9, dtype=torch.complex64)
    found = [torch.mm(z.conj(), z), torch.mm(z.conj().imag, z.imag)]
    router.remove()
    expected = [torch.mm(z.conj(), z), torch.mm(z.conj().imag, z.imag)]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("shapes", [((3, 4), (5, 6)), ((3,), (3, 4)), ((2, 3, 4), (4, 5))])
def test_errors_are_torchs(router, shapes):
    a, b = (torch.randn(shape) for shape in shapes)
    with pytest.raises(RuntimeError) as found:
        torch.mm(a, b)
    router.remove()
    with pytest.raises(RuntimeError) as expected:
        torch.mm(a, b)
    assert str(found.value) == str(expected.value)


def test_inference_mode_and_autocast(router):
    layer, x = torch.nn.Linear(50, 60), torch.randn(30, 50)
    with torch.inference_mode():
        inside = [layer(x) for _ in range(TURNS)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    assert half.dtype == torch.bfloat16
    router.remove()
    expected = layer(x).detach()
    for y in inside:
        close(y, expected, 50)
        assert y.is_inference()


LOWERED = {
    "float32_matmul_precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "mkldnn.matmul": (
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "none"),
    ),
    "mkldnn.enabled": (
        lambda: setattr(torch.backends.mkldnn, "enabled", False),
        lambda: setattr(torch.backends.mkldnn, "enabled", True),
    ),
}


@pytest.mark.parametrize("name", LOWERED)
def test_what_the_user_asked_of_float32_is_left_to_torch(router, name):
    if not are_products_exact():
        pytest.skip("precision is lowered for all tests")
    lower, restore = LOWERED[name]
    a, b = torch.randn(20, 30), torch.randn(30, 20)
    before = router.calls()
    lower()
    try:
        torch.mm(a, b)
        assert router.calls() == before
    finally:
        restore()
    torch.mm(a, b)
    assert router.calls() == before + 1


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")
def test_flags_of_onednn_are_seen(router):
    a = torch.randn(20, 20)
    before = router.calls()
    with torch.backends.mkldnn.flags(enabled=False):
        torch.mm(a, a)
    assert router.calls() == before
    torch.mm(a, a)
    assert router.calls() == before + 1


def test_setters_are_given_back(router):
    router.remove()
    setters = [vars(type(torch.backends.mkldnn))["enabled"].setter]
    setters += [torch._C._set_float32_matmul_precision, torch._C._set_deterministic_algorithms]
    assert not any(hasattr(setter, "__wrapped__") for setter in setters)


def test_deterministic_algorithms_are_not_timed(router):
    a, b = torch.randn(21, 31), torch.randn(31, 23)
    expected = None
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(20):
            found = torch.mm(a, b)
            expected = found if expected is None else expected
            assert torch.equal(found, expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_models_still_work(router):
    router.remove()
    model = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.ReLU(), torch.nn.Linear(65, 9))
    x = torch.randn(17, 33)
    expected = model(x)
    router.install()
    try:
        compiled = torch.compile(model)
        for _ in range(TURNS):
            found = compiled(x)
            found.sum().backward()
            close(found.detach(), expected.detach(), 65)
    finally:
        router.remove()


def test_addmm_goes_back_to_torch_where_the_detour_does_not_pay(made):
    made.router.forget()
    made.router.install([])
    try:
        a, bias = torch.randn(4, 4), torch.randn(4)
        expected = bias + a @ a
        for _ in range(600):
            found = torch.addmm(bias, a, a)
        torch.testing.assert_close(found, expected)
        assert made.router._addmm is None
    finally:
        made.remove()


def test_a_result_in_the_memory_of_a_factor_is_torchs_affair(router):
    before = router.calls()
    flat = torch.randn(128)
    out, factor = flat[:64].view(8, 8), flat[8:64].view(8, 7)
    with contextlib.suppress(RuntimeError):  # Versions of torch differ in whether they refuse.
        torch.mm(factor, torch.randn(7, 8), out=out)
    assert router.calls() == before
    torch.mm(factor, torch.randn(7, 8), out=flat[64:].view(8, 8))
    assert router.calls() == before + 1


def test_a_child_process_goes_on(router):
    """A fork inherits the router and its table, and takes turns by itself."""
    a = torch.randn(30, 40)
    expected = a @ a.t()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        same = all(torch.allclose(a @ a.t(), expected, atol=1e-4) for _ in range(30))
        os.write(write, b"y" if same else b"n")
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 1) == b"y"
