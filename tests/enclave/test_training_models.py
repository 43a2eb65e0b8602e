"""Kinds of models as training exports, against plain PyTorch: norms, attention, dropout."""

import numpy
import pytest
import torch
from torch import nn

from hotloop import Trainer, kernels
from hotloop.data.random_state import seed_all
from hotloop.enclave.training import export_training, load_training
from hotloop.enclave.training.samples import Samples, random_state

pytestmark = pytest.mark.skipif(
    not kernels.is_available(), reason=kernels.unavailable_reason() or ""
)


class Classifier(nn.Module):
    """A small encoder over tokens."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.place = nn.Parameter(torch.randn(12, 16) * 0.02)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.table(x) + self.place).mean(1))


class Residual(nn.Module):
    """A residual block with batch norm."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.last(self.second(y)) + x)


class Means(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Halved(nn.Module):
    """A residual block that halves the image, as those of ResNet do."""

    def __init__(self, channels, made):
        super().__init__()
        self.first = nn.Conv2d(channels, made, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(made)
        self.second = nn.Conv2d(made, made, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(made)
        self.short = nn.Conv2d(channels, made, 1, stride=2)

    def forward(self, x):
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(self.last(self.second(y)) + self.short(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8),
        Halved(8, 16), nn.Conv2d(16, 12, 1), nn.ReLU(), Means(), nn.Linear(12, 5),
    )  # fmt: skip


def residual_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8),
        nn.MaxPool2d(2), Residual(8), Means(), nn.Linear(8, 5),
    )  # fmt: skip


def norm_net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(),
        nn.LayerNorm(24), nn.Linear(24, 5),
    )  # fmt: skip


def dropout_net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 5)
    )


def images(seed, count=16):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(5, (count,), generator=draw)
    x = torch.randn(count, 3, 8, 8, generator=draw)
    return x + y.view(-1, 1, 1, 1), y


def tokens(seed, count=16):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(50, (count, 12), generator=draw)
    return x, x[:, 0] % 5


MODELS = {
    "encoder": (Classifier, tokens),
    "encoder with dropout": (lambda: Classifier(0.1), tokens),
    "residual": (residual_net, images),
    "resnet": (resnet, images),
    "norms": (norm_net, images),
    "dropout": (dropout_net, images),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_evaluates_as_in_torch(name, tmp_path):
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    notes = export_training(model, loss_fn, optimizer, batch(0), tmp_path / "export")
    assert notes == []
    run = load_training(tmp_path / "export")
    run.seed(3)
    torch.manual_seed(3)
    for number in range(15):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        assert run.step(x.numpy(), y.numpy()) == pytest.approx(loss.item(), rel=2e-4, abs=2e-5)
    for key, value in model.state_dict().items():
        numpy.testing.assert_allclose(run.tensors[key], value.numpy(), rtol=2e-3, atol=1e-4)
    x, y = batch(99, 35)
    model.eval()
    with torch.no_grad():
        wanted = loss_fn(model(x), y).item()
    found = run.evaluate(Samples(x.numpy(), y.numpy()))
    assert found.loss == pytest.approx(wanted, rel=2e-3)
    if isinstance(model, nn.Sequential):
        model.load_state_dict(
            {key: torch.from_numpy(array.copy()) for key, array in run.tensors.items()}
        )


def test_a_random_state_is_that_of_torch():
    for seed in (0, 7, 2**32 - 1, 2**63 - 1):
        expected = torch.Generator().manual_seed(seed).get_state()
        assert random_state(seed).tobytes() == expected.numpy().tobytes()


def test_a_run_with_dropout_is_that_of_the_trainer(tmp_path):
    x, y = images(1, 48)
    runs = []
    for _ in range(2):
        seed_all(0)
        model = dropout_net()
        runs.append((model, torch.optim.SGD(model.parameters(), 0.05)))
    (model, optimizer), (other, other_optimizer) = runs
    export_training(model, nn.CrossEntropyLoss(), optimizer, (x[:16], y[:16]), tmp_path / "export")
    run = load_training(tmp_path / "export")
    samples = Samples(x.numpy(), y.numpy())
    folder = tmp_path / "run"
    run.fit(samples, 2, seed=5, checkpoint_dir=folder, max_steps=4)
    again = load_training(tmp_path / "export")
    again.fit(samples, 2, seed=5, checkpoint_dir=folder, resume=True)
    Trainer(other, nn.CrossEntropyLoss(), other_optimizer).fit(
        (x, y), batch_size=16, epochs=2, seed=5, monitor=False
    )
    for key, value in other.state_dict().items():
        numpy.testing.assert_allclose(again.tensors[key], value.numpy(), rtol=1e-3, atol=1e-5)
