"""Batches, queue, deadlines, clients that go, drain and swap, on an engine that can be held."""

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.serve import AppOptions, BatchOptions
from hotloop.serve.cost import CostCurve
from support import examples, serving
from support.serving import Doubler, Running, request_bytes, tensor

BODY = json.dumps(tensor([[1, 2, 3, 4]])).encode()
INFER = "/v2/models/m/infer"


def held(served, engine, count, *, body=BODY, headers=()):
    """Clients whose requests wait: the engine is stopped, one request in each of its instances."""
    engine.go.clear()
    batcher = served.server.model.lane.batcher
    clients = []
    for at in range(count):
        client = served.connect()
        client.send(request_bytes("POST", INFER, body, headers))
        clients.append(client)
        if at < engine.num_instances:
            served.until(lambda at=at: batcher.busy_instances == at + 1)
        else:
            served.until(lambda at=at: batcher.num_queued == at + 1 - engine.num_instances)
    return clients


def test_requests_that_wait_are_run_together_and_each_gets_its_own():
    engine = Doubler(num_instances=1)
    with Running(engine, batch=BatchOptions(target_s=10)) as served:
        engine.go.clear()
        blocker = served.connect()
        blocker.send(request_bytes("POST", INFER, BODY))
        batcher = served.server.model.lane.batcher
        served.until(lambda: batcher.busy_instances == 1)
        sizes = [1, 3, 2, 5, 1, 7, 4]
        clients = []
        for n, rows in enumerate(sizes):
            client = served.connect()
            body, headers = serving.binary(np.full((rows, 4), n, np.float32))
            client.send(request_bytes("POST", INFER, body, headers))
            clients.append(client)
            served.until(lambda n=n: batcher.num_queued == n + 1)
        before = len(engine.rows)
        engine.go.set()
        for n, (rows, client) in enumerate(zip(sizes, clients, strict=True)):
            status, _, answer = client.answer()
            out = json.loads(answer)["outputs"][0]
            assert (status, out["shape"]) == (200, [rows, 4])
            assert out["data"] == [2.0 * n] * (4 * rows)
            client.socket.close()
        assert blocker.answer()[0] == 200
        blocker.socket.close()
        assert sum(engine.rows[before:]) == 1 + sum(sizes)
        assert max(engine.rows[before:]) > max(sizes)


def test_one_bad_input_fails_alone():
    engine = Doubler(num_instances=1)
    with Running(engine, batch=BatchOptions(target_s=10)) as served:
        clients = held(served, engine, 4)
        bad = served.connect()
        bad.send(request_bytes("POST", INFER, json.dumps(tensor([[-1, 0, 0, 0]])).encode()))
        served.until(lambda: served.server.model.lane.batcher.num_queued == 4)
        engine.go.set()
        assert [client.answer()[0] for client in clients] == [200] * 4
        assert bad.answer()[0] == 500
        for client in (*clients, bad):
            client.socket.close()
        served.still_serves()


def test_a_full_queue_is_refused_with_a_time_to_come_back():
    engine = Doubler(num_instances=1)
    with Running(engine, batch=BatchOptions(max_queue=3)) as served:
        clients = held(served, engine, 4)
        for _ in range(5):
            status, headers, body = served.ask("POST", INFER, BODY)
            assert status == 429
            assert int(headers[b"retry-after"]) >= 1
            assert json.loads(body) == {"error": "the queue is full"}
        assert served.ask("GET", "/v2/health/ready")[0] == 200
        engine.go.set()
        assert [client.answer()[0] for client in clients] == [200] * 4
        served.still_serves()
        text = served.ask("GET", "/metrics")[2].decode()
        assert 'hotloop_serve_dropped_total{reason="queue full"} 5' in text
        for client in clients:
            client.socket.close()


@pytest.mark.parametrize("how", ["parameter", "header", "default"])
def test_a_request_whose_deadline_passes_is_not_run(how):
    engine = Doubler(num_instances=1)
    app = AppOptions(default_timeout_s=0.3 if how == "default" else 60)
    with Running(engine, app=app) as served:
        blocker = held(served, engine, 1, headers=[])
        late = served.connect()
        document = tensor([[9, 9, 9, 9]])
        headers = [("X-Request-Timeout-Ms", "300")] if how == "header" else []
        if how == "parameter":
            document["parameters"] = {"timeout": 300_000}
        late.send(request_bytes("POST", INFER, json.dumps(document).encode(), headers))
        served.until(lambda: served.server.model.lane.batcher.num_queued == 1)
        time.sleep(0.4)
        ran = len(engine.rows)
        engine.go.set()
        assert late.answer()[0] == 504
        assert blocker[0].answer()[0] == (504 if how == "default" else 200)
        assert len(engine.rows) == ran + 1
        late.socket.close()
        blocker[0].socket.close()


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(monkeypatch):
    # However long this test is kept waiting, the estimate is not put to the test.
    monkeypatch.setattr("hotloop.serve.batcher._PROBE_S", math.inf)
    engine = Doubler(num_instances=1, wait_s=0.05)
    with Running(engine) as served:
        for timeout_ms in (1, 20):
            headers = [("X-Request-Timeout-Ms", str(timeout_ms))]
            status, got, _ = served.ask("POST", INFER, BODY, headers)
            assert (status, int(got[b"retry-after"])) == (429, 1)
        assert served.ask("POST", INFER, BODY, [("X-Request-Timeout-Ms", "5000")])[0] == 200


