"""Micro-batches make the loss and the gradient of the whole batch, or are refused."""

import copy
import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from hotloop.step.loss_weight import LossWeight

ROWS, MICRO, LENGTH, CLASSES = 30, 8, 6, 5
WEIGHTS = torch.tensor([0.1, 1.0, 10.0, 2.0, 0.5])


class Language(nn.Module):
    """Scores for each place, classes in the second dimension."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.embed(x)).transpose(1, 2)


def text(ignored=-100):
    """Lengths that go up, so that parts have unequal numbers of labels; some parts have none."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, CLASSES, (2, ROWS, LENGTH), generator=g)
    lengths = (torch.arange(ROWS) * (LENGTH + 1) // ROWS - 1).clamp(min=0)
    y[torch.arange(LENGTH) >= lengths[:, None]] = ignored
    return x, y


def rows(probabilities=False):
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 20 + [1] * 7 + [2] * 3)
    if probabilities:
        y = torch.rand(ROWS, CLASSES, generator=g).softmax(1)
    return torch.randn(ROWS, 10, generator=g), y


def numbers():
    g = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 10, generator=g), torch.rand(ROWS, CLASSES, generator=g)


def linear():
    return nn.Linear(10, CLASSES)


def logarithms():
    return nn.Sequential(nn.Linear(10, CLASSES), nn.LogSoftmax(1))


EXACT = {
    "ignored labels": (Language, F.cross_entropy, text()),
    "ignored labels, a module": (Language, nn.CrossEntropyLoss(ignore_index=0), text(0)),
    "labels beyond the classes": (Language, nn.CrossEntropyLoss(ignore_index=255), text(255)),
    "ignored labels, a partial": (
        Language, functools.partial(F.cross_entropy, ignore_index=2), text(2),
    ),
    "ignored labels, smoothed": (
        Language, nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=3), text(3),
    ),
    "weights": (linear, nn.CrossEntropyLoss(WEIGHTS), rows()),
    "weights and ignored labels": (
        Language, nn.CrossEntropyLoss(WEIGHTS, ignore_index=1, label_smoothing=0.2), text(1),
    ),
    "negative log-likelihood": (logarithms, nn.NLLLoss(WEIGHTS), rows()),
    "sum of negative log-likelihood": (logarithms, nn.NLLLoss(reduction="sum"), rows()),
    "probabilities": (linear, nn.CrossEntropyLoss(WEIGHTS), rows(probabilities=True)),
    "a sum": (linear, nn.CrossEntropyLoss(reduction="sum"), rows()),
    "a sum by a partial": (linear, functools.partial(F.mse_loss, reduction="sum"), numbers()),
    "squares": (linear, F.mse_loss, numbers()),
    "a mean by its batch": (logarithms, nn.KLDivLoss(reduction="batchmean"), numbers()),
    "logits": (linear, nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), numbers()),
    "a function of one's own": (linear, lambda out, y: (out - y).abs().mean(), numbers()),
}  # fmt: skip


def trained(make, loss_fn, data, plan, steps=6):
    """Losses and weights after some steps."""
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    step = hotloop.compile_step(model, loss_fn, optimizer, data, plan)
    losses = torch.stack([step(*data) for _ in range(steps)])
    return losses, list(model.parameters()), step


@pytest.mark.parametrize("compiles", ["off", "always"])
@pytest.mark.parametrize("name", EXACT)
def test_parts_make_the_loss_of_the_batch(name, compiles):
    make, loss_fn, data = EXACT[name]
    plan = hotloop.Plan().replace({"step.compile": "off"})
    want_losses, want, _ = trained(make, loss_fn, data, plan)
    plan = plan.replace({"memory.micro_batch_size": MICRO, "step.compile": compiles})
    losses, got, step = trained(make, loss_fn, data, plan)
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    if compiles == "always" and kernels.is_available():
        assert step.path == "compiled", step.reason


def test_a_batch_of_which_no_label_counts_is_as_in_pytorch():
    x, y = text()
    y[:] = -100
    for micro in (None, MICRO):
        plan = hotloop.Plan().replace({"memory.micro_batch_size": micro, "step.compile": "off"})
        losses, weights, _ = trained(Language, F.cross_entropy, (x, y), plan, steps=1)
        assert losses.isnan().all()
        assert not any(w.isnan().any() for w in weights)


class Contrastive(nn.Module):
    """Each row is compared with all others of its batch."""

    def forward(self, out, y):
        return F.cross_entropy(out @ out.T, torch.arange(len(out)))


