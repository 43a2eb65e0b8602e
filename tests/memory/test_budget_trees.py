"""Budgets of batches of any structure, of losses of their own, and of what shapes cannot tell."""

import collections
import dataclasses
import logging

import numpy
import pytest
import torch
from torch import nn

import hotloop
from hotloop.memory.trace import trace_step

Pair = collections.namedtuple("Pair", "scores hidden")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(16, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.words(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask[..., None]
        scores = self.head(hidden.mean(1))
        if labels is None:
            return scores
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


IDS = torch.zeros(4, 12, dtype=torch.int64)
MASK = torch.ones(4, 12)
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("example", "loss"),
    [
        (({"input_ids": IDS, "attention_mask": MASK}, LABELS), nn.functional.cross_entropy),
        (((IDS, MASK), LABELS), nn.functional.cross_entropy),
        ((hotloop.Arguments(IDS, attention_mask=MASK), LABELS), nn.functional.cross_entropy),
        (
            ({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS},),
            lambda answer: answer["loss"],
        ),
        (
            ({"input_ids": IDS, "attention_mask": MASK}, {"classes": LABELS, "weight": 2.0}),
            lambda answer, y: nn.functional.cross_entropy(answer, y["classes"]) * y["weight"],
        ),
    ],
)
def test_a_tree_is_predicted_as_its_tensors_are(example, loss):
    model = Encoder()
    optimizer = torch.optim.Adam(model.parameters())
    budget = hotloop.Budget.predict(model, example, 1024, loss_fn=loss, optimizer=optimizer)
    assert budget.assumptions == ()
    assert budget.gradient_buffers_bytes == 4 * (50 * 16 + 16 * 4 + 4)
    # The embedding's rows alone are 1024 x 12 x 16 floats.
    assert budget.working_memory_bytes > 1024 * 12 * 16 * 4
    # Ids, mask and labels of 1024 rows in each buffer of the pool.
    assert budget.batch_data_bytes >= 3 * 1024 * (12 * 8 + 12 * 4 + 8)


def test_micro_batches_cut_every_tensor():
    model = Encoder()
    example = ({"input_ids": IDS, "attention_mask": MASK}, LABELS)
    traces = [
        trace_step(
            model, example, batch_size=1024, micro_batch_size=micro,
            loss_fn=nn.functional.cross_entropy,
        )
        for micro in (None, 64)
    ]  # fmt: skip
    assert traces[1].peak_live_bytes < traces[0].peak_live_bytes / 4


@dataclasses.dataclass
class Graph:
    nodes: torch.Tensor
    adjacency: torch.Tensor


class OnGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, graph):
        return Pair(self.layer(graph.adjacency @ graph.nodes), graph.nodes)


def test_a_dataclass_is_one_argument_and_what_has_other_rows_keeps_them():
    x = Graph(torch.zeros(6, 3), torch.zeros(6, 6))
    y = torch.zeros(6, dtype=torch.int64)
    trace = trace_step(
        OnGraph(), (x, y), batch_size=6,
        loss_fn=lambda answer, y: nn.functional.cross_entropy(answer.scores, y),
    )  # fmt: skip
    assert trace.complete
    assert trace.output_shape is None


