"""Batches of any structure, in a program or plain, beside the same loop in PyTorch."""

import dataclasses
import re
from collections import OrderedDict, namedtuple
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import hotloop
from hotloop import Arguments, kernels
from support.beside_loop import train_both

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

STEPS, ROWS = 8, 16


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2, eps=1e-3)


def run(model, loss_fn, make_batch, *, plan=None, steps=STEPS, optimizer=adam):
    """``steps`` batches of ``make_batch(number, generator)`` through both."""
    torch.manual_seed(0)
    model = model() if isinstance(model, type) else model
    generator = torch.Generator().manual_seed(1)
    batches = [make_batch(number, generator) for number in range(steps)]
    return train_both(model, loss_fn, optimizer, batches, plan)


def runs_as_program(*args, **options):
    course = run(*args, **options)
    assert course.path == "compiled", course.reason
    assert course.programs >= 3, course.reason
    return course


class Output(OrderedDict):
    """As the ``ModelOutput`` of Transformers: parts by name and as attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Classifier(nn.Module):
    """Tokens and a mask in, by name; a mapping out, with the loss where there are labels."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 12), nn.Linear(12, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        embedded = self.embed(input_ids)
        mask = attention_mask.unsqueeze(-1).to(embedded.dtype)
        logits = self.head((embedded * mask).sum(1) / mask.sum(1).clamp(min=1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return Output(loss=loss, logits=logits)


def text(number, generator, length=9):
    tokens = torch.randint(0, 20, (ROWS, length), generator=generator)
    lengths = torch.randint(1, length + 1, (ROWS, 1), generator=generator)
    return {"input_ids": tokens, "attention_mask": (torch.arange(length) < lengths).long()}


def classes(generator, count=4):
    return torch.randint(0, count, (ROWS,), generator=generator)


def test_a_dict_with_an_attention_mask():
    runs_as_program(
        Classifier,
        lambda answer, y: F.cross_entropy(answer.logits, y),
        lambda n, g: (text(n, g), classes(g)),
    )


def test_the_loss_in_the_answer():
    runs_as_program(
        Classifier,
        lambda answer: answer.loss,
        lambda n, g: ({**text(n, g), "labels": classes(g)},),
    )


def test_a_mapping_that_is_no_dict():
    class Encoding(dict):
        """As the ``BatchEncoding`` of Transformers."""

    runs_as_program(
        Classifier,
        lambda answer, y: F.cross_entropy(answer["logits"], y),
        lambda n, g: (Encoding(text(n, g)), classes(g)),
    )


class Tabular(nn.Module):
    """Categories and numbers."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5 + 3, 2)

    def forward(self, categories, numbers, scale=1.0):
        return self.head(torch.cat([self.embed(categories), numbers * scale], 1))


def table(n, g):
    return torch.randint(0, 7, (ROWS,), generator=g), torch.randn(ROWS, 3, generator=g)


def test_a_tuple_of_tokens_and_numbers_with_two_targets():
    def loss(answer, y):
        return F.mse_loss(answer[:, 0], y[0]) + F.binary_cross_entropy_with_logits(
            answer[:, 1], y[1]
        )

    def batch(n, g):
        return table(n, g), [torch.randn(ROWS, generator=g), torch.rand(ROWS, generator=g)]

    runs_as_program(Tabular, loss, batch)


def test_positional_and_named_arguments_at_once():
    def batch(n, g):
        categories, numbers = table(n, g)
        return Arguments(categories, numbers=numbers), classes(g, 2)

    runs_as_program(Tabular, F.cross_entropy, batch)


def test_a_plain_value_is_part_of_the_shape():
    """It takes two values, each of which gets a program; none is taken for the other."""

    def batch(n, g):
        return (*table(n, g), 0.5 if n % 2 else 3.0), classes(g, 2)

    course = runs_as_program(Tabular, F.cross_entropy, batch, steps=10)
    assert course.programs == 10 - 2 * 2


def test_a_value_that_may_change_unseen_is_never_in_a_program():
    class Scaled(Tabular):
        def forward(self, categories, numbers, settings):
            return super().forward(categories, numbers, settings.scale)

    class Settings:
        scale = 1.0

    settings = Settings()

    class Changing(list):
        """Batches that change the settings when they are taken."""

        def __iter__(self):
            for number, part in enumerate(super().__iter__()):
                settings.scale = 1.0 + number
                yield part

    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)
    batches = Changing(((*table(n, g), settings), classes(g, 2)) for n in range(6))
    course = train_both(Scaled(), F.cross_entropy, adam, batches)
    assert course.path == "plain"
    assert "x[2] is neither a tensor nor a plain value" in course.reason


Pair = namedtuple("Pair", "left right")


class Sample(NamedTuple):
    pair: Pair
    weight: torch.Tensor


class TwoTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(6, 4)

    def forward(self, pair, weight):
        return self.tower(pair.left), self.tower(pair.right), weight


def test_named_tuples_in_named_tuples():
    def batch(n, g):
        left, right = torch.randn(2, ROWS, 6, generator=g)
        return Sample(Pair(left, right), torch.rand(ROWS, generator=g)), classes(g, 2).float()

    def loss(answer, y):
        left, right, weight = answer
        return (weight * (F.cosine_similarity(left, right) - y).square()).mean()

    runs_as_program(TwoTower, loss, batch)


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    edges: torch.Tensor
    name: str = "g"


class Messages(nn.Module):
    """A batch whose tensors have no common first size."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, graph):
        hidden = torch.relu(self.first(graph.nodes))
        source, target = graph.edges
        summed = hidden.index_add(0, target, hidden[source])
        return self.second(summed)


def graph(n, g):
    edges = torch.randint(0, ROWS, (2, 40), generator=g)
    return Graph(torch.randn(ROWS, 5, generator=g), edges), classes(g, 3)


def test_a_dataclass():
    runs_as_program(Messages, F.cross_entropy, graph)


def test_micro_batches_of_what_has_no_common_size_are_refused_before_anything_is_trained():
    model = Messages()
    plan = hotloop.Plan().replace({"memory.micro_batch_size": 4})
    example = graph(0, torch.Generator())
    with pytest.raises(hotloop.ModelError, match=r"first dimension.*\(2, 40\).*micro_batch_size"):
        hotloop.compile_step(model, F.cross_entropy, adam(model.parameters()), example, plan)


class Detector(nn.Module):
    """Images in a list; a list of dicts as targets."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, images):
        return [self.head(F.relu(self.body(image[None])).mean((2, 3)))[0] for image in images]


def detection_loss(answer, y):
    total = answer[0].new_zeros(())
    for boxes, target in zip(answer, y, strict=True):
        total = total + (target["boxes"] - boxes).abs().mean() + boxes[target["labels"]].sum()
    return total / len(answer)


@pytest.mark.parametrize("changes", [False, True])
def test_lists_of_dicts_as_targets(changes):
    def batch(n, g):
        counts = [1 + (n + k if changes else k) % 5 for k in range(3)]
        images = [torch.rand(3, 6, 5 + k, generator=g) for k in range(3)]
        targets = [
            {
                "boxes": torch.rand(count, 4, generator=g),
                "labels": torch.randint(0, 4, (count,), generator=g),
                "image_id": k,
            }
            for k, count in enumerate(counts)
        ]
        return Arguments(images), targets

    course = run(Detector, detection_loss, batch)
    assert changes or course.path == "compiled", course.reason


class Numbers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        if x.is_complex():
            x = torch.view_as_real(x).flatten(1)
        return self.linear(x.float())


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16,
        torch.bfloat16, torch.float64, torch.complex64, torch.complex128,
    ],
    ids=str,
)  # fmt: skip
def test_any_dtype(dtype):
    def batch(n, g):
        shape = (ROWS, 3 if dtype.is_complex else 6)
        if dtype.is_complex or dtype.is_floating_point:
            return {"x": torch.randn(shape, generator=g).to(dtype)}, classes(g, 3)
        return {"x": torch.randint(0, 2, shape, generator=g).to(dtype)}, classes(g, 3)

    runs_as_program(Numbers, F.cross_entropy, batch)
    runs_as_program(Numbers, F.cross_entropy, lambda n, g: (batch(n, g)[0]["x"], batch(n, g)[1]))


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(10, 3)

    def forward(self, a, b, c):
        return self.linear(a) + 2 * self.linear(b) - self.linear(c[:, 1:] if c.shape[1] > 10 else c)


def test_a_tensor_given_twice_and_views_that_overlap():
    """Three windows, where the last bridges the others; and which overlap changes."""

    def batch(n, g):
        signal = torch.randn(ROWS, 40, generator=g)
        if n % 3 == 0:
            parts = signal[:, :10], signal[:, 20:30], signal[:, 5:26]
            parts = (*parts[:2], parts[2][:, :11])
        elif n % 3 == 1:
            parts = signal[:, :10], signal[:, :10], signal[:, 4:15]
        else:
            parts = tuple(torch.randn(ROWS, 40, generator=g)[:, :k] for k in (10, 10, 11))
        return parts, classes(g, 3)

    runs_as_program(Three, F.cross_entropy, batch, steps=14)


def test_windows_that_overlap_in_another_order():
    """One dimension, so that the memory of each window is that of its values alone."""

    def batch(n, g):
        signal = torch.randn(ROWS * 40, generator=g)
        starts = (0, 200, 100) if n % 2 else (100, 0, 200)
        parts = [signal[s : s + ROWS * 10].view(ROWS, 10) for s in starts]
        return tuple(parts), classes(g, 3)

    runs_as_program(Three, F.cross_entropy, batch, steps=12)


def test_padded_rows():
    def batch(n, g):
        x = {"x": torch.randn(ROWS, 16, generator=g)[:, :6]}
        return x, torch.randint(0, 3, (ROWS, 8), generator=g)[:, 0]

    runs_as_program(Numbers, F.cross_entropy, batch)


class Imaging(nn.Module):
    """An image among other things; the convolution may have it with channels adjacent."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 + 2, 4)

    def forward(self, image, meta):
        return self.head(torch.cat([F.relu(self.conv(image)).mean((2, 3)), meta], 1))


def test_an_image_among_other_tensors():
    def batch(n, g):
        image = torch.rand(ROWS, 3, 9, 9, generator=g)
        return {"image": image, "meta": torch.rand(ROWS, 2, generator=g)}, classes(g)

    runs_as_program(Imaging, F.cross_entropy, batch)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[1][0][-1])


def test_packed_sequences_whose_lengths_change():
    def batch(n, g):
        lengths = [5, 4, 4, 2] if n % 2 else [5, 5, 3, 2]
        rows = [torch.randn(length, 4, generator=g) for length in lengths]
        return pack_sequence(rows), torch.randint(0, 3, (4,), generator=g)

    course = run(Packed, F.cross_entropy, batch)
    assert course.path == "plain"
    assert "reads a tensor's value" in course.reason


class Sizes(nn.Module):
    """Takes the sizes of a packed batch from tensors of the batch."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 6), nn.Linear(6, 3)

    def forward(self, data, sizes):
        packed = torch.nn.utils.rnn.PackedSequence(data, sizes)
        return self.head(self.rnn(packed)[1][0][-1])


class Splits(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, data, sizes):
        parts = torch.tensor_split(self.head(data), sizes)
        return torch.stack([part.sum(0) for part in parts])


@pytest.mark.parametrize("model", [Sizes, Splits])
def test_sizes_that_code_beside_the_operations_reads_are_found(model):
    def batch(n, g):
        sizes = [4, 4, 3, 2, 1] if n < 4 else [4, 3, 3, 3, 1]
        data = torch.randn(sum(sizes), 4, generator=g)
        count = 4 if model is Sizes else 6
        return (data, torch.tensor(sizes)), torch.randint(0, 3, (count,), generator=g)

    course = run(model, F.cross_entropy, batch)
    assert course.path == "plain"
    assert "test_trees.py" in course.reason


def test_several_steps_in_one_call():
    torch.manual_seed(0)
    model = Classifier()
    step = hotloop.compile_step(
        model, lambda a: a.loss, torch.optim.SGD(model.parameters(), 0.1), (one := several(1),)
    )
    twin = Classifier()
    twin.load_state_dict(model.state_dict())
    beside = hotloop.compile_step(
        twin, lambda a: a.loss, torch.optim.SGD(twin.parameters(), 0.1), (one,)
    )
    data = several(6)
    losses = step.many(data, hotloop.step.NO_TARGET, 6)
    single = [
        beside({name: t[n * ROWS : (n + 1) * ROWS] for name, t in data.items()}) for n in range(6)
    ]
    assert step.path == beside.path == "compiled"
    assert torch.equal(losses, torch.stack(single))


def several(count):
    g = torch.Generator().manual_seed(2)
    batches = [{**text(0, g), "labels": classes(g)} for _ in range(count)]
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: t.to_sparse(), r"x\.a is not dense on the CPU: sparse_coo"),
        (lambda t: t.requires_grad_(), r"x\.a needs a gradient of its own"),
        (lambda t: torch.complex(t, t).conj().imag, r"x\.a is a conjugate or negative view"),
    ],
)
def test_what_stays_plain_is_named(make, reason):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, a):
            return self.linear(a.to_dense() if a.is_sparse else a)

    torch.manual_seed(0)
    course = run(
        Net,
        F.cross_entropy,
        lambda n, g: ({"a": make(torch.randn(ROWS, 6, generator=g))}, classes(g, 3)),
    )
    assert course.path == "plain"
    assert re.search(reason, course.reason), course.reason


@pytest.mark.parametrize(
    ("example", "told"),
    [
        ((), "0 parts"),
        ((1, 2, 3), "3 parts"),
        (torch.zeros(2, 2), "Tensor"),
        (("a", 3), "str, int"),
        ((torch.zeros(3, 6), torch.zeros(2)), r"\(3, 6\), \(2,\)"),
    ],
)
def test_an_example_that_is_no_batch_is_refused(example, told):
    model = Numbers()
    with pytest.raises(hotloop.ModelError, match=told):
        hotloop.compile_step(model, F.cross_entropy, adam(model.parameters()), example)
