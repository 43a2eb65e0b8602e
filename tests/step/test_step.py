"""The train step against a hand-written PyTorch loop, and what it refuses."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import hotloop

LOSS = nn.functional.cross_entropy
PLAIN = hotloop.Plan().replace({"step.compile": "off"})
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 5))


def make_batches(count=30, n=64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(n, 12, generator=generator)
        yield x, x[:, :5].argmax(1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_plain_loop_bit_for_bit(name):
    model, plain = make_model(), make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    plain_optimizer = OPTIMIZERS[name](plain.parameters())
    example = next(make_batches())
    step = hotloop.compile_step(model, LOSS, optimizer, example=example, plan=PLAIN)
    for x, y in make_batches():
        plain_optimizer.zero_grad()
        loss = LOSS(plain(x), y)
        loss.backward()
        plain_optimizer.step()
        got = step(x, y)
        assert torch.equal(got, loss.detach())
        assert not got.requires_grad
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
        for key, value in plain_optimizer.state[b].items():
            assert torch.equal(torch.as_tensor(optimizer.state[a][key]), torch.as_tensor(value))


@pytest.mark.parametrize(("batch", "micro"), [(64, 16), (64, 24), (50, 16), (64, 64), (3, 16)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_make_the_update_of_the_whole_batch(batch, micro, reduction):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 5))
    plain = copy.deepcopy(model)
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    plan = hotloop.Plan().replace({"memory.micro_batch_size": micro})
    steps = []
    for which, its_plan in ((model, plan), (plain, hotloop.Plan())):
        optimizer = torch.optim.SGD(which.parameters(), lr=1e-2 / batch)
        example = next(make_batches(1, batch))
        steps.append(
            hotloop.compile_step(
                which, loss_fn, optimizer, example, its_plan.replace({"step.compile": "off"})
            )
        )
    for x, y in make_batches(10, batch):
        losses = [step(x, y) for step in steps]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay():
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x, y = next(make_batches(1))
    hotloop.compile_step(model, LOSS, optimizer, (x, y), PLAIN)(x, y)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def compiled(model=None, loss_fn=LOSS, optimizer=None, example=None):
    model = model or make_model()
    optimizer = optimizer or torch.optim.SGD(model.parameters())
    example = next(make_batches(1)) if example is None else example
    return hotloop.compile_step(model, loss_fn, optimizer, example, PLAIN)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"model": nn.Linear, "optimizer": "x"}, "model must be a torch.nn.Module"),
        ({"loss_fn": 3}, "loss_fn must be callable"),
        ({"optimizer": "adam"}, "optimizer must be a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.SGD(make_model().parameters())}, "built on the model's"),
        ({"example": torch.zeros(3)}, "example must be"),
        ({"example": (torch.zeros(3, 12), torch.zeros(2))}, "same number of samples"),
    ],
)
def test_what_cannot_be_used_is_refused(change, rule):
    with pytest.raises(hotloop.ModelError, match=rule):
        compiled(**change)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(reduction="none"), lambda out, y: out.detach().sum()]
)
def test_a_loss_must_be_one_number_that_can_be_differentiated(loss_fn):
    with pytest.raises(hotloop.ModelError, match="one number"):
        compiled(loss_fn=loss_fn)(*next(make_batches(1)))


STEP_ALONE = """
import resource, sys
import torch
from torch import nn
import hotloop

model = nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 4))
x, y = torch.randn(256, 16), torch.randint(0, 4, (256,))
plan = hotloop.Plan().replace({"step.compile": "off", "memory.tensor_arena": sys.argv[1]})
optimizer = torch.optim.SGD(model.parameters(), 0.1)
step = hotloop.compile_step(model, nn.functional.cross_entropy, optimizer, (x, y), plan)
for number in range(25):
    if number == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x, y)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


@pytest.mark.usefixtures("arena_available")
def test_a_step_by_itself_takes_no_fresh_pages():
    """Beyond the trainer too: activations lie where those of the step before lay."""

    def faults_per_step(arena):
        command = [sys.executable, "-c", STEP_ALONE, arena]
        # Else malloc learns the size, and keeps such blocks itself.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        return float(done.stdout)

    # The hidden activations alone are 1,024 pages.
    assert faults_per_step("never") > 1000
    assert faults_per_step("try") < 50
