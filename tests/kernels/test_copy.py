"""Copies between layouts, products of many matrices, counters and draws, against torch."""

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


@st.composite
def layouts(draw):
    """A shape, and the order of its dimensions in memory, with gaps and repeated parts."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 8, 33, 70]), min_size=0, max_size=5))
    if math.prod(shape) > 200_000:
        shape = shape[:3]

    def tensor(may_repeat, dtype):
        order = draw(st.permutations(range(len(shape))))
        sizes = [shape[d] for d in order]
        gaps = [draw(st.integers(0, 2)) if n < 50 else 0 for n in sizes]
        repeats = [may_repeat and draw(st.integers(0, 5)) == 0 for _ in sizes]
        held = [1 if again else n + g for n, g, again in zip(sizes, gaps, repeats, strict=True)]
        made = (torch.randperm(math.prod(held)) % 251).to(dtype).reshape(held)
        for d, (n, again) in enumerate(zip(sizes, repeats, strict=True)):
            made = (
                made.expand([*made.shape[:d], n, *made.shape[d + 1 :]])
                if again
                else (made.narrow(d, 0, n))
            )
        return made.permute([order.index(d) for d in range(len(shape))])

    dtype = draw(st.sampled_from([torch.float32, torch.int64, torch.bool, torch.uint8]))
    return tensor(True, dtype), tensor(False, dtype)


@settings(max_examples=examples(300), deadline=None)
@given(layouts(), st.integers(1, 3))
def test_copies(pair, threads):
    source, target = pair
    around = target.untyped_storage().nbytes()
    calls.copy(source, target, element_bytes=target.element_size(), num_threads=threads)()
    assert torch.equal(source, target)
    assert target.untyped_storage().nbytes() == around


def test_what_lies_between_stays():
    held = torch.full((40, 50), 7.0)
    calls.copy(drawn(30, 40).t(), held[:, :30], num_threads=2)()
    assert bool((held[:, 30:] == 7).all())
    assert torch.equal(held[:, :30], drawn(30, 40).t())


@pytest.mark.parametrize("shape", [(64, 28, 4, 32), (300, 400), (3, 200, 300)])
def test_large_copies_with_any_threads(shape):
    source = drawn(*shape).transpose(-1, -2) if len(shape) < 4 else drawn(*shape).transpose(1, 2)
    target = torch.zeros(source.shape)
    (found,) = same_with_any_threads(lambda n: calls.copy(source, target, num_threads=n), target)
    assert torch.equal(found, source)


def test_of_no_elements_and_of_too_many_dimensions():
    calls.copy(torch.zeros(0, 3), torch.zeros(0, 3))()
    call = calls.copy(torch.zeros(2), torch.zeros(2))
    call.arguments.num_dims = 9
    with pytest.raises(RunError, match="8 dimensions"):
        call()
    with pytest.raises(RunError, match="1, 4 or 8 bytes"):
        calls.copy(torch.zeros(2), torch.zeros(2), element_bytes=2)()


sides = st.integers(1, 70) | st.sampled_from([128, 200])


@settings(max_examples=examples(60), deadline=None)
@given(batch=st.sampled_from([1, 2, 7, 40]), m=sides, n=sides, k=sides,
       turned=st.lists(st.booleans(), min_size=3, max_size=3))  # fmt: skip
def test_products_of_many_matrices(batch, m, n, k, turned):
    a = drawn(batch, k, m).mT if turned[0] else drawn(batch, m, k)
    b = drawn(batch, n, k, seed=1).mT if turned[1] else drawn(batch, k, n, seed=1)
    if turned[2]:  # Heads of one sample lie beside each other.
        a = a.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.zeros(batch, m, n)
    (found,) = same_with_any_threads(
        lambda threads: calls.batch_product(a, b, out, num_threads=threads), out
    )
    want = a.double() @ b.double()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=2e-6 * math.sqrt(k) * 4)


def test_counters():
    count = torch.tensor(2**40)
    call = calls.add_count(count, 3)
    call()
    call()
    assert count.item() == 2**40 + 6


@pytest.mark.parametrize("shape", [(1,), (5,), (64, 1000), (3, 40, 7)])
@pytest.mark.parametrize("probability", [0.0, 0.3, 0.9, 1.0])
def test_draws_are_torchs(shape, probability):
    generator = torch.Generator().manual_seed(11)
    for _ in range(4):
        # A float takes one word of the generator, a draw two.
        torch.empty(3).uniform_(generator=generator)
        state, out, wanted = generator.get_state(), torch.empty(shape), torch.empty(shape)
        calls.draw(out, state, probability, 1.5)()
        assert torch.equal(out, wanted.bernoulli_(probability, generator=generator) * 1.5)
        assert torch.equal(state, generator.get_state())


def test_draws_refuse_what_is_no_probability_and_no_state():
    state = torch.Generator().get_state()
    with pytest.raises(RunError, match="from 0 to 1"):
        calls.draw(torch.empty(3), state, 1.5)()
    with pytest.raises(RunError, match="random state"):
        calls.draw(torch.empty(3), torch.zeros_like(state), 0.5)()
