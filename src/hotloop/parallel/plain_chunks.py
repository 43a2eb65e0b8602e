"""``PlainChunks``: a step chunk by chunk as PyTorch makes it, to be what workers make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


class PlainChunks:
    """Sums of what the chunks of one step give, in their order.

    Each chunk begins with the buffers of the step before; afterwards a float32 one is the mean of
    what the chunks made of it, another that of the first chunk, as on workers.

    Args:
        model, loss_fn: their parameters and buffers count.
        scale: share of a chunk in the gradients and the loss.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Any], scale: float) -> None:
        modules = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
        self._weights = list({id(p): p for m in modules for p in m.parameters()}.values())
        buffers = {id(b): b for m in modules for b in m.buffers()}.values()
        with torch.no_grad():
            self._buffers = [(b, b.clone()) for b in buffers]
        self._scale = scale
        self._made: list[list[torch.Tensor]] = []
        self._gradients: list[torch.Tensor | None] = [None] * len(self._weights)
        self._loss = torch.zeros((), dtype=torch.float64)

    @contextlib.contextmanager
    def chunk(self) -> Iterator[Callable[[torch.Tensor], None]]:
        """Around one chunk, which leaves gradients in ``grad`` and hands its loss to what this
        gives."""
        for weight in self._weights:
            weight.grad = None
        with torch.no_grad():
            for buffer, before in self._buffers if self._made else ():
                buffer.copy_(before)
        yield self._add_loss
        self._made.append([b.detach().clone() for b, _ in self._buffers])
        for number, weight in enumerate(self._weights):
            if weight.grad is not None:
                self._gradients[number] = self._added(self._gradients[number], weight.grad)

    def abandon(self) -> None:
        """Leave buffers as they were, and no gradients."""
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        for weight in self._weights:
            weight.grad = None

    def finish(self) -> torch.Tensor:
        """Leave sums in ``grad`` and buffers as the step leaves them; the loss."""
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            weight.grad = gradient
        with torch.no_grad():
            for number, (buffer, _) in enumerate(self._buffers):
                each = [made[number] for made in self._made]
                if buffer.dtype == torch.float32:
                    buffer.copy_(torch.stack([b.double() for b in each]).mean(0))
                else:
                    buffer.copy_(each[0])
        return self._loss.float()

    def _add_loss(self, loss: torch.Tensor) -> None:
        self._loss += self._scale * loss.double()

    def _added(self, total: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.detach()
        if gradient.layout != torch.strided or total is None:
            scaled = gradient * self._scale
            return scaled if total is None else total + scaled
        return total.add_(gradient, alpha=self._scale)
