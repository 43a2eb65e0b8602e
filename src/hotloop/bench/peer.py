"""Process of one peer: ``python -m hotloop.bench.peer SETUP.json``; one epoch for each line read.

Lines in: ``{"turn": n}``. Lines out: ``{"ready": true}``, then ``{"s": seconds, "loss": mean}``.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..measure import now, timed


def main() -> int:
    """Prepare, warm up, answer."""
    setup = json.loads(Path(sys.argv[1]).read_text())
    # What a peer prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    import numpy
    import torch

    from ..data import GlobalSampler
    from ..monitor import peak_resident_bytes

    torch.set_num_threads(setup["threads"])
    folder = Path(setup["folder"])
    x, y = numpy.load(folder / "x.npy"), numpy.load(folder / "y.npy")
    sampler = GlobalSampler(len(x), setup["batch_size"], seed=0)

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    def epochs() -> Any:
        """Waits for the next epoch; yields its number."""
        for line in sys.stdin:
            yield json.loads(line)["turn"]

    from ..train.zoo import build_model

    model = build_model(setup["model"])
    model.load_state_dict(torch.load(folder / "weights.pt"))
    if setup["peer"].startswith(("hotloop", "workers-")):
        _hotloop(model, x, y, setup, say, epochs())
        return 0
    if setup["peer"].startswith("ddp-"):
        from . import ddp

        run = ddp.start(setup, sys.argv[1], model, x, y)
    else:
        from .peers import PEERS

        run = PEERS[setup["peer"]][0](
            model, setup["model"], x, y, setup["batch_size"], setup["threads"]
        )
    say(ready=True)
    for number in epochs():
        order = sampler.order(number).numpy()
        seconds, loss = timed(partial(run, order))
        say(s=seconds, loss=loss, peak_bytes=peak_resident_bytes())
    return 0


def _hotloop(model: Any, x: Any, y: Any, setup: Any, say: Any, wanted: Any) -> None:
    """``Trainer.fit``, held at each end of an epoch until the next is wanted."""
    import torch

    from ..monitor import peak_resident_bytes
    from ..plan import Plan
    from ..train import Trainer

    knobs: dict[str, Any] = {
        "cpu.num_threads": setup["threads"],
        "step.compile": "always",
        "step.precision": setup["precision"],
        # Samples stay in memory, as they do for every peer.
        "memory.mmap_above_bytes": 2**40,
    }
    workers = setup["workers"]
    if setup["peer"].startswith("workers-"):
        workers = int(setup["peer"].removeprefix("workers-"))
    if workers is not None:
        knobs |= {"cpu.thread_affinity": "compact", "parallel.num_workers": workers}
    plan = Plan().replace(knobs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer, plan=plan)
    done, seen, started = 0, 0.0, 0.0

    def on_progress(progress: Any) -> None:
        nonlocal done, seen, started
        if progress.epochs_done == done:
            return
        ended = now()
        done = progress.epochs_done
        say(s=ended - started, loss=progress.loss, peak_bytes=peak_resident_bytes())
        next(wanted)
        started = now()

    say(ready=True)
    next(wanted)
    # The first epoch counts start-up too; the coordinator takes the first of every peer as warm-up.
    started = now()
    trainer.fit((x, y), batch_size=setup["batch_size"], epochs=setup["epochs"],
                on_progress=on_progress)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
