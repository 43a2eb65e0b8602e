"""Random numbers of chunks: functions of their key, and good enough for noise."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from hotloop import Plan, kernels
from hotloop.data.hashing import GOLDEN, mix, random_floats, scrambled, signed
from hotloop.kernels import calls
from hotloop.parallel import ParallelStep

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

CROSS = nn.functional.cross_entropy
# Steps that are recorded, before workers run any.
RECORDED = 2


def key(*words: int) -> torch.Tensor:
    return torch.tensor([signed(mix(*words))])


def uniform(a_key: torch.Tensor, number: int, shape: Any, half: int = 0) -> torch.Tensor:
    """What the kernel computes, in torch."""
    stream = scrambled(a_key + signed(mix(number, half)))
    counters = torch.arange(math.prod(shape), dtype=torch.int64) ^ stream
    return random_floats(scrambled(counters * signed(GOLDEN))).reshape(list(shape))


def drawn(
    a_key: torch.Tensor, number: int, shape: Any, kind: str = "uniform", a: float = 0, b: float = 1
) -> torch.Tensor:
    out = torch.full(shape, -7.0)
    calls.random(a_key, out, (mix(number, 0), mix(number, 1)), kind, a, b)()
    return out


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 0), (4, 33, 7)])
def test_the_kernel_draws_what_the_hash_says(shape: Any) -> None:
    one, other = uniform(key(3), 2, shape), uniform(key(3), 2, shape, 1)
    assert torch.equal(drawn(key(3), 2, shape), one)
    torch.testing.assert_close(drawn(key(3), 2, shape, "uniform", -2.0, 3.0), one * 5 - 2)
    assert torch.equal(drawn(key(3), 2, shape, "below", 0.3), (one < 0.3).float())
    normal = torch.sqrt(-2.0 * torch.log(1.0 - one)) * torch.cos(2.0 * math.pi * other)
    torch.testing.assert_close(
        drawn(key(3), 2, shape, "normal", 1.5, 0.25), normal * 0.25 + 1.5, rtol=1e-5, atol=1e-6
    )


def test_uniform_numbers_fill_their_range_evenly() -> None:
    draws = drawn(key(1), 0, (512, 512))
    assert 0 <= draws.min() < 1e-4
    assert 1 - 1e-4 < draws.max() < 1
    counts = torch.histc(draws, 64, 0.0, 1.0)
    expected = draws.numel() / 64
    # Chi-squared of 63 degrees: mean 63, deviation 11; six of them.
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * math.sqrt(2 * 63)


def test_normal_numbers_have_the_moments_of_the_law() -> None:
    draws = drawn(key(2), 0, (512, 512), "normal").double()
    near = 6 / 512
    assert abs(draws.mean()) < near
    assert abs(draws.var() - 1) < near * math.sqrt(2)
    assert abs((draws**4).mean() - 3) < near * math.sqrt(96)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((key(1, 0), 0), (key(1, 1), 0)),  # Two chunks of a step.
        ((key(1, 0), 0), (key(2, 0), 0)),  # The same chunk of two steps.
        ((key(1, 0), 0), (key(1, 0), 1)),  # Two operations.
    ],
)
def test_streams_are_not_alike(one: Any, other: Any) -> None:
    a, b = (drawn(*which, (512, 512)).double() - 0.5 for which in (one, other))
    for shift in (0, 1, 7):
        correlation = (a * b.roll(shift, 1)).mean() * 12
        assert abs(correlation) < 6 / 512
    neighbours = (a[:, 1:] * a[:, :-1]).mean() * 12
    assert abs(neighbours) < 6 / 512


class FromKey(nn.Module):
    """Dropout as the chunk of a key has it."""

    def __init__(self, p: float, number: int) -> None:
        super().__init__()
        self.p, self.number = p, number
        self.key = torch.zeros(1, dtype=torch.int64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = uniform(self.key, self.number, x.shape) < 1 - self.p
        return torch.where(keep, x / (1 - self.p), 0.0)


def test_training_is_what_plain_pytorch_computes_with_the_same_masks() -> None:
    """Forward and backward see one mask; another for each chunk and step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.25),
                          nn.Linear(40, 3)).train()  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(64, 12), torch.randint(0, 3, (64,))
    plan = Plan().replace({"parallel.num_workers": 2, "parallel.chunk_size": 16})
    step = ParallelStep(model, CROSS, optimizer, (x, y), plan)
    for _ in range(RECORDED):
        step(x, y)
    plain = copy.deepcopy(model)
    plain[1], plain[3] = FromKey(0.5, 1), FromKey(0.25, 2)
    its_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(5):
        state = torch.get_rng_state()
        loss = step(x, y).item()
        torch.set_rng_state(state)
        word = int(torch.randint(-(2**63), 2**63 - 1, (1,)))
        its_optimizer.zero_grad()
        total = 0.0
        for chunk, (a, b) in enumerate(zip(x.split(16), y.split(16), strict=True)):
            plain[1].key = plain[3].key = key(word, chunk)
            part = CROSS(plain(a), b) / 4
            part.backward()
            total += part.item()
        its_optimizer.step()
        assert loss == pytest.approx(total, rel=1e-5)
        for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    assert step.path == "parallel", step.reason
    step.close()


class Noisy(nn.Module):
    """Each operation that a key can stand in for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 5)
        self.maps, self.alpha = nn.Dropout2d(0.25), nn.AlphaDropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.alpha(self.maps(self.conv(x)).flatten(1))
        z = z + 0.1 * torch.randn_like(z) + 0.1 * torch.rand_like(z)
        z = z + 0.1 * torch.randn(z.shape) + 0.1 * torch.rand(z.shape)
        z = z * torch.bernoulli(torch.sigmoid(z.detach()))
        z = z + torch.empty_like(z).normal_(0.0, 0.1) + torch.empty_like(z).uniform_(-0.1, 0.1)
        # Into memory that others read, and in another precision.
        canvas = torch.zeros_like(z)
        canvas[:, :8].normal_(0.0, 0.1)
        z = z + canvas + 0.1 * torch.rand(z.shape[1], dtype=torch.float64).float()
        return self.linear(z)


class Foreign(nn.Module):
    """One that it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.rrelu(x.flatten(1), training=True))


def test_all_kinds_of_noise_are_the_same_for_any_number_of_workers() -> None:
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 5, (64,))
    results = []
    for workers in (1, 2, 3):
        torch.manual_seed(0)
        model = Noisy().train()
        plan = Plan().replace({"parallel.num_workers": workers, "parallel.chunk_size": 8})
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        step = ParallelStep(model, CROSS, optimizer, (x, y), plan)
        losses = [step(x, y).item() for _ in range(30)]
        assert step.path == "parallel", step.reason
        assert losses[-1] < losses[0]
        results.append((losses, model.state_dict()))
        step.close()
    for losses, weights in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(weights[n], t) for n, t in results[0][1].items())


def test_what_draws_otherwise_takes_the_plain_path() -> None:
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 5, (64,))
    model = Foreign().train()
    plan = Plan().replace({"parallel.num_workers": 2})
    step = ParallelStep(model, CROSS, torch.optim.Adam(model.parameters()), (x, y), plan)
    for _ in range(RECORDED + 1):
        step(x, y)
    assert step.path == "plain"
    assert "draws from one generator, chunks run in any order" in step.reason
