"""What each path answers: the Open Inference Protocol v2, ``/predict``, page, operations."""

from __future__ import annotations

import asyncio
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import orjson

from ..errors import HotloopError
from ..monitor.prometheus import CONTENT_TYPE
from ..version import VERSION
from .answers import infer_answer, predict_answer
from .connection_manager import ConnectionManager
from .limits import Limits
from .log import Log
from .message import JSON, Refusal, Request, busy
from .model import Lane, Model
from .openapi import openapi_document
from .page import assets, docs_page
from .security import Tokens, check_host
from .stats import Stats
from .tensors import InferRequest, parse_infer, parse_predict
from .work import Work

EXTENSIONS = ("binary_tensor_data", "model_repository")
_ATTESTATION = b"/attestation"
_NO_TOKEN_NEEDED = frozenset({b"/v2/health/live", b"/v2/health/ready"})
_CSP = (
    b"content-security-policy",
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
)
Handler = Callable[[Request], None]


@dataclass(frozen=True)
class AppOptions:
    """How requests are answered.

    Attributes:
        tokens: one must be given with each request; ``None``: all are served.
        allowed_hosts: names in ``Host``; ``None``: any.
        default_timeout_s: deadline of requests that bring none.
        log_requests: one line for each.
        attest: answers ``POST /attestation``; ``None``: there is no such path.
    """

    tokens: Tokens | None = None
    allowed_hosts: frozenset[bytes] | None = None
    default_timeout_s: float = 10.0
    log_requests: bool = False
    attest: Callable[[Request], None] | None = None


