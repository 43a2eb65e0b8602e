"""One way in for all kinds of evidence."""

from __future__ import annotations

from . import nitro, sev_snp, tdx, tpm
from .policy import Claims, Policy

_VERIFIERS = {
    "tpm": tpm.verify,
    "nitro": nitro.verify,
    "sev-snp": sev_snp.verify,
    "tdx": tdx.verify,
}


def verify(evidence: bytes, *, policy: Policy, nonce: bytes, now_s: float) -> Claims:
    """What evidence of the policy's kind says, once it is verified and allowed.

    Args:
        evidence: in the form of its kind; the files of this folder say which.
        policy: whom to trust, and what must run there.
        nonce: 16 to 64 bytes that must be in it: fresh, and made of the key it is for (``bind``).
        now_s: seconds since 1970.

    Raises:
        AttestationError: it is not accepted; the message says why.
    """
    return _VERIFIERS[policy.kind](evidence, policy=policy, nonce=nonce, now_s=now_s)
