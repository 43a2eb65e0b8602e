"""Inference: the fastest engine for this model on this machine, by race.

engine     what every backend looks like
loading    a file or folder to an engine; imports torch only where the file needs it
engines/   the backends
"""

from .engine import Engine, TensorSpec
from .loading import load_engine

__all__ = ["Engine", "TensorSpec", "load_engine"]
