"""What ``hotloop tune`` found before, for a run whose plan leaves the threads to measurement."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..data.batch import Batch
from ..errors import PlanError
from ..memory.tree import flatten
from ..plan import AUTO, Plan
from ..tuning import knobs_of, text_of
from ..tuning.remembered import recall
from .parts import TrainingParts
from .request import FitRequest
from .resolve import Resolved
from .run_data import RunData


def with_tuned(request: FitRequest, run: Resolved, data: RunData) -> Resolved:
    """The run with what tuning found for this machine, model and batch, and a note that says so.

    Only of one host, and where the plan was asked for with ``num_threads = "auto"``. A knob that is
    not at its default there was set by somebody and stays. A resumed run takes what the run had
    when it began.
    """
    asked = request.asked
    if run.hosts is not None or asked.cpu.num_threads != AUTO:
        return run
    remembered: tuple[dict[str, Any], str] | None
    if run.found is not None:
        kept = run.found.document.get("tuned")
        remembered = (dict(kept), "as when the run began") if kept else None
    else:
        work = parts_fingerprint(request.parts, data.batch_size, data.example)
        remembered = recall(request.machine.fingerprint(), work)
    if remembered is None:
        return run
    knobs, proof = remembered
    now, default = knobs_of(asked), knobs_of(Plan.auto())
    knobs = {k: v for k, v in knobs.items() if k in now and now[k] == default[k]}
    try:
        plan = run.plan.replace(knobs)
    except PlanError:  # Kept by a version with other rules.
        return run
    note = f"plan of hotloop tune: {_changed(knobs, default)}: {proof}"
    return dataclasses.replace(run, plan=plan, tuned=knobs, notes=(*run.notes, note))


def _changed(knobs: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    return text_of({k: v for k, v in knobs.items() if default[k] != v})


def parts_fingerprint(parts: TrainingParts, batch_size: int, example: Batch) -> str:
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
        "batch": [batch_size, *((list(t.shape[1:]), str(t.dtype)) for t in flatten(example)[0])],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _described(thing: Any) -> str:
    """Text that is the same in every process: no addresses."""
    if not isinstance(thing, nn.Module):
        return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing))}"
    text = f"{type(thing).__module__}.{thing!r}"
    return re.sub(r"0x[0-9a-fA-F]+", "", text)
