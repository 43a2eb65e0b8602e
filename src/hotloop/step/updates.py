"""Optimizer rules in the graph: which ``torch.optim`` rules, their state, and their scalars.

The graph holds the arithmetic on tensors; scalars that change from step to step (learning rate,
bias corrections) are computed here in double precision, as ``torch.optim`` does, and handed over
in a small table, one row for each parameter group.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import optim

from ..kernels.binding import ControlRow
from ..kernels.update_kinds import UPDATE_KINDS as KINDS
from .guards_tensors import own_step

# Columns of a row of the table.
COLUMNS = tuple(name for name, *_ in ControlRow._fields_ if name != "unused")
_ROW_DOUBLES = ctypes.sizeof(ControlRow) // ctypes.sizeof(ctypes.c_double)
_AT = {name: number for number, name in enumerate(COLUMNS)}
UNEVEN = "the parameters have made different numbers of steps"
_ADAM = ("exp_avg", "exp_avg_sq")
# State tensors of each rule; SGD's depend on its group.
_STATES: dict[type[optim.Optimizer], tuple[str, ...]] = {
    optim.Adam: _ADAM,
    optim.AdamW: _ADAM,
    optim.NAdam: _ADAM,
    optim.RAdam: _ADAM,
    optim.Adamax: ("exp_avg", "exp_inf"),
    optim.Adadelta: ("square_avg", "acc_delta"),
    optim.RMSprop: ("square_avg",),
    optim.Adagrad: ("sum",),
}


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
        return _STATES.get(type(self.optimizer), ("sum",))

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
        return torch.zeros(len(self.optimizer.param_groups), _ROW_DOUBLES, dtype=torch.float64)

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
        table = numpy.zeros((count, len(groups), _ROW_DOUBLES))
        steps = numpy.arange(first + 1, first + 1 + count)
        for number, group in enumerate(groups):
            lr: Any = float(group["lr"]) if rates is None else numpy.array(rates)[:, number]
            row = _columns(self.optimizer, group, lr, steps)
            if isinstance(self.optimizer, optim.NAdam):
                row |= _nadam_rates(group, lr, steps, self._mu_product(number))
            for name, value in row.items():
                table[:, number, _AT[name]] = value
        return torch.from_numpy(table)

    def advance(self, first: float, count: int) -> None:
        """Keep what a rule counts beside its steps, after ``count`` steps: NAdam's ``mu_product``.

        Args:
            first: steps done before them.
        """
        if not isinstance(self.optimizer, optim.NAdam) or not count:
            return
        steps = numpy.arange(first + 1, first + 1 + count)
        for number, group in enumerate(self.optimizer.param_groups):
            (*_, product) = _mu_products(group, steps, self._mu_product(number))
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
    table = torch.zeros(1, _ROW_DOUBLES, dtype=torch.float64)
    table[0, _AT["kind"]], table[0, _AT["lr"]] = KINDS["sgd"], -1.0
    return table


def _columns(optimizer: Any, group: dict[str, Any], lr: Any, steps: Any) -> dict[str, Any]:
    """Scalars of the updates; see the ``_single_tensor`` functions of ``torch.optim``."""
    row: dict[str, Any] = {
        "lr": lr,
        "weight_decay": float(group["weight_decay"]),
        "first_step": steps == 1,
        "eps": float(group.get("eps", 0.0)),
    }
    if isinstance(optimizer, optim.SGD):
        momentum = float(group["momentum"])
        kind = "nesterov" if group["nesterov"] else "momentum" if momentum else "sgd"
        row |= {"momentum": momentum, "dampening": float(group["dampening"])}
    elif isinstance(optimizer, (optim.Adam, optim.AdamW)):
        beta1, beta2 = (float(b) for b in group["betas"])
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, optim.AdamW))
        kind = "adamw" if decoupled else "adam"
        row |= {"beta1": beta1, "beta2": beta2, "bias_correction1": 1 - beta1**steps}
        row["bias_correction2_sqrt"] = numpy.sqrt(1 - beta2**steps)
    elif isinstance(optimizer, optim.NAdam):
        beta1, beta2 = (float(b) for b in group["betas"])
        kind = "nadamw" if group["decoupled_weight_decay"] else "nadam"
        row |= {"beta1": beta1, "beta2": beta2, "bias_correction1": 1.0}
        row["bias_correction2_sqrt"] = numpy.sqrt(1 - beta2**steps)
    elif isinstance(optimizer, optim.RAdam):
        kind = "adamw" if group["decoupled_weight_decay"] else "adam"
        row |= _radam(group, steps)
    elif isinstance(optimizer, optim.Adamax):
        kind = "adamax"
        beta1, beta2 = (float(b) for b in group["betas"])
        row |= {"beta1": beta1, "beta2": beta2, "bias_correction1": 1 - beta1**steps}
    elif isinstance(optimizer, optim.Adadelta):
        kind = "adadelta"
        row["alpha"] = float(group["rho"])
    elif isinstance(optimizer, optim.RMSprop):
        kind = "rmsprop"
        row["alpha"] = float(group["alpha"])
    else:
        kind = "adagrad"
        row["lr"] = lr / (1 + (steps - 1) * float(group["lr_decay"]))
    row["kind"] = float(KINDS[kind])
    return row


def _mu(group: dict[str, Any], steps: Any) -> Any:
    """NAdam's momentum of each step."""
    return float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (steps * group["momentum_decay"]))


def _mu_products(group: dict[str, Any], steps: Any, before: float) -> Any:
    """The product of momenta after each step, in float32 as ``torch.optim`` keeps it."""
    factors = numpy.concatenate([[before], _mu(group, steps)]).astype(numpy.float32)
    return numpy.multiply.accumulate(factors)[1:].astype(numpy.float64)


def _nadam_rates(group: dict[str, Any], lr: Any, steps: Any, before: float) -> dict[str, Any]:
    mu, following = _mu(group, steps), _mu(group, steps + 1)
    products = _mu_products(group, steps, before)
    return {
        "gradient_rate": lr * (1 - mu) / (1 - products),
        "moment_rate": lr * following / (1 - products * following),
    }


def _radam(group: dict[str, Any], steps: Any) -> dict[str, Any]:
    """RAdam as Adam: rectified, ``eps`` stands beside the root itself; before that, alone."""
    beta1, beta2 = (float(b) for b in group["betas"])
    correction1, correction2 = 1 - beta1**steps, 1 - beta2**steps
    most = 2 / (1 - beta2) - 1
    length = most - 2 * steps * beta2**steps / correction2
    is_rectified = length > 5
    known = numpy.where(is_rectified, length, 6.0)
    with numpy.errstate(all="ignore"):  # Where nothing is rectified.
        rectified = numpy.sqrt(
            (known - 4) * (known - 2) * most / ((most - 4) * (most - 2) * known) * correction2
        )
    return {
        "beta1": beta1,
        "beta2": beta2,
        "eps": numpy.where(is_rectified, float(group["eps"]), 1.0),
        "bias_correction1": correction1 / numpy.where(is_rectified, rectified, 1.0),
        "bias_correction2_sqrt": numpy.where(is_rectified, 1.0, numpy.inf),
    }


def reason_outside(optimizer: optim.Optimizer) -> str | None:
    """Why this optimizer's rule is not in the graph; ``None``: it is."""
    kind = type(optimizer)
    if kind is not optim.SGD and kind not in _STATES:
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
