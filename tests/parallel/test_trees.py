"""Workers on batches of any structure, and on losses that are not a mean over samples."""

import asyncio
import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hotloop import Arguments, DataParallelTrainer, ModelError, Plan, kernels
from hotloop.memory.tree import call
from hotloop.parallel import Hosts, ParallelStep
from hotloop.parallel import hosts as hosts_module
from hotloop.step.loss_weight import LossWeight
from support.beside_loop import plain_step, same

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

BATCH, CHUNK, STEPS, LENGTH = 16, 4, 8, 5


def plan(workers=2, **knobs):
    values = {"parallel.num_workers": workers, "parallel.chunk_size": CHUNK, **knobs}
    return Plan().replace(values)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, tokens, mask, scale=1.0):
        return {"scores": self.head(self.embed(tokens) * mask[..., None] * scale)}


def words(count=BATCH, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 11, (count, LENGTH), generator=g)
    mask = torch.rand(count, LENGTH, generator=g)
    return {"tokens": tokens, "mask": mask}, torch.randint(0, 11, (count, LENGTH), generator=g)


def over_words(answer, y):
    return F.cross_entropy(answer["scores"].flatten(0, 1), y.flatten(), reduction="none").mean()


def compare(make_batch, model, loss_fn, workers=2, *, path="parallel", optimizer=None, **knobs):
    """Train beside PyTorch on whole batches; the step, and the losses of both."""
    make = optimizer or (lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-3))
    twin = copy.deepcopy(model)
    mine, plain = make(model.parameters()), make(twin.parameters())
    step = ParallelStep(model, loss_fn, mine, make_batch(0), plan(workers, **knobs))
    losses = []
    for number in range(STEPS):
        batch = make_batch(number)
        losses.append(step(*batch).item())
        same(losses[-1], plain_step(twin, loss_fn, plain, *batch), 1e-5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        same(a.detach(), b.detach(), 1e-4)
    assert step.path == path, step.reason
    reason = step.reason
    step.close()
    return reason, losses, list(model.parameters())


@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_a_dict_and_any_number_of_workers(executor):
    found = []
    for workers in (1, 3):
        torch.manual_seed(0)
        _, losses, weights = compare(
            lambda n: words(seed=n), Words(), over_words, workers, **{"parallel.executor": executor}
        )
        found.append((losses, weights))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_several_steps_in_one_call():
    results = []
    for at_once in (False, True):
        torch.manual_seed(0)
        model = Words()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        step = ParallelStep(model, over_words, optimizer, words(), plan())
        x, y = words(BATCH * 6)
        if at_once:
            losses = step.many(x, y, 6)
        else:
            parts = [
                ({k: t[n * BATCH : (n + 1) * BATCH] for k, t in x.items()},
                 y[n * BATCH : (n + 1) * BATCH])
                for n in range(6)
            ]  # fmt: skip
            losses = torch.stack([step(*part) for part in parts])
        assert step.path == "parallel", step.reason
        step.close()
        results.append(losses)
    assert torch.equal(*results)


def test_plain_values_and_no_target():
    def batch(n):
        x, _ = words(seed=n)
        return (Arguments(x["tokens"], x["mask"], scale=2.0 if n else 1.0),)

    compare(batch, Words(), lambda answer: answer["scores"].square().mean())


class Classes(nn.Module):
    """Scores for each place, classes in the second dimension."""

    def __init__(self):
        super().__init__()
        self.words = Words()

    def forward(self, tokens, mask):
        return self.words(tokens, mask)["scores"].transpose(1, 2)


def padded(n, ignored=-100, empty=True):
    x, y = words(seed=n)
    lengths = torch.arange(BATCH) * (LENGTH + 1) // BATCH + (0 if empty else 1)
    y[torch.arange(LENGTH) >= lengths[:, None]] = ignored
    return x, y


@pytest.mark.parametrize("executor", ["threads", "processes"])
@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(torch.linspace(0.1, 3, 11), label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["ignored labels", "class weights", "a sum"],
)
def test_labels_that_do_not_count(loss_fn, executor):
    compare(
        padded, Classes(), loss_fn, optimizer=lambda p: torch.optim.SGD(p, lr=2e-3),
        **{"parallel.executor": executor},
    )  # fmt: skip


def test_batches_with_and_without_ignored_labels():
    """A chunk with shares and one without are two programs."""
    compare(lambda n: padded(n) if n % 2 else words(seed=n), Classes(), F.cross_entropy)


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [
        (lambda answer, y: F.cross_entropy(answer, y), "must be a mean over samples"),
        (lambda answer, y: F.cross_entropy(answer, y, reduction="sum"), "must be a mean over"),
        (lambda answer, y: answer.std(0).mean() + (y < 0).any(), "must be a mean over samples"),
    ],
    ids=["ignored labels", "a sum", "rows compared"],
)
def test_a_loss_that_chunks_do_not_make_is_one_batch(loss_fn, told):
    reason, *_ = compare(padded, Classes(), loss_fn, path="plain")
    assert told in reason


