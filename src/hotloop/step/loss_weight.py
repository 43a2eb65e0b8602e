"""How the losses of parts of a batch make the loss of the batch.

A mean over samples is weighted by samples, a sum by nothing, and torch's cross entropy by what it
divides by: the labels that are not ``ignore_index``, or the sum of their class weights. What a loss
function of the user's own divides by is not known; so the loss of the whole batch is compared with
that of its parts (``LossWeight.check``) before anything is updated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from ..errors import ModelError
from ..graph.recording import Recording
from .batch import Batch
from .loss_parts import compared, divisions, pieces

Kind = Literal["mean", "sum", "labels", "unknown"]

_OF_LABELS = {
    nn.CrossEntropyLoss.forward: functional.cross_entropy,
    nn.NLLLoss.forward: functional.nll_loss,
}
# Means over elements, of which each sample has as many.
_OF_ELEMENTS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
    nn.KLDivLoss, nn.PoissonNLLLoss, nn.SoftMarginLoss, nn.MultiLabelSoftMarginLoss,
    nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.HingeEmbeddingLoss,
)  # fmt: skip
_FORWARDS = {kind.forward for kind in _OF_ELEMENTS}
_FUNCTIONS = {
    functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss,
    functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits,
    functional.kl_div, functional.poisson_nll_loss, functional.soft_margin_loss,
    functional.multilabel_soft_margin_loss, functional.multi_margin_loss,
    functional.multilabel_margin_loss, functional.hinge_embedding_loss,
}  # fmt: skip


class LossWeight:
    """The weight of a loss in that of a larger batch.

    Attributes:
        is_settled: whether the weights are known to be right, or that this cannot be known.
        note: what the user is told of it; ``None``: nothing.
    """

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        self.loss_fn = loss_fn
        self.is_settled = False
        self.note: str | None = None
        self._labels: set[tuple[int, int]] = set()
        # Asked in each call of many steps.
        self._function, self._option = _recognised(loss_fn)

    @property
    def kind(self) -> Kind:
        """``"mean"`` over samples, ``"sum"``, ``"labels"``: a mean over the labels that count."""
        if self._function is None:
            return "unknown"
        if self._option("reduction", "mean") == "sum":
            return "sum"
        return "labels" if self._function in _OF_LABELS.values() else "mean"

    def judge(self, recording: Recording) -> str | None:
        """Why a step must not become a program of parts; ``None``: it may (``leaves_out``)."""
        found = divisions(recording)
        self._labels |= found.labels
        return found.refusal

    def leaves_out(self, batch: Batch) -> bool:
        """Whether a batch has labels that a loss of the user's own leaves out: no program then."""
        tensors = batch.tensors
        return any(n < len(tensors) and bool((tensors[n] == i).any()) for n, i in self._labels)

    def count(self, y: Any, num_samples: int) -> float | None:
        """What the loss of a batch is to be multiplied by in a mean over batches.

        Args:
            y: its targets.

        Returns:
            The samples, or what cross entropy divides by; ``None``: the loss is a sum.
        """
        kind = self.kind
        if kind == "sum":
            return None
        counts = self._counts(y) if kind == "labels" else None
        return float(num_samples) if counts is None else float(counts.sum())

    def shared(self, parts: Sequence[Batch]) -> list[Batch]:
        """Parts of one batch, each with its share in the loss.

        A share that depends on the labels is a tensor; else it is the same number for all batches.
        """
        sizes = [part.num_samples or 0 for part in parts]
        if self.kind == "sum":
            return list(parts)
        shares: list[float | torch.Tensor] = [size / sum(sizes) for size in sizes]
        counts = [self.count(p.y, n) or 0.0 for p, n in zip(parts, sizes, strict=True)]
        total = sum(counts)
        if total and any(c * sum(sizes) != total * n for c, n in zip(counts, sizes, strict=True)):
            shares = [torch.tensor(count / total, dtype=torch.float64) for count in counts]
        return [part.with_share(share) for part, share in zip(parts, shares, strict=True)]

    def of_chunks(self, y: Any, size: int, num_chunks: int) -> torch.Tensor | None:
        """What the mean of a batch over its chunks is to be weighted by, for each sample.

        Args:
            y: targets of some batches of ``num_chunks`` chunks of ``size`` samples.

        Returns:
            float64 ``[samples]``; ``None``: all chunks weigh the same.
        """
        if self.kind != "labels" or not isinstance(y, torch.Tensor):
            return None
        ignored = self._option("ignore_index", -100)
        if self._option("weight", None) is None and not bool((y == ignored).any()):
            return None  # Most batches: asked in each call, so this costs little.
        counts = self._counts(y)
        if counts is None:
            return None
        of_chunks = counts.view(-1, num_chunks, size).sum(-1)
        totals = of_chunks.sum(-1, keepdim=True)
        if bool((of_chunks * num_chunks == totals).all()):
            return None
        # Where no label counts the loss is no number, as PyTorch's.
        shares = torch.where(totals != 0, of_chunks * num_chunks / totals, 1.0)
        return shares.flatten().repeat_interleave(size)

    def _counts(self, y: Any) -> torch.Tensor | None:
        """What cross entropy divides by for each sample, float64 ``[samples]``.

        ``None``: it divides by the number of samples, as for targets that are probabilities.
        """
        if not isinstance(y, torch.Tensor) or y.is_floating_point() or y.dim() == 0:
            return None
        weight, ignored = self._option("weight", None), y == self._option("ignore_index", -100)
        kept: torch.Tensor = ~ignored
        if weight is not None:
            of_labels = weight.detach().double().to(y.device)[y.masked_fill(ignored, 0)]
            kept = of_labels.masked_fill(ignored, 0.0)
        return kept.flatten(1).sum(1).double() if y.dim() > 1 else kept.double()

    def check(self, answers: Sequence[tuple[Any, Batch]], remedy: str, rows: int = 0) -> bool:
        """Compare the loss of a batch with that of its parts, weighted by their shares.

        Args:
            answers: what the model answered to each part, and the part; a single one is cut into
                parts of so many ``rows``.
            remedy: what the user can do.

        Returns:
            Whether the weights are right; else ``note`` says that it cannot be known, and why.

        Raises:
            ModelError: they are not.
        """
        if len(answers) == 1:
            answers = pieces(*answers[0], rows)
        parts = self.shared([part for _, part in answers])
        found = compared(self.loss_fn, list(zip([a for a, _ in answers], parts, strict=True)))
        if found.is_alike:
            # A loss of the user's own may divide by what this batch did not have.
            self.is_settled = self.kind != "unknown"
            return True
        if found.unknown is not None:
            self.is_settled = True
            self.note = (
                "parts of a batch are weighted by their samples, and whether that gives the loss of"
                f" the batch cannot be known: {found.unknown}"
            )
            return False
        raise ModelError(
            "a loss that is computed in parts must be a mean over samples, or a loss of torch.nn",
            got=f"{found.whole:.6g} for a batch and {found.of_parts:.6g} for its parts",
            next_step=remedy,
        )


