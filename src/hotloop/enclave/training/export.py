"""``export_training``: a model, its loss and optimizer to a folder that trains without torch.

The step is recorded as ``compile_step`` records it, on a copy of the model, with hotloop's own
kernel for every operation. What it is made of is written as plain values (``document``).
"""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...data.random_state import random_state_kept
from ...errors import InputError, ModelError, StorageError
from ...graph import choices, passes
from ...graph.compare import difference
from ...graph.from_recording import graph_of
from ...graph.lower import Lowered, lower
from ...graph.memory_plan import Block
from ...graph.recording import NotRecordable, Recorder, Recording
from ...kernels import binding
from ...kernels.calls import Call
from ...kernels.update_scalars import STATES
from ...step.check import LossFn, check_parts
from ...step.compile import compile_step
from ...step.layout import Layout
from ...step.loss_weight import LossWeight
from ...step.recorded import RecordedStep
from ...step.recorded_shape import Shape
from ...step.updates import reason_outside
from ...train.progress import RunState
from ...train.snapshot import RunIdentity, snapshot
from ...train.system_calls import Files
from ...train.tensor_file import write_tensors
from . import document as documents
from .document import DTYPES, GROUP_FIELDS
from .places import Places
from .rewrite import rewrite_batch_norms, rewrite_convolutions
from .trainer import load_training

_STEPS = 3
Three = tuple[nn.Module, Any, torch.optim.Optimizer]


