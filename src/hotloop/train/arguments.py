"""What ``Trainer.fit`` asks of its arguments, before anything is allocated."""

from __future__ import annotations

from typing import Any

from ..data import PackedDataset
from ..errors import DataError, InputError


def check_arguments(
    batch_size: int | None,
    epochs: int,
    target_accuracy: float | None,
    max_steps: int | None,
    validation: Any,
) -> None:
    """Raises InputError where one is outside its rule."""
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("max_steps", max_steps)):
        if name != "epochs" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1", got=repr(value))
    if target_accuracy is None:
        return
    if not 0 < target_accuracy <= 1:
        raise InputError(
            "target_accuracy must be above 0 and at most 1",
            got=target_accuracy,
            next_step="write 98 % as 0.98",
        )
    if validation is None:
        raise InputError(
            "target_accuracy needs validation data", next_step="pass validation=(X, Y)"
        )


def check_alike(dataset: PackedDataset, validation: PackedDataset) -> None:
    """Raises DataError where the structure, shapes or dtypes of the two differ."""
    pairs = dataset.is_pair and validation.is_pair
    names = ("sample_shape", "sample_dtype", "target_shape", "target_dtype")
    for name in names if pairs else ("structure", "row_shapes", "row_dtypes"):
        here, there = getattr(dataset, name), getattr(validation, name)
        if here != there:
            raise DataError(
                f"validation data must be like the training data: {name} {here}", got=there
            )