def weighted(loss: torch.Tensor, share: float | torch.Tensor) -> torch.Tensor:
    """The loss times its share; 0 where that is 0, though the loss is no number then."""
    if isinstance(share, torch.Tensor):
        share = (share[0] if share.dim() else share).to(loss.dtype)
        return torch.where(share != 0, loss * share, torch.zeros_like(loss))
    return loss if share == 1.0 else loss * share


def _recognised(loss_fn: Any) -> tuple[Any, Callable[..., Any]]:
    """torch's function that a loss is, ``None``: none that is known; and what gives an option."""
    if isinstance(loss_fn, functools.partial):
        keywords = loss_fn.keywords
        known = not loss_fn.args and not {"size_average", "reduce"} & keywords.keys()
        return (_known(loss_fn.func) if known else None), keywords.get
    if isinstance(loss_fn, nn.Module):
        forward = type(loss_fn).forward
        of_elements = functional.mse_loss if forward in _FORWARDS else None
        return _OF_LABELS.get(forward, of_elements), functools.partial(getattr, loss_fn)
    return _known(loss_fn), dict[str, Any]().get


def _known(function: Any) -> Any:
    # By identity: what the user calls a loss need not be hashable.
    known = (*_FUNCTIONS, *_OF_LABELS.values())
    return next((each for each in known if each is function), None)
