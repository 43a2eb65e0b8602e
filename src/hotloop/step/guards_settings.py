"""What torch is set to, and what Python's random numbers stand at."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

_NAMES = (
    "grad mode",
    "inference mode",
    "default dtype",
    "autocast",
    "deterministic algorithms",
    "number of threads",
    "float32 matmul precision",
    "oneDNN",
    "anomaly mode",
    "number of dispatch modes",
    "number of function modes",
)
_C: Any = torch._C
# Asked at each step, so these are the functions below torch's public ones.
_is_autocast: Any = _C._is_any_autocast_enabled
_is_deterministic: Any = _C._get_deterministic_algorithms
_matmul_precision: Any = _C._get_float32_matmul_precision
_has_onednn: Any = _C._get_mkldnn_enabled
_dispatch_modes: Any = _C._len_torch_dispatch_stack
_function_modes: Any = _C._len_torch_function_stack
_is_grad, _is_inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_is_anomaly, _dtype, _threads = (
    torch.is_anomaly_enabled,
    torch.get_default_dtype,
    torch.get_num_threads,
)


def torch_settings() -> tuple[Any, ...]:
    """Settings of torch that change what an operation computes, in the order of ``_NAMES``."""
    now = (
        _is_grad(), _is_inference(), _dtype(), _is_autocast(), _is_deterministic(), _threads(),
        _matmul_precision(), _has_onednn(), _is_anomaly(), _dispatch_modes(), _function_modes(),
    )  # fmt: skip
    if now[3]:
        return (*now, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    return now


def difference_of_settings(old: tuple[Any, ...], new: tuple[Any, ...]) -> str:
    """The first setting that differs, in one line."""
    for name, before, after in zip(_NAMES, old, new, strict=False):
        if before != after:
            return f"torch's {name} changed from {before} to {after}"
    return f"torch's autocast changed from {old[len(_NAMES) :]} to {new[len(_NAMES) :]}"


class PythonState:
    """Where Python's generators of random numbers stand: a recorded step would not draw again.

    Those of the modules ``random`` and ``numpy.random``, and ``generators``, which
    ``Guards.generators`` has found. torch's own default generator is not among them.
    """

    def __init__(self, generators: list[tuple[str, Any]] | None = None) -> None:
        legacy: Any = numpy.random
        self._generators = [
            ("the module random", random),
            ("the module numpy.random", legacy),
            *(generators or ()),
        ]
        self._states = [_state_of(generator) for _, generator in self._generators]

    def changed(self) -> str | None:
        """Which generator was drawn from or seeded since, in one line; ``None``: none was."""
        for (place, generator), state in zip(self._generators, self._states, strict=True):
            if _state_of(generator) != state:
                return f"Python's random numbers are drawn in the step ({place})"
        return None


def _state_of(generator: Any) -> Any:
    """Where a generator stands, as a value that can be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if isinstance(generator, numpy.random.Generator):
        return _comparable(generator.bit_generator.state)
    if isinstance(generator, random.SystemRandom):
        return None  # The system's, which has no state.
    if hasattr(generator, "getstate"):
        return generator.getstate()
    return _comparable(generator.get_state(legacy=False))


def _comparable(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _comparable(value) for key, value in state.items()}
    return state.tobytes() if isinstance(state, numpy.ndarray) else state
