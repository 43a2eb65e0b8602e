"""Evidence of what runs where, verified; keys released to what is verified and to nothing else.

One file a kind of evidence (``tpm``, ``nitro``, ``sev_snp``, ``tdx``), one interface: ``verify``.
"""

from __future__ import annotations

from ...errors import MissingExtraError

try:
    import cryptography  # noqa: F401
except ImportError:
    raise MissingExtraError("attestation", "cryptography", "enclave") from None

from .policy import KINDS, Claims, Policy, bind
from .verifying import verify

__all__ = ["KINDS", "Claims", "Policy", "bind", "verify"]
