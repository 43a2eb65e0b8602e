"""Whether a loss has a score for each class label of the data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn import functional

from ..errors import DataError, ModelError

_IGNORED = -100  # The default of torch's losses.


def check_labels(loss_fn: Any, output_shape: Any, labels: Mapping[int, int]) -> None:
    """Check that a classifier has a score for every label of the data.

    Args:
        loss_fn: only torch's cross entropy and its like index scores by label; others are not
            checked.
        output_shape: ``[batch, classes, ...]`` of the model's answer; ``None``: not known.
        labels: each label, and the first sample that has it.

    Raises:
        ModelError: fewer scores than classes. DataError: a label below 0.
    """
    ignored = _ignored_label(loss_fn)
    counted = {label: sample for label, sample in labels.items() if label != ignored}
    if ignored is None or not counted:
        return
    lowest = min(counted)
    if lowest < 0:
        raise DataError(
            "class labels must be integers from 0, or the ignore_index of the loss",
            got=f"{lowest} for sample {counted[lowest]}",
            next_step=f"pass torch.nn.CrossEntropyLoss(ignore_index={lowest})",
        )
    if output_shape is None:
        return
    num_classes = max(counted) + 1
    if len(output_shape) < 2 or output_shape[1] < num_classes:
        raise ModelError(
            f"the model must give one score for each of the {num_classes} classes in the data",
            got=f"output of shape {tuple(output_shape)}",
            next_step=f"make the last layer {num_classes} wide, or check the labels",
        )


def _ignored_label(loss_fn: Any) -> int | None:
    """The label that a loss of torch's skips; ``None``: not a loss that indexes scores."""
    if isinstance(loss_fn, functools.partial) and not loss_fn.args:
        inner = _ignored_label(loss_fn.func)
        return None if inner is None else int(loss_fn.keywords.get("ignore_index", inner))
    if loss_fn in (functional.cross_entropy, functional.nll_loss):
        return _IGNORED
    # By its exact type: a class of the user's may do otherwise under the same name.
    if type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss):
        return int(loss_fn.ignore_index)
    return None
