"""Training programs made of drawn pieces, and what users change in them between two steps."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from support.drawn_models import CLASSES, MODELS, WIDTH
from support.drawn_pieces import LOSSES, OPTIMIZERS, SCHEDULES


class Program:
    """Model, loss, optimizer and schedule; two of the same pieces are twins."""

    def __init__(self, pieces):
        torch.manual_seed(pieces["seed"])
        self.model = MODELS[pieces["model"]]()
        self.model.config["form"] = pieces["form"]
        if pieces["model"] == "Lazy":
            self.model(torch.zeros(2, WIDTH))
        self.loss_fn = LOSSES[pieces["loss"]]()
        parts = [self.model, *([self.loss_fn] if isinstance(self.loss_fn, nn.Module) else [])]
        self.parts = nn.ModuleList(parts)
        left_out = self.model.head.bias if pieces["leaves_out"] else None
        self.optimizer = OPTIMIZERS[pieces["optimizer"]](
            [p for p in self.parts.parameters() if p is not left_out]
        )
        self.schedule = SCHEDULES[pieces["schedule"]](self.optimizer)
        self.left_out = left_out
        self.kept = {}

    def scheduled(self):
        if self.schedule is not None:
            self.schedule.step()


# ---- What users change between two steps ---------------------------------------------------------


def set_class_attribute(p):
    # A class of its own: twins do not share it.
    p.model.__class__ = type("Own", (type(p.model),), {"temperature": 2.0})


def new_group(p):
    if p.left_out is not None:
        p.optimizer.add_param_group({"params": [p.left_out], "lr": 0.01})
        p.left_out, p.schedule = None, None


def replaced_head(p):
    head = nn.Linear(10, CLASSES)
    head.load_state_dict({"weight": torch.full((CLASSES, 10), 0.1), "bias": torch.zeros(CLASSES)})
    p.kept["old head"], p.model.head = p.model.head, head.to(p.model.first.weight.dtype)


def evaluate(mode):
    def change(p):
        p.model.eval()
        with mode():
            for n in (5, 8):
                p.model(torch.zeros(n, WIDTH))
        p.model.train()

    return change


def other_data(p):
    for parameter in p.parts.parameters():
        parameter.data = parameter.data.clone().mul_(0.9)


def without_data(p):
    with torch.no_grad():
        for parameter in p.parts.parameters():
            parameter.mul_(0.9)


def loaded(p):
    p.parts.load_state_dict(copy.deepcopy(p.parts.state_dict()))
    p.optimizer.load_state_dict(copy.deepcopy(p.optimizer.state_dict()))


def assigned(p):
    state = {k: copy.deepcopy(v) for k, v in p.model.state_dict().items()}
    p.model.load_state_dict(state, assign=True)


def hooked(p):
    p.kept["hook"] = p.model.first.register_forward_hook(lambda module, args, out: out * 0.5)


def unhooked(p):
    if "hook" in p.kept:
        p.kept.pop("hook").remove()


def gradient_hook(p):
    if p.model.first.weight.requires_grad:
        p.model.first.weight.register_hook(lambda gradient: gradient * 0.5)


def other_numbers(p):
    for group in p.optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5
        group["weight_decay"] = 0.02
        if group.get("momentum"):
            group["momentum"] = 0.6
        if "betas" in group:
            group["betas"] = (0.8, 0.99)


def other_forward(p):
    model = p.model
    p.model.middle = lambda h: type(model).middle(model, h) * 0.5


def other_loss_weight(p):
    if hasattr(p.loss_fn, "weight"):
        p.loss_fn.weight = 0.5


def forgotten_state(p):
    p.optimizer.state.clear()


def moved_state(p):
    for state in p.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                state[name] = value.clone() * 0.5


def pruned(p):
    prune.l1_unstructured(p.model.first, "weight", amount=0.3)


def gradients_left(p):
    for parameter in p.parts.parameters():
        parameter.grad = torch.ones_like(parameter)


def other_step(p):
    own = p.optimizer.step

    def step(closure=None):
        own()
        without_data(p)

    p.optimizer.step, p.schedule = step, None


def told_otherwise(p):
    """What no attribute of a module says."""
    p.model.first.weight.gain = 0.5
    if hasattr(p.model, "own"):
        p.model.own.gain = 0.5


def in_double(p):
    p.parts.double()
    for state in p.optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                state[name] = value.double()


def other_option(p):
    for group in p.optimizer.param_groups:
        if "maximize" in group:
            group["maximize"] = not group["maximize"]
            group["lr"] = group["lr"] * 0.1


def norm_in_eval(p):
    p.model.norm.eval()


CHANGES = {
    "freeze": lambda p: p.model.first.requires_grad_(False),
    "thaw": lambda p: p.model.requires_grad_(True),
    "eval": lambda p: p.model.drop.eval(),
    "norm in eval": norm_in_eval,
    "dropout": lambda p: setattr(p.model.drop, "p", 0.5),
    "attribute": lambda p: setattr(p.model, "scale", 0.5),
    "in a dict": lambda p: p.model.config.update(form="dict"),
    "class attribute": set_class_attribute,
    "new group": new_group,
    "new head": replaced_head,
    "evaluation": evaluate(torch.no_grad),
    "inference mode": evaluate(torch.inference_mode),
    "data": other_data,
    "in place": without_data,
    "loaded": loaded,
    "assigned": assigned,
    "hook": hooked,
    "unhook": unhooked,
    "gradient hook": gradient_hook,
    "numbers": other_numbers,
    "forward": other_forward,
    "loss": other_loss_weight,
    "no state": forgotten_state,
    "other state": moved_state,
    "pruned": pruned,
    "gradients left": gradients_left,
    "step": other_step,
    "told otherwise": told_otherwise,
    "double": in_double,
    "option": other_option,
    "nothing": lambda p: None,
}
