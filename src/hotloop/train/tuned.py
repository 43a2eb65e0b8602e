"""What ``hotloop tune`` found before, for a run whose plan leaves the threads to measurement."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import PlanError
from ..machine import Machine
from ..plan import AUTO, Plan
from ..tuning import knobs_of, text_of
from ..tuning.remembered import recall
from .checkpoint import Checkpoint
from .parts import TrainingParts


@dataclass(frozen=True)
class Tuned:
    """Knobs taken over, by dotted name, and what the report says of it."""

    knobs: dict[str, Any]
    note: str


def with_tuned(
    parts: TrainingParts,
    machine: Machine,
    asked: Plan,
    plan: Plan,
    found: Checkpoint | None,
    batch_size: int,
    example: tuple[torch.Tensor, torch.Tensor],
) -> tuple[Plan, Tuned | None]:
    """The plan with what tuning found for this machine, model and batch, and what was taken over.

    Only where ``asked`` has ``num_threads = "auto"``. A knob that is not at its default
    there was set by somebody and stays. A resumed run takes what the run had when it began.

    Args:
        asked: the plan as given. plan: resolved. found: the checkpoint gone on from.
        example: one sample and target.
    """
    if asked.cpu.num_threads != AUTO:
        return plan, None
    if found is not None:
        kept = found.document.get("tuned")
        remembered = (dict(kept), "as when the run began") if kept else None
    else:
        remembered = recall(machine.fingerprint(), parts_fingerprint(parts, batch_size, example))
    if remembered is None:
        return plan, None
    knobs, proof = remembered
    now, default = knobs_of(asked), knobs_of(Plan.auto())
    knobs = {k: v for k, v in knobs.items() if k in now and now[k] == default[k]}
    try:
        return plan.replace(knobs), Tuned(
            knobs, f"plan of hotloop tune: {_changed(knobs, default)}: {proof}"
        )
    except PlanError:  # Kept by a version with other rules.
        return plan, None


def _changed(knobs: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    return text_of({k: v for k, v in knobs.items() if default[k] != v})


def parts_fingerprint(
    parts: TrainingParts, batch_size: int, example: tuple[torch.Tensor, torch.Tensor]
) -> str:
    """16 hex digits of what makes two runs the same work: model, loss, optimizer, batch, sample.

    Values of weights, learning rates and the like are left out.
    """
    optimizer = parts.optimizer
    facts = {
        "model": _described(parts.model),
        "parameters": [
            (name, list(p.shape), str(p.dtype), str(p.device.type), p.requires_grad)
            for name, p in parts.model.named_parameters()
        ],
        "loss": _described(parts.loss_fn),
        "optimizer": [
            type(optimizer).__qualname__,
            sorted((k, v) for k, v in optimizer.defaults.items() if isinstance(v, bool)),
        ],
        "limits": [parts.clip_norm is not None, parts.clip_value is not None],
        "batch": [batch_size, *((list(t.shape[1:]), str(t.dtype)) for t in example)],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _described(thing: Any) -> str:
    """Text that is the same in every process: no addresses."""
    if not isinstance(thing, nn.Module):
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing))}"
    text = f"{type(thing).__module__}.{thing!r}"
    return re.sub(r"0x[0-9a-fA-F]+", "", text)
