"""A compiled step beside plain PyTorch on the same batch."""

import copy

import torch
from torch.nn import functional as F

import hotloop


def learns_as_in_plain_pytorch(model, x, lr):
    """Ten steps of SGD with the same losses; the step, and the twin that PyTorch trained."""
    twin, y = copy.deepcopy(model), torch.randint(0, 10, (len(x),))
    optimizer, plain = (
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=lr)
        for m in (model, twin)
    )
    plan = hotloop.Plan().replace({"step.compile": "always"})
    step = hotloop.compile_step(model, F.cross_entropy, optimizer, (x, y), plan)
    assert step.path == "compiled", step.reason
    same_losses(step, twin, plain, x, y, steps=10)
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
