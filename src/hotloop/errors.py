"""The exception tree, and the one shape every message has.

    HotloopError                     anything hotloop raises on purpose
    ├── InputError (ValueError)      what was asked cannot be done: exit code 2
    │   ├── PlanError                a knob has a value outside its rule
    │   ├── DataError                the data is missing, damaged or does not fit
    │   ├── ModelError               the model, loss or optimizer cannot be used as given
    │   ├── CheckpointError          no usable checkpoint, or one of another model
    │   ├── SealedError              a sealed file is damaged, or sealed with another key
    │   ├── BudgetError              the run cannot fit the memory limit
    │   ├── AttestationError         evidence of an enclave that is not accepted
    │   └── MissingExtraError        an optional library is not installed
    └── RunError (RuntimeError)      it began and failed: exit code 1
        ├── StorageError             a file could not be written or read back
        ├── PoolError                a batch buffer was released twice or to the wrong pool
        └── DivergedError            the loss became NaN or infinite

A message states the rule, the value got and the next step, in one line.
"""

from __future__ import annotations


class HotloopError(Exception):
    """Base of all errors raised by hotloop.

    Args:
        rule: what must hold, for example ``"batch_size must be at least 1"``.
        got: the value that broke the rule; left out of the message when ``None``.
        next_step: what to do now, for example ``"pass --batch-size 64"``.
    """

    exit_code = 1

    def __init__(self, rule: str, *, got: object = None, next_step: str | None = None) -> None:
        self.rule = rule
        self.got = got
        self.next_step = next_step
        super().__init__(rule, got, next_step)

    def __str__(self) -> str:
        text = self.rule.rstrip(".")
        if self.got is not None:
            got = " ".join(str(self.got).split())
            text += f"; got {got[:300]}"
        if self.next_step is not None:
            text += f". Next: {self.next_step.rstrip('.')}"
        return " ".join(text.split()) + "."


class InputError(HotloopError, ValueError):
    """What was asked for cannot be done as asked; nothing was started."""

    exit_code = 2


class PlanError(InputError):
    """A knob has a value outside its rule, or a name that does not exist."""


class DataError(InputError):
    """The data is missing, damaged, or does not fit the model."""


class ModelError(InputError):
    """The model, loss or optimizer cannot be used as given."""


class CheckpointError(InputError):
    """No checkpoint can be used, or it belongs to another model."""


class SealedError(InputError):
    """A sealed file cannot be opened: damaged, cut, another key, or another file than asked for."""


class BudgetError(InputError):
    """The predicted memory does not fit the limit."""


class AttestationError(InputError):
    """Evidence of an enclave is damaged, forged, old, or not what the policy allows."""


class MissingExtraError(InputError):
    """An optional library is needed; the message has the ``pip install`` line."""

    def __init__(self, purpose: str, library: str, extra: str) -> None:
        super().__init__(
            f"{purpose} needs {library}, which is not installed",
            next_step=f"pip install 'hotloop[{extra}]'",
        )


class RunError(HotloopError, RuntimeError):
    """The work began and failed."""


class StorageError(RunError):
    """A file could not be written, or read back what was written."""


class PoolError(RunError):
    """A batch buffer was released twice, or to a pool that does not own it."""


class DivergedError(RunError):
    """The loss became NaN or infinite."""
