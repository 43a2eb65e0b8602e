"""Scalars of an optimizer's update in each step: learning rate, bias corrections, momenta.

Computed in double precision, as the ``_single_tensor`` functions of ``torch.optim`` do, and handed
over in a table (``binding.ControlRow``), one row for each parameter group. Imports no torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from .binding import ControlRow
from .update_kinds import UPDATE_KINDS

# Columns of a row of the table.
COLUMNS = tuple(name for name, *_ in ControlRow._fields_ if name != "unused")
ROW_DOUBLES = ctypes.sizeof(ControlRow) // ctypes.sizeof(ctypes.c_double)
AT = {name: number for number, name in enumerate(COLUMNS)}
_ADAM = ("exp_avg", "exp_avg_sq")
# State tensors of each optimizer of torch.optim, by its class's name; SGD's depend on its group.
STATES: dict[str, tuple[str, ...]] = {
    "SGD": ("momentum_buffer",),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "NAdam": _ADAM,
    "RAdam": _ADAM,
    "Adamax": ("exp_avg", "exp_inf"),
    "Adadelta": ("square_avg", "acc_delta"),
    "RMSprop": ("square_avg",),
    "Adagrad": ("sum",),
}


def table(
    optimizer: str,
    groups: Sequence[Mapping[str, Any]],
    first: float,
    count: int = 1,
    rates: Sequence[Sequence[float]] | None = None,
    mu_products: Sequence[float] | None = None,
) -> numpy.ndarray:
    """Tables of ``count`` steps, float64 ``[count, groups, 16]``.

    Args:
        optimizer: name of a class of ``torch.optim``, one of ``STATES``.
        groups: its parameter groups: the numbers in them.
        first: steps done so far.
        rates: learning rate of each step and group; ``None``: those of the groups.
        mu_products: of NAdam, its product of momenta so far, for each group.
    """
    rows = numpy.zeros((count, len(groups), ROW_DOUBLES))
    steps = numpy.arange(first + 1, first + 1 + count)
    for number, group in enumerate(groups):
        lr: Any = float(group["lr"]) if rates is None else numpy.array(rates)[:, number]
        row = _columns(optimizer, group, lr, steps)
        if optimizer == "NAdam":
            assert mu_products is not None
            row |= _nadam_rates(group, lr, steps, mu_products[number])
        for name, value in row.items():
            rows[:, number, AT[name]] = value
    return rows


def _columns(optimizer: str, group: Mapping[str, Any], lr: Any, steps: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "lr": lr,
        "weight_decay": float(group["weight_decay"]),
        "first_step": steps == 1,
        "eps": float(group.get("eps", 0.0)),
    }
    if optimizer == "SGD":
        momentum = float(group["momentum"])
        kind = "nesterov" if group["nesterov"] else "momentum" if momentum else "sgd"
        row |= {"momentum": momentum, "dampening": float(group["dampening"])}
    elif optimizer in ("Adam", "AdamW"):
        beta1, beta2 = (float(b) for b in group["betas"])
        decoupled = group.get("decoupled_weight_decay", optimizer == "AdamW")
        kind = "adamw" if decoupled else "adam"
        row |= {"beta1": beta1, "beta2": beta2, "bias_correction1": 1 - beta1**steps}
        row["bias_correction2_sqrt"] = numpy.sqrt(1 - beta2**steps)
    elif optimizer == "NAdam":
        beta1, beta2 = (float(b) for b in group["betas"])
        kind = "nadamw" if group["decoupled_weight_decay"] else "nadam"
        row |= {"beta1": beta1, "beta2": beta2, "bias_correction1": 1.0}
        row["bias_correction2_sqrt"] = numpy.sqrt(1 - beta2**steps)
    elif optimizer == "RAdam":
        kind = "adamw" if group["decoupled_weight_decay"] else "adam"
        row |= _radam(group, steps)
    elif optimizer == "Adamax":
        kind = "adamax"
        beta1, beta2 = (float(b) for b in group["betas"])
        row |= {"beta1": beta1, "beta2": beta2, "bias_correction1": 1 - beta1**steps}
    elif optimizer == "Adadelta":
        kind = "adadelta"
        row["alpha"] = float(group["rho"])
    elif optimizer == "RMSprop":
        kind = "rmsprop"
        row["alpha"] = float(group["alpha"])
    else:
        kind = "adagrad"
        row["lr"] = lr / (1 + (steps - 1) * float(group["lr_decay"]))
    row["kind"] = float(UPDATE_KINDS[kind])
    return row


def _mu(group: Mapping[str, Any], steps: Any) -> Any:
    """NAdam's momentum of each step."""
    return float(group["betas"][0]) * (1 - 0.5 * 0.96 ** (steps * group["momentum_decay"]))


def mu_products(group: Mapping[str, Any], first: float, count: int, before: float) -> Any:
    """NAdam's product of momenta after each of ``count`` steps, as ``torch.optim`` keeps it.

    Args:
        first: steps done before them. before: the product then.
    """
    return _mu_products(group, numpy.arange(first + 1, first + 1 + count), before)


def _mu_products(group: Mapping[str, Any], steps: Any, before: float) -> Any:
    """In float32, which ``torch.optim`` keeps it in."""
    factors = numpy.concatenate([[before], _mu(group, steps)]).astype(numpy.float32)
    return numpy.multiply.accumulate(factors)[1:].astype(numpy.float64)


def _nadam_rates(group: Mapping[str, Any], lr: Any, steps: Any, before: float) -> dict[str, Any]:
    mu, following = _mu(group, steps), _mu(group, steps + 1)
    products = _mu_products(group, steps, before)
    return {
        "gradient_rate": lr * (1 - mu) / (1 - products),
        "moment_rate": lr * following / (1 - products * following),
    }


def _radam(group: Mapping[str, Any], steps: Any) -> dict[str, Any]:
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
