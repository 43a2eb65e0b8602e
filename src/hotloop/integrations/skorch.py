"""skorch's nets on the fast step: the same class with ``Hotloop`` before its name.

They go wherever skorch's go: pipelines, ``GridSearchCV``, pickle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import MissingExtraError
from ..memory.tree import Arguments
from ..step import TrainStep, compile_step
from ..step.guards_code import take_for_constant

try:
    import sklearn
    import skorch
    from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
    from skorch.callbacks import BatchScoring, Callback, EpochScoring, GradientNormClipping
    from skorch.dataset import unpack_data
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] not in ("skorch", "sklearn"):
        raise
    raise MissingExtraError("hotloop.integrations.skorch", "skorch", "skorch") from None

# A net's own state is looked after here: a module, loss or optimizer made anew makes a new step.
for _library in (skorch, sklearn):
    take_for_constant(str(Path(_library.__file__).parent))

# Parts of the step that a net of the user's own may make itself.
_PARTS = (
    "train_step", "train_step_single", "get_train_step_accumulator", "_step_optimizer",
    "_zero_grad_optimizer",
)  # fmt: skip


class _NetLoss(nn.Module):
    """A net's own loss of a batch: ``forward(X, y)``."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        for name in (*net._modules, *net._criteria):
            part = getattr(net, f"{name}_")
            if isinstance(part, nn.Module):
                self.add_module(f"{name}_", part)
        # Guards follow the code of a method that is an attribute.
        self.infer, self.get_loss = net.infer, net.get_loss

    def forward(self, X: Any, y: Any) -> torch.Tensor:
        loss: torch.Tensor = self.get_loss(self.infer(X), y, X=X, training=True)
        return loss


class _FastStep:
    """The step of one module, loss and optimizer of a net."""

    def __init__(self, net: Any, clip_norm: float | None) -> None:
        self.made_for = _parts_of(net)
        self.clip_norm = clip_norm
        self._loss = _NetLoss(net)
        self.step: TrainStep | None = None

    def __call__(self, net: Any, X: Any, y: Any) -> torch.Tensor:
        x = Arguments(X, y)
        if self.step is None:
            self.step = compile_step(
                self._loss, _loss_itself, net.optimizer_, (x,), clip_norm=self.clip_norm
            )
        return self.step(x)

    @property
    def reason(self) -> str:
        return "" if self.step is None else self.step.reason


class _HotloopNet:
    """What makes a class of skorch's fast. Comes before it among the bases.

    ``fit`` records the first steps and runs the next ones as a program of forward, loss, backward
    and update. A net with several optimizers, or callbacks that look at gradients or training
    predictions, makes skorch's own steps, and ``hotloop_reason`` says so.
    """

    @property
    def hotloop_path(self) -> str:
        """``"compiled"``: batches of a shape run as a program; ``"plain"``."""
        fast = self.__dict__.get("_hotloop")
        return "plain" if fast is None or fast.step is None else fast.step.path

    @property
    def hotloop_reason(self) -> str:
        """Why the last step ran as it did."""
        reason: str = self.__dict__.get("_hotloop_reason", "no step was made yet")
        return reason

    def train_step(self, batch: Any, **fit_params: Any) -> dict[str, Any]:
        """One step on a batch.

        Returns:
            ``loss``, before the update, and ``y_pred``; ``None`` after a whole step.
        """
        net: Any = self
        refusal, clip_norm = _refusal(net, fit_params)
        if refusal is not None:
            net._hotloop_reason = refusal
            own: dict[str, Any] = super().train_step(batch, **fit_params)  # type: ignore[misc]
            return own
        fast = self.__dict__.get("_hotloop")
        if fast is None or fast.clip_norm != clip_norm or fast.made_for != _parts_of(net):
            fast = net._hotloop = _FastStep(net, clip_norm)
        net._set_training(True)
        loss = fast(net, *unpack_data(batch))
        net._hotloop_reason = fast.reason
        return {"loss": loss, "y_pred": None}

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment]
        return {name: value for name, value in state.items() if not name.startswith("_hotloop")}


class HotloopNet(_HotloopNet, NeuralNet):  # type: ignore[misc]
    """skorch's ``NeuralNet`` on the fast step."""


class HotloopClassifier(_HotloopNet, NeuralNetClassifier):  # type: ignore[misc]
    """skorch's ``NeuralNetClassifier`` on the fast step."""


class HotloopBinaryClassifier(_HotloopNet, NeuralNetBinaryClassifier):  # type: ignore[misc]
    """skorch's ``NeuralNetBinaryClassifier`` on the fast step."""


class HotloopRegressor(_HotloopNet, NeuralNetRegressor):  # type: ignore[misc]
    """skorch's ``NeuralNetRegressor`` on the fast step."""


def _refusal(net: Any, fit_params: dict[str, Any]) -> tuple[str | None, float | None]:
    """Why a step is skorch's own, or ``None``, and the limit of the gradient's norm."""
    if len(net._optimizers) != 1:
        return "the net has more than one optimizer", None
    if fit_params:
        return f"fit was given {next(iter(fit_params))}", None
    for name in _PARTS:
        of_ours = getattr(_HotloopNet, name, None)
        if getattr(type(net), name) is not (of_ours or getattr(NeuralNet, name)):
            return f"{type(net).__name__} has a {name} of its own", None
    if type(net).on_grad_computed is not NeuralNet.on_grad_computed:
        return f"{type(net).__name__} has on_grad_computed", None
    if type(net).on_batch_end is not NeuralNet.on_batch_end:
        return f"{type(net).__name__} has on_batch_end", None
    clip_norm = None
    for name, callback in net.callbacks_:
        if type(callback) is GradientNormClipping and clip_norm is None:
            if callback.gradient_clip_norm_type != 2:
                return f"callback {name} clips by another norm", None
            clip_norm = callback.gradient_clip_value
        elif type(callback).on_grad_computed is not Callback.on_grad_computed:
            return f"callback {name} looks at gradients", None
        scores = isinstance(callback, BatchScoring | EpochScoring) and callback.on_train
        if scores or not _is_skorchs(type(callback).on_batch_end):
            return f"callback {name} may look at predictions", None
    return None, clip_norm


def _is_skorchs(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "skorch"


def _parts_of(net: Any) -> list[int]:
    names = (*net._modules, *net._criteria, *net._optimizers)
    return [id(getattr(net, f"{name}_")) for name in names]


def _loss_itself(answer: torch.Tensor) -> torch.Tensor:
    return answer
