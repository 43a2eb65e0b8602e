"""Trials of plans on a user's own model and data, each in a fresh process that runs slices."""

from __future__ import annotations

import contextlib
import itertools
import json
import runpy
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import HotloopError, InputError, ModelError, RunError
from ..machine import Machine
from ..plan import Plan
from ..tuning import (
    BATCH_SIZE,
    PRECISION,
    PRESENT,
    Candidate,
    LrRule,
    key_of,
    learning_rate_factor,
    text_of,
)
from .child import Child
from .losses import equal_to_rounding, loss_difference

if TYPE_CHECKING:
    from ..data import PackedDataset
    from .trainer import Trainer

_IMPORT_S, _BUILD_S = 120.0, 900.0
# A slice is this long; far longer ones only where one step is.
SLICE_S = 0.25
_SLICE_LIMIT_S = 300.0
_SCRIPT = "__hotloop_trial__"
# Of the memory that is free, what trials may take together.
_MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Work:
    """What a trial trains, in its process: how ``Trainer.fit`` is called there."""

    trainer: Trainer
    data: Any
    batch_size: int
    seed: int
    fingerprint: str


@dataclass(frozen=True)
class Source:
    """How a trial's process comes by its model and data.

    Attributes:
        target: ``module:function``, called there with ``arguments`` and the plan; gives ``Work``.
        arguments: plain JSON types. ``batch_size`` and ``lr_factor`` are set for each trial.
        batch_size: the present one.
    """

    target: str
    arguments: dict[str, Any]
    batch_size: int


@dataclass(frozen=True)
class Facts:
    """What a trial tells once it is warm.

    Attributes:
        steps_per_call: steps that one call of the step makes. peak_bytes: most memory resident.
        fingerprint: of the work, see ``tuned.parts_fingerprint``.
        precision: of forward and backward. precision_reason: what the probe of precision ``auto``
            found; ``None``: nothing was probed.
    """

    steps_per_call: int
    peak_bytes: int | None
    fingerprint: str
    precision: str = "float32"
    precision_reason: str | None = None