def test_several_steps_in_one_call_of_a_loss_that_chunks_do_not_make():
    """Whoever was told that several steps fit into a call has them, one by one."""
    torch.manual_seed(0)
    model, own = Classes(), lambda answer, y: answer.std(0).mean() + 0 * y.sum()
    twin = copy.deepcopy(model)
    mine, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step = ParallelStep(model, own, mine, words(), plan())
    assert step.makes_many
    x, y = words(BATCH * 6)
    losses = torch.cat(
        [
            step.many({k: t[cut] for k, t in x.items()}, y[cut], 3)
            for cut in (slice(0, 48), slice(48, 96))
        ]
    )
    for number, loss in enumerate(losses):
        cut = slice(number * BATCH, (number + 1) * BATCH)
        part = {k: t[cut] for k, t in x.items()}
        same(loss, plain_step(twin, own, plain, part, y[cut]), 1e-5)
    assert step.path == "plain"


def test_labels_that_only_later_batches_ignore():
    """A batch that has some is run as one; in chunks are those that have none."""
    torch.manual_seed(0)
    model, own = Classes(), lambda answer, y: F.cross_entropy(answer, y)
    twin = copy.deepcopy(model)
    mine, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    step = ParallelStep(model, own, mine, words(), plan())
    for number in range(STEPS):
        batch = padded(number) if number in (4, 6) else words(seed=number)
        same(step(*batch), plain_step(twin, own, plain, *batch), 1e-5)
        assert ("left out" in step.reason) == (number in (4, 6)), step.reason
    assert step.path == "parallel", step.reason
    step.close()


def test_a_loss_that_makes_its_labels_is_one_batch():
    reason, *_ = compare(
        lambda n: padded(n) if n > 4 else words(seed=n), Classes(),
        lambda answer, y: F.cross_entropy(answer, y + 0), path="plain",
    )  # fmt: skip
    assert "test_trees.py" in reason
    assert "may weigh labels" in reason


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes = Classes()

    def forward(self, tokens, mask, labels):
        return {"loss": F.cross_entropy(self.classes(tokens, mask), labels)}


def test_a_loss_in_the_answer_is_one_batch():
    def batch(n):
        x, y = padded(n)
        return ({**x, "labels": y},)

    reason, *_ = compare(batch, WithLoss(), lambda answer: answer["loss"], path="plain")
    assert "cannot be known" in reason


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, other):
        return self.linear(x) + other.mean()


@pytest.mark.parametrize("other", [torch.ones(()), torch.ones(3)])
def test_what_is_no_sample_is_not_cut(other):
    def batch(n):
        g = torch.Generator().manual_seed(n)
        return (torch.randn(BATCH, 4, generator=g), other), torch.randint(
            0, 3, (BATCH,), generator=g
        )

    reason, *_ = compare(batch, Pair(), F.cross_entropy, path="plain")
    assert "samples in its first size" in reason


