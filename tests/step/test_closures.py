"""Optimizers that evaluate the loss themselves, and those of sparse gradients: plain, and right."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hotloop
from support.beside_loop import same, train_both


class Twice(torch.optim.SGD):
    """Evaluates the loss twice a step, as a sharpness-aware optimizer does."""

    def step(self, closure):
        closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        return super().step()


OPTIMIZERS = {
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=4, history_size=3),
    "with a line search": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    "one of one's own": lambda p: Twice(p, lr=0.1),
}


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3))


def batches(count=5):
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(20, 6, generator=g), torch.randint(0, 3, (20,), generator=g)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("micro", [None, 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_is_evaluated_as_in_pytorch(name, micro, clip_norm):
    model = build()
    twin = copy.deepcopy(model)
    optimizer, plain = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    plan = hotloop.Plan().replace({"memory.micro_batch_size": micro})
    example = next(batches())
    step = hotloop.compile_step(
        model, F.cross_entropy, optimizer, example, plan, clip_norm=clip_norm
    )
    for number, (x, y) in enumerate(batches()):

        def closure(x=x, y=y):
            plain.zero_grad()
            loss = F.cross_entropy(twin(x), y)
            loss.backward()
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(twin.parameters(), clip_norm)
            return loss

        torch.manual_seed(number)
        got = step(x, y)
        torch.manual_seed(number)
        first = closure()
        torch.manual_seed(number)
        plain.step(closure)
        assert torch.equal(got, first.detach())
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert step.path == "plain"
    assert "closure" in step.reason


def test_micro_batches_inside_a_closure():
    weights = []
    for micro in (None, 6):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
        plan = hotloop.Plan().replace({"memory.micro_batch_size": micro})
        step = hotloop.compile_step(model, F.cross_entropy, optimizer, next(batches()), plan)
        for x, y in batches(3):
            step(x, y)
        weights.append(model.weight)
    same(weights[1].detach(), weights[0].detach(), 1e-3)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 6, sparse=True), nn.Linear(6, 3)

    def forward(self, x):
        return F.linear(self.embed(x).mean(1), self.head.weight.detach())


@pytest.mark.parametrize(
    "make", [torch.optim.SparseAdam, lambda p: torch.optim.SGD(p, lr=0.3)], ids=["adam", "sgd"]
)
def test_sparse_gradients(make):
    torch.manual_seed(0)
    model = Words()
    model.head.requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    data = [
        (torch.randint(0, 50, (8, 4), generator=g), torch.randint(0, 3, (8,), generator=g))
        for _ in range(5)
    ]
    course = train_both(
        model, F.cross_entropy, lambda p: make([q for q in p if q.requires_grad]), data
    )
    assert course.path == "plain"
    assert "sparse" in course.reason


class Learned(nn.Module):
    """Weights of tasks that are learned, and a buffer that moves."""

    def __init__(self):
        super().__init__()
        self.log_var = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, out, y):
        self.seen += 0.1
        parts = torch.stack([F.cross_entropy(out, y), out.square().mean()])
        return (torch.exp(-self.log_var) * parts).sum() + self.log_var.sum() + 0 * self.seen


def test_a_loss_with_parameters_and_a_buffer_is_trained():
    torch.manual_seed(0)
    course = train_both(
        nn.Linear(6, 3), Learned(), lambda p: torch.optim.Adam(p, lr=0.05), list(batches(8))
    )
    if hotloop.kernels.is_available():
        assert course.path == "compiled", course.reason


def test_a_probe_of_precision_leaves_a_loss_with_parameters_alone():
    loss_fn = Learned()
    model = nn.Linear(6, 3)
    plan = hotloop.Plan().replace({"step.precision": "auto", "step.compile": "always"})
    optimizer = torch.optim.Adam([*model.parameters(), *loss_fn.parameters()])
    hotloop.compile_step(model, loss_fn, optimizer, next(batches()), plan)
    assert loss_fn.seen == 0
    assert loss_fn.log_var.grad is None
    assert torch.equal(loss_fn.log_var, torch.zeros(2))