class Weighted(nn.Module):
    """A loss that learns."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1000))

    def forward(self, output, target):
        return nn.functional.mse_loss(output, target) * self.log_scale.exp().mean()


def test_parameters_of_a_loss_count_and_are_left_alone():
    model, loss = nn.Linear(3, 2), Weighted()
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()])
    example = (torch.zeros(4, 3), torch.zeros(4, 2))
    budget = hotloop.Budget.predict(model, example, 4, loss_fn=loss, optimizer=optimizer)
    assert budget.gradient_buffers_bytes == 4 * (8 + 1000)
    assert budget.optimizer_state_bytes >= 2 * 4 * 1008
    assert loss.log_scale.grad is None

    extra = nn.Parameter(torch.ones(500))
    optimizer = torch.optim.Adam([*model.parameters(), extra])
    budget = hotloop.Budget.predict(
        model, example, 4, optimizer=optimizer,
        loss_fn=lambda output, y: nn.functional.mse_loss(output * extra.mean(), y),
    )  # fmt: skip
    assert budget.gradient_buffers_bytes == 4 * (8 + 500)
    assert extra.grad is None
    assert not optimizer.state


# ---- What shapes alone cannot tell ------------------------------------------------------------


class Sparse(nn.Module):
    def __init__(self, layout):
        super().__init__()
        dense = torch.eye(4)
        self.register_buffer(
            "adjacency", dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
        )
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(torch.sparse.mm(self.adjacency, x))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x):
        lengths = (x[..., 0] != 0).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return self.rnn(packed)[1][0][0]


def _numpy_loss(output, target):
    order = numpy.argsort(output.detach().numpy()[:, 0]).copy()
    return nn.functional.mse_loss(output[torch.from_numpy(order)], target)


def _branch(output, target):
    return output.mean() if output.sum() > 0 else -output.mean()


def _ctc(output, target):
    """``[batch, time, classes]`` scores against one label each."""
    scores = output.log_softmax(-1).transpose(0, 1)
    labels = torch.ones(len(output), 1, dtype=torch.int64)
    return nn.functional.ctc_loss(scores, labels, (5,) * len(output), (1,) * len(output))


def _ids_of(output, target):
    """Raises on shapes alone what it would not in PyTorch."""
    names = {0.0: 1.0}
    return output.mean() * names[float(target.detach().clone().flatten()[0].numpy())]


@pytest.mark.parametrize(
    ("make", "x", "loss"),
    [
        (lambda: Sparse("coo"), torch.zeros(4, 3), None),
        (lambda: Sparse("csr"), torch.zeros(4, 3), None),
        (Packed, torch.ones(4, 5, 3), None),
        (lambda: nn.Linear(3, 2), torch.zeros(4, 3), _numpy_loss),
        (lambda: nn.Linear(3, 2), torch.zeros(4, 3), _branch),
        (lambda: nn.Linear(3, 2), torch.zeros(4, 3), _ids_of),
        (lambda: nn.Linear(3, 2), torch.zeros(4, 5, 3), _ctc),
        (lambda: nn.Sequential(nn.LazyLinear(2)), torch.zeros(4, 3), None),
    ],
    ids=["coo", "csr", "packed", "numpy", "branch", "dict", "ctc", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:Lazy modules:UserWarning")
def test_what_cannot_be_traced_is_unknown_and_says_why(make, x, loss):
    model = make()
    budget = hotloop.Budget.predict(model, (x, torch.zeros(4, 2)), 4, loss_fn=loss)
    assert budget.working_memory_bytes is None
    assert budget.flop_per_step is None
    (line,) = budget.assumptions
    assert "working memory is unknown" in line
    assert "\n" not in line
    assert "(" in line
    assert budget.total_bytes > 0
    for parameter in model.parameters():
        assert parameter.grad is None


def test_an_optimizer_that_needs_a_closure():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.LBFGS(model.parameters())
    example = (torch.zeros(4, 3), torch.zeros(4, 2))
    budget = hotloop.Budget.predict(model, example, 4, optimizer=optimizer)
    assert budget.working_memory_bytes is not None
    assert "LBFGS" in budget.assumptions[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_traced_as_it_was_written():
    model = torch.compile(nn.Linear(3, 2))
    budget = hotloop.Budget.predict(model, (torch.zeros(4, 3), torch.zeros(4, 2)), 4)
    assert budget.working_memory_bytes is not None, budget.assumptions


# ---- What does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "example", "loss", "expected"),
    [
        (
            nn.Linear(4, 2), (torch.zeros(2, 3), torch.zeros(2, 2)), None,
            r"model .*8, 3\) float32 \(input\)",
        ),
        (
            nn.Linear(3, 2), (torch.zeros(2, 3), torch.zeros(2, 5)), None,
            r"loss .*8, 5\) float32 \(y\)",
        ),
        (
            nn.Linear(3, 2), (torch.zeros(2, 3), torch.zeros(2, 5)),
            nn.functional.cross_entropy, r"\(8, 3\).*loss|loss .*\(8, 5\) float32 \(y\)",
        ),
        (
            Encoder(), ({"input_ids": IDS, "attention_mask": MASK[:, :5]}, LABELS), None,
            r"\(8, 12\) int64 \(input_ids\), \(8, 5\) float32 \(attention_mask\)",
        ),
        (Encoder(), ({"ids": IDS}, LABELS), None, r"\(8, 12\) int64 \(x.ids\).*unexpected keyword"),
        (Encoder(), (IDS.float(), LABELS), None, r"model .*\(8, 12\) float32 \(input_ids\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_in_one_line(model, example, loss, expected):
    told_by_torch = []
    handler = logging.Handler()
    handler.emit = told_by_torch.append
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    with pytest.raises(hotloop.ModelError, match=expected) as told:
        hotloop.Budget.predict(model, example, 8, loss_fn=loss)
    assert "\n" not in str(told.value)
    log.removeHandler(handler)
    assert not told_by_torch
    assert model.training


def test_one_row_is_no_reason_to_refuse_a_batch_norm():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x) * float(x.detach().numpy().max())

    example = (torch.zeros(1, 3), torch.zeros(1, 3))
    budget = hotloop.Budget.predict(Branching(), example, 8)
    assert budget.working_memory_bytes is None


def test_inference_takes_what_the_model_takes():
    model = Encoder()
    predict = hotloop.Budget.predict
    whole = predict(model, {"input_ids": IDS, "attention_mask": MASK}, 1024, "infer")
    by_place = predict(model, (IDS, MASK), 1024, "infer")
    assert whole.working_memory_bytes == by_place.working_memory_bytes > 0
    assert whole.batch_data_bytes == by_place.batch_data_bytes
    # A target, which a model of one argument does not take.
    pair = predict(nn.Linear(3, 2), (torch.zeros(1, 3), torch.zeros(1)), 8, "infer")
    alone = predict(nn.Linear(3, 2), torch.zeros(1, 3), 8, "infer")
    assert pair.working_memory_bytes == alone.working_memory_bytes
