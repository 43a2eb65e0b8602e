"""Operators of a graph of inference: layers with all that their kernels do in one pass.

They are never called: they are names for nodes. Images are ``[batch, C, H, W]``, as in ATen;
``activation`` is ``"none"``, ``"relu"``, ``"gelu"`` or ``"tanh_gelu"``.
"""

from __future__ import annotations

from typing import Any

ACTIVATIONS = ("relu", "gelu", "tanh_gelu")


def linear(x: Any, weight: Any, bias: Any, addend: Any, activation: str) -> Any:
    """``activation(x weight^T + bias + addend)``."""


def convolution(
    x: Any, weight: Any, bias: Any, addend: Any, stride: Any, padding: Any, activation: str,
    pooled: bool,
) -> Any:  # fmt: skip
    """``activation(x * weight + bias + addend)``; ``pooled``: then the greatest of each 2x2."""


def max_pool(x: Any, kernel: Any, stride: Any, padding: Any, activation: str) -> Any:
    """``activation(the greatest of each window)``."""


def pointwise(x: Any, addend: Any, activation: str) -> Any:
    """``activation(x + addend)``."""
