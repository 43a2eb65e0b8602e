"""Training without torch: a recorded step as a file, and what runs it with NumPy alone.

export        a model, its loss and optimizer to a folder. It, places (addresses as places in
              spaces) and rewrite (layers in operations of hotloop's kernels) import torch
document      the folder's document: a closed schema, checked as it is read
instructions  calls of kernels as plain values, and back: each address checked against its memory
memory        the tensors of an export, where they lie
program       a program of one size of batch, ready to run
samples       data of a file as NumPy arrays, in the order of ``Trainer.fit``
trainer       TrainingExport: steps, epochs, evaluation, checkpoints

Importing loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import names_in

if TYPE_CHECKING:
    from .export import export_training
    from .trainer import TrainingExport, load_training

__all__ = ["TrainingExport", "export_training", "load_training"]

_MODULE_OF = {
    "export_training": "export",
    "TrainingExport": "trainer",
    "load_training": "trainer",
}
__getattr__ = names_in(__name__, _MODULE_OF)
