"""A step on batches of any structure beside the same loop in plain PyTorch."""

import copy
import random
from dataclasses import dataclass, field

import torch

import hotloop
from hotloop.memory.tree import call


@dataclass
class Course:
    """How a run went.

    Attributes:
        path: where it ended, and why; programs: how many steps were one.
    """

    path: str = ""
    reason: str = ""
    losses: list = field(default_factory=list)
    programs: int = 0


def plain_step(model, loss_fn, optimizer, x, *y):
    """One step as every PyTorch tutorial writes it."""
    optimizer.zero_grad()
    loss = loss_fn(call(model, x), *y)
    loss.backward()
    optimizer.step()
    return loss.item()


def train_both(model, loss_fn, make_optimizer, batches, plan=None, **options):
    """Train a model by ``compile_step`` and its twin by PyTorch, and hold one against the other.

    Losses, weights, buffers, optimizer state and torch's random numbers must be the same.

    Args:
        make_optimizer: of a list of parameters; those of a loss module are among them.
        batches: ``(x, y)`` or ``(x,)`` each.
    """
    parts = torch.nn.ModuleList([model])
    if isinstance(loss_fn, torch.nn.Module):
        parts.append(loss_fn)
    twins = copy.deepcopy(parts)
    twin, twin_loss = twins[0], twins[1] if len(twins) > 1 else loss_fn
    optimizer = make_optimizer(list(parts.parameters()))
    plain_optimizer = make_optimizer(list(twins.parameters()))
    step = hotloop.compile_step(model, loss_fn, optimizer, batches[0], plan, **options)
    course, expected = Course(), []
    state, pythons = torch.get_rng_state(), random.getstate()
    for batch in batches:
        course.losses.append(step(*batch).item())
        course.programs += step.reason.startswith(("forward, loss, backward",))
    ours = torch.get_rng_state()
    torch.set_rng_state(state)
    random.setstate(pythons)
    for batch in batches:
        expected.append(plain_step(twin, twin_loss, plain_optimizer, *batch))
    assert torch.equal(ours, torch.get_rng_state()), "torch's random numbers went another way"
    same(course.losses, expected, 1e-5)
    for name, value in twins.state_dict().items():
        same(parts.state_dict()[name], value, 1e-4)
    for mine, theirs in zip(parts.parameters(), twins.parameters(), strict=True):
        for name, value in plain_optimizer.state[theirs].items():
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                same(optimizer.state[mine][name], value, 1e-4)
    course.path, course.reason = step.path, step.reason
    return course


def same(one, other, rtol):
    """Equal to rounding."""
    one, other = (torch.as_tensor(t).to_dense().double() for t in (one, other))
    size = other.abs().max().item() if other.numel() else 0.0
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * max(size, 1e-2), equal_nan=True)
