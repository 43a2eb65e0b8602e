"""Every system call of a save is made to fail in turn; the old or the new checkpoint loads."""

import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest

from hotloop.errors import StorageError
from hotloop.train import checkpoint
from hotloop.train.checkpoint import CheckpointStore
from hotloop.train.system_calls import Files
from support import FOLDER
from support.checkpoint_samples import QuickFiles, save_sample, variant_of

CALLS = [name for name in vars(Files) if not name.startswith("_")]
OPENING = ("create", "open_folder", "open_read")


class Crash(BaseException):
    """The process is gone: from here on it makes no system call."""


class FaultyFiles(QuickFiles):
    """Real system calls, the one with index ``at`` done wrong in the way ``fault`` says."""

    def __init__(self, at=None, fault=None):
        self.log = []
        self.at = at
        self.fault = fault
        self.fired = False
        self.crashed = False
        self.open_fds = set()

    def call(self, name, *args):
        if self.crashed:
            raise Crash
        index = len(self.log)
        self.log.append(name)
        again = self.fired and self.fault.sticky and name == self.log[self.at]
        if index != self.at and not again:
            return self.do(name, *args)
        self.fired = True
        return self.do_wrong(name, *args)

    def do_wrong(self, name, *args):
        fault = self.fault
        if fault.half and name == "write":
            fd, data = args
            taken = self.do("write", fd, data[: (len(data) + 1) // 2])
            if fault.error is None and not fault.crash:
                return taken
        elif fault.error is None and not fault.crash:
            return self.do(name, *args)
        elif fault.after and name in OPENING:
            os.close(getattr(super(), name)(*args))  # a call that fails hands out no descriptor
        elif fault.after or (name == "close" and not fault.crash):
            self.do(name, *args)  # close(2) frees the descriptor even when it reports an error
        if fault.crash:
            self.crashed = True
            raise Crash
        raise OSError(fault.error, os.strerror(fault.error))

    def do(self, name, *args):
        result = getattr(super(), name)(*args)
        if name in OPENING:
            self.open_fds.add(result)
        elif name == "close":
            self.open_fds.discard(args[0])
        return result

    def bury(self):
        """What the kernel does for a dead process; and its memory is gone."""
        for fd in self.open_fds:
            os.close(fd)
        checkpoint._busy.clear()


def _method(name):
    return lambda self, *args: self.call(name, *args)


for _name in CALLS:
    setattr(FaultyFiles, _name, _method(_name))


class Fault:
    def __init__(self, label, *, error=None, crash=False, half=False, after=False, sticky=False):
        self.label = label
        self.error = error
        self.crash = crash
        self.half = half
        self.after = after
        self.sticky = sticky

    def __repr__(self):
        return self.label


FAULTS = [
    Fault("no space", error=errno.ENOSPC),
    Fault("no space from here on", error=errno.ENOSPC, sticky=True),
    Fault("half written, then no space", error=errno.ENOSPC, half=True, sticky=True),
    Fault("I/O error", error=errno.EIO),
    Fault("I/O error of a call that worked", error=errno.EIO, after=True),
    Fault("short write", half=True),
    Fault("killed before", crash=True),
    Fault("killed after", crash=True, after=True),
    Fault("killed in the middle of a write", crash=True, half=True),
]


def nothing_there(folder):
    return (
        CheckpointStore(folder / "new" / "folder", keep_last=1, files=QuickFiles()),
        None,
        (7, "b"),
    )


def an_older_step(folder):
    store = CheckpointStore(folder, keep_last=1, files=QuickFiles())
    save_sample(store, 6)
    leftover = folder / f".tmp-{os.getpid()}-0123456789abcdef"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    return store, (6, "a"), (7, "b")


def the_same_step(folder):
    store = CheckpointStore(folder, keep_last=2, files=QuickFiles())
    save_sample(store, 5)
    save_sample(store, 7)
    return store, (7, "a"), (7, "b")


SCENARIOS = [nothing_there, an_older_step, the_same_step]


def attempt(scenario, folder, files):
    """Save over the scenario's checkpoint with these files: (outcome, old, new, store)."""
    store, old, new = scenario(folder)
    disturbed = CheckpointStore(store.folder, keep_last=store.keep_last, files=files)
    try:
        save_sample(disturbed, *new)
        outcome = "saved"
    except StorageError:
        outcome = "error"
    except Crash:
        outcome = "killed"
    files.bury()
    return outcome, old, new, store


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_an_undisturbed_save_makes_the_calls_that_the_faults_are_put_on(tmp_path, scenario):
    files = FaultyFiles()
    outcome, _, new, store = attempt(scenario, tmp_path, files)
    assert outcome == "saved"
    assert variant_of(store.latest()) == new
    assert files.log.count("create") == 4
    assert files.log.count("fsync") >= 6
    assert {"write", "rename", "make_folder", "list_folder", "lock", "close"} <= set(files.log)
    assert files.open_fds == set()


def test_no_call_goes_round_the_object_that_the_faults_are_put_on(tmp_path):
    """What the interpreter itself audits while a checkpoint is written: opened, named, removed."""
    script = f"""
import os, sys
sys.path.insert(0, {str(FOLDER.parent)!r})
from pathlib import Path
from support.checkpoint_samples import save_sample
from hotloop.train.checkpoint import CheckpointStore
folder = Path({str(tmp_path / "run")!r})
store = CheckpointStore(folder, keep_last=1)
save_sample(store, 1)
seen, watching = [], True
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir",
           "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime", "mmap.__new__")
def note(event, args):
    if watching and event in WATCHED:
        frame = sys._getframe(1)
        seen.append((event, Path(frame.f_code.co_filename).name, str(args[:1])))
sys.addaudithook(note)
save_sample(store, 2)
watching = False
outside = [each for each in seen if each[1] != "system_calls.py" and str(folder) in each[2]]
assert not outside, outside
assert len([each for each in seen if each[1] == "system_calls.py"]) > 15, seen
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_after_a_fault_at_any_call_the_old_or_the_new_loads(tmp_path, scenario, fault):
    at = 0
    outcomes = set()
    while True:
        folder = tmp_path / str(at)
        folder.mkdir()
        files = FaultyFiles(at, fault)
        outcome, old, new, store = attempt(scenario, folder, files)
        if not files.fired:
            break
        outcomes.add(outcome)
        found = variant_of(store.latest())
        named = "rename" in files.log[: at + fault.after]
        if outcome == "saved":
            assert found == new
        elif not named:
            assert found == old
        else:
            assert found in (old, new)
        if outcome == "error":
            # Nothing is left aside, unless the removal itself was what failed.
            removing = files.log[at] in ("list_folder", "remove_file", "remove_folder")
            left = [p.name for p in folder.rglob(".tmp-*") if "0123456789abcdef" not in p.name]
            assert left == [] or removing
        assert files.open_fds == set() or outcome == "killed"
        save_sample(store, 9)
        assert variant_of(store.latest()) == (9, "a")
        assert not list(folder.rglob(".tmp-*"))
        assert len(list(store.folder.iterdir())) <= store.keep_last
        at += 1
    assert at > 30
    if fault.crash:
        assert outcomes == {"killed"}
    elif fault.error:
        assert outcomes == {"saved", "error"}
    else:
        assert outcomes == {"saved"}


@pytest.mark.parametrize(
    ("error", "next_step"),
    [
        (errno.ENOSPC, "free space on the disk"),
        (errno.EDQUOT, "free space in the quota"),
        (errno.EACCES, "choose a folder you may write to"),
        (errno.EROFS, "not read-only"),
        (errno.EIO, "EIO"),
    ],
)
def test_the_line_says_what_is_wrong_and_what_to_do(tmp_path, error, next_step):
    dry = FaultyFiles()
    attempt(nothing_there, tmp_path, dry)
    for name in ("make_folder", "create", "write", "fsync", "rename"):
        files = FaultyFiles(dry.log.index(name), Fault("error", error=error))
        store = CheckpointStore(tmp_path / name / "folder", files=files)
        with pytest.raises(StorageError, match=next_step) as caught:
            save_sample(store, 1)
        assert errno.errorcode[error] in str(caught.value)
        assert str(store.folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_write_that_takes_nothing_does_not_hang(tmp_path):
    class Stuck(Files):
        def write(self, fd, data):
            return 0

    with pytest.raises(StorageError, match="took nothing"):
        save_sample(CheckpointStore(tmp_path, files=Stuck()), 1)
    assert list(tmp_path.iterdir()) == []


def test_the_user_interrupting_leaves_nothing_behind(tmp_path):
    class Interrupted(Files):
        def fsync(self, fd):
            raise KeyboardInterrupt

    save_sample(CheckpointStore(tmp_path), 1)
    with pytest.raises(KeyboardInterrupt):
        save_sample(CheckpointStore(tmp_path, files=Interrupted()), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_old_ones_that_cannot_be_removed_are_named_and_tried_again(tmp_path):
    class Stubborn(Files):
        renames = 0

        def rename(self, old, new):
            if ".tmp-" in new.name:
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().rename(old, new)

    store = CheckpointStore(tmp_path, keep_last=1, files=Stubborn())
    save_sample(store, 1)
    assert store.not_removed == ()
    save_sample(store, 2)
    assert store.not_removed == (f"{tmp_path / 'step-000000001'}: Operation not permitted",)
    assert variant_of(store.latest()) == (2, "a")
    again = CheckpointStore(tmp_path, keep_last=1)
    save_sample(again, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003"]


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES])
def test_a_newest_one_that_cannot_be_read_is_reported_and_the_one_before_used(tmp_path, error):
    store = CheckpointStore(tmp_path)
    save_sample(store, 1)
    newest = save_sample(store, 2)
    dry = FaultyFiles()
    CheckpointStore(tmp_path, files=dry).latest()
    for at, name in enumerate(dry.log):
        files = FaultyFiles(at, Fault("error", error=error))
        with contextlib.ExitStack() as stack:
            if name == "list_folder":
                stack.enter_context(pytest.raises(StorageError, match="readable"))
            found = CheckpointStore(tmp_path, files=files).latest()
            assert variant_of(found) == (1, "a")
            assert found.skipped == (f"{newest}: {os.strerror(error)}",)
        assert files.open_fds == set()


def test_one_that_is_removed_while_it_is_read_is_no_damage(tmp_path):
    writer = CheckpointStore(tmp_path, keep_last=1)
    first = save_sample(writer, 1)

    class Overtaken(Files):
        def open_read(self, path):
            if path.parent == first and first.exists():
                save_sample(writer, 2)
            return super().open_read(path)

    found = CheckpointStore(tmp_path, files=Overtaken()).latest()
    assert variant_of(found) == (2, "a")
    assert found.skipped == ()


def test_two_threads_saving_at_once_take_turns(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    threads = [threading.Thread(target=save_sample, args=(store, step)) for step in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert variant_of(store.latest()) == (6, "a")
    assert not list(tmp_path.glob(".tmp-*"))
