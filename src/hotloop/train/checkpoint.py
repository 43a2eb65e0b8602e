"""Checkpoints that survive a kill, a full disk and a flipped bit: ``docs/checkpoints.md``.

A checkpoint is a folder that nobody changes after it has its name. It is written under a name that
no reader looks at, synced file by file, and then named; what is damaged later is seen by its
checksums, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import CheckpointError, PlanError, SealedError, StorageError
from ..sealed import FolderIndex, Sealed
from ..sealed.place import INDEX, SUFFIX
from .manifest import (
    DOCUMENT,
    MANIFEST,
    TENSOR_SUFFIX,
    FileRecord,
    Manifest,
    check_contents,
    check_group,
    check_sizes,
    encode_document,
    read_document,
    read_manifest,
)
from .sealed_files import SealedFiles
from .system_calls import (
    Files,
    closing,
    is_locked,
    make_folders,
    remove_tree,
    storage_error,
    sync_folder,
    write_all,
)

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"step-(\d{9,18})(?:\.(\d{1,9}))?")
_ASIDE = re.compile(r"\.tmp-(\d{1,10})-[0-9a-f]{16}")
_RULE = "a checkpoint must be written whole"
# Folders under construction or removal in this process, whose own pid says nothing about them.
_busy: set[Path] = set()


class TensorFiles(Protocol):
    """How a tensor group becomes a file: ``tensor_file``, or ``array_file`` of NumPy arrays."""

    def check_tensors(self, group: str, tensors: Mapping[str, Any]) -> None:
        """Raise CheckpointError where a group cannot be written."""

    def write_tensors(
        self, files: Files, path: Path, tensors: Mapping[str, Any]
    ) -> tuple[int, str]:
        """Write a new file and sync it: its bytes and its sha256."""

    def load_tensors(self, path: Path) -> dict[str, Any]:
        """The tensors of a file in memory of their own."""


def _torch_files() -> TensorFiles:
    from . import tensor_file

    return tensor_file


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and found whole.

    Attributes:
        step: optimizer steps done when it was saved.
        path: its folder.
        tensors: group -> name -> CPU tensor in memory of its own. Names that were one tensor when
            saved (tied weights) are one object again.
        document: what was saved as ``document``.
        skipped: one line for each newer checkpoint that is damaged: its path and what is wrong.
    """

    step: int
    path: Path
    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    document: Mapping[str, Any]
    skipped: tuple[str, ...] = ()


class RolledBackError(CheckpointError):
    """An older checkpoint than the newest is all there is: it is not damaged, and not accepted."""