REFUSED = {
    "a sum in a function": (
        linear, lambda out, y: F.cross_entropy(out, y, reduction="sum"), rows(),
    ),
    "ignored labels in a function": (
        Language, lambda out, y: F.cross_entropy(out, y, ignore_index=0), text(0),
    ),
    "a mask": (
        linear, lambda out, y: ((out - y).square() * (y > 0.7)).sum() / (y > 0.7).sum(), numbers(),
    ),
    "rows of a batch compared": (linear, Contrastive(), rows()),
    "rows that are broadcast": (
        lambda: nn.Linear(10, 1), lambda out, y: F.mse_loss(out, y[:, 0]), numbers(),
    ),
    "squares of rows that are broadcast": (
        lambda: nn.Linear(10, 1), F.mse_loss, (numbers()[0], numbers()[1][:, 0]),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("compiles", ["off", "always"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_that_parts_do_not_make_is_refused_before_anything_is_trained(name, compiles):
    make, loss_fn, data = REFUSED[name]
    plan = hotloop.Plan().replace({"memory.micro_batch_size": MICRO, "step.compile": compiles})
    model = make()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = hotloop.compile_step(model, loss_fn, optimizer, data, plan)
    with pytest.raises(hotloop.ModelError, match="must be a mean over samples") as refused:
        step(*data)
    assert len(str(refused.value).splitlines()) == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


OWN = {
    "cross entropy": lambda out, y: F.cross_entropy(out, y),
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "a count": lambda out, y: (
        F.cross_entropy(out, y, reduction="none").sum() / (y != -100).sum().float()
    ),
    "labels that are made": lambda out, y: F.cross_entropy(out, y + 0),
    "labels that are written": lambda out, y: F.cross_entropy(
        out, y.clone().masked_fill_(y < 0, -100)
    ),
    "a count that is written": lambda out, y: (
        F.cross_entropy(out, y, reduction="none").sum() / (y != -100).sum().sub_((y == 7).sum())
    ),
    "a mask": lambda out, y: (
        (F.cross_entropy(out, y, reduction="none") * (y >= 0)).sum() / (y >= 0).sum()
    ),
}


@pytest.mark.parametrize("compiles", ["off", "always"])
@pytest.mark.parametrize("name", OWN)
def test_labels_that_only_later_batches_ignore_are_found(name, compiles):
    """The first batches give no hint. Such a loss is no program, or one for batches without."""
    x, y = rows()
    plan = hotloop.Plan().replace({"memory.micro_batch_size": MICRO, "step.compile": compiles})
    torch.manual_seed(0)
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = hotloop.compile_step(model, OWN[name], optimizer, (x, y), plan)
    for _ in range(5):
        step(x, y)
    known = name in ("cross entropy", "smoothed", "a count")
    fast = kernels.is_available() and known and compiles == "always"
    assert step.path == ("compiled" if fast else "plain"), step.reason
    before = copy.deepcopy(model.state_dict())
    y = y.clone()
    y[:3] = -100
    with pytest.raises(hotloop.ModelError, match="must be a mean over samples"):
        step(x, y)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, x, labels):
        out = self.linear(x)
        return {"loss": F.cross_entropy(out, labels), "logits": out}


def test_what_cannot_be_known_is_told():
    x, y = rows()
    data = ({"x": x, "labels": y},)
    plan = hotloop.Plan().replace({"memory.micro_batch_size": MICRO})
    _, _, step = trained(WithLoss, lambda answer: answer["loss"], data, plan)
    assert any("cannot be known" in note for note in step.notes)
    assert "cannot be known" in step.reason


class Disturbing(nn.Module):
    """A loss with a buffer, a counter in a buffer, and numbers drawn by the user."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, out, y):
        self.calls += 1
        return (out - y).square().mean()


def test_the_comparison_leaves_no_trace():
    loss_fn = Disturbing()
    plan = hotloop.Plan().replace({"memory.micro_batch_size": 10, "step.compile": "off"})
    torch.manual_seed(3)
    random.seed(3)
    state = random.getstate()
    trained(linear, loss_fn, numbers(), plan, steps=2)
    assert loss_fn.calls == 2 * 3
    assert random.getstate() == state
    torch.manual_seed(1)
    linear()
    after = torch.get_rng_state()
    torch.manual_seed(1)
    trained(linear, lambda out, y: (out - y).square().mean(), numbers(), plan, steps=2)
    assert torch.equal(torch.get_rng_state(), after)


def test_no_part_has_one_sample_where_a_batch_norm_needs_two():
    def make():
        return nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))

    x, y = numbers()
    plan = hotloop.Plan().replace({"memory.micro_batch_size": 7})
    losses, _, _ = trained(make, F.mse_loss, (x[:29], y[:29]), plan)
    assert losses.isfinite().all()


def test_the_weight_of_a_batch():
    x, y = text()
    assert LossWeight(F.cross_entropy).count(y, ROWS) == float((y >= 0).sum())
    weight = LossWeight(nn.CrossEntropyLoss(WEIGHTS, ignore_index=1))
    assert weight.count(torch.tensor([0, 1, 2, 2]), 4) == pytest.approx(20.1)
    assert LossWeight(nn.MSELoss(reduction="sum")).count(x, ROWS) is None
    assert LossWeight(lambda out: out).count(None, ROWS) == ROWS

    class Flattened(nn.CrossEntropyLoss):
        def forward(self, out, y):
            return super().forward(out.flatten(0, 1), y.flatten())

    class Unhashable:
        __hash__ = None

        def __call__(self, out, y):
            return out.mean()

    assert LossWeight(Unhashable()).kind == "unknown"
    assert LossWeight(Flattened()).kind == "unknown"
    assert LossWeight(nn.L1Loss()).kind == "mean"
