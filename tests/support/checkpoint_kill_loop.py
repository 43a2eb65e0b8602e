"""Kill a process that saves checkpoints, again and again; run by test_checkpoint_sigkill.py.

    python -m support.checkpoint_kill_loop FOLDER NUM_KILLS SEED

One process imports torch once and forks the victims: an import takes longer than a hundred saves.
Prints one line of JSON: kills, how many hit a save in mid-way, how many found a newer one than
the last that the victim told of, and what was wrong.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from hotloop.train.checkpoint import CheckpointStore
from support.checkpoint_samples import save_sample, variant_of


def save_for_ever(folder, step, pipe):
    """Save each step twice, telling of each save before it begins and after it returned."""
    store = CheckpointStore(folder, keep_last=2)
    while True:
        step += 1
        for variant in "ab":
            for phase in "<>":
                if phase == ">":
                    save_sample(store, step, variant)
                os.write(pipe, f"{phase} {step} {variant}\n".encode())


def told(pipe):
    """What the victim wrote into the pipe, whole lines only."""
    text = b""
    while data := os.read(pipe, 65536):
        text += data
    lines = text.decode().split("\n")[:-1]
    return [(phase, int(step), variant) for phase, step, variant in map(str.split, lines)]


def main(folder, num_kills, seed):
    chance = random.Random(seed)
    store = CheckpointStore(folder, keep_last=2)
    last = None
    wrong = []
    mid_save = newer = 0
    for kill in range(num_kills):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(folder, last[0] if last else 0, writer)
            finally:
                os._exit(3)
        os.close(writer)
        time.sleep(chance.uniform(0.001, 0.03))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSIGNALED(status):
            wrong.append(f"kill {kill}: the victim ended by itself, {status}")
        events = told(reader)
        os.close(reader)
        saved = [event[1:] for event in events if event[0] == ">"]
        expected = {saved[-1] if saved else last}
        if events and events[-1][0] == "<":
            mid_save += 1
            expected.add(events[-1][1:])
        try:
            checkpoint = store.latest()
            found = variant_of(checkpoint)
            if found not in expected:
                wrong.append(f"kill {kill}: found {found}, expected one of {expected}")
            if checkpoint is not None and checkpoint.skipped:
                wrong.append(f"kill {kill}: damaged {checkpoint.skipped}")
        except Exception as error:
            wrong.append(f"kill {kill}: {type(error).__name__}: {error}")
            break
        newer += len(expected) == 2 and found == events[-1][1:]
        last = found
    save_sample(store, (last[0] if last else 0) + 1)
    left = sorted(path.name for path in folder.iterdir())
    if len(left) != min(2, 1 + (last is not None)) or any(".tmp" in name for name in left):
        wrong.append(f"left behind: {left}")
    print(json.dumps({"kills": num_kills, "mid_save": mid_save, "newer": newer, "wrong": wrong}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
