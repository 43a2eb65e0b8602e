"""A server in a thread, an engine whose answers are known, and a client that sends any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
import time

import numpy as np
import uvloop

from hotloop.infer import TensorSpec
from hotloop.serve import (
    AppOptions,
    BatchOptions,
    Limits,
    Log,
    Model,
    Server,
    ServerOptions,
)


class Doubler:
    """Twice the input, plus the number of the version; fails on a row that begins with -1."""

    name = "doubler"
    precision = "float32"

    def __init__(
        self, *, width=4, num_instances=2, wait_s=0.0, version=0, dtype="float32", fixed=None
    ):
        shape = fixed or (None, width)
        self.inputs = (TensorSpec("x", dtype, shape),)
        self.outputs = (TensorSpec("y", dtype, shape),)
        self.num_threads = 1
        self.num_instances = num_instances
        self.wait_s = wait_s
        self.version = version
        self.closed = False
        self.rows = []
        self.go = threading.Event()
        self.go.set()

    def run(self, arrays):
        assert not self.closed
        (x,) = arrays
        assert x.flags.carray
        self.go.wait(20)
        if self.wait_s:
            time.sleep(self.wait_s)
        self.rows.append(len(x))
        if x.dtype == np.float32 and (x.reshape(len(x), -1)[:, 0] == -1).any():
            raise ValueError("secret /path/of/the/server")
        return [x * 2 + np.asarray(self.version, dtype=x.dtype)]

    def close(self):
        self.closed = True


class Running:
    """A server in a thread of its own; a context manager."""

    def __init__(self, load, *, limits=None, app=None, batch=None, path=None, name="m", **options):
        self.log_text = io.StringIO()
        self.log = Log(self.log_text)
        if not callable(load):
            engine = load
            self.model_load = lambda: engine
        else:
            self.model_load = load
        self.options = ServerOptions(
            port=0, limits=limits or Limits(), app=app or AppOptions(), **options
        )
        self.batch = batch or BatchOptions()
        self.path, self.name = path, name
        self.finished = None
        self._ready = threading.Event()
        self._error = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        async def main():
            model = Model(self.name, self.model_load, path=self.path, options=self.batch)
            self.server = Server(model, self.options, self.log)
            self.loop = asyncio.get_running_loop()
            return await self.server.run(lambda _: self._ready.set(), signals=False)

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                self.finished = runner.run(main())
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(30)
        if self._error:
            raise self._error
        self.address = self.server.address
        self.port = int(self.address.rpartition(":")[2])
        return self

    def __exit__(self, *_):
        self.stop()
        self.log.close()

    def stop(self, *, wait=True):
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.server.stop)
        if wait:
            self._thread.join(30)
            assert not self._thread.is_alive()

    # --- clients

    def connect(self, timeout_s=20.0):
        return Client(self.port, timeout_s)

    def ask(self, method, path, body=b"", headers=()):
        """Status, headers and body of one request on a connection of its own."""
        with self.connect() as client:
            client.send(request_bytes(method, path, body, headers))
            return client.answer()

    def infer(self, document, headers=()):
        status, _, body = self.ask(
            "POST", "/v2/models/m/infer", json.dumps(document).encode(), headers
        )
        return status, json.loads(body)

    def still_serves(self):
        status, answer = self.infer(tensor([[1, 2, 3, 4]]))
        assert status == 200, answer
        assert answer["outputs"][0]["data"] == [2, 4, 6, 8]

    def until(self, true, timeout_s=20.0):
        ends_at = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < ends_at, "it did not happen"
            time.sleep(0.005)


class Client:
    """A socket, and answers read from it by their length."""

    def __init__(self, port, timeout_s=20.0):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self.unread = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def answer(self, *, head=False):
        """Status, headers and body; raises EOFError if the server closed without one."""
        while b"\r\n\r\n" not in self.unread:
            self._more()
        top, _, self.unread = self.unread.partition(b"\r\n\r\n")
        first, *lines = top.split(b"\r\n")
        headers = dict(line.lower().split(b": ", 1) for line in lines)
        length = 0 if head else int(headers.get(b"content-length", 0))
        while len(self.unread) < length:
            self._more()
        body, self.unread = self.unread[:length], self.unread[length:]
        return int(first.split()[1]), headers, body

    def is_closed(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def _more(self):
        data = self.socket.recv(65536)
        if not data:
            raise EOFError
        self.unread += data


def request_bytes(method, path, body=b"", headers=()):
    """A request of HTTP/1.1 with its length."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in headers)]
    if body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def tensor(rows, *, datatype="FP32", shape=None, **more):
    """An infer request with one tensor as JSON."""
    shape = list(np.shape(rows)) if shape is None else shape
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": rows}], **more}


def binary(array, **more):
    """Body and header of an infer request with one binary tensor."""
    types = {"float32": "FP32", "int64": "INT64", "bool": "BOOL", "uint8": "UINT8"}
    entry = {
        "name": "x", "datatype": types[str(array.dtype)], "shape": list(array.shape),
        "parameters": {"binary_data_size": array.nbytes},
    }  # fmt: skip
    top = json.dumps({"inputs": [entry], **more}).encode()
    return top + array.tobytes(), [("Inference-Header-Content-Length", len(top))]