class PlanTrials:
    """Runs candidates (differences to a present plan); a ``tuning.Trial``, and a context manager.

    The cost is seconds a sample. A process that was prepared stays until it is released, held
    between two steps, where it takes no time of the processor.

    Args:
        source: the work. present: the plan that candidates are differences to.
        lr_rule: of candidates with another batch size.
        check_results: refuse candidates whose first losses are not those of the present plan to
            rounding, but for those with another precision or batch size; and such with another
            precision that come to compute in the present one.
        slice_s: seconds of a measurement.
        on_start: told what is being prepared.
        free_bytes: memory that is free now; ``None``: not known.
    """

    def __init__(
        self,
        source: Source,
        present: Plan,
        *,
        lr_rule: LrRule = "none",
        check_results: bool = False,
        slice_s: float = SLICE_S,
        on_start: Callable[[str], None] = lambda _: None,
        free_bytes: Callable[[], int | None] = lambda: Machine.probe().memory.headroom_bytes,
    ) -> None:
        self.source, self.present, self.lr_rule = source, present, lr_rule
        self.check_results = check_results
        self.slice_s, self.on_start, self.free_bytes = slice_s, on_start, free_bytes
        self.facts: dict[str, Facts] = {}
        self.losses: dict[str, list[float]] = {}
        self._running: dict[str, Child] = {}
        self._stack = contextlib.ExitStack()
        self._numbers = itertools.count()
        self._folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="hotloop-trials-"))
        )

    def __enter__(self) -> PlanTrials:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def plan_of(self, candidate: Candidate) -> Plan:
        """The plan of a candidate.

        Raises:
            PlanError: a knob that does not exist, or a value outside its rule.
        """
        return self.present.replace({k: v for k, v in candidate.items() if k != BATCH_SIZE})

    def batch_size_of(self, candidate: Candidate) -> int:
        """Samples of a step of a candidate."""
        return int(candidate.get(BATCH_SIZE, self.source.batch_size))

    def lr_factor_of(self, candidate: Candidate) -> float:
        """By what the candidate's learning rate is multiplied."""
        return learning_rate_factor(
            self.lr_rule, self.source.batch_size, self.batch_size_of(candidate)
        )

    def prepare(self, candidates: Sequence[Candidate]) -> dict[str, str]:
        """Start, build and warm up; see ``tuning.Trial``.

        Processes import side by side and build one after the other: building times kernels.
        """
        failures: dict[str, str] = {}
        started: dict[str, tuple[Candidate, Child]] = {}
        if self.check_results and key_of(PRESENT) not in self.losses:
            candidates = [PRESENT, *candidates]
        for candidate in candidates:
            key = key_of(candidate)
            if key in self._running or key in started:
                continue
            try:
                started[key] = candidate, self._start(candidate)
            except HotloopError as error:
                failures[key] = str(error)
        try:
            for key, (candidate, child) in started.items():
                self.on_start(text_of(candidate))
                try:
                    self._build(candidate, child)
                except RunError as error:
                    failures[key] = str(error.got or error)
                    self._running.pop(key, None)
                    child.close()
        except BaseException:
            for _, child in started.values():
                child.close()
            raise
        return failures

    def require(self, candidates: Sequence[Candidate]) -> None:
        """Prepare candidates that must run.

        Raises:
            RunError: one cannot.
        """
        failures = self.prepare(candidates)
        for candidate in candidates:
            reason = failures.get(key_of(candidate))
            if reason is not None:
                raise RunError(f"{text_of(candidate)} must run", got=reason)

    def measure(self, candidate: Candidate) -> float:
        """Seconds a sample in one slice; prepares the candidate first where it is not.

        Raises:
            RunError: the trial failed.
        """
        self.require([candidate])
        key = key_of(candidate)
        child = self._running[key]
        child.tell(do="slice", s=self.slice_s)
        try:
            answer = child.answer(_SLICE_LIMIT_S + self.slice_s)
        except RunError:
            self.release(candidate)
            raise
        self.losses[key] = answer["losses"]
        return float(answer["s_per_step"]) / self.batch_size_of(candidate)

    def release(self, candidate: Candidate) -> None:
        """End the candidate's process, if there is one."""
        child = self._running.pop(key_of(candidate), None)
        if child is not None:
            child.close()

    def makes_many(self, candidate: Candidate) -> bool:
        """Whether a candidate makes several steps a call."""
        return self._facts_of(candidate).steps_per_call > 1

    def fingerprint_of(self, candidate: Candidate) -> str:
        """Of a candidate's work."""
        return self._facts_of(candidate).fingerprint

    def precision_of(self, candidate: Candidate) -> tuple[str, str | None]:
        """What a candidate computes in, and what the probe of precision ``auto`` found."""
        facts = self._facts_of(candidate)
        return facts.precision, facts.precision_reason

    def _facts_of(self, candidate: Candidate) -> Facts:
        if key_of(candidate) not in self.facts:
            self.require([candidate])
        return self.facts[key_of(candidate)]

    def close(self) -> None:
        """End all of them. Twice is allowed."""
        while self._running:
            self._running.popitem()[1].close()
        self._stack.close()

    def _start(self, candidate: Candidate) -> Child:
        setup = {
            "target": self.source.target,
            "arguments": {
                **self.source.arguments,
                "batch_size": self.batch_size_of(candidate),
                "lr_factor": self.lr_factor_of(candidate),
            },
            "plan": self.plan_of(candidate).to_dict(),
        }
        path = self._folder / f"trial-{next(self._numbers)}.json"
        path.write_text(json.dumps(setup), encoding="utf-8")
        return Child(f"a trial of {text_of(candidate)}", "hotloop.train.trial_worker", [str(path)])

    def _build(self, candidate: Candidate, child: Child) -> None:
        key = key_of(candidate)
        child.answer(_IMPORT_S)
        free, needed = self.free_bytes(), self._needed_bytes()
        if free is not None and needed is not None and needed > free * _MEMORY_SHARE:
            raise RunError(
                "a trial must fit the free memory beside those that run",
                got=f"not enough memory: {needed >> 20} MiB of {free >> 20} MiB free",
            )
        child.tell(do="build")
        answer = child.answer(_BUILD_S)
        self.facts[key] = Facts(
            answer["steps_per_call"], answer["peak_bytes"], answer["fingerprint"],
            answer["precision"], answer["precision_reason"],
        )  # fmt: skip
        self.losses[key] = answer["losses"]
        self._running[key] = child
        self._check(candidate)

    def _check(self, candidate: Candidate) -> None:
        if not self.check_results:
            return
        if PRECISION in candidate:
            facts, present = self.facts[key_of(candidate)], self.facts[key_of(PRESENT)]
            if facts.precision == present.precision:
                raise RunError(
                    "a candidate with another precision must come to compute in it",
                    got=facts.precision_reason or f"precision is {facts.precision} as it is",
                )
            return
        if BATCH_SIZE in candidate:
            return
        losses = self.losses[key_of(PRESENT)], self.losses[key_of(candidate)]
        if not equal_to_rounding(*losses):
            difference, steps = loss_difference(*losses)
            raise RunError(
                "a candidate must compute what the present plan computes",
                got=f"losses of the first {steps} steps differ by {difference:.1e}",
            )

    def _needed_bytes(self) -> int | None:
        """What the largest trial so far took."""
        return max((f.peak_bytes or 0 for f in self.facts.values()), default=None)


