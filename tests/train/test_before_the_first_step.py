"""What cannot go well is told before anything is trained, in one line; what can is not refused."""

import functools

import pytest
import torch
from torch import nn

import hotloop
from hotloop.train.labels import check_labels

LOSS = nn.functional.cross_entropy
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(33, 10, generator=GENERATOR), torch.randint(0, 3, (33,), generator=GENERATOR)
IMAGES = torch.randn(33, 2, 4, 4, generator=GENERATOR)


def fit(model, data, loss_fn=LOSS, **options):
    """A report; and that nothing was trained where it fails."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    micro = options.pop("micro", None)
    plan = hotloop.Plan().replace({"memory.micro_batch_size": micro, "step.compile": "off"})
    trainer = hotloop.Trainer(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1), plan)
    steps = []
    try:
        return trainer.fit(data, monitor=False, on_losses=steps.extend, **options)
    finally:
        after = model.state_dict()
        assert steps or all(torch.equal(after[name], value) for name, value in before.items())


# A batch of one sample before a normalisation.


def with_norm(norm, *before):
    return nn.Sequential(*before, norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def made(model, example):
    model.eval()(example[:2])
    return model.train()


LONE = {
    "features": lambda: (made(with_norm(nn.BatchNorm1d(10)), X), X),
    "pooled images": lambda: (
        made(with_norm(nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1)), IMAGES), IMAGES
    ),
}  # fmt: skip
FINE = {
    "images": lambda: (made(with_norm(nn.BatchNorm2d(2)), IMAGES), IMAGES),
    "frozen": lambda: (made(with_norm(nn.BatchNorm1d(10).eval()), X), X),
    "layer norm": lambda: (made(with_norm(nn.LayerNorm(10)), X), X),
}


@pytest.mark.parametrize("kind", LONE)
def test_a_last_batch_of_one_before_a_norm(kind):
    model, x = LONE[kind]()
    assert fit(model, (x, Y), batch_size=16, drop_last=True).steps == 2
    assert fit(model, (x, Y), batch_size=17).steps == 2
    with pytest.raises(hotloop.ModelError, match="the last batch of an epoch has 1 sample"):
        fit(model, (x, Y), batch_size=16)


@pytest.mark.parametrize("kind", FINE)
def test_a_last_batch_of_one_that_a_norm_takes(kind):
    model, x = FINE[kind]()
    if kind == "frozen":
        model[0].eval()
    assert fit(model, (x, Y), batch_size=16).steps == 3


def test_batches_and_micro_batches_of_one_before_a_norm():
    model, x = LONE["features"]()
    with pytest.raises(hotloop.ModelError, match="a batch has 1 sample"):
        fit(model, (x, Y), batch_size=1)
    with pytest.raises(hotloop.ModelError, match="in micro-batches of 1"):
        fit(model, (x[:32], Y[:32]), batch_size=16, micro=1)
    # 16 = 5 + 5 + 4 + 2: no micro-batch is left with one.
    assert fit(model, (x[:32], Y[:32]), batch_size=16, micro=5).steps == 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=16)
    with pytest.raises(hotloop.ModelError, match="the last batch of an epoch has 1 sample"):
        fit(model, loader)


# Modules that are in eval mode when fit is called stay so.


class Frozen(nn.Sequential):
    """Its first layers are always in eval mode, by its own ``train``."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("how", ["set", "own train", "whole", "nested"])
def test_layers_in_eval_mode_stay_so(how):
    layers = nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
    model = (Frozen if how == "own train" else nn.Sequential)(*layers).train()
    if how in ("set", "nested"):
        model[1].eval()
    if how == "nested":
        model = nn.Sequential(model)
    if how == "whole":
        model.eval()  # As after an evaluation: it is trained as a whole.
    norm = layers[1]
    modes = [m.training for m in model.modules()]
    fit(model, (X[:32], Y[:32]), batch_size=16, validation=(X[:32], Y[:32]))
    assert [m.training for m in model.modules()] == modes
    assert norm.num_batches_tracked.item() == (2 if how == "whole" else 0)
    assert layers[2].training == (how != "whole")


# Labels.


class CrossEntropyLoss(nn.Module):
    """Of a user's own, by a name of torch's."""

    def forward(self, scores, y):
        return LOSS(scores, y % 3)


@pytest.mark.parametrize("label", [255, -100, -1, 7])
@pytest.mark.parametrize("partial", [True, False])
def test_labels_that_the_loss_skips_are_none(label, partial):
    masks = torch.where(IMAGES[:, 0] > 0.5, label, torch.randint(0, 3, (33, 4, 4)))
    loss = nn.CrossEntropyLoss(ignore_index=label)
    if partial:
        loss = functools.partial(LOSS, ignore_index=label)
    model = nn.Conv2d(2, 3, 1)
    report = fit(model, (IMAGES, masks), loss, batch_size=16, validation=(IMAGES, masks))
    with torch.no_grad():
        expected = loss(model(IMAGES), masks).item()
    assert report.validation_loss == pytest.approx(expected, rel=1e-5)
    other = nn.CrossEntropyLoss(ignore_index=-50)
    told = r"one score for each of the \d+ classes" if label > 0 else "integers from 0"
    with pytest.raises(hotloop.InputError, match=told):
        fit(model, (IMAGES, masks), other, batch_size=16)


def test_labels_of_a_loss_of_ones_own_are_not_judged():
    assert fit(nn.Linear(10, 3), (X, Y + 5), CrossEntropyLoss(), batch_size=16).steps == 3


