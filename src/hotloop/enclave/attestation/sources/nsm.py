"""Documents of the Nitro Security Module, ``/dev/nsm``.

The interface: Linux, ``include/uapi/linux/nsm.h``, and AWS, aws-nitro-enclaves-nsm-api: a request
and an answer in CBOR. Written to that; not run on such hardware.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ....errors import InputError, RunError
from .. import cbor

_IOCTL_RAW = 3 << 30 | 32 << 16 | 0x0A << 8  # _IOWR(0x0A, 0, struct nsm_raw)
_RESPONSE_BYTES = 0x3000


class _IoVec(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Raw(ctypes.Structure):
    _fields_ = (("request", _IoVec), ("response", _IoVec))


class NitroModule:
    """The module of this enclave.

    Args:
        device: its file.
        ioctl: the system call; for tests.
    """

    kind = "nitro"

    def __init__(
        self, device: Path = Path("/dev/nsm"), ioctl: Callable[[int, int, Any], Any] = fcntl.ioctl
    ) -> None:
        self._device = device
        self._ioctl = ioctl

    def make(self, nonce: bytes, public_key: bytes) -> bytes:
        """A document with the nonce and the key.

        Raises:
            InputError: this is no Nitro enclave.
            RunError: the module refused.
        """
        body = {"user_data": None, "nonce": nonce, "public_key": public_key or None}
        answer = self._ask(cbor.encode({"Attestation": body}))
        document = answer.get("Attestation") if isinstance(answer, dict) else None
        if not isinstance(document, dict) or not isinstance(document.get("document"), bytes):
            raise RunError("the Nitro module must answer with a document", got=answer)
        found: bytes = document["document"]
        return found

    def _ask(self, message: bytes) -> Any:
        request = ctypes.create_string_buffer(message, len(message))
        response = ctypes.create_string_buffer(_RESPONSE_BYTES)
        raw = _Raw(_IoVec(ctypes.addressof(request), len(message)),
                   _IoVec(ctypes.addressof(response), _RESPONSE_BYTES))  # fmt: skip
        try:
            file = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{self._device} must be there: this is no Nitro enclave",
                             got=error.strerror) from None  # fmt: skip
        try:
            self._ioctl(file, _IOCTL_RAW, raw)
        except OSError as error:
            raise RunError("the Nitro module must answer", got=error.strerror) from None
        finally:
            os.close(file)
        return cbor.decode(response.raw[: raw.response.length], "the Nitro module's answer")
