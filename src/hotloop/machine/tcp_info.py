"""When something last came on a TCP connection, by the kernel's clock (Linux ``TCP_INFO``)."""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any

# Places in ``struct tcp_info`` of milliseconds since then.
LAST_DATA_RECEIVED, LAST_ACK_RECEIVED = 52, 56
# What they may be off by: a tick of the kernel's slowest clock.
TICK_S = 0.004
_BYTES, _MILLISECONDS = 60, struct.Struct("=I")


def since_s(sock: Any, place: int) -> float | None:
    """Seconds since something last came, up to ``TICK_S`` off; ``None``: the kernel does not tell.

    Args:
        sock: a socket, or what stands for one (``Transport.get_extra_info("socket")``).
        place: ``LAST_DATA_RECEIVED`` or ``LAST_ACK_RECEIVED``.
    """
    if sys.platform != "linux" or sock is None:
        return None
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
        return float(_MILLISECONDS.unpack_from(info, place)[0] / 1000)
    except (OSError, AttributeError, struct.error):
        return None
