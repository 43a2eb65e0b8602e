"""Data of every kind for the tests of fit, and the loop in plain PyTorch to hold it against."""

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import hotloop
from hotloop.data import GlobalSampler

LOSS = nn.functional.cross_entropy
SEED = 3
N, WIDTH, SIZE = 50, 6, 8


def arrays(n=N):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, WIDTH, generator=generator)
    return x, (x[:, 0] > 0).long()


class Samples(Dataset):
    """Samples of arrays; what it gave is in ``given``."""

    def __init__(self, x, y):
        self.x, self.y, self.given = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.given.append(index)
        return self.x[index], self.y[index]


class Noisy(Samples):
    """Each sample with noise; what it gave is in ``given``."""

    def __getitem__(self, index):
        sample = self.x[index] + torch.randn(WIDTH), self.y[index]
        self.given.append(sample)
        return sample


class Stream(IterableDataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __iter__(self):
        return iter(zip(self.x, self.y, strict=True))


def make_model(dropout=0.0):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))


def make_trainer(dropout=0.0, compile="off", **knobs):
    model = make_model(dropout)
    plan = hotloop.Plan().replace(
        {"cpu.num_threads": 1, "step.compile": compile, "checkpoint.every_s": 0, **knobs}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hotloop.Trainer(model, LOSS, optimizer, plan)


def fit(data, trainer=None, **options):
    """Losses of the steps of a fit, its trainer and report."""
    trainer = trainer or make_trainer()
    losses = []
    options = {"epochs": 2, "seed": SEED, "monitor": False, **options}
    report = trainer.fit(data, on_losses=losses.extend, **options)
    return losses, trainer, report


def plain(batches, dropout=0.0, loss_fn=LOSS, model=None):
    """Losses and model of a loop in plain PyTorch over ``(x, y)``."""
    model = model or make_model(dropout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def shuffled(x, y, epochs=2, size=SIZE):
    """The batches that a seed makes of samples."""
    sampler = GlobalSampler(len(x), size, seed=SEED)
    for epoch in range(epochs):
        for index in sampler.batches(epoch):
            yield x[index], y[index]


def close(losses, expected):
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    return True


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
