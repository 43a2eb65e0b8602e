"""What the load generator owes to itself is not counted as the server's."""

import select
import socket
import sys
import time

import pytest

pytest.importorskip("httptools")

from hotloop.bench.load import _Connection, _State


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells")
@pytest.mark.parametrize("stamped", [True, False])
def test_a_connection_that_stood_was_late_by_the_generator(stamped):
    with socket.create_server(("127.0.0.1", 0)) as listener, select.epoll() as epoll:
        state = _State([b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], epoll, 5.0, stamped)
        connection = _Connection(state, listener.getsockname(), socket.AF_INET)
        asked = time.perf_counter()
        connection.ask(asked, asked)
        time.sleep(0.2)  # It stands at once; this process is busy elsewhere.
        connection.on_event(select.EPOLLOUT)
        held = connection.sent - asked
        taken = time.perf_counter() - asked
        assert 0.15 < held <= taken if stamped else held == 0.0
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(100).startswith(b"GET / ")
        connection.close()