def test_closures_run_plain():
    x, y = words()
    model = Words()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    step = ParallelStep(model, over_words, optimizer, (x, y), plan())
    losses = [step(x, y).item() for _ in range(3)]
    assert losses[-1] < losses[0]
    assert (step.path, "closure" in step.reason) == ("plain", True)


def test_process_batch_takes_any_batch():
    async def train():
        model = Words()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with DataParallelTrainer(model, over_words, optimizer, plan()) as trainer:
            losses = [await trainer.process_batch(words(seed=n)) for n in range(4)]
            return trainer.path, losses

    path, losses = asyncio.run(train())
    assert path == "parallel"
    assert all(loss.isfinite() for loss in losses)


def on_hosts(loss_fn, parts, monkeypatch):
    """Gradients and losses of hosts that have these parts of one batch, each in a thread."""
    count = len(parts)
    barrier, flats = threading.Barrier(count), {}

    def all_reduce(flat):
        flats[threading.get_ident()] = flat.clone()
        barrier.wait()
        flat.copy_(torch.stack(list(flats.values())).sum(0))
        barrier.wait()

    monkeypatch.setattr(hosts_module.dist, "all_reduce", all_reduce)
    torch.manual_seed(0)
    model = Classes()
    models = [copy.deepcopy((model, loss_fn)) for _ in parts]
    losses = [None] * count

    def host(rank):
        (mine, own_loss), (x, y) = models[rank], parts[rank]
        optimizer = torch.optim.SGD(mine.parameters(), 0.1)
        hosts = Hosts(rank, count)
        hosts.shares, hosts._chunk_size = [1] * count, 0
        loss = own_loss(call(mine, x), y)
        loss.backward()
        weight = LossWeight(loss_fn).count(y, len(y))
        losses[rank] = hosts.combine(mine, optimizer, loss, len(y), 0.1, weight, own_loss)

    threads = [threading.Thread(target=host, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return model, models, losses


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(torch.linspace(0.1, 3, 11)),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=["ignored labels", "class weights", "a sum"],
)
def test_hosts_weigh_losses_by_what_they_divide_by(loss_fn, monkeypatch):
    x, y = padded(0)
    cuts = [slice(0, 2), slice(2, 9), slice(9, BATCH)]  # The first has no label that counts.
    parts = [({k: t[cut] for k, t in x.items()}, y[cut]) for cut in cuts]
    assert (parts[0][1] == -100).all()
    model, models, losses = on_hosts(loss_fn, parts, monkeypatch)
    expected = loss_fn(call(model, x), y)
    expected.backward()
    for (one, _), loss in zip(models, losses, strict=True):
        same(loss, expected.detach(), 1e-5)
        for a, b in zip(one.parameters(), model.parameters(), strict=True):
            same(a.grad, b.grad, 1e-5)


class Averaging(nn.Module):
    """A loss that keeps a mean of what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, answer, y):
        self.seen += answer.detach().mean()
        return answer.square().mean()


def test_a_loss_with_a_buffer_is_the_same_on_all_hosts(monkeypatch):
    x, y = padded(0)
    parts = [({k: t[cut] for k, t in x.items()}, y[cut]) for cut in (slice(0, 4), slice(4, BATCH))]
    model, models, _ = on_hosts(Averaging(), parts, monkeypatch)
    for _, loss_fn in models:
        same(loss_fn.seen, call(model, x).detach().mean(), 1e-5)


def test_hosts_refuse_what_their_parts_do_not_make():
    x, y = padded(0)
    model = Classes()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def between(loss, rows, seconds, weight):
        raise AssertionError("nothing may be combined")

    step = ParallelStep(
        model, lambda a, t: F.cross_entropy(a, t), optimizer, (x, y), plan(), between=between
    )
    with pytest.raises(ModelError, match="must be a mean over samples"):
        step(x, y)
