"""How the processes of a run on several machines find each other."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError, RunError
from .hosts import Hosts, answering

_KEY = "hotloop/store"
_TRY_S = 2.0


@contextlib.contextmanager
def joined(timeout_s: float, device: torch.device) -> Iterator[Hosts | None]:
    """The hosts that ``torchrun`` started, or of a process group that is there; else ``None``.

    Args:
        timeout_s: that a host may be silent.
        device: of the model: NCCL between GPUs, else gloo.

    Raises:
        InputError: the environment is not as ``torchrun`` sets it.
        RunError: they did not all come within ``timeout_s``.
    """
    there = dist.is_available() and dist.is_initialized()
    if not there and not _several_asked():
        yield None
        return
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))  # Where NCCL puts what it is handed.
        if not there:
            with answering():
                _join("nccl" if device.type == "cuda" else "gloo", timeout_s)
            stack.callback(dist.destroy_process_group)
        count = dist.get_world_size()
        yield Hosts(dist.get_rank(), count) if count > 1 else None
        if not there:
            # All end together: host 0 keeps the store, and gloo's threads let go of tensors late,
            # which while the interpreter ends would abort it.
            with answering():
                dist.barrier()


def _several_asked() -> bool:
    """Whether the environment, as ``torchrun`` sets it, asks for more than one host."""
    text = os.environ.get("WORLD_SIZE", "1")
    if text in ("", "1"):
        return False
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if not text.isdecimal() or missing:
        raise InputError(
            "WORLD_SIZE must be a number, and RANK, MASTER_ADDR and MASTER_PORT be set beside it",
            got=f"WORLD_SIZE={text}" + (f", no {', '.join(missing)}" if missing else ""),
            next_step="start with torchrun, or unset WORLD_SIZE",
        )
    if not dist.is_available():
        raise RunError("several hosts need a torch that was built with torch.distributed")
    return True


def _join(backend: str, timeout_s: float) -> None:
    timeout = datetime.timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _own_store(rank, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)


def _own_store(rank: int, timeout: datetime.timedelta) -> Any:
    """A store of this start alone, kept by host 0.

    ``torchrun`` offers its own, which it keeps when it starts the processes again; there gloo finds
    the addresses of those that died, and cannot connect (pytorch issue 135712).
    """
    make_store: Any = dist.TCPStore  # type: ignore[attr-defined]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    known = make_store(address, port, is_master=False, timeout=timeout)
    if rank == 0:
        with socket.create_connection((address, port), timeout.total_seconds()) as probe:
            mine = probe.getsockname()[0]  # As the others reach it: on the way to the launcher.
        store = make_store(mine, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        word = secrets.token_hex(8)
        store.set(word, "")
        known.set(_KEY, f"{word} {store.port} {mine}")
        return store
    until_s = time.monotonic() + timeout.total_seconds()
    attempt = datetime.timedelta(seconds=min(_TRY_S, timeout.total_seconds()))
    while True:
        word, at, theirs = known.get(_KEY).decode().split(" ")
        try:
            store = make_store(theirs, int(at), is_master=False, timeout=attempt)
            if store.check([word]):
                store.set_timeout(timeout)
                return store
            raise RuntimeError(f"another store at {theirs}:{at}")
        except RuntimeError:  # That of the start before; the host 0 of now will say its own.
            if time.monotonic() > until_s:
                raise
            time.sleep(0.1)
