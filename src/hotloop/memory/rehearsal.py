"""Touch the code that a step will run, so that resident memory tells what it costs.

Kernel libraries are mapped, not read: their pages become resident when first run, 10 to 60 MiB
that belong to no tensor. Running one tiny layer of each kind that the step uses makes them
resident before the budget reads resident memory, which turns a constant into a measurement.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import kernels
from ..kernels import calls

# Rows of each tiny layer: enough that every thread of the pool starts.
_ROWS = 64


def rehearse(operations: set[str], *, training: bool, optimizer: bool = True) -> None:
    """Run a tiny layer of each kind named by ``operations`` (from ``StepTrace``).

    Args:
        operations: names such as ``"aten::convolution"``.
        training: run backward, and one optimizer step, too.
        optimizer: touch the optimizer's code.

    The global random state is left as it was.
    """
    state = torch.random.get_rng_state()
    try:
        for name, layer, shape in _layers():
            if any(name in operation for operation in operations):
                _run(layer, torch.zeros(shape), training=training, optimizer=optimizer)
        if training and any("mm" in operation for operation in operations):
            _run_candidates()
    finally:
        torch.random.set_rng_state(state)


def _run_candidates() -> None:
    """The kernels that a recorded step times against each other for each product."""
    a, out = torch.zeros(_ROWS, 64), torch.empty(_ROWS, 64)
    with torch.no_grad():
        torch.mm(a, a, out=out)
        if torch.backends.mkldnn.is_available():
            torch.ops.mkldnn._linear_pointwise(a, a.t(), None, "none", [], "")
        if kernels.is_available():
            calls.product(a, a, out, None, num_threads=1)()
            calls.batch_product(a[None], a[None], out[None], num_threads=1)()


def _layers() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    linear = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    conv = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.MaxPool2d(2))
    return [
        ("mm", linear, (_ROWS, 64)),
        ("convolution", conv, (_ROWS, 1, 12, 12)),
        ("batch_norm", nn.BatchNorm2d(16), (_ROWS, 16, 8, 8)),
        ("layer_norm", nn.Sequential(nn.LayerNorm(64), nn.GELU(), nn.Dropout()), (_ROWS, 8, 64)),
        (
            "softmax",
            nn.TransformerEncoderLayer(64, 2, 64, batch_first=True),
            (_ROWS, 8, 64),
        ),
    ]


def _run(layer: nn.Module, x: torch.Tensor, *, training: bool, optimizer: bool) -> None:
    # A run evaluates too, by kernels of its own.
    layer.eval()
    with torch.inference_mode():
        layer(x)
    if not training:
        return
    layer.train()
    output = layer(x)
    torch.nn.functional.cross_entropy(
        output.flatten(1), torch.zeros(len(x), dtype=torch.int64)
    ).backward()
    if optimizer:
        torch.optim.Adam(layer.parameters()).step()
