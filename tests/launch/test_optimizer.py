"""Adam by the fused kernel is the Adam that torch runs by itself, and only where it can be."""

import copy

import pytest
import torch

from hotloop.launch import optimizer


@pytest.fixture
def fused():
    """The replacement, installed."""
    optimizer.install()
    optimizer.updates.calls = optimizer.updates.fused = 0
    yield optimizer.updates
    optimizer.remove()


def train(kind, seed=0, steps=20, model=None, **options):
    """Weights, optimizer state and losses after some steps on data with a signal."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = model or torch.nn.Sequential(
        torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5)
    )
    x = torch.randn(64, 20, generator=generator)
    y = (x[:, :5] * 2).argmax(1)
    made = kind(model.parameters(), **options)
    losses = []
    for _ in range(steps):
        made.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        made.step()
        losses.append(loss.item())
    return model, made, losses


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.01, "weight_decay": 0.1},
        {"amsgrad": True, "betas": (0.8, 0.95)},
        {"maximize": True, "eps": 1e-6},
    ],
)
def test_the_same_losses_and_state(fused, kind, options):
    model, made, losses = train(kind, **options)
    assert fused.fused == fused.calls == 20
    optimizer.remove()
    plain_model, plain, expected = train(kind, **options)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    a, b = made.state_dict(), plain.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for key in a["state"]:
        assert a["state"][key].keys() == b["state"][key].keys()
        assert a["state"][key]["step"] == b["state"][key]["step"]
    plain.load_state_dict(copy.deepcopy(a))
    plain.step()


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}, {"foreach": False}])
def test_the_scripts_choice_stays(fused, options):
    train(torch.optim.Adam, steps=2, **options)
    assert (fused.calls, fused.fused) == (2, 0)


def test_other_parameters_take_torchs_way(fused):
    p = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    made = torch.optim.Adam([p])
    p.sum().backward()
    made.step()
    assert (fused.calls, fused.fused) == (1, 0)


@pytest.mark.parametrize(
    ("shape", "gradient"),
    [
        ((6, 4), lambda g: g.t().contiguous().t()),
        ((2, 3, 4, 5), lambda g: g.contiguous(memory_format=torch.channels_last)),
    ],
)
def test_gradients_laid_out_otherwise(fused, shape, gradient):
    """The fused kernel walks memory: another layout would give another result."""
    results = []
    for replaced in (True, False):
        if not replaced:
            optimizer.remove()
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape))
        made = torch.optim.Adam([p], lr=0.1)
        for _ in range(3):
            p.grad = gradient(torch.randn(shape))
            made.step()
        results.append(p.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert fused.fused == 0


def test_a_channels_last_model_is_fused(fused):
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
    made = torch.optim.Adam(layer.parameters())
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    layer(x).square().mean().backward()
    made.step()
    assert fused.calls == 1


def test_a_learning_rate_that_is_a_tensor(fused):
    train(torch.optim.Adam, steps=2, lr=torch.tensor(0.01))
    assert (fused.calls, fused.fused) == (2, 0)


def test_it_is_torchs_again_afterwards():
    import importlib

    module = importlib.import_module("torch.optim.adam")
    before = module.adam
    optimizer.install()
    optimizer.install()
    assert module.adam is not before
    optimizer.remove()
    optimizer.remove()
    assert module.adam is before