def test_a_client_that_goes_is_dropped_before_it_is_run():
    engine = Doubler(num_instances=1)
    with Running(engine) as served:
        first, *others = held(served, engine, 6)
        for client in others:
            client.socket.close()
        batcher = served.server.model.lane.batcher
        served.until(lambda: batcher.num_queued == 0)
        assert served.server.stats.dropped["client gone"] == 5
        ran = len(engine.rows)
        engine.go.set()
        assert first.answer()[0] == 200
        first.socket.close()
        served.still_serves()
        assert len(engine.rows) == ran + 2


def test_drain_answers_what_was_accepted_and_refuses_the_rest():
    engine = Doubler(num_instances=1)
    with Running(engine) as served:
        waiting = held(served, engine, 5)
        late = served.connect()
        late.send(request_bytes("POST", INFER, BODY)[:-5])  # Its body is not whole yet.
        fresh = served.connect()
        served.until(lambda: served.ask("GET", "/v2")[0] == 200)
        served.stop(wait=False)
        assert fresh.is_closed()
        late.send(BODY[-5:])
        status, headers, _ = late.answer()
        assert status == 503
        assert headers[b"connection"] == b"close"
        engine.go.set()
        for client in waiting:
            status, headers, _ = client.answer()
            assert (status, headers[b"connection"]) == (200, b"close")
            client.socket.close()
        served.stop()
        assert served.finished is True
        assert engine.closed
        for client in (late, fresh):
            client.socket.close()


def test_a_drain_that_takes_too_long_says_so():
    engine = Doubler(num_instances=1)
    with Running(engine, drain_s=0.3) as served:
        running, queued = held(served, engine, 2)
        served.stop(wait=False)
        status, _, _ = queued.answer()
        assert status == 503
        served.stop()
        assert served.finished is False
        engine.go.set()
        for client in (running, queued):
            client.socket.close()


def test_a_swap_drops_no_request():
    engines = []

    def load():
        engines.append(Doubler(wait_s=0.001, version=100 * len(engines)))
        return engines[-1]

    with Running(load) as served:
        stop = threading.Event()

        def client(n):
            seen = []
            with served.connect() as connection:
                while not stop.is_set():
                    connection.send(request_bytes("POST", INFER, BODY))
                    status, _, body = connection.answer()
                    assert status == 200, body
                    answer = json.loads(body)
                    version = int(answer["model_version"])
                    added = 100 * (version - 1)
                    want = [2 + added, 4 + added, 6 + added, 8 + added]
                    assert answer["outputs"][0]["data"] == want
                    seen.append(version)
            assert seen == sorted(seen)
            return seen

        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(client, n) for n in range(8)]
            for number in range(2, 6):
                loaded = served.loop.call_soon_threadsafe
                done = threading.Event()

                async def reload(done=done):
                    await served.server.model.load(served.server.stats, served.log)
                    done.set()

                loaded(lambda reload=reload: served.loop.create_task(reload()))
                assert done.wait(20)
                assert served.server.model.lane.version == str(number)
                time.sleep(0.05)
            stop.set()
            seen = [future.result() for future in futures]
        assert {version for each in seen for version in each} == {1, 2, 3, 4, 5}
        served.until(lambda: all(engine.closed for engine in engines[:-1]))
        assert not engines[-1].closed


