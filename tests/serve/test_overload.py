"""More than can be answered: who is refused when, what a deadline counts from, places set free."""

import asyncio
import gc
import json
import math
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hotloop.serve import BatchOptions, Limits
from hotloop.serve.connection import Connection
from hotloop.serve.connection_manager import ConnectionManager
from hotloop.serve.message import Request
from hotloop.serve.work import Work
from support import serving
from support.serving import Doubler, Running, request_bytes, tensor

BODY = json.dumps(tensor([[1, 2, 3, 4]])).encode()
INFER = "/v2/models/m/infer"


def deadline(milliseconds):
    return [("X-Request-Timeout-Ms", str(milliseconds))]


def queue(served, count):
    """Clients with a request each that waits behind those before it."""
    batcher = served.server.model.lane.batcher
    clients = []
    for at in range(count):
        clients.append(served.connect())
        clients[-1].send(request_bytes("POST", INFER, BODY))
        if at == 0:
            served.until(lambda: batcher.busy_instances == 1)
        else:
            served.until(lambda at=at: batcher.num_queued == at)
    return clients


class Clock:
    """A loop whose callbacks are run by hand, and the time."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        self.callbacks = []
        monkeypatch.setattr("hotloop.serve.connection_manager.time.monotonic", lambda: self.now_s)
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def call_soon(self, callback):
        self.callbacks.append(callback)

    def end_turn(self):
        for callback in self.callbacks:
            callback()
        self.callbacks.clear()


def test_bytes_count_from_the_look_before_the_one_that_found_them(monkeypatch):
    clock = Clock(monkeypatch)
    manager = ConnectionManager(Limits(), gate=None, handle=None, on_answer=None)
    assert manager.earliest_arrival_s() == 100.0
    clock.now_s = 100.3  # A long turn: thousands of sockets are read.
    assert manager.earliest_arrival_s() == 100.0
    clock.end_turn()
    clock.now_s = 100.31
    # It may have come as soon as the turn began.
    assert manager.earliest_arrival_s() == pytest.approx(100.01)
    clock.now_s = 100.4
    assert manager.earliest_arrival_s() == pytest.approx(100.01)
    clock.end_turn()
    clock.now_s = 107.0  # The loop has waited for bytes: these have only just come.
    assert manager.earliest_arrival_s() == 107.0
    clock.now_s = 107.5
    clock.end_turn()
    clock.now_s = 107.51
    assert manager.earliest_arrival_s() == pytest.approx(107.01)


def test_what_a_connection_sends_at_once_counts_from_the_look_that_accepted_it(monkeypatch):
    clock = Clock(monkeypatch)
    arrived = []
    manager = ConnectionManager(
        Limits(),
        gate=lambda request: arrived.append(request.arrived_s),
        handle=None,
        on_answer=None,
    )
    connection = Connection(manager)
    clock.now_s = 100.3  # Thousands more were accepted meanwhile, and no byte was read.
    clock.end_turn()
    clock.now_s = 100.31
    connection._feed(memoryview(b"POST /v2 HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n"))
    assert arrived == [100.0]
    clock.end_turn()


def test_what_waited_for_a_busy_loop_has_used_its_deadline():
    with Running(Doubler(num_instances=1)) as served:
        served.still_serves()
        app = served.server.app
        handle = app.handle

        def slow(request):
            handle(request)
            if request.path == b"/v2":
                time.sleep(0.6)

        app.manager.handle = slow
        with served.connect() as first, served.connect() as late:
            late.send(request_bytes("GET", "/v2/health/live"))
            assert late.answer()[0] == 200
            first.send(request_bytes("GET", "/v2"))
            time.sleep(0.2)  # The loop has found the first request and sleeps in it.
            late.send(request_bytes("POST", INFER, BODY, deadline(250)))
            assert first.answer()[0] == 200
            status, headers, _ = late.answer()
            assert (status, headers[b"retry-after"]) == (429, b"1")
        served.still_serves()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells")
def test_what_waited_in_the_listen_queue_has_used_its_deadline():
    """The loop stands still between two looks, so that its own clock says nothing."""
    with Running(Doubler(num_instances=1)) as served:
        served.still_serves()
        time.sleep(0.1)  # The last look is long past.
        stalled = threading.Event()

        def stall():
            stalled.set()
            time.sleep(0.7)

        served.loop.call_soon_threadsafe(stall)
        assert stalled.wait(5)
        with served.connect() as late, served.connect() as patient:
            late.send(request_bytes("POST", INFER, BODY, deadline(500)))
            patient.send(request_bytes("POST", INFER, BODY, deadline(30_000)))
            assert late.answer()[0] == 429
            assert patient.answer()[0] == 200
        served.still_serves()


def test_where_the_kernel_does_not_tell_the_estimate_holds(monkeypatch):
    clock = Clock(monkeypatch)
    manager = ConnectionManager(Limits(), gate=None, handle=None, on_answer=None)

    class Transport:
        def get_extra_info(self, name):
            return self

        def getsockopt(self, *args):
            raise OSError

    class Silent:
        def get_extra_info(self, name):
            return None

    for transport in (None, Transport(), Silent()):
        assert manager.arrival_s(transport, 99.0, is_first=True) == 99.0
    manager.earliest_arrival_s()
    clock.end_turn()
    manager.earliest_arrival_s()
    clock.now_s = 100.001  # Looks in quick succession need no one else's clock.

    class Told(Transport):
        def getsockopt(self, *args):
            return (0).to_bytes(52, "little") + (2_000).to_bytes(4, "little")

    assert manager.arrival_s(Told(), 99.5, is_first=False) == 99.5
    assert manager.arrival_s(Told(), 99.5, is_first=True) == pytest.approx(98.001, abs=0.005)
    clock.now_s = 101.0
    assert manager.arrival_s(Told(), 99.5, is_first=False) == pytest.approx(99.0, abs=0.005)


def test_an_estimate_may_not_fill_the_whole_deadline():
    with Running(Doubler(num_instances=1)) as served:
        batcher = served.server.model.lane.batcher
        with batcher._lock:
            batcher.curve._tail = 1.0
            for at in range(50):
                batcher.curve.add(1, 2.8, time.monotonic() + 0.001 * at)
            batcher._idle_since_s = time.monotonic() + 60
        assert served.ask("POST", INFER, BODY, deadline(3000))[0] == 429
        assert served.ask("POST", INFER, BODY, deadline(4000))[0] == 200


def test_a_client_that_goes_leaves_its_place():
    engine = Doubler(num_instances=1)
    with Running(engine, batch=BatchOptions(max_queue=3)) as served:
        engine.go.clear()
        clients = queue(served, 4)
        batcher = served.server.model.lane.batcher
        assert served.ask("POST", INFER, BODY)[0] == 429
        for client in clients[1:3]:
            client.socket.close()
        served.until(lambda: batcher.num_queued == 1)
        more = [served.connect() for _ in range(2)]
        for at, client in enumerate(more):
            client.send(request_bytes("POST", INFER, BODY))
            served.until(lambda at=at: batcher.num_queued == 2 + at)
        assert served.ask("POST", INFER, BODY)[0] == 429
        engine.go.set()
        for client in (clients[0], clients[3], *more):
            assert client.answer()[0] == 200
            client.socket.close()
        assert batcher.num_queued == 0
        assert batcher._queued_rows == batcher._num_gone == 0


def test_thousands_that_go_do_not_lie_in_the_queue():
    engine = Doubler(num_instances=1)
    with Running(engine) as served:
        engine.go.clear()
        batcher = served.server.model.lane.batcher
        (first,) = queue(served, 1)
        for _ in range(12):
            clients = [served.connect() for _ in range(40)]
            for client in clients:
                client.send(request_bytes("POST", INFER, BODY))
            served.until(lambda: batcher.num_queued == 40)
            for client in clients:
                client.socket.close()
            served.until(lambda: batcher.num_queued == 0)
        assert len(batcher._queue) < 100
        engine.go.set()
        assert first.answer()[0] == 200
        first.socket.close()
        served.still_serves()


def test_what_cannot_be_answered_in_time_is_refused_before_its_body(monkeypatch):
    monkeypatch.setattr("hotloop.serve.batcher._PROBE_S", math.inf)
    engine = Doubler(num_instances=1, wait_s=0.05)
    with Running(engine) as served, served.connect() as client:
        head = request_bytes("POST", INFER, BODY, [*deadline(5), ("Expect", "100-continue")])
        client.send(head[: -len(BODY)])
        status, headers, _ = client.answer()
        assert (status, headers[b"retry-after"]) == (429, b"1")
        assert served.server.stats.dropped["deadline not reachable"] == 1
        assert served.server.app.manager.buffered_bytes == 0


def test_an_engine_that_was_slow_once_is_tried_again():
    engine = Doubler(num_instances=1)
    with Running(engine) as served:
        batcher = served.server.model.lane.batcher
        with batcher._lock:
            for at in range(50):
                batcher.curve.add(1, 5.0, time.monotonic() + 0.001 * at)
            batcher._idle_since_s = time.monotonic() + 60
        ran = len(engine.rows)
        assert served.ask("POST", INFER, BODY, deadline(3000))[0] == 429
        assert len(engine.rows) == ran
        batcher._idle_since_s = time.monotonic() - 2
        assert served.ask("POST", INFER, BODY, deadline(3000))[0] == 200
        assert len(engine.rows) == ran + 1
        assert batcher.curve.cost_s(1) < 5.0
        # One is enough to see; the next is judged by what it showed.
        batcher._idle_since_s = time.monotonic() + 60
        assert served.ask("POST", INFER, BODY, deadline(3000))[0] == 429


def test_a_lag_of_the_loop_is_expected_again_but_not_for_ever(monkeypatch):
    # However long this test is kept waiting, the lag is as it was.
    monkeypatch.setattr("hotloop.serve.batcher._LAG_HALVED_S", 1e6)
    monkeypatch.setattr("hotloop.serve.batcher._PROBE_S", math.inf)
    with Running(Doubler(num_instances=1)) as served:
        batcher = served.server.model.lane.batcher
        with batcher._lock:
            batcher._lag_s, batcher._lag_seen_s = 8.0, time.monotonic()
        assert served.ask("POST", INFER, BODY, deadline(3000))[0] == 429
        monkeypatch.undo()
        batcher._lag_seen_s -= 60
        assert served.ask("POST", INFER, BODY, deadline(3000))[0] == 200


def test_under_overload_every_request_gets_an_answer_and_the_counts_agree():
    engine = Doubler(num_instances=2, wait_s=0.01)
    answers = Counter()
    lock = threading.Lock()

    def client(served, number):
        mine = Counter()
        body, headers = serving.binary(np.full((2, 4), number, np.float32))
        with served.connect() as connection:
            for _ in range(25):
                connection.send(request_bytes("POST", INFER, body, [*headers, *deadline(120)]))
                status, got, answer = connection.answer()
                mine[status] += 1
                if status == 200:
                    document = json.loads(answer)
                    assert document["outputs"][0]["data"] == [2.0 * number] * 8
                elif status == 429:
                    assert int(got[b"retry-after"]) >= 1
        with lock:
            answers.update(mine)

    with Running(engine, batch=BatchOptions(max_batch=4, max_queue=16)) as served:
        with ThreadPoolExecutor(40) as pool:
            for future in [pool.submit(client, served, n) for n in range(40)]:
                future.result()
        stats = served.server.stats
        assert sum(answers.values()) == 40 * 25
        assert set(answers) <= {200, 429, 504}
        assert answers[200]
        assert answers[429]
        assert {code: n for (route, code), n in stats.requests.items() if route == "infer"} == dict(
            answers
        )
        refused = sum(stats.dropped[r] for r in ("queue full", "deadline not reachable"))
        assert (refused, stats.dropped["deadline"]) == (answers[429], answers[504])
        assert served.server.model.lane.batcher.num_queued == 0
        manager = served.server.app.manager
        assert manager.buffered_bytes == manager.unanswered == 0
        served.still_serves()


@pytest.mark.parametrize("pieces", [1, 2, 40, 700])
def test_a_body_in_pieces_is_put_together(pieces):
    rows = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    body, headers = serving.binary(rows)
    with Running(Doubler()) as served, served.connect() as client:
        whole = request_bytes("POST", INFER, body, headers)
        top = len(whole) - len(body)
        client.send(whole[:top])
        step = -(-len(body) // pieces)
        for at in range(0, len(body), step):
            client.send(body[at : at + step])
            if pieces > 1:
                time.sleep(0.001)  # A read of its own for most of them.
        status, _, answer = client.answer()
        assert status == 200
        got = json.loads(answer)["outputs"][0]["data"]
        np.testing.assert_allclose(got, 2 * rows.ravel(), rtol=1e-6)
        assert served.server.app.manager.buffered_bytes == 0


def test_bodies_on_their_way_count_as_waiting_while_they_come_quickly(monkeypatch):
    monkeypatch.setattr("hotloop.serve.batcher._COMING_S", 3.0)
    with Running(Doubler(num_instances=1), batch=BatchOptions(max_queue=3)) as served:
        batcher = served.server.model.lane.batcher
        whole = request_bytes("POST", INFER, BODY)
        clients = [served.connect() for _ in range(3)]
        for at, client in enumerate(clients):
            client.send(whole[:-5])
            served.until(lambda at=at: len(batcher._coming) == at + 1)
        assert served.ask("POST", INFER, BODY)[0] == 429
        clients[0].send(whole[-5:])
        assert clients[0].answer()[0] == 200
        served.still_serves()
        clients[1].socket.close()  # One that goes is no longer waited for,
        served.until(lambda: len(batcher._coming) == 1)
        clients[0].send(b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
                        b"Transfer-Encoding: chunked\r\n\r\nnot a length\r\n")  # fmt: skip
        assert clients[0].answer()[0] == 400  # nor is one that breaks off,
        served.until(lambda: len(batcher._coming) == 1)
        monkeypatch.setattr("hotloop.serve.batcher._COMING_S", 0.0)
        served.still_serves()  # nor one that takes its time.
        assert not batcher._coming
        clients[2].send(whole[-5:])
        assert clients[2].answer()[0] == 200
        for client in clients:
            client.socket.close()


def test_what_is_answered_or_refused_is_free_without_the_collector():
    def alive():
        return sum(isinstance(thing, (Request, Work)) for thing in gc.get_objects())

    engine = Doubler(num_instances=1, wait_s=0.02)
    body = json.dumps(tensor([[1, 2, 3, 4]], parameters={"timeout": 5_000})).encode()
    with Running(engine) as served:
        served.still_serves()
        gc.collect()
        gc.disable()
        try:
            before = alive()
            for _ in range(30):
                assert served.ask("POST", INFER, BODY, deadline(3))[0] == 429  # On its headers,
                assert served.ask("POST", INFER, body)[0] == 429  # with its body,
                assert served.ask("POST", INFER, b"{")[0] == 400  # for what is in it,
                assert served.ask("GET", "/nothing")[0] == 404
            served.still_serves()
            engine.go.clear()
            gone = queue(served, 20)
            engine.go.set()
            for client in gone:
                client.socket.close()
            served.until(lambda: not served.server.app.manager.connections)
            served.until(lambda: not served.server.model.lane.batcher.busy_instances)
            served.still_serves()
            assert alive() - before < 10
        finally:
            gc.enable()
