"""From a model to a process that serves it: sockets, signals, the watch on files, the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import HotloopError, InputError
from .app import App, AppOptions
from .connection import Connection
from .connection_manager import ConnectionManager
from .limits import Limits, raise_descriptor_limit
from .log import Log
from .model import Model
from .stats import Stats

_LINGER_S = 2.0
_GC_OBJECTS = 50_000
# Connections that wait to be taken; the kernel makes it net.core.somaxconn where that is less. One
# that finds no place asks again after a second, which is longer than many a deadline.
_BACKLOG = 16_384


@dataclass(frozen=True)
class ServerOptions:
    """Where and how long.

    Attributes:
        host, port: to listen on; port 0: any that is free.
        tls: certificate and key, loaded.
        drain_s: seconds for what was accepted, once the server is to stop.
        watch_s: seconds between two looks at the model's files; 0: they are not watched.
        app: who is served and how.
        limits: see there.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    tls: ssl.SSLContext | None = None
    drain_s: float = 30.0
    watch_s: float = 0.0
    app: AppOptions = field(default_factory=AppOptions)
    limits: Limits = field(default_factory=Limits)


class Server:
    """One model behind one socket.

    Args:
        model: not loaded yet.
        options: where and how long.
        log: for what happens.

    Attributes:
        address: ``http://127.0.0.1:8000`` or ``https://...``, once it listens.
        stopped_by: number of the signal that ended it.
        app: what answers, once it listens.
    """

    def __init__(self, model: Model, options: ServerOptions, log: Log) -> None:
        self.model = model
        self.options = options
        self.log = log
        self.stats = Stats()
        self.address = ""
        self.stopped_by: int | None = None
        self.app: App | None = None
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """Have ``run`` drain and return; from the loop's thread."""
        self._stop.set()

    async def run(self, on_ready: Callable[[Server], None], *, signals: bool = True) -> bool:
        """Load, listen, serve until ``stop`` or a signal, drain; whether all was answered.

        Args:
            on_ready: called once connections are taken.
            signals: SIGTERM and SIGINT stop it, SIGHUP loads model and tokens again.

        Raises:
            HotloopError: the model cannot be loaded.
            InputError: the address cannot be listened on.
        """
        options = self.options
        loop = asyncio.get_running_loop()
        sock = listen(options.host, options.port)
        try:
            await self.model.load(self.stats, self.log)
            app = App(self.model, self.stats, self.log, options.limits, options.app)
            self.app = app
            most = raise_descriptor_limit(options.limits.max_connections)
            manager = ConnectionManager(options.limits, app.gate, app.handle, app.on_answer, most)
            app.manager = manager
            server = await loop.create_server(
                lambda: Connection(manager), sock=sock, backlog=_BACKLOG, ssl=options.tls,
                ssl_handshake_timeout=options.limits.header_timeout_s if options.tls else None,
            )  # fmt: skip
        except BaseException:
            sock.close()
            raise
        port = sock.getsockname()[1]
        shown = f"[{options.host}]" if ":" in options.host else options.host
        self.address = f"http{'s' if options.tls else ''}://{shown}:{port}"
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._on_signal, number)
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup, app)
        self._keep(self._sweep(manager))
        if options.watch_s > 0:
            self._keep(self._watch(app))
        # What is there now stays; the collector need not look at it during requests.
        gc.collect()
        gc.freeze()
        # Requests leave no cycles behind, but each makes objects: at Python's 700 the collector
        # took a quarter of the interpreter's time to find nothing.
        thresholds = gc.get_threshold()
        gc.set_threshold(_GC_OBJECTS, *thresholds[1:])
        self.log.info("serving", address=self.address, model=self.model.name,
                      engine=self.model.lane.engine.name, max_connections=most)  # fmt: skip
        on_ready(self)
        try:
            await self._stop.wait()
            return await self._drain(server, app, manager)
        finally:
            for task in self._tasks:
                task.cancel()
            gc.set_threshold(*thresholds)
            gc.unfreeze()

    async def _drain(self, server: asyncio.Server, app: App, manager: ConnectionManager) -> bool:
        """Take no more, answer what was accepted, close."""
        self.log.info("draining", unanswered=manager.unanswered, signal=self.stopped_by)
        app.draining = True
        server.close()
        manager.drain()
        loop = asyncio.get_running_loop()
        close = self.model.lane.batcher.close
        limit_s = loop.time() + self.options.drain_s
        finished = await loop.run_in_executor(None, close, self.options.drain_s)
        ends_at = loop.time() + _LINGER_S
        while manager.connections and loop.time() < ends_at:
            if any(connection.has_unsent for connection in manager.connections):
                ends_at = max(ends_at, min(limit_s, loop.time() + _LINGER_S))
            await asyncio.sleep(0.01)
        left = manager.unanswered
        for connection in list(manager.connections):
            connection.abort()
        self.log.info("stopped", finished=finished and left == 0, unanswered=left)
        return finished and left == 0

    def _on_signal(self, number: int) -> None:
        if self.stopped_by is not None:
            # The second one means now.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stopped_by = number
        self.stop()

    def _on_hangup(self, app: App) -> None:
        tokens = self.options.app.tokens
        if tokens is not None:
            try:
                tokens.reload()
            except InputError as error:
                self.log.error("tokens not read; those before stay", error=str(error))
        self._keep(self._reload(app))

    async def _reload(self, app: App) -> None:
        with contextlib.suppress(HotloopError):  # It is in the log.
            await app.reload()

    async def _watch(self, app: App) -> None:
        """Load files that were replaced, once two looks see the same."""
        seen: tuple[object, ...] | None = None
        while True:
            await asyncio.sleep(self.options.watch_s)
            mark = self.model.mark()
            if mark is not None and mark == seen and self.model.has_changed:
                await self._reload(app)
            seen = mark

    async def _sweep(self, manager: ConnectionManager) -> None:
        limits = self.options.limits
        shortest = min(
            limits.header_timeout_s, limits.body_timeout_s, limits.idle_timeout_s,
            limits.write_timeout_s,
        )  # fmt: skip
        pause_s = min(1.0, max(0.05, shortest / 8))
        while True:
            await asyncio.sleep(pause_s)
            manager.sweep()

    def _keep(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        InputError: the address is not this machine's, or taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InputError(
            "the host must be an address of this machine", got=f"{host}: {error}"
        ) from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        sock.close()
        raise InputError(
            "the address must be free", got=f"{host} port {port}: {error}",
            next_step="choose another with --port, or 0 for any",
        ) from None  # fmt: skip
    return sock


def run_server(server: Server, on_ready: Callable[[Server], None]) -> bool:
    """Run to the end on a loop of uvloop's; see ``Server.run``."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(server.run(on_ready))