def test_a_folder_that_is_replaced_is_loaded_and_a_broken_one_is_not(tmp_path):
    folder = tmp_path / "model"

    def put(number):
        fresh = tmp_path / f"fresh{number}"
        fresh.mkdir()
        (fresh / "version").write_text(str(number))
        if folder.exists():
            folder.rename(tmp_path / f"old{number}")
        fresh.rename(folder)

    def load():
        text = (folder / "version").read_text()
        return Doubler(version=int(text))

    put(0)
    with Running(load, path=folder, watch_s=0.05) as served:
        served.still_serves()
        put(1)
        served.until(lambda: served.server.model.lane.version == "2")
        assert served.infer(tensor([[1, 1, 1, 1]]))[1]["outputs"][0]["data"] == [3] * 4
        put(2)
        (folder / "version").write_text("broken")
        served.until(lambda: served.server.stats.reload_failures >= 1)
        status, answer = served.infer(tensor([[1, 1, 1, 1]]))
        assert (status, answer["outputs"][0]["shape"]) == (200, [1, 4])
        failures = served.server.stats.reload_failures
        time.sleep(0.3)
        assert served.server.stats.reload_failures <= failures + 1  # Not tried for ever.


def test_rows_of_different_lengths_are_not_mixed():
    engine = Doubler(fixed=(None, None), num_instances=1)
    with Running(engine, batch=BatchOptions(target_s=10)) as served:

        def body(rows, width, value):
            return serving.binary(np.full((rows, width), value, np.float32))

        engine.go.clear()
        clients = []
        for n in range(9):
            width = 3 + n % 3
            sent, headers = body(1 + n % 2, width, n)
            client = served.connect()
            client.send(request_bytes("POST", INFER, sent, headers))
            clients.append((client, 1 + n % 2, width, n))
        served.until(lambda: served.server.model.lane.batcher.num_queued == 8)
        engine.go.set()
        for client, rows, width, n in clients:
            status, _, answer = client.answer()
            out = json.loads(answer)["outputs"][0]
            assert (status, out["shape"], out["data"]) == (
                200,
                [rows, width],
                [2.0 * n] * (rows * width),
            )
            client.socket.close()


# --- the cost curve


@given(
    fixed=st.floats(1e-5, 1e-2), per_row=st.floats(1e-6, 1e-3),
    sizes=st.lists(st.integers(1, 64), min_size=30, max_size=80),
)  # fmt: skip
@settings(max_examples=examples(60))
def test_the_curve_learns_a_line(fixed, per_row, sizes):
    curve = CostCurve(64)
    for at, rows in enumerate([*range(1, 65), *sizes]):
        curve.add(rows, fixed + per_row * rows, 0.1 * at)
    for rows in (1, 8, 32, 64):
        true = fixed + per_row * rows
        assert 0.6 * true < curve.cost_s(rows) < 1.6 * true
    costs = [curve.cost_s(rows) for rows in range(1, 65)]
    assert costs == sorted(costs)


def test_the_curve_forgets():
    curve = CostCurve(64)
    for at in range(200):
        curve.add(32, 0.01, 0.01 * at)
    assert curve.cost_s(32) == pytest.approx(0.01, rel=0.05)
    for at in range(60):
        curve.add(32, 0.03, 3 + 0.01 * at)
    assert curve.cost_s(32) == pytest.approx(0.03, rel=0.1)
    # A size that was slow once is tried again after it has not been seen for long.
    curve = CostCurve(64)
    curve.anchor(1, 0.001)
    curve.anchor(64, 0.004)
    curve.add(64, 0.4, 0.0)
    assert curve.best_rows(0.05) < 64
    for at in range(500):
        curve.add(16, 0.0018, 0.5 * at)
    assert curve.cost_s(64) < 0.02


def test_the_best_batch_keeps_the_target_and_is_no_larger_than_it_pays():
    curve = CostCurve(64)
    for rows in curve.sizes:
        for at in range(20):
            curve.add(rows, 0.001 + 0.001 * rows, 0.01 * at)
    assert curve.best_rows(0.001) == 1
    assert 4 <= curve.best_rows(0.03) <= 12
    assert curve.best_rows(1.0) >= 24
    # Rows that arrive faster than small batches can answer them are not made to queue.
    assert curve.best_rows(0.03, rate_per_s=500) <= 12
    assert curve.best_rows(0.03, rate_per_s=950) >= 24
    assert curve.best_rows(0.03, rate_per_s=950, num_instances=2) <= 12
    flat = CostCurve(64)
    for rows in flat.sizes:
        flat.add(rows, 0.001 * rows, 0.0)
    assert flat.best_rows(1.0) <= 4
    assert CostCurve(1).best_rows(0.0) == 1


@given(
    rate=st.floats(0, 1e7), num_instances=st.integers(1, 8), limit=st.integers(1, 64),
)  # fmt: skip
def test_the_size_that_sustains_a_rate_is_within_the_limit(rate, num_instances, limit):
    curve = CostCurve(64)
    curve.anchor(1, 0.001)
    curve.anchor(64, 0.003)
    size = curve.smallest_sustaining(rate, num_instances, limit)
    assert 1 <= size <= limit
    if size < limit:
        assert rate * curve.cost_s(size) <= 0.8 * size * num_instances
