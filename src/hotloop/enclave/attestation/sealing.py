"""Keys on their way: HPKE (RFC 9180), base mode, of X25519, HKDF-SHA256 and ChaCha20-Poly1305."""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from ...errors import AttestationError

SUITE = "DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305"
PUBLIC_KEY_BYTES = 32
_HPKE = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)


class ReceivingKey:
    """A key pair for one answer; its private part never leaves this process's memory.

    Attributes:
        public_key: 32 bytes, to be sent and to be hashed into the evidence.
    """

    def __init__(self, private: X25519PrivateKey | None = None) -> None:
        self._private = private or X25519PrivateKey.generate()
        self.public_key = self._private.public_key().public_bytes_raw()

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """What was sealed to this key for this purpose.

        Raises:
            AttestationError: it was sealed to another key, for another purpose, or is damaged.
        """
        try:
            return bytes(_HPKE.decrypt(sealed, self._private, info=info))
        except (InvalidTag, ValueError):
            raise AttestationError("a released key must be sealed to this enclave") from None


def seal(secret: bytes, public_key: bytes, info: bytes) -> bytes:
    """``secret`` for the holder of ``public_key`` alone: encapsulated key, then ciphertext.

    Raises:
        AttestationError: the public key is none.
    """
    try:
        receiver = X25519PublicKey.from_public_bytes(public_key)
        return bytes(_HPKE.encrypt(secret, receiver, info=info))
    except ValueError:
        raise AttestationError("a public key must be 32 bytes of X25519") from None


def release_info(key_id: str, challenge: bytes) -> bytes:
    """What a released key is bound to: the protocol, its name, and the challenge it answers."""
    return b"hotloop key release v1\0" + key_id.encode() + b"\0" + challenge