def pickled_source(trainer: Trainer, data: PackedDataset, batch_size: int, seed: int,
                   folder: Path) -> Source:  # fmt: skip
    """A trainer's parts and its data, written to ``folder`` for trials in other processes.

    The scheduler stays behind: a trial trains on past its end.

    Raises:
        ModelError: the model, the loss or the optimizer cannot be pickled.
        DataError, StorageError: the data cannot be written.
    """
    import torch

    from ..data.copies import save_packed

    parts = {
        "model": trainer.model,
        "loss_fn": trainer.loss_fn,
        "optimizer": trainer.optimizer,
        "clip_norm": trainer.clip_norm,
        "clip_value": trainer.clip_value,
    }
    try:
        torch.save(parts, folder / "trainer.pt")
    except Exception as error:
        raise ModelError(
            "model, loss and optimizer must be picklable, to be tried in fresh processes",
            got=f"{type(error).__name__}: {error}",
            next_step="define the classes and functions they use at the top of a module, or use "
            "hotloop tune --model module:factory",
        ) from error
    save_packed(data, folder / "data")
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    arguments = {"folder": str(folder), "seed": seed, "script": script}
    return Source("hotloop.train.trials:unpickled", arguments, batch_size)


def unpickled(arguments: dict[str, Any], plan: Plan) -> Work:
    """In a trial's process: what ``pickled_source`` wrote.

    Raises:
        ModelError: it cannot be read back here.
    """
    import torch

    from ..data.copies import load_packed
    from .trainer import Trainer
    from .tuned import parts_fingerprint

    folder = Path(arguments["folder"])
    try:
        try:
            parts = torch.load(folder / "trainer.pt", weights_only=False)
        except AttributeError:  # Of a script's own classes, which are those of __main__ there.
            if arguments["script"] is None:
                raise
            _import_script(arguments["script"])
            parts = torch.load(folder / "trainer.pt", weights_only=False)
    except HotloopError:
        raise
    except Exception as error:
        raise ModelError(
            "model, loss and optimizer must be readable in a fresh process",
            got=f"{type(error).__name__}: {error}",
            next_step="move their classes from the script to a module that can be imported",
        ) from error
    for group in parts["optimizer"].param_groups:
        group["lr"] = group["lr"] * arguments["lr_factor"]
    trainer = Trainer(
        parts["model"],
        parts["loss_fn"],
        parts["optimizer"],
        plan,
        clip_norm=parts["clip_norm"],
        clip_value=parts["clip_value"],
    )
    data, batch_size = load_packed(folder / "data"), arguments["batch_size"]
    fingerprint = parts_fingerprint(trainer.parts, batch_size, data.example())
    return Work(trainer, data, batch_size, arguments["seed"], fingerprint)


def refuse_inside_a_trial() -> None:
    """A script that a trial imports for its classes must not tune there.

    Raises:
        InputError: it does.
    """
    if _SCRIPT in sys.modules:
        raise InputError(
            "a script is imported by its trials, so it must tune only when it is run itself",
            next_step="write if __name__ == '__main__': before what it does",
        )


def _import_script(path: str) -> None:
    """The classes and functions of a script, as those of ``__main__``; as multiprocessing does."""
    module = types.ModuleType(_SCRIPT)
    sys.modules[_SCRIPT] = module
    module.__dict__.update(runpy.run_path(path, run_name=_SCRIPT))
    sys.modules["__main__"] = module
