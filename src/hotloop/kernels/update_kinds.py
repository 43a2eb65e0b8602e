"""Names of the update rules that the kernels know, with the numbers they have there."""

from __future__ import annotations

# As UpdateRule.kind of binding.py.
UPDATE_KINDS = {
    "sgd": 0, "momentum": 1, "nesterov": 2, "adam": 3, "adamw": 4, "rmsprop": 5, "adagrad": 6,
    "nadam": 7, "nadamw": 8, "adamax": 9, "adadelta": 10,
}  # fmt: skip
