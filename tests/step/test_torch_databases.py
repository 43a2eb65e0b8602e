"""Every optimizer and module of torch's own test databases, against eager PyTorch over six steps.

The full check runs every configuration of a module, the others its first.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import hotloop
from hotloop import kernels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import optim_db

# Importing them forbids setting torch's flags, for every other test of this process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

STEPS = 6
# A closure; gradients that are sparse: other loops than this one.
_OTHER_LOOPS = {"LBFGS", "SparseAdam"}
# What the rules of a program know; their configurations it may still leave to torch.
_RULES = {
    "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD",
}  # fmt: skip
# What none of them has: torch makes the update after a program of gradients.
_WITHOUT_RULE = {"amsgrad", "maximize", "centered"}


def both(model, loss_fn, make_optimizer, batches):
    """Losses, model and optimizer of eager PyTorch, and of the recorded step; and that step."""
    eager, ours = model, copy.deepcopy(model)
    optimizer, other = make_optimizer(eager.parameters()), make_optimizer(ours.parameters())
    torch.manual_seed(1)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(eager(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    drawn = torch.random.get_rng_state()
    torch.manual_seed(1)
    step = hotloop.compile_step(ours, loss_fn, other, example=batches[0])
    made = [step(x, y).clone() for x, y in batches]
    assert torch.equal(torch.random.get_rng_state(), drawn)
    return (losses, eager, optimizer), (made, ours, other), step


def assert_same(plain, fast):
    for wanted, made in zip(plain[0], fast[0], strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-6, equal_nan=True)
    for (name, wanted), made in zip(
        plain[1].state_dict().items(), fast[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(
            made, wanted, rtol=1e-3, atol=1e-5, equal_nan=True, msg=lambda m, n=name: n + m
        )
    wanted, made = (side[2].state_dict() for side in (plain, fast))
    assert wanted["state"].keys() == made["state"].keys()
    for number, values in wanted["state"].items():
        assert values.keys() == made["state"][number].keys()
        for name, value in values.items():
            torch.testing.assert_close(
                torch.as_tensor(made["state"][number][name]),
                torch.as_tensor(value),
                rtol=1e-3,
                atol=1e-5,
                equal_nan=True,
            )


def optimizers():
    for info in optim_db:
        if info.optim_cls.__name__ in _OTHER_LOOPS:
            continue
        for given in info.optim_inputs_func(device="cpu"):
            name = info.optim_cls.__name__
            yield pytest.param(info.optim_cls, given, id=f"{name}-{given.desc}")


@pytest.mark.parametrize(("kind", "given"), list(optimizers()))
def test_optimizers(kind, given):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
    if kind.__name__ == "Muon":  # Takes matrices alone.
        model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, False))
    batches = [(torch.randn(8, 12), torch.randint(4, (8,))) for _ in range(STEPS)]
    kwargs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in given.kwargs.items()}
    plain, fast, step = both(
        model, nn.functional.cross_entropy, lambda p: kind(p, **kwargs), batches
    )
    assert_same(plain, fast)
    assert step.path == "compiled", step.reason
    has_rule = kind.__name__ in _RULES and not any(kwargs.get(name) for name in _WITHOUT_RULE)
    assert step.makes_many == has_rule, step.reason


class Scaled(nn.Module):
    """A module behind a scale and a shift, so that something trains and a gradient comes back."""

    def __init__(self, module):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.01))
        self.module = module

    def forward(self, x):
        return self.module(x * self.scale + self.shift)


def squares(answer, y):
    """The mean square of all that an answer holds, moved by the target."""
    if isinstance(answer, (tuple, list)):
        return sum(squares(part, y) for part in answer)
    return (answer + y.mean()).square().mean()


def modules():
    """Module, constructor's arguments and input of each that takes one float tensor."""
    for info in module_db:
        given = info.module_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
        first = True
        for number, one in enumerate(given):
            forward = one.forward_input
            if forward is None or forward.kwargs or len(forward.args) != 1:
                continue
            (x,) = forward.args
            if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim()):
                continue
            marks = [] if first else [pytest.mark.full]
            first = False
            yield pytest.param(info.module_cls, one, x, id=f"{info.name}-{number}", marks=marks)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "given", "x"), list(modules()))
def test_modules(kind, given, x):
    torch.manual_seed(0)
    inner = kind(*given.constructor_input.args, **given.constructor_input.kwargs)
    model = Scaled(inner)
    batches = [
        (x.detach() * (1 + 0.01 * number), torch.full((len(x),), 0.01 * number))
        for number in range(STEPS)
    ]
    try:
        copy.deepcopy(model)
        squares(copy.deepcopy(model)(x), batches[0][1]).backward()
    except (ValueError, TypeError, RuntimeError) as error:
        pytest.skip(f"plain PyTorch does not train it: {error}")
    plain, fast, step = both(
        model, squares, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), batches
    )
    assert_same(plain, fast)
    if step.path != "compiled":
        assert step.reason
