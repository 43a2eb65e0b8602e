"""Kill a saving process at each of its system calls in turn; run by test_checkpoint_sigkill.py.

    python -m support.checkpoint_kill_each_call FOLDER

Each victim is forked, saves over a checkpoint that is there, and kills itself before or after one
system call, so that the kernel ends it as it ends any process: locks freed, descriptors closed,
nothing else. Prints one line of JSON: kills, and what was wrong.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import torch

from hotloop.errors import StorageError
from hotloop.train.checkpoint import CheckpointStore
from hotloop.train.system_calls import Files
from support.checkpoint_samples import QuickFiles, save_sample, variant_of


class Deadly(QuickFiles):
    """Kills this process at call number ``at``."""

    def __init__(self, at, after):
        self.left, self.after = at, after

    def call(self, name, *args):
        self.left -= 1
        if self.left == -1 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.left == -1 and name == "write":
            args = (args[0], args[1][: (len(args[1]) + 1) // 2])
        result = getattr(super(), name)(*args)
        if self.left == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


for _name in [name for name in vars(Files) if not name.startswith("_")]:
    setattr(Deadly, _name, lambda self, *args, _name=_name: self.call(_name, *args))


def ended(victim):
    """How a forked process that runs ``victim`` ends."""
    pid = os.fork()
    if pid == 0:
        try:
            victim()
            os._exit(0)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_each_call(folder, old, new, after):
    """Number of kills, and what was wrong."""
    wrong, at = [], 0
    while True:
        place = folder / f"{new[0]}{new[1]}-{'after' if after else 'before'}-{at}"
        if old:
            save_sample(CheckpointStore(place, keep_last=1, files=QuickFiles()), *old)
        files = Deadly(at, after)
        code = ended(lambda: save_sample(CheckpointStore(place, keep_last=1, files=files), *new))  # noqa: B023
        store = CheckpointStore(place, keep_last=1, files=QuickFiles())
        try:
            found = variant_of(store.latest())
            if found not in ((new,) if code == 0 else (old, new)):
                wrong.append(f"call {at}, exit code {code}: found {found}")
            save_sample(store, 9)
            if [p.name for p in place.iterdir()] != ["step-000000009"]:
                wrong.append(f"call {at}: left {sorted(p.name for p in place.iterdir())}")
        except Exception as error:
            wrong.append(f"call {at}: {type(error).__name__}: {error}")
        if code == 0:
            return at, wrong
        if code != -signal.SIGKILL:
            wrong.append(f"call {at}: exit code {code}")
        at += 1


def cut_at_each_size(folder):
    """The kernel itself writes short and then refuses, at file sizes from 0 on."""
    wrong, size = [], 0
    old, new = (6, "a"), (7, "b")
    while True:
        place = folder / f"size-{size}"
        save_sample(CheckpointStore(place, keep_last=1, files=QuickFiles()), *old)

        def victim():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: B023
            store = CheckpointStore(place, keep_last=1, files=QuickFiles())  # noqa: B023
            try:
                save_sample(store, *new)
            except StorageError:
                os._exit(1)

        code = ended(victim)
        found = variant_of(CheckpointStore(place, files=QuickFiles()).latest())
        if found != (new if code == 0 else old) or len(list(place.iterdir())) != 1:
            wrong.append(f"files of {size} bytes at most: exit code {code}, found {found}")
        if code == 0:
            return size, wrong
        size += 37


def main(folder):
    kills, wrong = 0, []
    for old, new in ((None, (7, "b")), ((6, "a"), (7, "b")), ((7, "a"), (7, "b"))):
        for after in (False, True):
            found, complaints = killed_at_each_call(folder / str(old), old, new, after)
            kills, wrong = kills + found, wrong + complaints
    size, complaints = cut_at_each_size(folder)
    print(json.dumps({"kills": kills, "bytes": size, "wrong": wrong + complaints}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
