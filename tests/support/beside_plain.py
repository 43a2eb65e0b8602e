"""A recorded step beside plain PyTorch on the same batches."""

import copy

import torch
from torch.nn import functional as F

import hotloop

ALWAYS = hotloop.Plan().replace({"step.compile": "always"})


def with_program(model, loss_fn, optimizer, x, y, plan=ALWAYS, **options):
    """A step that was called on batches of one shape until it had a program for them."""
    step = hotloop.compile_step(model, loss_fn, optimizer, (x, y), plan, **options)
    for _ in range(2):
        assert step.path == "plain"
        step(x, y)
    assert step.path == "compiled", step.reason
    return step


def called(step):
    """The operations of the last program's graph."""
    shape = list(step._recorded._shapes.values())[-1]
    return [node for node in shape.graph.graph.graph.nodes if node.op == "call_function"]


def learns_as_in_plain_pytorch(model, x, lr):
    """Ten steps of SGD with the same losses; the step, and the twin that PyTorch trained."""
    twin, y = copy.deepcopy(model), torch.randint(0, 10, (len(x),))
    optimizer, plain = (
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr)
        for m in (model, twin)
    )
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y), ALWAYS)
    same_losses(step, twin, plain, x, y, steps=10)
    assert step.path == "compiled", step.reason
    return step, twin


def same_losses(step, twin, optimizer, x, y, *, steps):
    """Train the twin by PyTorch, as ``step`` trains its model; the losses are the same."""
    for _ in range(steps):
        loss = step(x, y)
        optimizer.zero_grad()
        expected = F.cross_entropy(twin(x), y)
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
