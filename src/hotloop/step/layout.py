"""Images of a batch laid out as the model's convolutions like them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..memory import tree
from ..memory.image_layout import preferred


class Layout:
    """How the one image of a batch is laid out: ``x``, or the only tensor of it with four
    dimensions.

    Args:
        copies: see ``preferred``.

    Attributes:
        has_images: whether any batch had one.
    """

    def __init__(self, model: nn.Module, *, copies: bool) -> None:
        self._model, self._copies = model, copies
        self.has_images = False
        self._of: Any = None
        self._laid_out: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, x: Any) -> Any:
        """``x`` with the image laid out; what there is to know of it is found out once a shape."""
        if isinstance(x, torch.Tensor):
            return self._image(x, x) if x.dim() == 4 else x
        images = [t for t in tree.flatten(x)[0] if t.dim() == 4]
        if len(images) != 1:
            return x
        (image,) = images
        laid_out = self._image(image, x)
        if laid_out is image:
            return x
        return tree.map_tensors(lambda t: laid_out if t is image else t, x)

    def _image(self, image: torch.Tensor, x: Any) -> torch.Tensor:
        self.has_images = True
        key = (image.shape[1:], image.stride()[1:])
        if key != self._of or self._laid_out is None:
            model = self._model if x is image else _OfImage(self._model, x, image)
            self._of, self._laid_out = key, preferred(model, image, copies=self._copies)
        return self._laid_out(image)


class _OfImage(nn.Module):
    """A model as a function of the one image in its batch; the rest has shapes alone."""

    def __init__(self, model: nn.Module, x: Any, image: torch.Tensor) -> None:
        super().__init__()
        self.model = model
        self._x, self._image = x, image

    def forward(self, image: torch.Tensor) -> Any:
        def part(tensor: torch.Tensor) -> torch.Tensor:
            if tensor is self._image:
                return image
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

        return tree.call(self.model, tree.map_tensors(part, self._x))
