"""The budget: components by hand, nothing touched, and the trace against a real step."""

import copy

import pytest
import torch
from torch import nn

import hotloop
from hotloop.memory import TensorArena, largest_micro_batch
from hotloop.memory.arena_model import ArenaModel
from hotloop.memory.trace import trace_step

LOSS = nn.functional.cross_entropy


def batch(n=8, width=20):
    return torch.zeros(n, width), torch.zeros(n, dtype=torch.int64)


def predict(model, optimizer=None, n=8, example=None, **options):
    return hotloop.Budget.predict(
        model, example or batch(), n, loss_fn=LOSS, optimizer=optimizer, **options
    )


@pytest.mark.parametrize(
    ("make", "per_parameter"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.Adam(p), 2),
        (lambda p: torch.optim.Adam(p, fused=True), 2),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
        (lambda p: torch.optim.RMSprop(p), 1),
        (lambda p: torch.optim.Adagrad(p), 1),
    ],
)
def test_components_are_what_one_counts_by_hand(make, per_parameter):
    model = nn.Sequential(nn.Linear(20, 100), nn.BatchNorm1d(100), nn.Linear(100, 4))
    trained = 4 * (20 * 100 + 100 + 200 + 400 + 4)
    budget = predict(model, make(list(model.parameters())))
    assert budget.model_parameters_bytes == trained + 4 * 200 + 8
    assert budget.gradient_buffers_bytes == trained
    # Beside its tensors an optimizer may keep a step count for each of the 6 parameters.
    assert 0 <= budget.optimizer_state_bytes - per_parameter * trained <= 6 * 8
    named = [size for title, size in budget.table() if title != "Total"]
    assert budget.total_bytes == sum(size or 0 for size in named)


def test_tied_and_frozen_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(20, 20, bias=False)
            self.b = nn.Linear(20, 20, bias=False)
            self.b.weight = self.a.weight
            self.frozen = nn.Linear(20, 20, bias=False).requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.b(self.a(x)))

    budget = predict(Tied())
    assert budget.model_parameters_bytes == 2 * 1600
    assert budget.gradient_buffers_bytes == 1600


def test_predicting_touches_nothing():
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).eval()
    optimizer = torch.optim.Adam(model.parameters())
    before = copy.deepcopy(model.state_dict())
    random_state = torch.random.get_rng_state()
    predict(model, optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.state
    assert not any(m.training for m in model.modules())


def test_a_model_larger_than_memory_is_predicted_from_shapes():
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(80_000, 80_000) for _ in range(4)])
    budget = predict(model, n=16, example=batch(1, 80_000))
    parameters = 4 * (80_000**2 + 80_000) * 4
    assert budget.model_parameters_bytes == parameters
    assert budget.total_bytes > 4 * parameters


def test_inference_has_no_gradients():
    model = nn.Linear(20, 4)
    budget = hotloop.Budget.predict(model, batch()[0], 8, phase="infer")
    assert budget.gradient_buffers_bytes == budget.optimizer_state_bytes == 0
    assert "Gradient buffers" not in dict(budget.table())


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"n": 0}, "batch_size"),
        ({"n": True}, "batch_size"),
        ({"phase": "test"}, "phase must be"),
        ({"example": (torch.zeros(1, 20),)}, "example must be"),
        ({"example": batch(1, 21)}, "must run on a batch of shape"),
    ],
)
def test_what_cannot_be_predicted_is_refused(change, rule):
    with pytest.raises(hotloop.InputError, match=rule):
        predict(nn.Linear(20, 4), **change)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    # Each size tried runs the whole batch in such parts: few samples. And each is larger than what
    # resident memory changes by between two predictions, and than the weights it needs.
    model = nn.Sequential(nn.Linear(2, 400_000), nn.ReLU(), nn.Linear(400_000, 2))
    plan = hotloop.Plan()
    example = batch(8, 2)
    whole = hotloop.Budget.predict(model, example, 16, loss_fn=LOSS, plan=plan)
    limit = whole.total_bytes - whole.working_memory_bytes // 2
    found = largest_micro_batch(model, example, 16, limit, plan, loss_fn=LOSS)
    assert found is not None
    size, budget = found
    assert budget.total_bytes <= limit
    more = plan.replace({"memory.micro_batch_size": size + 1})
    assert hotloop.Budget.predict(model, example, 16, loss_fn=LOSS, plan=more).total_bytes > limit
    assert largest_micro_batch(model, example, 16, 2**20, plan, loss_fn=LOSS) is None


@pytest.mark.usefixtures("arena_available")
@pytest.mark.parametrize("kind", ["perceptron", "convolutions"])
def test_the_trace_is_what_a_real_step_allocates(kind):
    if kind == "perceptron":
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2304, 10),
        )  # fmt: skip
    x, y = torch.randn(128, 1, 28, 28), torch.zeros(128, dtype=torch.int64)
    optimizer = torch.optim.Adam(model.parameters())
    trace = trace_step(model, (x, y), batch_size=128, optimizer=optimizer, loss_fn=LOSS)
    modelled = ArenaModel()
    handles = {}
    for number, size in trace.events:
        if size:
            handles[number] = modelled.malloc(size)
        else:
            modelled.free(handles.pop(number))
    plan = hotloop.Plan(step=hotloop.StepConfig(compile="off"))
    step = hotloop.compile_step(model, LOSS, optimizer, (x, y), plan)
    with TensorArena() as arena:
        arena.reset_peak()
        start = arena.stats().live_bytes
        for _ in range(2):
            step(x, y)
        reached = arena.stats().peak_top_bytes
    assert start == 0 or reached > start
    assert modelled.peak_top_bytes == pytest.approx(reached, rel=0.05)


def test_without_the_arena_the_prediction_says_what_it_does_not_cover(monkeypatch):
    def said(plan):
        return [line for line in predict(nn.Linear(20, 4), plan=plan).assumptions if "gaps" in line]

    plan = hotloop.Plan()
    monkeypatch.setattr(TensorArena, "unavailable_reason", staticmethod(lambda: "no kernels"))
    (line,) = said(plan)
    assert "no kernels" in line
    assert said(plan.replace({"memory.tensor_arena": "never"})) == []
    monkeypatch.setattr(TensorArena, "unavailable_reason", staticmethod(lambda: None))
    assert said(plan) == []


class Caching(nn.Module):
    """Keeps what it makes in its first call."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale, self.known, self.calls = nn.GRU(8, 12), None, {}, []

    def forward(self, x):
        if self.scale is None:
            self.scale = torch.arange(12).float()
        self.calls.append(self.known.setdefault(len(x), torch.ones(12)))
        return self.layer(x)[0] * self.scale + self.known[len(x)]


def test_a_prediction_leaves_nothing_in_the_model():
    model = Caching()
    own = list(model.layer.parameters())
    hotloop.Budget.predict(model, torch.zeros(4, 2, 8), 4, "infer")
    assert (model.scale, model.known, model.calls) == (None, {}, [])
    assert all(a is b for a, b in zip(model.layer._flat_weights, own, strict=True))
    assert all(a() is b for a, b in zip(model.layer._flat_weight_refs, own, strict=True))
