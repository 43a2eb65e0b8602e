"""Optimizer rules in the graph: which ``torch.optim`` rules, their state, and their scalars.

The graph holds the arithmetic on tensors; scalars that change from step to step (learning rate,
bias corrections) are computed by ``kernels.update_scalars`` and handed over in a small table, one
row for each parameter group.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import optim

from ..kernels import update_scalars
from ..kernels.update_kinds import UPDATE_KINDS as KINDS
from ..kernels.update_scalars import AT, ROW_DOUBLES, STATES
from .guards_tensors import own_step

UNEVEN = "the parameters have made different numbers of steps"
_KNOWN = {getattr(optim, name) for name in STATES}


@dataclass
class Update:
    """The rule of one optimizer over the weights of a graph.

    Attributes:
        optimizer: ``torch.optim`` SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, RMSprop or
            Adagrad.
        weights: trainable parameters, in the order of the graph.
        clip_norm, clip_value: limits of the gradient before the update.
        used: numbers of the weights that get a gradient; set by who builds the graph.
    """

    optimizer: optim.Optimizer
    weights: list[torch.Tensor]
    clip_norm: float | None = None
    clip_value: float | None = None
    used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._group_of: dict[int, int] = {}
        for number, group in enumerate(self.optimizer.param_groups):
            for parameter in group["params"]:
                self._group_of[id(parameter)] = number
        groups = self.optimizer.param_groups
        self._has_momentum = [bool(g["momentum"]) for g in groups if "momentum" in g]
        self._names = [self._state_names(w) for w in self.weights]

    def _state_names(self, weight: torch.Tensor) -> tuple[str, ...]:
        number = self._group_of.get(id(weight))
        if number is None:
            return ()
        group = self.optimizer.param_groups[number]
        if isinstance(self.optimizer, optim.SGD):
            return ("momentum_buffer",) if group["momentum"] else ()
        return STATES.get(type(self.optimizer).__name__, ("sum",))

    def change(self) -> str | None:
        """Why the rule is another one than when it was made; ``None``: it is the same.

        Numbers of groups are read each time, and switches are guarded. But whether there is a
        momentum says which state there is.
        """
        for group, had in zip(self.optimizer.param_groups, self._has_momentum, strict=False):
            if bool(group["momentum"]) != had:
                return f"{type(self.optimizer).__name__} gets or loses its momentum"
        return None

    def has_group(self, weight: torch.Tensor) -> bool:
        """Whether the optimizer updates a weight."""
        return id(weight) in self._group_of

    def group_of(self, weight: torch.Tensor) -> int:
        """Number of the parameter group that a weight is in."""
        return self._group_of[id(weight)]

    def state_shapes(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """One tensor like the weight for each state it has; only shape and strides count."""
        return [torch.empty_like(weight, device="meta")] * len(self._state_names(weight))

    def control(self) -> torch.Tensor:
        """An empty table, float64 ``[groups, 16]``."""
        return torch.zeros(len(self.optimizer.param_groups), ROW_DOUBLES, dtype=torch.float64)

    def bind(self) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
        """State tensors in the order of the graph, step counters, and steps done; made if missing.

        Raises:
            ValueError: the parameters have made different numbers of steps.
        """
        states: list[torch.Tensor] = []
        counters: list[torch.Tensor] = []
        known = self.optimizer.state
        sgd = isinstance(self.optimizer, optim.SGD)
        fresh = self._fresh(known)
        if sgd and len(set(fresh)) > 1:
            raise ValueError(UNEVEN)
        for number, weight in enumerate(self.weights):
            names = self._names[number]
            if number not in self.used:
                states += [torch.zeros_like(weight) for _ in names]
                continue
            if sgd and not names:  # torch.optim keeps no entry either.
                continue
            state = known[weight]
            if not sgd and "step" not in state:
                state["step"] = torch.tensor(0.0)
            if isinstance(self.optimizer, optim.NAdam) and "mu_product" not in state:
                state["mu_product"] = torch.tensor(1.0)
            for name in names:
                if state.get(name) is None:
                    initial = 0.0
                    if name == "sum":
                        initial = self._group(weight).get("initial_accumulator_value", 0.0)
                    state[name] = torch.full_like(weight, initial, requires_grad=False)
                elif state[name].stride() != weight.stride():
                    state[name] = torch.empty_like(weight).copy_(state[name])
                states.append(state[name])
            if "step" in state:
                counters.append(state["step"])
        done = {float(c) for c in counters}
        if len(done) > 1:
            raise ValueError(UNEVEN)
        if sgd:
            # The first step differs only with dampening: the buffer begins as the gradient.
            return states, counters, 0.0 if any(fresh) else 1.0
        return states, counters, done.pop() if done else 0.0

    def _fresh(self, known: Mapping[torch.Tensor, Mapping[str, Any]]) -> list[bool]:
        """Whether a weight that has state by its rule has none yet, for each such weight."""
        return [
            any(known.get(self.weights[n], {}).get(name) is None for name in self._names[n])
            for n in self.used
            if self._names[n]
        ]

    def _group(self, weight: torch.Tensor) -> dict[str, Any]:
        group: dict[str, Any] = self.optimizer.param_groups[self._group_of[id(weight)]]
        return group

    def rows(
        self, first: float, count: int = 1, rates: Sequence[Sequence[float]] | None = None
    ) -> torch.Tensor:
        """Tables of ``count`` steps, float64 ``[count, groups, 16]``.

        Args:
            first: steps done so far.
            rates: learning rate of each step and group; ``None``: those of the optimizer.
        """
        groups = self.optimizer.param_groups
        products = None
        if isinstance(self.optimizer, optim.NAdam):
            products = [self._mu_product(number) for number in range(len(groups))]
        kind = type(self.optimizer).__name__
        made = update_scalars.table(kind, groups, first, count, rates, products)
        return torch.from_numpy(made)

    def advance(self, first: float, count: int) -> None:
        """Keep what a rule counts beside its steps, after ``count`` steps: NAdam's ``mu_product``.

        Args:
            first: steps done before them.
        """
        if not isinstance(self.optimizer, optim.NAdam) or not count:
            return
        for number, group in enumerate(self.optimizer.param_groups):
            before = self._mu_product(number)
            (*_, product) = update_scalars.mu_products(group, first, count, before)
            for weight in self._of_group(number):
                self.optimizer.state[weight]["mu_product"].fill_(float(product))

    def _of_group(self, number: int) -> list[torch.Tensor]:
        used = (self.weights[n] for n in self.used)
        return [w for w in used if self._group_of[id(w)] == number]

    def _mu_product(self, number: int) -> float:
        """NAdam's product of momenta so far; all parameters have made the same steps."""
        weights = self._of_group(number)
        return float(self.optimizer.state[weights[0]]["mu_product"]) if weights else 1.0


@functools.cache  # The same for each micro-batch; nobody writes it.
def sums_table() -> torch.Tensor:
    """The table, float64 ``[1, 16]``, by which an update adds its gradient: w - (-1 * g)."""
    table = torch.zeros(1, ROW_DOUBLES, dtype=torch.float64)
    table[0, AT["kind"]], table[0, AT["lr"]] = KINDS["sgd"], -1.0
    return table


def reason_outside(optimizer: optim.Optimizer) -> str | None:
    """Why this optimizer's rule is not in the graph; ``None``: it is."""
    kind = type(optimizer)
    if kind not in _KNOWN:
        return f"{kind.__name__} keeps its own step"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"{kind.__name__} has hooks"
    if own_step(optimizer) is not None:
        return f"the step of this {kind.__name__} is not torch's"
    for group in optimizer.param_groups:
        for option in ("amsgrad", "maximize", "centered", "capturable", "differentiable"):
            if group.get(option):
                return f"{kind.__name__} with {option}=True keeps its own step"
        if kind is optim.RMSprop and group["momentum"]:
            return "RMSprop with momentum keeps its own step"
    return None
