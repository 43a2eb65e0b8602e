"""Samples that are trees: dicts, tuples of any length, one tensor; against plain PyTorch."""

import collections
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import hotloop
from hotloop.data import GlobalSampler
from hotloop.memory.tree import call
from support.data_sources import SEED, SIZE, Samples, close

N, LENGTH, WORDS = 50, 5, 11
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(1, WORDS, (N, LENGTH), generator=GENERATOR)
MASK = torch.rand(N, LENGTH, generator=GENERATOR) > 0.3
REAL = torch.randn(N, LENGTH, generator=GENERATOR)
LABELS = torch.randint(0, 3, (N,), generator=GENERATOR)
MASK[:, 0] = True

Item = collections.namedtuple("Item", "ids mask")


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    loss: torch.Tensor | None = None


class Output(collections.OrderedDict):
    """As the ``ModelOutput`` of Transformers."""

    def __getattr__(self, name):
        return self[name]


class Classifier(nn.Module):
    """Of words with a mask; with labels its answer has the loss."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, 3)

    def forward(self, ids, mask, labels=None):
        weights = mask.float().unsqueeze(-1)
        scores = self.head((self.words(ids) * weights).sum(1) / weights.sum(1))
        if labels is None:
            return scores
        return Output(loss=functional.cross_entropy(scores, labels), logits=scores)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        # Without a bias: distances have no gradient for it, and Adam would follow the rounding.
        self.layer = nn.Linear(LENGTH, 4, bias=False)

    def forward(self, anchor, positive, negative):
        return self.layer(anchor), self.layer(positive), self.layer(negative)


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(LENGTH, 3), nn.Tanh(), nn.Linear(3, LENGTH))

    def forward(self, x):
        return Answer(self.layers(x), ((self.layers(x) - x) ** 2).mean())


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(LENGTH, 4)

    def forward(self, x):
        answer = self.layer(x)
        return {"class": answer[:, :3], "value": answer[:, 3]}


def both(answer, y):
    of_class = functional.cross_entropy(answer["class"], y["label"])
    return of_class + functional.mse_loss(answer["value"], y["value"])


def triplet(answer):
    return functional.triplet_margin_loss(*answer)


def loss_inside(answer):
    return answer.loss


WORDS_IN = {"ids": IDS, "mask": MASK}
CASES = {
    # name: model, loss, tensors of the whole set as (x, y) or (x,).
    "dict": (Classifier, functional.cross_entropy, (WORDS_IN, LABELS)),
    "named tuple": (Classifier, functional.cross_entropy, (Item(IDS, MASK), LABELS)),
    "loss in the answer": (Classifier, loss_inside, ({**WORDS_IN, "labels": LABELS},)),
    "three parts": (Towers, triplet, ([REAL, REAL.flip(0), REAL.roll(1, 0)],)),
    "one tensor": (Coder, loss_inside, (REAL,)),
    "targets that are a dict": (Several, both, (REAL, {"label": LABELS, "value": REAL[:, 0]})),
}


def rows(tree, index):
    return hotloop.memory.tree.map_tensors(lambda t: t[index], tree)


def trained(name, batches):
    """Losses and model of plain PyTorch on batches ``(x, y)`` or ``(x,)``."""
    make, loss_fn, _ = CASES[name]
    torch.manual_seed(1)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for x, *y in batches:
        optimizer.zero_grad()
        loss = loss_fn(call(model, x), *y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def shuffled(whole, epochs=2):
    sampler = GlobalSampler(N, SIZE, seed=SEED)
    for epoch in range(epochs):
        for index in sampler.batches(epoch):
            yield rows(whole, index)


def fitted(name, data, compiling, **options):
    make, loss_fn, _ = CASES[name]
    torch.manual_seed(1)
    model = make()
    plan = hotloop.Plan().replace({"cpu.num_threads": 1, "step.compile": compiling})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    report = hotloop.Trainer(model, loss_fn, optimizer, plan).fit(
        data, epochs=options.pop("epochs", 2), seed=SEED, monitor=False, on_losses=losses.extend,
        **options,
    )  # fmt: skip
    return losses, model, report


def samples_of(whole):
    """A map-style dataset of the rows: a pair, or what the only part is."""
    parts = [rows(whole, k) for k in range(N)]
    return [part if len(part) == 2 else part[0] for part in parts]


@pytest.mark.parametrize("compiling", ["off", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_samples_that_are_trees(name, compiling):
    whole = CASES[name][2]
    expected, model = trained(name, shuffled(whole))
    losses, mine, report = fitted(name, samples_of(whole), compiling, batch_size=SIZE)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    for a, b in zip(mine.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert report.path == ("plain" if compiling == "off" else "compiled"), report.path_reason


@pytest.mark.parametrize("name", CASES)
def test_trees_of_arrays_are_what_datasets_of_their_rows_are(name):
    whole = CASES[name][2]
    expected = fitted(name, samples_of(whole), "off", batch_size=SIZE)[0]
    assert fitted(name, whole, "off", batch_size=SIZE, validation=whole)[0] == expected
    arrays = hotloop.memory.tree.map_tensors(lambda t: t, whole)
    assert fitted(name, arrays, "auto", batch_size=SIZE)[2].path == "compiled"


@pytest.mark.parametrize("name", CASES)
def test_loaders_of_trees_go_on_in_mid_epoch(name, tmp_path):
    def loader():
        return DataLoader(samples_of(CASES[name][2]), batch_size=SIZE, shuffle=True)

    torch.manual_seed(SEED)
    both_epochs = [batch for _ in range(2) for batch in loader_batches(loader(), name)]
    losses, whole, _ = fitted(name, loader(), "off", validation=loader())
    assert close(losses[:7], trained(name, both_epochs)[0][:7])
    before = fitted(name, loader(), "off", checkpoint_dir=tmp_path, max_steps=9)[0]
    after, model, _ = fitted(name, loader(), "off", checkpoint_dir=tmp_path, resume=True)
    assert before + after == losses
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def loader_batches(loader, name):
    pair = len(CASES[name][2]) == 2
    for batch in loader:
        yield tuple(batch) if pair else (batch,)


def padded(samples):
    """A ``collate_fn`` that pads to the longest."""
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    return {"ids": ids, "mask": ids > 0}, torch.tensor([label for _, label in samples])


@pytest.mark.parametrize("compiling", ["off", "auto"])
@pytest.mark.parametrize("workers", [0, 1])
def test_sequences_of_any_length_by_the_collate_fn_of_a_loader(compiling, workers):
    lengths = torch.randint(1, LENGTH + 1, (N,), generator=torch.Generator().manual_seed(2))
    samples = [(IDS[k, : lengths[k]], int(LABELS[k])) for k in range(N)]

    def loader():
        return DataLoader(
            samples, batch_size=4, shuffle=True, collate_fn=padded, num_workers=workers
        )

    torch.manual_seed(SEED)
    expected = trained("dict", [batch for _ in range(2) for batch in loader()])[0]
    losses, _, report = fitted("dict", loader(), compiling, validation=loader())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert report.validation_accuracy is not None
    with pytest.raises(hotloop.DataError, match="pass a DataLoader with a collate_fn"):
        fitted("dict", samples, "off", batch_size=4)


def test_targets_that_are_lists_of_dicts_train_on_the_plain_path():
    def collate(samples):
        return torch.stack([x for x, _ in samples]), [y for _, y in samples]

    def loss_fn(answer, targets):
        parts = [((a - t["boxes"].sum()) ** 2).mean() for a, t in zip(answer, targets, strict=True)]
        return torch.stack(parts).mean()

    samples = [(REAL[k], {"boxes": torch.full((k % 3, 4), float(k))}) for k in range(20)]
    loader = DataLoader(samples, batch_size=4, collate_fn=collate)
    torch.manual_seed(1)
    model, plain = nn.Linear(LENGTH, 2), nn.Linear(LENGTH, 2)
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-5)
    expected = []
    for x, y in loader:
        optimizer.zero_grad()
        loss = loss_fn(plain(x), y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    losses = []
    trainer = hotloop.Trainer(model, loss_fn, torch.optim.SGD(model.parameters(), lr=1e-5))
    trainer.fit(loader, validation=loader, on_losses=losses.extend, monitor=False)
    assert close(losses, expected)


def test_samples_may_hold_names_beside_tensors():
    """What is no tensor and no number cannot be packed: it is read while training."""

    class Named(Samples):
        def __getitem__(self, index):
            return {"ids": self.x[index], "mask": self.y[index], "labels": LABELS[index]} | {
                "name": f"sample {index}"
            }

    class Patient(Classifier):
        def forward(self, ids, mask, labels, name):
            assert all(text.startswith("sample") for text in name)
            return super().forward(ids, mask, labels)

    torch.manual_seed(1)
    model = Patient()
    expected, _ = trained("loss in the answer", shuffled(CASES["loss in the answer"][2], 1))
    losses = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    report = hotloop.Trainer(model, loss_inside, optimizer).fit(
        Named(IDS, MASK), batch_size=SIZE, seed=SEED, on_losses=losses.extend, monitor=False
    )
    assert close(losses, expected)
    assert any("read while training" in note for note in report.notes)


def test_a_loss_with_numpy_inside_has_no_budget_and_trains():
    def matched(answer, y):
        order = torch.from_numpy(answer.detach().numpy().argsort(0))
        return (answer.gather(0, order) - y.sort(0).values).square().mean()

    def run(train):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return train(model, torch.optim.SGD(model.parameters(), 0.1)), model.weight.detach()

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator)
    y = torch.randn(32, 2, generator=generator)

    def plain(model, optimizer):
        for part in torch.arange(32).split(8):
            optimizer.zero_grad()
            matched(model(x[part]), y[part]).backward()
            optimizer.step()

    def fit(model, optimizer):
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
        return hotloop.Trainer(model, matched, optimizer).fit(data, monitor=False)

    def fit_arrays(model, optimizer):
        return hotloop.Trainer(model, matched, optimizer).fit((x, y), batch_size=8, monitor=False)

    report, weight = run(fit)
    torch.testing.assert_close(weight, run(plain)[1])
    for found in (report, run(fit_arrays)[0]):
        assert found.path == "plain"
        assert "numpy" in found.path_reason
        assert any("working memory is unknown" in note for note in found.notes)
