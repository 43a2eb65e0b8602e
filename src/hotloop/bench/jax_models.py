"""The models of the races in JAX: functions of a weights' dictionary and a batch.

Keys are those of the torch model's ``state_dict``; weights of matrix products are stored
transposed, ``[in, out]``, as JAX multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax  # type: ignore[import-not-found, unused-ignore]
import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]
import numpy

from .shapes import ENCODER_HEADS, ENCODER_LAYERS

_EPSILON = 1e-5


def weights_of(state: Mapping[str, numpy.ndarray]) -> dict[str, Any]:
    """Arrays of a torch ``state_dict`` as JAX takes them."""
    return {
        name: jnp.asarray(array.T if array.ndim == 2 else array) for name, array in state.items()
    }


def forward_of(name: str) -> Callable[[dict[str, Any], Any], Any]:
    """``forward(weights, batch) -> scores`` of a model of the race; compile it with ``jax.jit``."""
    if name == "resnet18":
        return _resnet18
    if name == "encoder":
        return _encoder

    def zoo(w: dict[str, Any], x: Any) -> Any:
        # Inside jit the keys are sorted: "0.bias" before "0.weight", and "10" before "2".
        keys = sorted(w, key=lambda key: (int(key.split(".")[0]), key.endswith("bias")))
        return zoo_forward(name, [w[key] for key in keys], x)

    return zoo


def zoo_forward(name: str, w: Sequence[Any], batch: Any) -> Any:
    """Scores of a perceptron of the zoo or ``cnn``; ``w`` in the order of ``parameters()``."""
    at = 0
    if name == "cnn":
        for _ in range(2):
            batch = jax.lax.conv_general_dilated(batch, w[at], (1, 1), "VALID")
            batch = jax.nn.relu(batch + w[at + 1][None, :, None, None])
            at += 2
        window = (1, 1, 2, 2)
        batch = jax.lax.reduce_window(batch, -jnp.inf, jax.lax.max, window, window, "VALID")
    batch = batch.reshape(len(batch), -1)
    while at < len(w):
        batch = batch @ w[at] + w[at + 1]
        at += 2
        if at < len(w):
            batch = jax.nn.relu(batch)
    return batch


def _conv(x: Any, weight: Any, stride: int, padding: int) -> Any:
    pads = [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, weight, (stride, stride), pads)


def _batch_norm(w: dict[str, Any], name: str, x: Any) -> Any:
    scale = w[f"{name}.weight"] * jax.lax.rsqrt(w[f"{name}.running_var"] + _EPSILON)
    shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def _resnet18(w: dict[str, Any], x: Any) -> Any:
    x = jax.nn.relu(_batch_norm(w, "norm", _conv(x, w["stem.weight"], 2, 3)))
    pads = ((0, 0), (0, 0), (1, 1), (1, 1))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads)
    for number in range(8):
        stride = 2 if number in (2, 4, 6) else 1
        block = f"blocks.{number}"
        y = _batch_norm(w, f"{block}.norm1", _conv(x, w[f"{block}.conv1.weight"], stride, 1))
        y = _conv(jax.nn.relu(y), w[f"{block}.conv2.weight"], 1, 1)
        if f"{block}.skip.0.weight" in w:
            x = _conv(x, w[f"{block}.skip.0.weight"], stride, 0)
            x = _batch_norm(w, f"{block}.skip.1", x)
        x = jax.nn.relu(_batch_norm(w, f"{block}.norm2", y) + x)
    return x.mean((2, 3)) @ w["head.weight"] + w["head.bias"]


def _layer_norm(w: dict[str, Any], name: str, x: Any) -> Any:
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + _EPSILON)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def _linear(w: dict[str, Any], name: str, x: Any) -> Any:
    return x @ w[f"{name}.weight"] + w[f"{name}.bias"]


def _encoder(w: dict[str, Any], x: Any) -> Any:
    batch, tokens, width = x.shape
    for number in range(ENCODER_LAYERS):
        layer = f"layers.{number}"
        qkv = _linear(w, f"{layer}.qkv", x).reshape(batch, tokens, 3, ENCODER_HEADS, -1)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        x = _layer_norm(
            w, f"{layer}.norm1", x + _linear(w, f"{layer}.out", mixed.reshape(batch, tokens, width))
        )
        up = jax.nn.gelu(_linear(w, f"{layer}.up", x), approximate=False)
        x = _layer_norm(w, f"{layer}.norm2", x + _linear(w, f"{layer}.down", up))
    return _linear(w, "head", x.mean(1))
