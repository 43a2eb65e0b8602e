"""``hotloop serve``: a model behind HTTP."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, MissingExtraError
from ..files import unicode_name
from ..sealed import SUFFIX, Sealed, key_file_from_flags, read_key
from .enclave_keys import KINDS, add_source_options, source_of

if TYPE_CHECKING:
    from ..infer import Engine
    from ..serve import Log, Server
    from ..serve.message import Request

NAME = "serve"
_INTERRUPTED = 130


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="serve a model over HTTP (Open Inference Protocol v2)",
        description="Serve an exported model with adaptive batches, until SIGTERM or Ctrl-C. "
        "Loopback alone, unless --host says otherwise.",
    )
    parser.add_argument(
        "model", type=str, metavar="MODEL",
        help="a folder of hotloop export, or an .onnx, .xml, .pt2 or .safetensors file",
    )  # fmt: skip
    add = parser.add_argument
    add("--name", help="in the protocol's paths (default: the file's or folder's name)")
    add("--factory", metavar="MODULE:FUNCTION", help="makes the module of a .safetensors file")
    key_file_from_flags(parser)
    add("--json", action="store_true", help="print the address as JSON once it serves")

    group = parser.add_argument_group("network")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    add("--token-file", type=Path, metavar="FILE", help="tokens, one a line; clients send one")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    add("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    add("--insecure", action="store_true", help="another host without TLS and token is meant")
    add("--allowed-host", action="append", default=[], metavar="NAME",
        help="a name in Host that is served too; on loopback others are refused")  # fmt: skip

    group = parser.add_argument_group("attestation (docs/attestation.md)")
    add = group.add_argument
    add("--attest", choices=KINDS,
        help="prove to clients what runs here, and that the TLS key is its own")  # fmt: skip
    add_source_options(add)

    group = parser.add_argument_group("batches and load")
    add = group.add_argument
    add("--max-latency-ms", type=float, default=20.0, metavar="MS",
        help="what 99 of 100 answers should keep (default: 20)")  # fmt: skip
    add("--max-batch", type=int, default=64, metavar="N",
        help="rows of a call put together from several requests (default: 64)")  # fmt: skip
    add("--max-queue", type=int, default=1024, metavar="N",
        help="requests that may wait; more are refused with 429 (default: 1024)")  # fmt: skip
    add("--timeout-ms", type=float, default=10_000.0, metavar="MS",
        help="deadline of requests that bring none (default: 10000)")  # fmt: skip
    add("--num-instances", type=int, metavar="N", help="calls at the same time (as exported)")
    add("--num-threads", type=int, metavar="N", help="threads in each call (as exported)")
    add("--affinity", default="compact", metavar="KIND",
        help="CPUs of instances: none, compact, spread or a list (compact)")  # fmt: skip

    group = parser.add_argument_group("limits and operation")
    add = group.add_argument
    add("--max-body-mb", type=float, default=64.0, metavar="MB", help="of one body (default: 64)")
    add("--max-connections", type=int, default=16_384, metavar="N", help="(default: 16384)")
    add("--header-timeout-s", type=float, default=10.0, metavar="S", help="(default: 10)")
    add("--body-timeout-s", type=float, default=30.0, metavar="S", help="(default: 30)")
    add("--idle-timeout-s", type=float, default=60.0, metavar="S", help="(default: 60)")
    add("--drain-s", type=float, default=30.0, metavar="S",
        help="for what was accepted, once it is to stop (default: 30)")  # fmt: skip
    add("--watch", action="store_true", help="load the model again when its files are replaced")
    add("--log-requests", action="store_true", help="one line of JSON for each request on stderr")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve; returns the exit code."""
    _check(args)
    try:
        import httptools  # noqa: F401
        import orjson  # noqa: F401
        import uvloop  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("hotloop serve", str(error.name), "serve") from None
    from ..infer import load_engine
    from ..serve import (
        AppOptions,
        BatchOptions,
        Limits,
        Log,
        Model,
        Server,
        ServerOptions,
        Tokens,
        check_exposure,
        is_loopback,
        run_server,
        tls_context,
    )

    tokens = Tokens(args.token_file) if args.token_file else None
    tls = tls_context(args.tls_cert, args.tls_key) if args.tls_cert else None
    check_exposure(args.host, tls=tls is not None, tokens=tokens is not None,
                   insecure=args.insecure)  # fmt: skip
    hosts = None
    if is_loopback(args.host) and tokens is None:
        names = ["localhost", "127.0.0.1", "[::1]", args.host, *args.allowed_host]
        hosts = frozenset(name.lower().encode() for name in names)
    log = Log()
    limits = Limits(
        max_body_bytes=int(args.max_body_mb * 1e6),
        max_connections=args.max_connections,
        header_timeout_s=args.header_timeout_s,
        body_timeout_s=args.body_timeout_s,
        idle_timeout_s=args.idle_timeout_s,
    )
    path = Path(args.model)
    key = read_key(args.key_file) if args.key_file else None
    model = Model(
        unicode_name(args.name or Path(path.resolve().name.removesuffix(SUFFIX)).stem),
        lambda: load_engine(
            # Anew at each load: a place reads once what its folder holds.
            args.model if key is None else Sealed(path, key),
            num_threads=args.num_threads, num_instances=args.num_instances,
            # A thread that spins takes its CPU from the event loop: a fifth of the server's time.
            spinning=False, factory=args.factory,
        ),
        path=path,
        options=BatchOptions(
            max_batch=args.max_batch, target_s=args.max_latency_ms / 1000, max_queue=args.max_queue
        ),
        place=lambda engine: _place(engine, args.affinity),
    )  # fmt: skip
    options = ServerOptions(
        host=args.host, port=args.port, tls=tls, drain_s=args.drain_s,
        watch_s=1.0 if args.watch else 0.0,
        app=AppOptions(
            tokens=tokens, allowed_hosts=hosts, default_timeout_s=args.timeout_ms / 1000,
            log_requests=args.log_requests, attest=_attest(args, log) if args.attest else None,
        ),
        limits=limits,
    )  # fmt: skip
    server = Server(model, options, log)

    def ready(server: Server) -> None:
        if not is_loopback(args.host) and tokens is None:
            log.warn("anyone who reaches this address is served", host=args.host)
        _tell(server, as_json=args.json)

    try:
        finished = run_server(server, ready)
    finally:
        log.close()
    if server.stopped_by == signal.SIGINT:
        return _INTERRUPTED
    return 0 if finished else 1