# The loss of an evaluation is that of the whole set.


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(weight=torch.tensor([5.0, 1.0, 0.1])),
        nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1),
        nn.CrossEntropyLoss(ignore_index=2, weight=torch.tensor([5.0, 1.0, 0.1])),
        nn.NLLLoss(ignore_index=0),
        functools.partial(LOSS, weight=torch.tensor([1.0, 9.0, 3.0])),
        nn.MultiMarginLoss(),
    ],
    ids=["weights", "smoothing", "both", "nll", "partial", "margin"],
)
def test_the_loss_of_an_evaluation_is_that_of_the_whole_set(loss_fn):
    y = torch.cat([torch.zeros(16), torch.ones(8), torch.full((9,), 2)]).long()
    model = nn.Linear(10, 3)
    # In one batch of the validation no label counts.
    report = fit(model, (X, Y), loss_fn, batch_size=8, drop_last=True, validation=(X, y))
    with torch.no_grad():
        expected = loss_fn(model(X), y).item()
    assert report.validation_loss == pytest.approx(expected, rel=1e-5)
    assert not any("validation loss" in note for note in report.notes)


def test_of_a_loss_that_is_not_known_the_weights_are_told():
    def own(scores, y):
        return LOSS(scores, y)

    report = fit(nn.Linear(10, 3), (X, Y), own, batch_size=8, validation=(X, Y))
    assert any(note.startswith("validation loss:") for note in report.notes)
    total = fit(
        nn.Linear(10, 3), (X, Y), nn.CrossEntropyLoss(reduction="sum"), batch_size=8,
        validation=(X, Y),
    )  # fmt: skip
    assert total.validation_loss == pytest.approx(total.history[-1].validation_loss)


# What a model keeps of an evaluation can be trained with.


class Caching(nn.Module):
    def __init__(self, keep):
        super().__init__()
        self.layer, self.keep, self.tables = nn.Linear(10, 3), keep, {}

    def forward(self, x):
        if len(x) not in self.tables:
            if self.keep == "table":
                self.tables[len(x)] = torch.cos(torch.arange(float(len(x))))[:, None]
            elif self.keep == "view of a buffer":
                self.tables[len(x)] = torch.ones(len(x) * 2)[::2, None]
            else:
                self.tables[len(x)] = self.layer.weight.detach().mean() * torch.ones(len(x), 1)
        return self.layer(x * self.tables[len(x)])


class Forces(nn.Module):
    """Takes a gradient of its own in forward, in an evaluation too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 3)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.layer(x).square().sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.layer(force)


@pytest.mark.parametrize("keep", ["table", "view of a buffer", "of the weights"])
def test_caches_that_an_evaluation_fills(keep):
    model = Caching(keep)
    # 33 = 16 + 16 + 1 to train, 20 = 16 + 4 to validate, then batches of 4.
    fit(model, (X, Y), batch_size=16, epochs=2, validation=(X[:20], Y[:20]))
    fit(model, (X[:20], Y[:20]), batch_size=4)


def test_gradients_inside_an_evaluation():
    report = fit(Forces(), (X, Y), batch_size=16, epochs=2, validation=(X, Y))
    assert report.validation_loss is not None


# A model or loss that does not fit the data.


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 3)

    def forward(self, image):
        return self.layer(image)


def mean_of(answer):
    return answer.mean()


@pytest.mark.parametrize(
    ("model", "loss_fn", "data", "told"),
    [
        (nn.Linear(9, 3), LOSS, (X, Y), r"\(16, 10\) float32"),
        (nn.Linear(10, 3), LOSS, (X.double(), Y), r"\(16, 10\) float64|float64 \[16, 10\]"),
        (nn.Linear(10, 3), LOSS, (X.long(), Y), r"\(16, 10\) int64|int64 \[16, 10\]"),
        (Named(), mean_of, {"picture": X}, "picture"),
        (Named(), mean_of, {"image": X, "size": Y}, "size"),
        (nn.Linear(10, 3), nn.functional.mse_loss, (X, Y), r"\(16,\) int64 \(y\)"),
        (nn.Linear(10, 3), LOSS, (X, Y.double()), r"\(16,\) float64 \(y\)"),
        (nn.Linear(10, 3), LOSS, (X,), r"as loss_fn\(answer\).*x: float32 \[16, 10\]"),
        (nn.Linear(10, 3), mean_of, (X, Y), r"as loss_fn\(answer, y\).*y: int64 \[16\]"),
    ],
    ids=[
        "width",
        "double",
        "whole",
        "name",
        "more names",
        "targets",
        "labels",
        "no targets",
        "no loss of targets",
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_what_does_not_fit_is_named_with_shape_and_dtype(model, loss_fn, data, told, loaded):
    if isinstance(data, dict):
        samples = [{name: values[k] for name, values in data.items()} for k in range(33)]
    elif len(data) == 1:
        samples = list(X)
    else:
        samples = list(zip(*data, strict=True))
    if loaded:
        batches = list(torch.utils.data.DataLoader(samples, batch_size=16))
        samples = lambda: iter(batches)  # noqa: E731
    with pytest.raises(hotloop.ModelError, match=told) as error:
        fit(model, samples, loss_fn, **({} if loaded else {"batch_size": 16}))
    assert "\n" not in str(error.value)


def test_scores_and_classes():
    ten, eleven = {9: 0}, {10: 0}  # The highest label, and a sample that has it.
    check_labels(LOSS, (64, 10), ten)
    check_labels(nn.functional.mse_loss, (64, 1), ten)
    check_labels(LOSS, None, ten)
    with pytest.raises(hotloop.ModelError, match="11 classes"):
        check_labels(nn.CrossEntropyLoss(), (64, 10), eleven)
