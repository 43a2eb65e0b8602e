"""SGD with momentum, Adadelta, RMSprop and Adagrad by hotloop's kernel, where that is faster.

torch makes each of these on the CPU as a handful of operations for each parameter, every one a pass
over memory; the kernel computes the same in one. Groups and state stay as they are, so checkpoints
do too. What it does not take (sparse or complex gradients, other types, options of the rule that it
does not know) goes to torch's function.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels import calls
from ..kernels.binding import UpdateRule
from ..kernels.update_kinds import UPDATE_KINDS as KINDS
from .choice import Choice
from .optimizer import are_plain, updates

# Options whose arithmetic is left to torch.
_OPTIONS_LEFT = (
    "foreach", "fused", "capturable", "differentiable", "has_complex", "has_sparse_grad",
    "maximize", "centered", "grad_scale", "found_inf",
)  # fmt: skip


@dataclass(frozen=True)
class _Rule:
    """How one of torch's functions is called.

    Attributes:
        lists: names of its first parameters. states: which of these lists are states.
        scalars: names by keyword. make: an ``UpdateRule`` from these, and the first step's number.
    """

    lists: tuple[str, ...]
    states: tuple[int, ...]
    scalars: tuple[str, ...]
    make: Callable[[dict[str, Any]], Any]


def _sgd(options: dict[str, Any]) -> Any:
    kind = "nesterov" if options["nesterov"] else "momentum"
    return UpdateRule(
        kind=KINDS[kind], lr=options["lr"], weight_decay=options["weight_decay"],
        momentum=options["momentum"], dampening=options["dampening"],
    )  # fmt: skip


def _adadelta(options: dict[str, Any]) -> Any:
    return UpdateRule(
        kind=KINDS["adadelta"], lr=options["lr"], weight_decay=options["weight_decay"],
        alpha=options["rho"], eps=options["eps"],
    )  # fmt: skip


def _rmsprop(options: dict[str, Any]) -> Any:
    return UpdateRule(
        kind=KINDS["rmsprop"], lr=options["lr"], weight_decay=options["weight_decay"],
        alpha=options["alpha"], eps=options["eps"],
    )  # fmt: skip


def _adagrad(options: dict[str, Any]) -> Any:
    rate = options["lr"] / (1 + options["steps_done"] * options["lr_decay"])
    return UpdateRule(
        kind=KINDS["adagrad"], lr=rate, weight_decay=options["weight_decay"], eps=options["eps"]
    )


_RULES = {
    "sgd": _Rule(
        ("params", "d_p_list", "momentum_buffer_list"), (2,),
        ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize"), _sgd,
    ),
    "adadelta": _Rule(
        ("params", "grads", "square_avgs", "acc_deltas", "state_steps"), (2, 3),
        ("lr", "rho", "eps", "weight_decay", "maximize"), _adadelta,
    ),
    "rmsprop": _Rule(
        ("params", "grads", "square_avgs", "grad_avgs", "momentum_buffer_list", "state_steps"),
        (2,), ("lr", "alpha", "eps", "weight_decay", "momentum", "centered"), _rmsprop,
    ),
    "adagrad": _Rule(
        ("params", "grads", "state_sums", "state_steps"), (2,),
        ("lr", "weight_decay", "lr_decay", "eps", "maximize"), _adagrad,
    ),
}  # fmt: skip
_plain: dict[str, Any] = {}


def install() -> None:
    """Replace torch's functions; once a process. Functions of another shape stay torch's."""
    for name, rule in _RULES.items():
        module: Any = importlib.import_module(f"torch.optim.{name}")
        plain = getattr(module, name)
        if name not in _plain and _is_known(plain, rule):
            _plain[name] = plain
            setattr(module, name, _replacement(plain, rule))


def remove() -> None:
    """Put torch's functions back."""
    for name, plain in _plain.items():
        setattr(importlib.import_module(f"torch.optim.{name}"), name, plain)
    _plain.clear()


def _is_known(plain: Any, rule: _Rule) -> bool:
    parameters = inspect.signature(plain).parameters
    known = {*rule.lists, *rule.scalars, *_OPTIONS_LEFT}
    needed = [n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return (
        tuple(parameters)[: len(rule.lists)] == rule.lists
        and set(parameters) <= known
        and set(needed) == set(rule.scalars)
    )


def _replacement(plain: Any, rule: _Rule) -> Any:
    choices: dict[Any, Choice] = {}

    @functools.wraps(plain)
    def update(*lists: Any, **options: Any) -> None:
        if torch.compiler.is_compiling():
            plain(*lists, **options)
            return
        started = time.perf_counter()
        choice = None
        if len(lists) == len(rule.lists) and _takes(rule, lists, options):
            params = lists[0]
            key = len(params), params[0].shape, params[-1].shape, torch.get_num_threads()
            choice = choices.setdefault(key, Choice())
        taken = choice is not None and choice.next()
        if taken:
            _update(rule, lists, options)
        else:
            plain(*lists, **options)
        seconds = time.perf_counter() - started
        if choice is not None:
            choice.note(taken, seconds)
        if taken:
            updates.calls += 1
            updates.fused += 1
            updates.seconds += seconds

    return update


def _takes(rule: _Rule, lists: Sequence[list[Any]], options: dict[str, Any]) -> bool:
    """Whether the kernel computes what torch's function would."""
    if any(options.get(name) for name in _OPTIONS_LEFT):
        return False
    if options.get("foreach") is not None or options.get("fused") is not None:
        return False  # The script's choice stays.
    if torch.are_deterministic_algorithms_enabled():
        return False  # Which way is the faster one may differ from run to run.
    scalars = [options[name] for name in rule.scalars]
    if not all(isinstance(scalar, (int, float)) for scalar in scalars):
        return False
    if rule.make is _sgd and not options["momentum"]:
        return False  # One pass already.
    if rule.make is _rmsprop and options["momentum"]:
        return False
    used = [lists[0], lists[1], *(lists[number] for number in rule.states)]
    return bool(lists[0]) and all(t is not None for part in used for t in part) and are_plain(used)


def _update(rule: _Rule, lists: Sequence[list[Any]], options: dict[str, Any]) -> None:
    params, gradients = lists[0], lists[1]
    steps = lists[-1] if rule.lists[-1] == "state_steps" else []
    threads = torch.get_num_threads()
    made, steps_done = None, None
    for number, (weight, gradient) in enumerate(zip(params, gradients, strict=True)):
        if rule.make is _adagrad:
            steps_done = float(steps[number])
        if made is None or (steps_done is not None and made[0] != steps_done):
            made = steps_done, rule.make({**options, "steps_done": steps_done})
        states = [lists[at][number] for at in rule.states]
        calls.update(weight, gradient, states, made[1], num_threads=threads)()
    with torch.no_grad():
        for step in steps:
            step += 1
    torch.autograd.graph.increment_version([*params, *(t for n in rule.states for t in lists[n])])
