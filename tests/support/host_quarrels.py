"""Two hosts that do not agree; what each is told goes into a folder. Argument: the folder."""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from hotloop.errors import HotloopError, MissingExtraError
from hotloop.parallel import joined
from hotloop.train.checkpoint import CheckpointStore
from hotloop.train.hosts import newest_of

folder = Path(sys.argv[1])
with joined(60.0, torch.device("cpu")) as hosts:
    assert hosts is not None
    rank = hosts.rank
    said: dict[str, list[str]] = {}

    def tried(name: str, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except HotloopError as error:
            said[name] = [type(error).__name__, str(error)]

    def optimizer(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr)

    def fails() -> None:
        raise MissingExtraError("a table", "pyarrow", "parquet")

    wide = nn.Linear(4, 2 + rank)
    same = nn.Linear(4, 2)
    tried("agree", lambda: hosts.agree(seed=1, batch_size=64 * (1 + rank)))
    tried("shape", lambda: hosts.same_model(wide, optimizer(wide)))
    tried("rate", lambda: hosts.same_model(same, optimizer(same, 0.1 * (1 + rank))))
    tried("fewer", lambda: hosts.same_model(*(lambda m: (m, optimizer(m)))(
        nn.Linear(4, 2, bias=rank == 0))))  # fmt: skip
    tried("first", lambda: hosts.first(fails))
    store = CheckpointStore(folder / f"of-{rank}")
    if rank:
        store.save(7, tensors={"model": {"w": torch.ones(2)}}, document={})
    tried("newest", lambda: newest_of(hosts, store, store.latest))
    hosts.same_model(same, optimizer(same))
    torch.save(same.state_dict(), folder / f"weights-{rank}.pt")
    (folder / f"said-{rank}.json").write_text(json.dumps(said))
