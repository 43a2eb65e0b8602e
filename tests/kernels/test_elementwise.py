"""Element-wise programs: each operation against torch in float64, and programs against torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop import kernels
from hotloop.errors import RunError
from hotloop.kernels import calls
from hotloop.kernels.elementwise import OPERATIONS, Operation
from support import examples
from support.same_bits import drawn, same_with_any_threads

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

F = torch.nn.functional
ONE = {
    "neg": torch.neg, "abs": torch.abs, "sqr": torch.square, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "exp": torch.exp, "log": torch.log,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf, "relu": torch.relu,
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
TWO = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "max": torch.maximum,
    "min": torch.minimum, "gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le,
    "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1e-39, 3.4e38, -3.4e38, 1.0]
# 1 + erf(x) of near numbers, and what becomes 0 where 1 / (1 + e^-x) is below float32's numbers.
ABSOLUTE = {"gelu": 5e-7, "gelu_tanh": 5e-7, "sigmoid": 3e-39, "silu": 3e-37}


def every_size(count=100_003):
    """Numbers of every exponent, of usual sizes, and special ones."""
    bits = torch.randint(
        -(2**31), 2**31 - 1, (count // 2,), generator=torch.Generator().manual_seed(3)
    )
    usual = drawn(count // 2, scale=4.0)
    return torch.cat([bits.int().view(torch.float32), usual, torch.tensor(SPECIAL)])


def run(operations, *tensors, threads=1):
    shape = tensors[-1].shape
    calls.elementwise(operations, tensors, (shape[0], shape[1]), num_threads=threads)()
    return tensors[-1]


def one(name, x, constant=0.0):
    operations = [
        Operation("load", 0, 0), Operation(name, 1, 0, constant=constant), Operation("store", 1, 1)
    ]  # fmt: skip
    return run(operations, x[None], torch.zeros(1, len(x)))[0]


def assert_near(found, want, ulps, absolute=0.0):
    """Within so many units of the last place, as far as float32 has numbers; NaN where it has."""
    limit = torch.finfo(torch.float32)
    nan = want.isnan()
    assert torch.equal(found.isnan(), nan)
    rounded = want.float()
    infinite = rounded.isinf() & ~nan
    sure = infinite & (want.abs() > limit.max * 1.000001)
    assert torch.equal(found[sure], rounded[sure])
    finite = ~nan & ~infinite & (want.abs() < limit.max * 0.99999)
    error = (found.double() - want)[finite].abs()
    unit = 2.0 ** (want[finite].abs().clamp(limit.tiny).log2().floor() - 23)
    worst = ((error - absolute).clamp(0) / unit).max()
    assert worst <= ulps, float(worst)


@pytest.mark.parametrize("name", sorted(ONE))
def test_one_operand(name):
    x = every_size()
    want = ONE[name](x.double())
    infinite = ONE[name](x).isnan() & (name != "gelu")  # torch has NaN for gelu of infinity.
    want = torch.where(infinite, math.nan, want)
    assert_near(one(name, x), want, 3, ABSOLUTE.get(name, 0.0))


@pytest.mark.parametrize("constant", [None, 0.5, 0.0, math.nan, -math.inf])
@pytest.mark.parametrize("name", sorted(TWO))
def test_two_operands(name, constant):
    x, y = every_size(5000), every_size(5000).flip(0)
    y[:50] = x[:50]
    operations = [Operation("load", 0, 0), Operation("load", 7, 1)]
    operations.append(Operation(name, 3, 0, 7 if constant is None else -1, constant=constant or 0))
    out = run([*operations, Operation("store", 2, 3)], x[None], y[None], torch.zeros(1, len(x)))[0]
    other = y if constant is None else torch.tensor(constant)
    torch.testing.assert_close(out, TWO[name](x, other).float(), rtol=0, atol=0, equal_nan=True)
    if constant is not None:
        operations[-1] = Operation(name, 3, -1, 7, constant=constant)
        program = [*operations, Operation("store", 2, 3)]
        out = run(program, x[None], y[None], torch.zeros(1, len(x)))[0]
        want = TWO[name](other, y).float()
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 5, 12, -1, -2, -3])
def test_powers(exponent):
    x = torch.cat([drawn(1000), torch.tensor(SPECIAL)])
    want = x.double() ** exponent
    found = one("pow", x, exponent)
    usual = want.abs() < 1e30
    usual &= want.abs() > 1e-30
    assert_near(found[usual], want[usual], 8)
    assert torch.equal(found.isnan(), (x**exponent).isnan())


def test_threshold_select_fma_and_constants():
    x, y, z = (every_size(3000).roll(n) for n in (0, 1, 5))
    z[::2] = 0
    out = torch.zeros(1, len(x))
    loads = [Operation("load", n, n) for n in range(3)]
    tensors = x[None], y[None], z[None], out

    def result(*operations):
        return run([*loads, *operations, Operation("store", 3, 4)], *tensors)[0].clone()

    found = result(Operation("threshold", 4, 0, 1, constant=0.25))
    torch.testing.assert_close(
        found, torch.ops.aten.threshold_backward(x, y, 0.25), rtol=0, atol=0, equal_nan=True
    )
    found = result(Operation("select", 4, 0, 1, 2))
    torch.testing.assert_close(found, torch.where(z.bool(), x, y), rtol=0, atol=0, equal_nan=True)
    found = result(Operation("select", 4, 0, -1, 2, constant=2.5))
    assert (found[z == 0] == 2.5).all()
    usual = (x.abs() < 1e9) & (y.abs() < 1e9) & (z.abs() < 1e9)
    found = result(Operation("fma", 4, 0, 1, 2))
    want = x.double() * y.double() + z.double()
    error = (found - want).abs()
    assert (error <= 2e-7 * ((x * y).double().abs() + z.abs()) + 1e-44)[usual].all()
    assert (result(Operation("constant", 4, constant=1.5)) == 1.5).all()
    assert (run([Operation("store", 0, -1, constant=3.0)], out) == 3).all()


def repeated(rows, cols, kind):
    """A tensor that is repeated to the shape, or laid out in an unusual way."""
    seed = rows * 7 + cols
    if kind == "transposed":
        return drawn(cols, rows, seed=seed).t()
    if kind == "strided":
        return drawn(rows, cols + 3, seed=seed)[:, :cols]
    sizes = {"whole": (rows, cols), "row": (cols,), "column": (rows, 1), "scalar": ()}
    return drawn(*sizes[kind], seed=seed)


@settings(max_examples=examples(120), deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 64, 300]),
    cols=st.integers(0, 40) | st.sampled_from([511, 512, 513, 1500]),
    kinds=st.lists(
        st.sampled_from(["whole", "row", "column", "scalar", "transposed", "strided"]),
        min_size=3, max_size=3,
    ),
    out_kind=st.sampled_from(["whole", "transposed", "strided"]),
)  # fmt: skip
def test_tensors_are_repeated_as_in_torch(rows, cols, kinds, out_kind):
    x, y, z = (repeated(rows, cols, kind) for kind in kinds)
    out, kept = (
        repeated(rows, cols, out_kind).clone(memory_format=torch.preserve_format) for _ in range(2)
    )
    program = [
        Operation("load", 0, 0), Operation("load", 1, 1), Operation("add", 2, 0, 1),
        Operation("store", 4, 2), Operation("load", 3, 2), Operation("mul", 2, 2, 3),
        Operation("relu", 2, 2), Operation("store", 3, 2),
    ]  # fmt: skip
    tensors = [x, y, z, out, kept]

    def make(threads):
        return calls.elementwise(program, tensors, (rows, cols), num_threads=threads)

    found = []
    for threads in (1, 2, 3):
        out.fill_(-7), kept.fill_(-7)
        make(threads)()
        found.append((out.clone(), kept.clone()))
    for made, between in found:
        total = torch.broadcast_to(x + y, (rows, cols))
        assert torch.equal(made, (total * z).relu().expand(rows, cols))
        assert torch.equal(between, total)


def test_in_place_and_registers_that_are_memory():
    x, y = drawn(40, 100), drawn(40, 100, seed=1)
    swapped, other = x.clone(), y.clone()
    program = [
        Operation("load", 0, 0), Operation("load", 1, 1),
        Operation("store", 0, 1), Operation("store", 1, 0),
    ]  # fmt: skip
    run(program, swapped, other)
    assert torch.equal(swapped, y)
    assert torch.equal(other, x)
    a, b = x.clone(), torch.zeros(40, 100)
    program = [
        Operation("load", 0, 0), Operation("mul", 1, 0, constant=2.0), Operation("store", 0, 1),
        Operation("add", 2, 0, 1), Operation("store", 1, 2),
    ]  # fmt: skip
    run(program, a, b)
    assert torch.equal(a, x * 2)
    assert torch.equal(b, x + x * 2)
    # Stored twice: the first value is still what its register has.
    program = [
        Operation("load", 0, 0), Operation("exp", 1, 0), Operation("store", 1, 1),
        Operation("neg", 2, 0), Operation("store", 1, 2), Operation("add", 3, 1, 2),
        Operation("store", 2, 3),
    ]  # fmt: skip
    first, last = torch.zeros(40, 100), torch.zeros(40, 100)
    run(program, x, first, last)
    assert torch.equal(first, -x)
    torch.testing.assert_close(last, x.exp() - x)


def test_a_large_program_has_the_same_bits_with_any_threads():
    x, bias, out = drawn(300, 257), drawn(257), torch.zeros(300, 257)
    program = [Operation("load", 0, 0), Operation("load", 1, 1), Operation("add", 0, 0, 1)]
    for name in ("tanh", "exp", "gelu", "sigmoid", "log"):
        program.append(Operation(name, 0, 0))
    program.append(Operation("store", 2, 0))
    (found,) = same_with_any_threads(
        lambda n: calls.elementwise(program, [x, bias, out], (300, 257), num_threads=n), out
    )
    want = F.gelu((x + bias).double().tanh().exp()).sigmoid().log()
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        ([Operation("add", 0, 1, 2)], "operation 0 .* reads a register that nothing wrote"),
        ([Operation("load", 0, 9)], "operation 0 .* needs a tensor that is there"),
        ([Operation("load", 16, 0)], "operation 0 .* a register from 0 to 15"),
        ([Operation("load", 0, 0), Operation("store", 2, 0)], "1 .* tensor that is repeated"),
        ([Operation("load", 0, 0), Operation("pow", 0, 0, constant=0.5)], "1 .* whole number"),
        ([Operation("constant", 0)] * 257, "at most 256 operations"),
    ],
)
def test_a_program_that_cannot_run_is_an_error(operations, words):
    tensors = drawn(3, 4), torch.zeros(3, 4), torch.zeros(4)
    call = calls.elementwise(operations, tensors, (3, 4))
    with pytest.raises(RunError, match=words):
        call()


def test_what_is_not_a_program_at_all():
    with pytest.raises(ValueError, match="must fit"):
        calls.elementwise([], [drawn(3, 5)], (3, 4))
    call = calls.elementwise([Operation("constant", 0)], [], (3, 4))
    call.keep[2][0].opcode = len(OPERATIONS)
    with pytest.raises(RunError, match="not known"):
        call()
