"""What each peer does: prepare once, then train one epoch at a time on a given order of samples.

Each function takes the model's name, samples ``[n, 1, 28, 28]`` float32, labels int64 ``[n]``, the
batch size and the number of threads, and returns ``epoch(order) -> mean loss``. All start from the
same weights and use Adam with a learning rate of 1e-3 on the cross entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import nn

Epoch = Callable[[numpy.ndarray], float]
Peer = Callable[[nn.Module, str, numpy.ndarray, numpy.ndarray, int, int], Epoch]
_LR = 1e-3


def pytorch(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """PyTorch as people write it: DataLoader, Adam, zero_grad, backward, step."""
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR)
    loss_fn = nn.CrossEntropyLoss()

    def epoch(order: numpy.ndarray) -> float:
        total = 0.0
        for batch, target in DataLoader(data, batch_size=size, sampler=order.tolist()):
            optimizer.zero_grad()
            loss = loss_fn(model(batch), target)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        return total / len(order)

    return epoch


def _tuned(model: nn.Module, name: str, x: Any, y: Any, size: int, compiled: bool) -> Epoch:
    samples, labels = torch.from_numpy(x), torch.from_numpy(y)
    if name == "cnn":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        samples = samples.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR, fused=True)

    def forward_backward(batch: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(batch), target)
        loss.backward()
        return loss.detach()

    call = torch.compile(forward_backward) if compiled else forward_backward

    def epoch(order: numpy.ndarray) -> float:
        at = torch.from_numpy(order)
        total = torch.zeros(())
        for start in range(0, len(at), size):
            rows = at[start : start + size]
            optimizer.zero_grad()
            total += call(samples[rows], labels[rows]) * len(rows)
            optimizer.step()
        return total.item() / len(order)

    return epoch


def pytorch_tuned(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """PyTorch tuned by hand: in-memory slices, fused Adam, channels last for convolutions."""
    return _tuned(model, name, x, y, size, compiled=False)


def torch_compile(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """The same with forward and backward through ``torch.compile``."""
    return _tuned(model, name, x, y, size, compiled=True)


def lightning(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """Lightning's Trainer with logging, checkpoints and the progress bar off."""
    import logging
    import warnings

    import lightning as pl  # type: ignore[import-not-found, unused-ignore]
    from torch.utils.data import DataLoader, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR)

    class Module(pl.LightningModule):  # type: ignore[misc, unused-ignore]
        total = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss = nn.functional.cross_entropy(self.inner(batch[0]), batch[1])
            self.total += loss.item() * len(batch[0])
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer

    def epoch(order: numpy.ndarray) -> float:
        module = Module()
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(data, batch_size=size, sampler=order.tolist()))
        return module.total / len(order)

    return epoch


def _jax(model: nn.Module, name: str, x: Any, y: Any, size: int, scan: bool) -> Epoch:
    import jax  # type: ignore[import-not-found, unused-ignore]
    import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]

    from .jax_models import zoo_forward

    layers: list[Any] = [p.detach().numpy().copy() for p in model.parameters()]
    weights = [jnp.asarray(w.T if w.ndim == 2 else w) for w in layers]

    def loss_of(w: Any, batch: Any, target: Any) -> Any:
        scores = jax.nn.log_softmax(zoo_forward(name, w, batch))
        return -jnp.mean(jnp.take_along_axis(scores, target[:, None], 1))

    def step(state: Any, data: Any) -> Any:
        w, m, v, t = state
        loss, g = jax.value_and_grad(loss_of)(w, *data)
        t = t + 1
        m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
        v = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b * b, v, g)
        c1, c2 = 1 - 0.9**t, jnp.sqrt(1 - 0.999**t)
        w = jax.tree.map(lambda a, b, c: a - _LR / c1 * b / (jnp.sqrt(c) / c2 + 1e-8), w, m, v)
        return (w, m, v, t), loss

    def zeros() -> Any:
        return [jnp.zeros_like(w) for w in weights]

    state = (weights, zeros(), zeros(), jnp.float32(0))
    one = jax.jit(step, donate_argnums=0)
    many = jax.jit(lambda s, a, b: jax.lax.scan(step, s, (a, b)), donate_argnums=0)

    def epoch(order: numpy.ndarray) -> float:
        nonlocal state
        total, start = 0.0, 0
        if scan:
            whole = len(order) // size
            rows = order[: whole * size]
            batches = x[rows].reshape(whole, size, *x.shape[1:])
            state, losses = many(state, batches, y[rows].reshape(whole, size))
            total, start = float(losses.sum()) * size, whole * size
        pending = []
        for at in range(start, len(order), size):
            rows = order[at : at + size]
            state, loss = one(state, (x[rows], y[rows]))
            pending.append((loss, len(rows)))
        total += sum(float(loss) * count for loss, count in pending)
        return total / len(order)

    return epoch


def jax_jit(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """JAX, one jitted step (loss, gradient, Adam), weights donated."""
    return _jax(model, name, x, y, size, scan=False)


def jax_scan(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """JAX, all whole batches of an epoch in one ``lax.scan``."""
    return _jax(model, name, x, y, size, scan=True)


def keras(model: nn.Module, name: str, x: Any, y: Any, size: int, threads: int) -> Epoch:
    """Keras on JAX, compiled, sixteen steps an execution."""
    import os

    os.environ["KERAS_BACKEND"] = "jax"
    import keras as k  # type: ignore[import-not-found, unused-ignore]

    k.config.set_image_data_format("channels_first")
    kinds = {nn.Flatten: k.layers.Flatten, nn.ReLU: k.layers.ReLU, nn.MaxPool2d: k.layers.MaxPool2D}
    network = k.Sequential([k.layers.Input(x.shape[1:])])
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            network.add(k.layers.Dense(layer.out_features))
            kernel = layer.weight.t()
        elif isinstance(layer, nn.Conv2d):
            network.add(k.layers.Conv2D(layer.out_channels, layer.kernel_size))
            kernel = layer.weight.permute(2, 3, 1, 0)
        else:
            network.add(kinds[type(layer)]())
            continue
        assert layer.bias is not None
        network.layers[-1].set_weights([kernel.numpy(force=True), layer.bias.numpy(force=True)])
    network.compile(
        optimizer=k.optimizers.Adam(_LR, epsilon=1e-8),
        loss=k.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=16,
    )

    def epoch(order: numpy.ndarray) -> float:
        done = network.fit(x[order], y[order], batch_size=size, shuffle=False, verbose=0)
        return float(done.history["loss"][0])

    return epoch


PEERS: dict[str, tuple[Peer, str | None]] = {
    "pytorch": (pytorch, None),
    "pytorch-tuned": (pytorch_tuned, None),
    "torch.compile": (torch_compile, None),
    "lightning": (lightning, "lightning"),
    "jax-jit": (jax_jit, "jax"),
    "jax-scan": (jax_scan, "jax"),
    "keras": (keras, "keras"),
}