def _check(args: argparse.Namespace) -> None:
    for flag in ("max_latency_ms", "max_batch", "max_queue", "timeout_ms", "max_body_mb",
                 "max_connections", "header_timeout_s", "body_timeout_s", "idle_timeout_s",
                 "num_instances", "num_threads"):  # fmt: skip
        value = getattr(args, flag)
        if value is not None and not value > 0:
            raise InputError(f"--{flag.replace('_', '-')} must be above 0", got=value)
    if not args.drain_s >= 0:
        raise InputError("--drain-s must be at least 0", got=args.drain_s)
    if not 0 <= args.port < 65536:
        raise InputError("--port must be from 0 to 65535", got=args.port)
    if (args.tls_cert is None) != (args.tls_key is None):
        raise InputError("--tls-cert and --tls-key go together", next_step="give both")
    if args.attest and args.tls_cert is None:
        raise InputError("--attest needs --tls-cert and --tls-key: evidence is for the TLS key")


def _attest(args: argparse.Namespace, log: Log) -> Callable[[Request], None]:
    from ..serve.attesting import Attester

    return Attester(source_of(args.attest, args), args.tls_cert, log).answer


def _place(engine: Engine, affinity: str) -> Sequence[Sequence[int]]:
    """As many CPUs for each instance as it has threads, if one is left for the event loop.

    Where none is, a pinned instance waits behind the loop while another CPU is free: small, two
    instances on two CPUs, 64 connections: 20,400 requests a second pinned, 27,300 not.
    """
    from ..machine import Machine, ThreadAffinity

    kind = ThreadAffinity.parse(affinity)
    machine = Machine.probe()
    wanted = engine.num_instances * engine.num_threads
    if engine.num_instances == 1 or (kind.kind != "list" and wanted >= machine.usable_cpus):
        return ()
    cpus = kind.cpus(machine, wanted, knob="num_instances")
    step = engine.num_threads
    return [cpus[i * step : (i + 1) * step] for i in range(engine.num_instances)] if cpus else ()


def _tell(server: Server, *, as_json: bool) -> None:
    if as_json:
        lane = server.model.lane
        document = {
            "address": server.address, "name": server.model.name, "engine": lane.engine.name,
            "num_instances": lane.engine.num_instances,
        }  # fmt: skip
        print(json.dumps(document), flush=True)
    else:
        print(f"serving {server.model.name} at {server.address} (Ctrl-C stops)", flush=True)
