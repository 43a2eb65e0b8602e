"""PyTorch's own paths: eager, and the compiled graph (AOTInductor with frozen weights)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import ModelError, RunError
from ..engine import check_arrays
from ..signature import Signature, flatten, unflatten

if TYPE_CHECKING:
    import numpy


class TorchEngine:
    """What both share: arrays and tensors in, threads set for the call and restored."""

    name = "torch"

    def __init__(
        self,
        signature: Signature,
        *,
        num_threads: int = 1,
        num_instances: int = 1,
        precision: str = "float32",
    ) -> None:
        self.signature = signature
        self.inputs, self.outputs = signature.inputs, signature.outputs
        self.num_threads = num_threads
        self.num_instances = num_instances
        self.precision = precision

    def run(self, arrays: Sequence[numpy.ndarray]) -> list[numpy.ndarray]:
        """See ``Engine.run``."""
        check_arrays(self.inputs, arrays)
        tensors = [_as_tensor(array) for array in arrays]
        try:
            return [tensor.numpy() for tensor in self.run_tensors(tensors)]
        except TypeError as error:  # bfloat16 and its like are no types of NumPy.
            raise RunError(
                "an answer as array must be of a type that NumPy has", got=error,
                next_step="pass torch tensors, or give the model's answer .float()",
            ) from error  # fmt: skip
        except RuntimeError as error:
            raise RunError("the model must answer", got=error) from error

    def run_tensors(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The same for tensors."""
        # A setting of the calling thread: 0.1 us to look at, so that it is set only where it must.
        before = torch.get_num_threads()
        if before == self.num_threads:
            with torch.inference_mode():
                return self._call(tensors)
        with self._threads(before), torch.inference_mode():
            return self._call(tensors)

    @contextlib.contextmanager
    def _threads(self, before: int) -> Iterator[None]:
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise NotImplementedError

    def close(self) -> None:
        """See ``Engine.close``."""


def _as_tensor(array: Any) -> torch.Tensor:
    """An array as a tensor, which cannot look at one that is read-only or runs backwards."""
    import numpy

    array = numpy.asarray(array)
    direct = array.flags.writeable and min(array.strides, default=0) >= 0
    return torch.from_numpy(array if direct else array.copy())


class EagerEngine(TorchEngine):
    """The module itself in inference mode.

    Args:
        model: in eval mode, the engine's own.
        signature: of the model.
        channels_last: images and the weights of convolutions with channels adjacent.
        shared: threads, instances and precision, see ``Engine``.
    """

    name = "eager"

    def __init__(
        self, model: nn.Module, signature: Signature, *, channels_last: bool = False, **shared: Any
    ) -> None:
        super().__init__(signature, **shared)
        self._model = model
        self._channels_last = channels_last
        self._takes_one = signature.takes_one
        self._dtypes = [getattr(torch, spec.dtype) for spec in self.outputs]

    def _call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self._channels_last:
            tensors = [
                t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
                for t in tensors
            ]
        lower = self.precision == "bfloat16"
        context = torch.autocast("cpu", torch.bfloat16) if lower else contextlib.nullcontext()
        with context:
            if self._takes_one:
                result = self._model(tensors[0])
                tensor = isinstance(result, torch.Tensor)
                leaves = [result] if tensor else flatten(result, "the result", opaque=True)[0]
            else:
                leaves = self.signature.call(self._model, tensors)
        if lower:
            leaves = [leaf.to(dtype) for leaf, dtype in zip(leaves, self._dtypes, strict=True)]
        return leaves

    def answer(self, leaves: Sequence[Any]) -> Any:
        """The module's result as it is, for arrays or tensors."""
        tensors = [t.detach() if isinstance(t, torch.Tensor) else _as_tensor(t) for t in leaves]
        args, kwargs = unflatten(self.signature.input_structure, tensors)
        with self._threads(torch.get_num_threads()), torch.inference_mode():
            return self._model(*args, **kwargs)

    def close(self) -> None:
        """See ``Engine.close``."""
        del self._model


class InductorEngine(TorchEngine):
    """A library that AOTInductor built, weights frozen into it; called without the interpreter.

    Args:
        package: the compiled package. It is machine code: only ever from hotloop's own cache.
        signature: of the model. shared: as for ``EagerEngine``.
    """

    name = "inductor"

    def __init__(self, package: str | Path, signature: Signature, **shared: Any) -> None:
        super().__init__(signature, **shared)
        try:
            # Below ``aoti_load_package``, whose wrapper walks argument trees on every call and
            # cannot be told how many calls may run at once. They share the weights.
            self._loader = torch._C._aoti.AOTIModelPackageLoader(
                str(package), "model", False, self.num_instances, -1
            )
        except Exception as error:
            raise ModelError("the compiled model must load", got=error) from error

    def _call(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        results: list[torch.Tensor] = self._loader.boxed_run([t.contiguous() for t in tensors])
        return results

    def close(self) -> None:
        """See ``Engine.close``."""
        del self._loader
