"""Drawn train functions: whatever they do, and whatever changes between calls, as in PyTorch."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import hotloop
from hotloop import kernels
from support import THOROUGH
from support.train_functions import batch

if not kernels.is_available():
    pytest.skip(kernels.unavailable_reason(), allow_module_level=True)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),  # Whose rule hotloop does not have.
}
BODIES = {
    "plain": lambda: [nn.Linear(12, 10), nn.Tanh()],
    "norm": lambda: [nn.Linear(12, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU()],
    "dropout": lambda: [nn.Linear(12, 10), nn.GELU(), nn.Dropout(0.2)],
    "layer": lambda: [nn.Linear(12, 10), nn.LayerNorm(10), nn.SiLU()],
}


class World:
    """Two nets and what is kept beside them; each method is something that a function does."""

    def __init__(self, bodies, optimizers):
        self.a, self.b = (nn.Sequential(*BODIES[name](), nn.Linear(10, 4)) for name in bodies)
        self.ema = copy.deepcopy(self.a).requires_grad_(False)
        self.oa = OPTIMIZERS[optimizers[0]](self.a.parameters())
        self.ob = OPTIMIZERS[optimizers[1]](self.b.parameters())
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.oa, 0.97)
        self.mean, self.queue = torch.zeros(12), torch.zeros(6, 4)

    def fit_a(self, x, y, t):
        self.oa.zero_grad()
        loss = F.cross_entropy(self.a(x), y)
        loss.backward()
        self.oa.step()
        return loss

    def fit_a_clipped(self, x, y, t):
        self.oa.zero_grad()
        loss = F.mse_loss(self.a(x - self.mean), t)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.a.parameters(), 0.1)
        self.oa.step()
        return norm

    def fit_b_to_a(self, x, y, t):
        self.ob.zero_grad()
        loss = F.mse_loss(self.b(x), self.a(x).detach())
        loss.backward()
        self.ob.step()
        return loss

    def fit_a_through_b(self, x, y, t):
        self.oa.zero_grad()
        loss = F.mse_loss(self.b(F.pad(self.a(x), (0, 8))), t)  # Leaves gradients in b.
        loss.backward()
        self.oa.step()
        return loss

    def fit_both(self, x, y, t):
        self.oa.zero_grad()
        self.ob.zero_grad()
        loss = F.mse_loss(self.a(x), self.b(x)) + F.cross_entropy(self.b(x), y)
        loss.backward()
        self.oa.step()
        self.ob.step()
        return loss

    def add_gradients(self, x, y, t):
        loss = F.l1_loss(self.b(x), t)
        loss.backward()
        return loss

    def step_b(self, x, y, t):
        self.ob.step()
        self.ob.zero_grad(set_to_none=False)

    def penalty(self, x, y, t):
        given = (x + self.mean).requires_grad_()
        (slope,) = torch.autograd.grad(self.b(given).square().sum(), given, create_graph=True)
        self.ob.zero_grad()
        loss = slope.square().mean()
        loss.backward()
        self.ob.step()
        return loss

    def average(self, x, y, t):
        with torch.no_grad():
            for e, p in zip(self.ema.parameters(), self.a.parameters(), strict=True):
                e.mul_(0.9).add_(p, alpha=0.1)

    def average_at_once(self, x, y, t):
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.a.parameters()), 0.2)

    def decay(self, x, y, t):
        for p in self.b.parameters():
            p.data.mul_(0.99)

    def move_mean(self, x, y, t):
        before = self.mean * 2 + 1
        with torch.no_grad():
            self.mean.mul_(0.8).add_(x.mean(0), alpha=0.2)
        return torch.tanh(before) + self.mean

    def fill_queue(self, x, y, t):
        with torch.no_grad():
            self.queue.copy_(torch.cat([self.ema(x)[:2], self.queue[:-2]]))
            self.queue[:, 0] = self.queue[:, 1]
        return self.queue.sum(0)

    def look(self, x, y, t):
        self.a.eval()
        with torch.no_grad():
            found = self.a(x).mean(0) + self.b(x).mean(0)
        self.a.train()
        return found

    def by_hand(self, x, y, t):
        weights = list(self.b.parameters())
        gradients = torch.autograd.grad(F.mse_loss(self.b(x), t), weights)
        with torch.no_grad():
            for p, g in zip(weights, gradients, strict=True):
                p -= 0.01 * g

    def slower(self, x, y, t):
        self.schedule.step()

    def frozen(self, x, y, t):
        self.b.requires_grad_(False)
        self.oa.zero_grad()
        loss = F.mse_loss(self.a(x), self.b(x + 0.1 * torch.randn_like(x)))
        loss.backward()
        self.oa.step()
        self.b.requires_grad_(True)
        return loss

    def state(self):
        modules = (self.a, self.b, self.ema)
        found = [v for m in modules for v in m.state_dict().values()] + [self.mean, self.queue]
        for optimizer in (self.oa, self.ob):
            for state in optimizer.state.values():
                found += [v for v in state.values() if isinstance(v, torch.Tensor)]
        gradients = [p.grad for m in (self.a, self.b) for p in m.parameters()]
        return found, gradients


ACTIONS = [
    name for name, value in vars(World).items() if name not in ("__init__", "state")
    and callable(value) and not name.startswith("__")
]  # fmt: skip


# With gradients that the call before left, and lets go later, a call is plain.
USES_OLD_GRADIENTS = {"add_gradients", "step_b", "fit_a_through_b"}


def slow_down(world):
    for group in world.oa.param_groups:
        group["lr"] *= 0.3


def reload(world):
    world.oa.load_state_dict(copy.deepcopy(world.oa.state_dict()))
    world.a.load_state_dict({k: v * 0.9 for k, v in world.a.state_dict().items()})


def let_go(world):
    world.b.zero_grad()


CHANGES = {
    "nothing": lambda world: None,
    "rate": slow_down,
    "reload": reload,
    "eval": lambda world: world.b.eval(),
    "freeze": lambda world: world.a[0].requires_grad_(False),
    "let go": let_go,
    "mean": lambda world: world.mean.fill_(0.3),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@settings(max_examples=200 if THOROUGH else 16, deadline=None)
@given(
    st.tuples(*[st.sampled_from(sorted(BODIES))] * 2),
    st.tuples(*[st.sampled_from(sorted(OPTIMIZERS)[1:] * 3 + ["asgd"])] * 2),
    st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=5),
    st.sampled_from(sorted(CHANGES)),
)
def test_drawn_functions_are_plain_pytorchs(bodies, optimizers, actions, change):
    worlds = []
    for _ in range(2):
        torch.manual_seed(0)
        worlds.append(World(bodies, optimizers))
    world, twin = worlds

    def made(of):
        bound = [getattr(of, name) for name in actions]

        def train(x, y, t):
            found = [action(x, y, t) for action in bound]
            return [f for f in found if f is not None]

        return train

    step, plain = hotloop.compile_step(made(world)), made(twin)
    for number in range(12):
        if number == 6:
            CHANGES[change](world)
            CHANGES[change](twin)
        torch.manual_seed(number)
        found = step(*batch(number, 8))
        state = torch.get_rng_state()
        torch.manual_seed(number)
        expected = plain(*batch(number, 8))
        assert torch.equal(state, torch.get_rng_state())
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=2e-3, atol=2e-4)
        for one, other in zip(world.state()[0], twin.state()[0], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)
    if "asgd" not in optimizers and USES_OLD_GRADIENTS.isdisjoint(actions):
        assert step.path == "compiled", step.reason
