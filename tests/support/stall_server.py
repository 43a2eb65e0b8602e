"""A small HTTP server for the tests of the load generator: one connection, one thread."""

import contextlib
import socket
import threading
import time


class SmallServer:
    """Answers each request by a rule: ``rule(number) -> (status, seconds before the answer)``.

    Requests are answered one after the other, whatever connection they came on: while one is
    slow, all wait, as behind one busy engine. A status of None closes without an answer; -1 never
    answers.
    """

    def __init__(self, rule):
        self.rule = rule
        self.bodies = []
        self.connections = 0
        self._lock = threading.Lock()
        self._count = 0
        self._open = []
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # A thread that waits in accept or recv keeps a socket that is only closed.
        for one in [self._socket, *self._open]:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        data = b""
        while True:
            try:
                while b"\r\n\r\n" not in data:
                    more = connection.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.split(b"\r\n")
                    if line.lower().startswith(b"content-length")
                )
                while len(data) < length:
                    data += connection.recv(65536)
                body, data = data[:length], data[length:]
                with self._lock:
                    number = self._count
                    self._count += 1
                    self.bodies.append((head, body))
                    status, seconds = self.rule(number)
                    time.sleep(seconds)
                if status is None:
                    connection.close()
                    return
                if status != -1:
                    connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok" % status)
            except (OSError, StopIteration):
                return