class CheckpointStore:
    """The checkpoints of one run, in one folder, written by one process at a time.

    Args:
        folder: made by the first ``save`` where missing. ``Sealed``: checkpoints are sealed with
            its key, and no others are accepted; with its counter, none that is older either.
        keep_last: how many checkpoints that look whole are kept; at least 1.
        files: the system calls; a test passes ones that fail.
        tensor_files: how tensors are written and read; ``None``: torch's.

    Attributes:
        not_removed: one line for each old folder that the last ``save`` could not remove. The
            checkpoint itself was saved; the next ``save`` tries again.

    Raises:
        PlanError: ``keep_last`` is below 1; or sealed checkpoints of other tensors than torch's.
    """

    def __init__(
        self,
        folder: str | Path | Sealed,
        *,
        keep_last: int = 3,
        files: Files | None = None,
        tensor_files: TensorFiles | None = None,
    ) -> None:
        if keep_last < 1:
            raise PlanError("keep_last must be at least 1", got=keep_last)
        self._sealed = folder if isinstance(folder, Sealed) else None
        if self._sealed is not None and tensor_files is not None:
            raise PlanError(
                "sealed checkpoints are read as torch's tensors", got="other tensor files"
            )
        self._number = 0  # Of the newest sealed checkpoint that was read or saved.
        place = folder.path if isinstance(folder, Sealed) else folder
        # Absolute now: a later change of the working folder must not move the store.
        # Where nobody knows a home (a container's user without an entry), "~" is a plain name.
        self.folder = Path(os.path.expanduser(place)).absolute()
        self.keep_last = keep_last
        self.not_removed: tuple[str, ...] = ()
        self._files = Files() if files is None else files
        self._tensor_files = tensor_files or _torch_files()
        self._damaged: set[Path] = set()
        self._saving = threading.Lock()
        self._anchored = False

    def save(
        self,
        step: int,
        *,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        document: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint; when this returns, it survives a power cut.

        Tensors are written from where they lie and must not change meanwhile. Saving a step that
        has a checkpoint adds a second one beside it, ``step-000000123.1``, and then removes the
        first: at every moment one of them is whole.

        Args:
            step: optimizer steps done; at least 0.
            tensors: group -> name -> tensor, for example ``{"model": model.state_dict()}``.
            document: plain JSON values; encode anything else with ``split_state``.

        Returns:
            The folder of the checkpoint.

        Raises:
            CheckpointError: the step, a name, a tensor or a value cannot be stored; nothing was
                written.
            StorageError: the disk is full or refuses; older checkpoints are untouched, and what
                was begun is removed.
        """
        if type(step) is not int or not 0 <= step < 10**18:
            raise CheckpointError("the step of a checkpoint must be a whole number", got=step)
        text = self.check(tensors, document)
        with self._saving:
            self.not_removed = ()
            try:
                number = self._next_number()
                self._make_folder()
                self._remove_leftovers()
                with self._aside() as aside:
                    path = self._write(aside, step, tensors, text, number)
                sync_folder(self._files, self.folder)
                self._advance(number)
            except OSError as error:
                raise storage_error(_RULE, self.folder, error) from error
            self._remove_old(path)
            return path

    def check(
        self, tensors: Mapping[str, Mapping[str, torch.Tensor]], document: Mapping[str, Any]
    ) -> bytes:
        """The document as ``save`` writes it, if all of this can be saved; writes nothing.

        Raises:
            CheckpointError: a name, a tensor or a value cannot be stored.
        """
        for group, named in tensors.items():
            check_group(group)
            self._tensor_files.check_tensors(group, named)
        return encode_document(document)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written; ``None`` if there is none.

        Takes the memory of its tensors, and removes nothing, damaged or not.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
            StorageError: the folder cannot be read.
        """
        skipped: list[str] = []
        found = self._newest_first()
        while found:
            step, _, path = found.pop(0)
            try:
                return self._load(step, path, tuple(skipped))
            except RolledBackError as error:
                if not skipped:
                    raise
                got = f"{error.got}; what is newer is damaged: {skipped[0]}"
                raise RolledBackError(error.rule, got=got, next_step=error.next_step) from None
            except (CheckpointError, SealedError, OSError) as error:
                if not os.path.lexists(path):
                    # Not damage: a writer removed it while we read, for a newer one. Look again.
                    skipped, found = [], self._newest_first()
                    continue
                reason = error.strerror if isinstance(error, OSError) else str(error)
                skipped.append(f"{path}: {reason or error}")
                self._damaged.add(path)
        if not skipped:
            self._check_none()
            return None
        raise CheckpointError(
            f"a checkpoint in {self.folder} must be whole; all {len(skipped)} are damaged",
            got=skipped[0],
            next_step="restore the folder from a copy, or start again in another folder",
        )

    def newest_step(self) -> int | None:
        """The last step that has a checkpoint, damaged or not; ``None``: there is none.

        Raises:
            StorageError: the folder cannot be read.
        """
        found = self._newest_first()
        return found[0][0] if found else None

    def _make_folder(self) -> None:
        make_folders(self._files, self.folder)
        if not self._anchored:
            # Whoever made the folder, perhaps a run that was killed, may not have synced its name.
            with contextlib.suppress(PermissionError):
                sync_folder(self._files, self.folder.parent)
            self._anchored = True

    def _newest_first(self) -> list[tuple[int, int, Path]]:
        """Step, attempt and path of everything named like a checkpoint, damaged or not."""
        try:
            names = self._files.list_folder(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("the checkpoint folder must be readable", self.folder, error) from (
                error
            )
        found = []
        for name in names:
            match = _NAME.fullmatch(name)
            if match:
                step, attempt = int(match[1]), int(match[2] or 0)
                if name == _name_of(step, attempt):
                    found.append((step, attempt, self.folder / name))
        return sorted(found, reverse=True)

    def _load(self, step: int, path: Path, skipped: tuple[str, ...]) -> Checkpoint:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise CheckpointError("a checkpoint must be a folder")
        files, place = self._opened(path)
        if place is not None:
            self._check_age(path, place.index)
        manifest = read_manifest(files, path)
        if manifest.step != step:
            raise CheckpointError(f"the manifest must be of step {step}", got=manifest.step)
        check_sizes(files, path, manifest)
        document = read_document(files, path, manifest)
        tensors: dict[str, Mapping[str, torch.Tensor]] = {}
        if place is None:
            check_contents(files, path, manifest)
            load = self._tensor_files.load_tensors
            tensors = {g: load(path / (g + TENSOR_SUFFIX)) for g in manifest.groups}
            return Checkpoint(step, path, tensors, document, skipped)
        from .tensor_file import read_tensors

        # Each segment is verified when it is read, and all are read: no sha256 is needed.
        for group in manifest.groups:
            with (place / (group + TENSOR_SUFFIX)).open() as file:
                tensors[group] = read_tensors(file)
        self._accept(place.index)
        return Checkpoint(step, path, tensors, document, skipped)

    def _opened(self, path: Path) -> tuple[Files, Sealed | None]:
        """The system calls that read a checkpoint, and the folder where it is sealed."""
        if self._sealed is None:
            if (path / (INDEX + SUFFIX)).exists():
                raise CheckpointError("it is sealed", next_step="pass its key")
            return self._files, None
        # One object, which reads its index once: all files must be of the same checkpoint.
        place = Sealed(path, self._sealed.key)
        return SealedFiles(self._files, place.key, place.index), place

    def _check_age(self, path: Path, index: FolderIndex) -> None:
        """Whether it is as new as the counter says; see ``sealed.counter``."""
        assert self._sealed is not None
        counter = self._sealed.counter
        if counter is None:
            return
        wanted, number = counter.read(), index.number
        if number is None or number < wanted:
            raise RolledBackError(
                f"{path} must be at least as new as the counter {counter} says, {wanted}",
                got=f"number {number}",
                next_step="restore the newest checkpoint; an older one was put in its place, "
                "or it is another run's",
            )

    def _check_none(self) -> None:
        counter = None if self._sealed is None else self._sealed.counter
        if counter is not None and counter.begins_at_zero and counter.read() > 0:
            raise RolledBackError(
                f"{self.folder} must have the checkpoints that the counter {counter} has counted, "
                f"{counter.read()}",
                got="none",
                next_step="restore them, or make a new counter for a new run",
            )

    def _accept(self, index: FolderIndex) -> None:
        """What was read is the newest from now on, for the counter too."""
        self._number = index.number or 0
        self._advance(self._number)

    def _next_number(self) -> int:
        counter = None if self._sealed is None else self._sealed.counter
        return 1 + max(self._number, 0 if counter is None else counter.read())

    def _advance(self, number: int) -> None:
        """After the checkpoint is durable: before, a crash would leave none that is new enough."""
        self._number = number
        if self._sealed is not None and self._sealed.counter is not None:
            self._sealed.counter.advance(number)

    def _looks_whole(self, path: Path) -> bool:
        """Manifest and sizes only: reading every byte of every checkpoint at a save would cost."""
        if path in self._damaged:
            return False
        try:
            files, _ = self._opened(path)
            check_sizes(files, path, read_manifest(files, path))
        except (CheckpointError, SealedError, OSError):
            return False
        return True

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        """A new folder that readers ignore; removed at the end if it still has that name."""
        path = self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        _busy.add(path)
        try:
            self._files.make_folder(path)
            with closing(self._files, self._files.open_folder(path)) as fd:
                with contextlib.suppress(OSError):  # the pid in the name is the other sign of life
                    self._files.lock(fd)
                yield path
        except BaseException:
            with contextlib.suppress(OSError):
                remove_tree(self._files, path)
            raise
        finally:
            _busy.discard(path)

    def _write(
        self,
        aside: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, torch.Tensor]],
        text: bytes,
        number: int,
    ) -> Path:
        """Write all files into the folder aside, make them durable, and give it its name."""
        records = {}
        files = self._files
        if self._sealed is not None:
            files = SealedFiles(self._files, self._sealed.key)
        for group, named in tensors.items():
            name = group + TENSOR_SUFFIX
            written = self._tensor_files.write_tensors(files, aside / name, named)
            records[name] = FileRecord(*written)
        _write_file(files, aside / DOCUMENT, text)
        records[DOCUMENT] = FileRecord(len(text), hashlib.sha256(text).hexdigest())
        _write_file(files, aside / MANIFEST, Manifest(step, records).to_bytes())
        if isinstance(files, SealedFiles):
            files.write_index(aside, number)
        sync_folder(self._files, aside)
        attempts = [a for s, a, _ in self._newest_first() if s == step]
        path = self.folder / _name_of(step, max(attempts, default=-1) + 1)
        self._files.rename(aside, path)
        self._damaged.discard(path)
        return path

    def _remove_old(self, saved: Path) -> None:
        """Keep the last ``keep_last`` steps that look whole, of each step the last attempt.

        What fails here does not undo the save: it is noted, and the next save tries again.
        """
        try:
            doomed = self._doomed(saved)
        except StorageError as error:
            self.not_removed = (f"{self.folder}: {error}",)
            return
        failed = []
        moved = []
        for path in doomed:
            aside = self.folder / f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
            _busy.add(aside)
            try:
                # Named aside before its files go, so that no reader meets half a checkpoint.
                self._files.rename(path, aside)
                moved.append(aside)
            except OSError as error:
                _busy.discard(aside)
                failed.append(f"{path}: {error.strerror}")
        try:
            if moved:
                sync_folder(self._files, self.folder)
            for aside in moved:
                remove_tree(self._files, aside)
        except OSError as error:
            failed.append(f"{self.folder}: {error.strerror}")
        finally:
            _busy.difference_update(moved)
        self.not_removed = tuple(failed)

    def _doomed(self, saved: Path) -> list[Path]:
        kept_steps: set[int] = set()
        doomed = []
        for step, _, path in self._newest_first():
            if path == saved:
                kept_steps.add(step)
            elif step in kept_steps or len(kept_steps) >= self.keep_last:
                doomed.append(path)
            elif self._looks_whole(path):
                kept_steps.add(step)
        return doomed

    def _remove_leftovers(self) -> None:
        """Remove what killed writers left: their process is gone, and with it their lock."""
        for name in self._files.list_folder(self.folder):
            match = _ASIDE.fullmatch(name)
            path = self.folder / name
            if not match or path in _busy or _is_alive(int(match[1])):
                continue
            # Best effort: a leftover costs space only, and must not stop a save.
            with contextlib.suppress(OSError):
                if not is_locked(self._files, path):
                    remove_tree(self._files, path)


def _name_of(step: int, attempt: int) -> str:
    return f"step-{step:09d}" + (f".{attempt}" if attempt else "")


def _write_file(files: Files, path: Path, data: bytes) -> None:
    with closing(files, files.create(path)) as fd:
        write_all(files, fd, data)
        files.fsync(fd)


def _is_alive(pid: int) -> bool:
    """Whether another process has this id; for our own, ``_busy`` knows better."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
