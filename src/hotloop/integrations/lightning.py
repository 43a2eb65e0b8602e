"""``Trainer(strategy=HotloopStrategy())``: an unmodified ``LightningModule`` on the fast step.

For the packages ``lightning`` and ``pytorch_lightning``: the one that is imported already, else the
one that is installed.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import MissingExtraError
from ..memory.tree import Arguments, flatten
from ..plan import Plan
from ..step import TrainStep, compile_step
from ..step.guards_code import take_for_constant
from .lightning_step import LoggedValue, SkippedStep, TrainingStep, reads_batch_idx

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
# They look at gradients, which a program does not have as a whole, or make parts of the step.
_OF_GRADIENTS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step")
_OF_THE_STEP = ("backward", "optimizer_step", "configure_gradient_clipping")
# Values that a step reads of its trainer may change so often in a row.
_MOST_CHANGES = 3


def _package() -> Any:
    """``lightning.pytorch``, or the package of the other name.

    Raises:
        MissingExtraError: neither is installed.
    """
    for name in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not error.name or error.name.partition(".")[0] != name.partition(".")[0]:
                raise
    raise MissingExtraError("hotloop.integrations.lightning", "lightning", "lightning")


_pl = _package()
_name = _pl.__name__
_automatic = importlib.import_module(f"{_name}.loops.optimization.automatic")
_Precision = importlib.import_module(f"{_name}.plugins.precision").Precision
_strategies = importlib.import_module(f"{_name}.strategies")
# Its own state is looked after here: what a step reads of the trainer, what it logs.
for _part in (_name, _name.replace("pytorch_lightning", "lightning_fabric")):
    take_for_constant(importlib.import_module(_part.partition(".")[0]).__path__[0])


class HotloopStrategy(_strategies.SingleDeviceStrategy):  # type: ignore[misc, name-defined]
    """Lightning's single device, where forward, backward and update are one recorded step.

    With automatic optimization, one optimizer and 32-bit precision. What ``training_step`` logs,
    and what it reads of the trainer (``self.current_epoch``), is as with Lightning alone. After a
    program the gradients are ``None``; a hook that looks at them makes the step Lightning's own.

    Args:
        plan: as for ``compile_step``.

    Attributes:
        reason: why the last step ran as it did.
    """

    strategy_name = "hotloop"

    def __init__(self, plan: Plan | None = None) -> None:
        super().__init__(device="cpu")
        self._plan = plan
        self._forget()

    def _forget(self) -> None:
        self._watch: TrainingStep | None = None
        self._step: TrainStep | None = None
        self._for: Any = None
        self._mode = "own"
        self._read: Any = None
        self._changes = 0
        self._reason = "no step was made yet"

    @property
    def path(self) -> str:
        """``"compiled"``: batches of a shape run as a program; ``"plain"``."""
        return "plain" if self._step is None else self._step.path

    @property
    def reason(self) -> str:
        """Why the last step ran as it did."""
        return self._reason

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """One batch's step, by the program where there is one."""
        refusal = self._refusal(optimizer, closure, kwargs)
        if refusal is None and self._watch is None:
            self._mode = "observed"
            refusal = "the first step is Lightning's own"
        if refusal is not None:
            self._reason = refusal
            try:
                return super().optimizer_step(optimizer, closure, model, **kwargs)
            finally:
                self._mode = "own"
        self._mode = "whole"
        own: Any = closure
        try:
            with torch.enable_grad():
                own._result = own._step_fn()
        finally:
            self._mode = "own"
        if own._zero_grad_fn is not None:
            own._zero_grad_fn()
        return own._result.loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """What ``training_step`` gives; in a whole step its loss, the update made."""
        if self._mode == "whole":
            return self._whole(*args)
        if self._mode == "own":
            return super().training_step(*args, **kwargs)
        module = self.lightning_module
        watch = TrainingStep(module, module._trainer)
        log = type(module).log

        def log_too(name: str, value: Any, *args: Any, **options: Any) -> None:
            watch.notes.log(name, value, *args, **options)
            view, module.__dict__["_trainer"] = module._trainer, watch.notes.view._trainer
            log(module, name, value, *args, **options)
            module.__dict__["_trainer"] = view

        with watch.watched(log_too):
            watch.notes.output = super().training_step(*args, **kwargs)
        watch.begin()
        watch.notes.check()
        watch.notes.by_key.clear()
        self._watch, self._for = watch, (module, module._trainer.optimizers[0])
        return watch.notes.output

    def _whole(self, batch: Any, batch_idx: int | None = None) -> Any:
        watch, trainer = self._watch, self.lightning_module._trainer
        assert watch is not None
        notes = watch.notes
        x = Arguments(batch, None, self._read)
        tensors, structure = flatten(x)
        notes.key = structure, tuple([t.shape for t in tensors])
        notes.ran = False
        with watch.watched(notes.log):
            try:
                if self._step is None:
                    self._step = self._compile(watch, x, trainer)
                loss = self._step(x)
            except SkippedStep:
                loss = None
            reason = "training_step returned None" if self._step is None else self._step.reason
        self._reason = notes.refusal or reason
        module: Any = self.lightning_module
        for value in watch.logged():
            module.log(value.name, _detached(value), **value.options)
        if notes.ran and isinstance(notes.output, Mapping):
            return {**notes.output, "loss": loss}
        return loss

    def _compile(self, watch: TrainingStep, x: Arguments, trainer: Any) -> TrainStep:
        limit, kind = trainer.gradient_clip_val or None, trainer.gradient_clip_algorithm
        by_value = str(getattr(kind, "value", kind)) == "value"
        return compile_step(
            watch, _loss_itself, trainer.optimizers[0], (x,), self._plan,
            clip_value=limit if by_value else None, clip_norm=None if by_value else limit,
        )  # fmt: skip

    def teardown(self) -> None:
        """Let go of the programs."""
        self._forget()
        super().teardown()

    # ---- What stays Lightning's own ------------------------------------------------------------

    def _refusal(self, optimizer: Any, closure: Any, kwargs: dict[str, Any]) -> str | None:
        """Why this step is Lightning's own; ``None``: it need not be."""
        module, trainer = self.lightning_module, self.lightning_module._trainer
        if self._for is not None and (
            self._for[0] is not module or self._for[1] is not trainer.optimizers[0]
        ):
            self._forget()
        watch = self._watch
        if watch is not None:
            if watch.notes.refusal is not None:
                return watch.notes.refusal
            read = watch.notes.read()
            self._changes = self._changes + 1 if read != self._read else 0
            self._read = read
            if self._changes > _MOST_CHANGES:
                names = ", ".join(f"trainer.{name}" for name, _ in read)
                watch.notes.refuse(f"what training_step reads changes each time: {names}")
                return watch.notes.refusal
        return self._refusal_of(module, trainer, optimizer, closure, kwargs)

    def _refusal_of(
        self, module: Any, trainer: Any, optimizer: Any, closure: Any, kwargs: dict[str, Any]
    ) -> str | None:
        if trainer.accumulate_grad_batches != 1:
            return "gradients of several batches are accumulated"
        if type(self.precision_plugin) is not _Precision:
            return f"precision is that of {type(self.precision_plugin).__name__}"
        if type(closure) is not _automatic.Closure or kwargs:
            return "the optimizer's closure is not Lightning's own"
        if self.model is not module or len(trainer.optimizers) != 1:
            return "the model is wrapped, or has more than one optimizer"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return "the optimizer has hooks"
        if torch.is_anomaly_enabled():
            return "anomalies are looked for"
        if reads_batch_idx(module.training_step):
            return "training_step reads batch_idx, which changes in each step"
        for hook in (*_OF_GRADIENTS, *_OF_THE_STEP):
            if _overrides(module, hook, _pl.LightningModule):
                return f"{type(module).__name__} has {hook}"
        for callback in trainer.callbacks:
            for hook in _OF_GRADIENTS:
                if _overrides(callback, hook, _pl.Callback):
                    return f"{type(callback).__name__} has {hook}"
        return None


def _loss_itself(answer: torch.Tensor) -> torch.Tensor:
    return answer


def _detached(logged: LoggedValue) -> Any:
    value = logged.value
    return value.detach() if isinstance(value, torch.Tensor) else value


def _overrides(thing: Any, hook: str, base: type) -> bool:
    return hook in vars(thing) or getattr(type(thing), hook, None) is not getattr(base, hook, None)


def _register() -> None:
    registry = _strategies.StrategyRegistry
    if "hotloop" not in registry:
        registry.register("hotloop", HotloopStrategy, description=HotloopStrategy.__doc__ or "")


_register()