def export_training(
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    example: tuple[torch.Tensor, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    num_samples: int | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    scheduler: Any = None,
    scheduler_interval: str = "epoch",
    schedule_length: int = 0,
    num_threads: int | None = None,
) -> list[str]:
    """Write a training run that needs no torch: programs, weights, optimizer.

    Model, loss and optimizer stay as they are. The run begins with the present weights and an
    optimizer that has made no step.

    Args:
        model: of layers whose forward, backward and update are hotloop's own kernels:
            perceptrons, convolutional networks, small transformers.
        loss_fn: ``loss_fn(model(x), y)``.
        optimizer: SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, RMSprop or Adagrad.
        example: one batch ``(x, y)`` of the batch size to train with; y's values are used.
        folder: made new.
        num_samples: of the training data: the last, smaller batch of an epoch gets a program of
            its own. ``None``: it is dropped when training.
        normalize: means and deviations of the channels, applied to bytes over 255.
        scheduler: its rates of ``schedule_length`` epochs or steps are written down; the last one
            holds from there.
        scheduler_interval: ``"epoch"`` or ``"step"``.
        num_threads: inside each kernel; ``None``: torch's present number.

    Returns:
        Notes for the user.

    Raises:
        ModelError: the step does not become a program, or has operations that only torch makes;
            names them and the lines of the model.
        InputError: the folder is there. StorageError: it cannot be written.
    """
    folder = Path(folder)
    check_parts(model, loss_fn, optimizer)
    if folder.exists():
        raise InputError("an export needs a new folder", got=str(folder))
    if not all(isinstance(part, torch.Tensor) and part.dim() for part in example):
        raise InputError("an example must be one batch (x, y) of two tensors")
    outside = reason_outside(optimizer)
    if outside is not None:
        raise ModelError("the optimizer must be one whose rule hotloop has", got=outside)
    if any(map(_has_begun, optimizer.state.values())):
        raise ModelError(
            "a training export begins with an optimizer that has made no step",
            got=f"{type(optimizer).__name__} with state",
            next_step="make a new optimizer on the trained weights",
        )
    notes: list[str] = []
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        with random_state_kept(), choices.own_kernels(), sdpa_kernel(SDPBackend.MATH):
            body, tensors = _build((model, loss_fn, optimizer), example, num_samples, notes)
    finally:
        torch.set_num_threads(before)
    body["normalize"] = None if normalize is None else [list(row) for row in normalize]
    body["schedule"] = {
        "interval": scheduler_interval,
        "rates": _rates(optimizer, scheduler, schedule_length),
    }
    _write(folder, body, tensors)
    return notes


def _has_begun(state: dict[str, Any]) -> bool:
    """Whether a step was made; Adagrad's state is there before its first."""
    return float(state["step"]) > 0 if "step" in state else bool(state)


def _build(
    three: Three, example: tuple[torch.Tensor, torch.Tensor], num_samples: int | None,
    notes: list[str],
) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:  # fmt: skip
    """The document but for its files, and the tensors of each file."""
    batch_size = len(example[0])
    copied: Three = copy.deepcopy(three)
    step = _recorded_step(copied, example)
    places = Places(*_described(step, copied), model=copied[0])
    programs = [_train_program(step, places, batch_size)]
    rest = (num_samples or 0) % batch_size
    if rest:
        small = example[0][:rest], example[1][:rest]
        other = copy.deepcopy(three)
        last = _recorded_step(other, small)
        programs.append(
            _train_program(
                last, Places(*_described(last, other), model=other[0], like=places), rest
            )
        )
    try:
        for size in (batch_size, 1):
            programs.append(_evaluation(three, example, size, step, places))
    except (NotRecordable, ModelError) as reason:
        programs = [p for p in programs if p["kind"] == "train"]
        notes.append(f"no evaluation: {reason}")
    body = {
        "format": documents.FORMAT,
        "version": documents.VERSION,
        "binding": binding.binding_hash(),
        "num_threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "x": _spec(example[0]),
        "y": _spec(example[1]),
        "loss_kind": LossWeight(three[1]).kind,
        "optimizer": {
            "name": type(three[2]).__name__, "groups": [_group(g) for g in three[2].param_groups]
        },
        "tensors": places.tensors,
        "programs": programs,
    }  # fmt: skip
    checkpoint, kept = _checkpoint(copied, places)
    body["checkpoint"] = checkpoint
    state = three[0].state_dict()
    files = {
        documents.MODEL_FILE: {t["names"][0]: state[t["names"][0]] for t in places.of_model},
        documents.CONSTANTS_FILE: places.constants,
        documents.CHECKPOINT_FILE: kept,
    }
    return body, files


# ---- Programs --------------------------------------------------------------------------------


def _recorded_step(three: Three, example: tuple[torch.Tensor, torch.Tensor]) -> RecordedStep:
    """A step that is a program, recorded from plain ones on the example."""
    rewrite_convolutions(three[0])
    step = compile_step(*three, example=example)
    for _ in range(_STEPS):
        step(*example)
    recorded = step.recorded
    if recorded is None or not recorded.programs or not recorded.whole:
        raise ModelError("the step must become a program (docs/step.md)", got=step.reason)
    return recorded


def _described(
    recorded: RecordedStep, three: Three
) -> tuple[dict[str, list[torch.Tensor]], list[tuple[str, torch.Tensor, float]]]:
    """What programs find, by kind; and the optimizer's states: name, tensor, initial value."""
    optimizer = three[2]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    states = []
    for weight in recorded.weights:
        for name in STATES[type(optimizer).__name__]:
            tensor = optimizer.state.get(weight, {}).get(name)
            if isinstance(tensor, torch.Tensor):
                initial = 0.0
                if name == "sum":
                    initial = float(groups[id(weight)].get("initial_accumulator_value", 0.0))
                states.append((name, tensor, initial))
    return recorded.tensors, states


def _train_program(recorded: RecordedStep, places: Places, batch_size: int) -> dict[str, Any]:
    shape: Shape = recorded.programs[-1]
    assert shape.program is not None
    lowered = shape.program.lowered
    groups = lowered.updates
    _refuse_torch(lowered)
    places.add_random_state(lowered.random_state)
    block = recorded.block
    return _program("train", batch_size, lowered, shape.batch_parts, places, block, groups)


def _program(
    kind: str,
    batch_size: int,
    lowered: Lowered,
    batch_parts: Sequence[int],
    places: Places,
    block: Block,
    groups: dict[int, int],
) -> dict[str, Any]:
    with places.arena(block.address, lowered.arena_bytes, lowered.unread) as arena:
        instructions = []
        for number, call in enumerate(lowered.instructions):
            assert isinstance(call, Call)
            instructions.append(places.values(call) | {"group": groups.get(number)})
        outputs = [places.laid(tensor) for tensor in lowered.outputs]
        return {
            "kind": kind,
            "batch_size": batch_size,
            "parts": [
                {"part": part, "at": places.laid(tensor)}
                for part, tensor in zip(batch_parts, lowered.batch, strict=True)
            ],
            "loss": outputs[0],
            "answer": outputs[1] if kind == "evaluate" else None,
            "instructions": instructions,
            "arena_bytes": arena.size_bytes,
        }


def _refuse_torch(lowered: Lowered) -> None:
    """Raise ModelError where an instruction is torch's, with its lines of the model."""
    found: dict[str, None] = {}
    for node in lowered.of_torch:
        line = node.meta.get("line")
        found[f"{_name(node)} ({line})" if line else _name(node)] = None
    if not found and not all(isinstance(i, Call) for i in lowered.instructions):
        found["an operation of torch's"] = None
    if found:
        raise ModelError(
            "every operation of a training export must be one of hotloop's kernels",
            got=", ".join(found), next_step="train it with torch, or replace these layers",
        )  # fmt: skip


def _name(node: Any) -> str:
    return str(node.target).removesuffix(".default")


def _evaluation(
    three: Three,
    example: tuple[torch.Tensor, torch.Tensor],
    size: int,
    step: RecordedStep,
    places: Places,
) -> dict[str, Any]:
    """Forward and loss in evaluation mode, on the weights of the training program.

    Recorded with its backward pass, whose layouts the passes know, which is then dropped.
    """
    model, loss_fn, _ = copy.deepcopy(three)
    model.eval()
    rewrite_batch_norms(model)
    rewrite_convolutions(model)
    tensors = _same_order(three, (model, loss_fn), step)
    x, y = (part[:size] for part in example)
    x = Layout(model, copies=True)(x)
    recordings = [_record(model, loss_fn, x, y, tensors) for _ in range(2)]
    differs = difference(*recordings)
    if differs is not None:
        raise NotRecordable(differs)
    graph = graph_of(recordings[1])
    passes.optimize(graph, torch.get_num_threads())
    (output,) = (n for n in graph.graph.graph.nodes if n.op == "output")
    loss, *_, answer = output.args[0]
    output.args = ((loss, answer),)
    graph.graph.graph.eliminate_dead_code()
    held = {**tensors, "constant": [tensor for tensor, _ in graph.constants]}
    inputs = [
        None if kind == "batch" else held[kind][number].detach() for kind, number in graph.inputs
    ]
    block = Block()
    lowered = lower(graph.graph, inputs, torch.get_num_threads(), block)
    _refuse_torch(lowered)
    batch_parts = [number for kind, number in graph.inputs if kind == "batch"]
    with places.aliases(tensors):
        return _program("evaluate", size, lowered, batch_parts, places, block, {})


def _same_order(
    three: Three, copied: tuple[nn.Module, Any], step: RecordedStep
) -> dict[str, list[torch.Tensor]]:
    """The tensors of a copy, by kind, in the order of the training program's."""
    modules = [m for m in copied if isinstance(m, nn.Module)]
    parameters = list({id(p): p for m in modules for p in m.parameters()}.values())
    found: dict[str, list[torch.Tensor]] = {
        "weight": [p for p in parameters if p.requires_grad],
        "frozen": [p for p in parameters if not p.requires_grad],
        "buffer": list({id(b): b for m in modules for b in m.buffers()}.values()),
    }
    if any(len(found[kind]) != len(mine) for kind, mine in step.tensors.items()):
        raise NotRecordable("the optimizer has parameters that the model has not")
    return found


def _record(
    model: nn.Module, loss_fn: Callable[..., Any], x: torch.Tensor, y: torch.Tensor,
    tensors: dict[str, list[torch.Tensor]],
) -> Recording:  # fmt: skip
    for weight in tensors["weight"]:
        weight.grad = None
    recorder = Recorder({**tensors, "batch": [x, y]})
    with recorder:
        answer = model(x)
        loss = loss_fn(answer, y)
        loss.backward()
    if recorder.refusal is not None:
        raise NotRecordable(recorder.refusal)
    recording = recorder.recording
    recording.loss = recorder.ref(loss.detach())
    recording.gradients = [
        None if w.grad is None else recorder.ref(w.grad) for w in tensors["weight"]
    ]
    recording.outputs = [recorder.ref(answer.detach())]
    return recording


# ---- Other parts of the document ----------------------------------------------------------------


def _spec(batch: torch.Tensor) -> dict[str, Any]:
    dtype = str(batch.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"a batch must be of one of {', '.join(DTYPES)}", got=dtype)
    return {"shape": list(batch.shape[1:]), "dtype": dtype}


def _group(group: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a parameter group that its rule knows."""
    made: dict[str, Any] = {}
    for name in sorted(GROUP_FIELDS & group.keys()):
        value = group[name]
        if name == "betas":
            made[name] = [float(beta) for beta in value]
        else:
            made[name] = value if isinstance(value, bool) else float(value)
    return made


def _rates(optimizer: torch.optim.Optimizer, scheduler: Any, length: int) -> list[list[float]]:
    """Learning rates of each step or epoch, by a scheduler whose state is put back."""
    if scheduler is None:
        return []
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise InputError("a schedule must be known before the run", got="ReduceLROnPlateau")
    if length < 1:
        raise InputError("schedule_length must be at least 1 with a scheduler", got=length)
    state, before = copy.deepcopy(scheduler.state_dict()), [g["lr"] for g in optimizer.param_groups]
    rates = []
    try:
        for _ in range(length):
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer._opt_called = True  # type: ignore[attr-defined]
            scheduler.step()
    finally:
        scheduler.load_state_dict(state)
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
    return rates


def _checkpoint(three: Three, places: Places) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Document and groups of a checkpoint as ``Trainer.fit`` writes it, and tensors to keep."""
    model, loss_fn, optimizer = three
    identity = RunIdentity(0, 1, 1, drop_last=False, data="", optimizer="", scheduler=None)
    facts = {
        "num_threads": torch.get_num_threads(), "path": "compiled", "precision": "float32",
        "tuned": None, "programs": None,
    }  # fmt: skip
    groups, document = snapshot(model, loss_fn, optimizer, None, RunState(), identity, facts, {})
    numbers = {id(p): n for n, g in enumerate(optimizer.param_groups) for p in g["params"]}
    special: dict[int, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for name, kind in (("step", "steps"), ("mu_product", "mu_product")):
            if isinstance(state.get(name), torch.Tensor):
                special[state[name].data_ptr()] = {kind: numbers[id(parameter)]}
    kept: dict[str, torch.Tensor] = {}
    refs: dict[str, dict[str, Any]] = {}
    for group, named in groups.items():
        if group == "model":
            continue
        refs[group] = {}
        for name, tensor in named.items():
            ref = special.get(tensor.data_ptr()) or places.tensor_at(tensor)
            if (group, name) == ("random", "torch") and places.random is not None:
                ref = {"tensor": places.random}
            if ref is None:
                ref = {"file": f"{group}.{name}"}
                kept[ref["file"]] = tensor
            refs[group][name] = ref
    return {"document": document, "groups": refs}, kept


def _write(folder: Path, body: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]) -> None:
    aside = folder.with_name(f".{folder.name}-{secrets.token_hex(8)}")
    files = Files()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        for name, named in tensors.items():
            write_tensors(files, aside / name, named)
        body["files"] = {name: documents.file_record(aside / name) for name in tensors}
        (aside / documents.DOCUMENT).write_bytes(documents.to_bytes(body))
        load_training(aside)  # What would be refused is not written.
        aside.rename(folder)
    except OSError as error:
        raise StorageError(f"{folder} could not be written", got=error.strerror) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
