"""The train step: one call from a batch to updated weights.

check     what must hold of model, loss and optimizer before the first step
step      compile_step and the plain step
"""

from .step import TrainStep, compile_step

__all__ = ["TrainStep", "compile_step"]