class App:
    """Routes and answers; all methods run in the loop's thread."""

    def __init__(
        self, model: Model, stats: Stats, log: Log, limits: Limits, options: AppOptions
    ) -> None:
        self.model = model
        self.stats = stats
        self.log = log
        self.limits = limits
        self.options = options
        self.draining = False
        self.manager: ConnectionManager | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._assets = assets()
        self._public = _NO_TOKEN_NEEDED | set(self._assets)
        name = urllib.parse.quote(model.name).encode()
        self._model_path = b"/v2/models/" + name
        self._fixed: dict[bytes, tuple[bytes, str, Handler]] = {
            b"/v2": (b"GET", "metadata", self._server_metadata),
            b"/v2/health/live": (b"GET", "health", self._live),
            b"/v2/health/ready": (b"GET", "health", self._ready),
            b"/predict": (b"POST", "predict", self._predict),
            b"/metrics": (b"GET", "metrics", self._metrics),
            b"/stats": (b"GET", "stats", self._stats),
            b"/openapi.json": (b"GET", "docs", self._openapi),
            b"/docs": (b"GET", "docs", self._docs),
            b"/v2/repository/models/" + name + b"/load": (b"POST", "load", self._reload),
            **dict.fromkeys(self._assets, (b"GET", "page", self._page)),
        }
        if options.attest is not None:
            # Before a client sends its token, it wants to know to whom.
            self._public |= {_ATTESTATION}
            self._fixed[_ATTESTATION] = (b"POST", "attestation", options.attest)
        self._refresh_paths()

    # --- before the body

    def gate(self, request: Request) -> None:
        """Refuse as early as can be; see ``ConnectionManager``."""
        method, path, headers = request.method, request.path, request.headers
        if b"host" not in headers and not request.is_old:
            raise Refusal(400, "a request must name its host", close=True)
        check_host(headers, self.options.allowed_hosts)
        tokens = self.options.tokens
        if (
            tokens is not None
            and path not in self._public
            and not tokens.allows(headers.get(b"authorization", b""))
        ):
            raise Refusal(
                401, "a token is needed: Authorization: Bearer TOKEN",
                headers=[(b"www-authenticate", b"Bearer")], reason="token",
            )  # fmt: skip
        wanted, request.route, request.handler = self._route(path)
        if method != wanted and not (method == b"HEAD" and wanted == b"GET"):
            allow = b"GET, HEAD" if wanted == b"GET" else wanted
            raise Refusal(405, "this path has another method", headers=[(b"allow", allow)])
        if wanted == b"POST":
            if headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise Refusal(
                    415, "bodies are taken as they are, not compressed",
                    headers=[(b"accept-encoding", b"identity")],
                )  # fmt: skip
            if self.draining:
                raise busy(503, "the server is stopping", 1.0, "stopping")
            if request.route in ("infer", "predict"):
                # Before the body is kept: under overload most of the work would be for nothing.
                batcher = self.model.lane.batcher
                batcher.expect(request, request.arrived_s + _header_timeout_s(request))
                request.on_whole = batcher.has_come

    def handle(self, request: Request) -> None:
        """Answer now, or have it answered later."""
        try:
            assert request.handler is not None
            request.handler(request)
        except Refusal as refusal:
            request.refuse(refusal)
        except Exception as error:
            self.log.error("request failed", route=request.route, error=repr(error))
            request.refuse(Refusal(500, "the server failed on this request"))

    def on_answer(self, request: Request, status: int) -> None:
        """Count an answer."""
        age_s = request.age_s
        self.stats.answered(request.route, status, age_s)
        if request.error is not None and request.error.reason is not None:
            self.stats.dropped[request.error.reason] += 1
        if self.options.log_requests:
            self.log.info(
                "request", method=request.method.decode("ascii", "replace"), route=request.route,
                status=status, latency_ms=round(1000 * age_s, 3),
            )  # fmt: skip

    # --- inference

    def _infer(self, request: Request) -> None:
        lane = self.model.lane
        length = request.headers.get(b"inference-header-content-length")
        if length is not None and not (length.isdigit() and len(length) < 16):
            raise Refusal(400, "Inference-Header-Content-Length must be a number of bytes")
        asked = parse_infer(
            request.body, None if length is None else int(length), lane.signature, self.limits
        )

        def encode(arrays: list[numpy.ndarray]) -> None:
            body, kind, headers = infer_answer(
                asked, arrays, lane.signature, self.model.name, lane.version
            )
            request.answer(200, body, kind, headers)

        self._submit(request, asked, lane, encode)

    def _predict(self, request: Request) -> None:
        lane = self.model.lane
        asked = parse_predict(request.body, lane.signature, self.limits)

        def encode(arrays: list[numpy.ndarray]) -> None:
            request.answer(200, predict_answer(asked, arrays, lane.signature, request.age_s))

        self._submit(request, asked, lane, encode)

    def _submit(
        self,
        request: Request,
        asked: InferRequest,
        lane: Lane,
        encode: Callable[[list[numpy.ndarray]], None],
    ) -> None:
        if self.draining:
            raise busy(503, "the server is stopping", 1.0, "stopping")

        def done(result: list[numpy.ndarray] | Refusal) -> None:
            if isinstance(result, Refusal):
                request.refuse(result)
                return
            try:
                encode(result)
            except Exception as error:
                self.log.error("answer failed", route=request.route, error=repr(error))
                request.refuse(Refusal(500, "the server failed on this request"))

        timeout_s = min(
            self.options.default_timeout_s if asked.timeout_s is None else asked.timeout_s,
            _header_timeout_s(request),
        )
        arrived = request.arrived_s
        work = Work(asked.arrays, asked.rows, done, arrived, arrived + timeout_s)
        batcher = lane.batcher
        batcher.submit(work)
        request.on_gone = lambda: batcher.cancel(work)

    # --- the protocol's other paths

    def _route(self, path: bytes) -> tuple[bytes, str, Handler]:
        found = self._fixed.get(path)
        if found is None:
            found = self._fixed.get(self._plain(path))
        if found is None:
            raise Refusal(404, "there is nothing at this path")
        return found

    def _plain(self, path: bytes) -> bytes:
        """The path with percent signs used in one way."""
        text = urllib.parse.quote(urllib.parse.unquote_to_bytes(path)).encode()
        return text[:-1] if len(text) > 1 and text.endswith(b"/") else text

    def _refresh_paths(self) -> None:
        """The paths of the model, with and without its present version."""
        for path in [p for p in self._fixed if p.startswith(self._model_path)]:
            del self._fixed[path]
        version = self.model.lane.version.encode()
        for base in (self._model_path, self._model_path + b"/versions/" + version):
            self._fixed[base] = (b"GET", "metadata", self._model_metadata)
            self._fixed[base + b"/ready"] = (b"GET", "health", self._ready)
            self._fixed[base + b"/infer"] = (b"POST", "infer", self._infer)

    def _server_metadata(self, request: Request) -> None:
        request.answer_json({"name": "hotloop", "version": VERSION, "extensions": EXTENSIONS})

    def _model_metadata(self, request: Request) -> None:
        request.answer_json(self.model.metadata())

    def _live(self, request: Request) -> None:
        request.answer_json({"live": True})

    def _ready(self, request: Request) -> None:
        if self.draining:
            raise busy(503, "the server is stopping", 1.0, "stopping")
        request.answer_json({"ready": True})

    def _reload(self, request: Request) -> None:
        if self.options.tokens is None:
            raise Refusal(403, "loading a model over the network needs --token-file")
        if request.body.strip() not in (b"", b"{}"):
            # A client must not choose what is loaded: the path was given when the server started.
            raise Refusal(400, "the model is loaded from its own path; parameters are not taken")

        async def load() -> None:
            try:
                await self.reload()
            except HotloopError:
                request.refuse(
                    Refusal(500, "the model could not be loaded; the one before goes on")
                )
            else:
                request.answer_json({"versions": [self.model.lane.version]})

        task = asyncio.get_running_loop().create_task(load())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reload(self) -> None:
        """Load the model again.

        Raises:
            HotloopError: it could not be; the one before goes on.
        """
        started = time.monotonic()
        try:
            await self.model.load(self.stats, self.log)
        except Exception as error:
            self.stats.reload_failures += 1
            self.model.refuse_mark()
            self.log.error("model not loaded", error=str(error))
            if isinstance(error, HotloopError):
                raise
            raise HotloopError("the model could not be loaded") from error
        self.stats.reloads += 1
        self._refresh_paths()
        lane = self.model.lane
        self.log.info(
            "model loaded", version=lane.version, engine=lane.engine.name,
            seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip

    # --- operations and the page

    def _metrics(self, request: Request) -> None:
        request.answer(200, self.stats.prometheus(self._gauges()), CONTENT_TYPE.encode())

    def _gauges(self) -> list[tuple[str, str, float]]:
        lane, manager = self.model.lane, self.manager
        batcher = lane.batcher
        gauges: list[tuple[str, str, float]] = [
            ("serve_queue_requests", "Requests that wait.", batcher.num_queued),
            ("serve_busy_instances", "Calls of the engine under way.", batcher.busy_instances),
            ("serve_instances", "Calls that may be under way.", batcher.num_instances),
            ("serve_best_batch_rows", "Rows a batch should have.", batcher.best_rows),
            ("serve_arriving_rows_per_second", "Rows asked for.", batcher.rate_per_s),
            ("serve_log_lines_dropped", "Lines nobody read.", self.log.dropped),
        ]
        if manager is not None:
            gauges += [
                ("serve_connections", "Open connections.", len(manager.connections)),
                ("serve_buffered_bytes", "Bodies in memory.", manager.buffered_bytes),
                (
                    "serve_connections_timed_out",
                    "Closed for being slow or idle.",
                    manager.timed_out,
                ),
                ("serve_connections_evicted", "Idle, closed to make room.", manager.evicted),
            ]
        return gauges

    def _stats(self, request: Request) -> None:
        lane, stats = self.model.lane, self.stats
        batcher = lane.batcher
        found = stats.percentiles_s()
        request.answer_json(
            {
                "model": self.model.metadata(),
                "engine": lane.engine.name,
                "precision": lane.engine.precision,
                "uptime_s": round(time.monotonic() - stats.started_s, 1),
                "requests": sum(stats.requests.values()),
                "rows": stats.rows,
                "dropped": dict(stats.dropped),
                "latency_p50_s": found["p50"],
                "latency_p99_s": found["p99"],
                "queue_requests": batcher.num_queued,
                "busy_instances": batcher.busy_instances,
                "num_instances": batcher.num_instances,
                "best_batch_rows": batcher.best_rows,
                "recent_batch_rows": list(stats.recent_rows)[-60:],
                "recent_latency_s": list(stats.recent_latency_s)[-60:],
                "cost_s": batcher.curve.table(),
            }
        )

    def _openapi(self, request: Request) -> None:
        request.answer(200, orjson.dumps(self._openapi_document()), JSON)

    def _docs(self, request: Request) -> None:
        body = docs_page(self._openapi_document())
        request.answer(200, body, b"text/html; charset=utf-8", [_CSP])

    def _openapi_document(self) -> dict[str, Any]:
        return openapi_document(
            self.model.metadata(), tokens=self.options.tokens is not None, limits=self.limits,
            attestation=self.options.attest is not None,
        )  # fmt: skip

    def _page(self, request: Request) -> None:
        content_type, body = self._assets[request.path]
        request.answer(200, body, content_type, [_CSP, (b"referrer-policy", b"no-referrer")])


def _header_timeout_s(request: Request) -> float:
    """``X-Request-Timeout-Ms``, in seconds."""
    text = request.headers.get(b"x-request-timeout-ms")
    if text is None:
        return float("inf")
    if not (text.isdigit() and len(text) < 12) or int(text) == 0:
        raise Refusal(400, "X-Request-Timeout-Ms must be a number of milliseconds above 0")
    return int(text) / 1000
