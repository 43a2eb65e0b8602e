"""The owner's side: which key goes to which enclave, and the release itself.

The file of a broker, TOML; files in it are sought beside it:

    challenge_life_s = 60

    [policies.trainer]
    kind = "tpm"
    keys = ["000b..."]
    measurements.PCR16 = ["..."]

    [keys.mnist]
    file = "mnist.key"
    policies = ["trainer"]
"""

from __future__ import annotations

import os
import re
import stat
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import AttestationError, InputError
from .challenges import Challenges
from .policy import KINDS, Claims, Policy, bind
from .sealing import release_info, seal
from .verifying import verify

_MAX_KEY_BYTES = 4096
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RELEASE = "release"  # What the enclave's key is for; see ``bind``.


@dataclass(frozen=True)
class HeldKey:
    """A key and who may have it.

    Attributes:
        secret: its bytes; not shown when this is printed.
        policies: any of them is enough.
    """

    secret: bytes = field(repr=False)
    policies: tuple[Policy, ...]


@dataclass(frozen=True)
class Release:
    """A key that was let go, sealed, and what the evidence said."""

    sealed: bytes
    claims: Claims


class Broker:
    """Releases keys to evidence that a policy accepts, and to nothing else.

    Args:
        keys: by name.
        challenges: made here, used once.
        now_s: seconds since 1970.
    """

    def __init__(
        self,
        keys: Mapping[str, HeldKey],
        challenges: Challenges | None = None,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self.keys = keys
        self.challenges = challenges or Challenges()
        self._now_s = now_s

    def release(
        self, key_id: str, kind: str, challenge: bytes, public_key: bytes, evidence: bytes
    ) -> Release:
        """The key, sealed to ``public_key``, if the evidence vouches for that public key.

        Args:
            key_id: name of the key.
            kind: of the evidence.
            challenge: of this broker; used up by this call.
            public_key: 32 bytes of X25519, whose private part is in the enclave.
            evidence: made with the nonce ``bind(RELEASE, challenge, public_key)``.

        Raises:
            AttestationError: it is not released; the message says why.
        """
        self.challenges.take(challenge)
        held = self.keys.get(key_id)
        policies = [one for one in (held.policies if held else ()) if one.kind == kind]
        if held is None or not policies:
            # Which names there are is not told to who may have none of them.
            raise AttestationError(f"a key must be one that evidence of kind {kind} opens",
                                   got=key_id)  # fmt: skip
        nonce = bind(RELEASE, challenge, public_key)
        refusals = []
        for policy in policies:
            try:
                claims = verify(evidence, policy=policy, nonce=nonce, now_s=self._now_s())
            except AttestationError as refusal:
                refusals.append(refusal)
                continue
            if claims.public_key not in (None, public_key):
                raise AttestationError("the key in the evidence must be the one that is asked for")
            return Release(seal(held.secret, public_key, release_info(key_id, challenge)), claims)
        raise refusals[0]

    @classmethod
    def load(cls, path: Path) -> Broker:
        """A broker from its file; see the top of this one.

        Raises:
            InputError: it cannot be read, names something unknown, or a key is open to others.
        """
        table = read_toml(path)
        _only(table, {"challenge_life_s", "policies", "keys"}, "the file of a broker")
        policies = load_policies(table, path)
        keys = {}
        for name, entry in _tables(table, "keys").items():
            _only(entry, {"file", "policies"}, f"keys.{name}")
            wanted = entry.get("policies")
            if not isinstance(wanted, list) or not wanted or set(wanted) - set(policies):
                raise InputError(f"keys.{name}.policies must name policies of the file",
                                 got=wanted)  # fmt: skip
            file = entry.get("file")
            if not isinstance(file, str):
                raise InputError(f"keys.{name}.file must be a path", got=file)
            secret = read_key(path.parent / file)
            keys[name] = HeldKey(secret, tuple(policies[one] for one in wanted))
        if not keys:
            raise InputError("the file of a broker must hold at least one key", got=path)
        life_s = table.get("challenge_life_s", 60)
        if type(life_s) not in (int, float) or not 1 <= life_s <= 3600:
            raise InputError("challenge_life_s must be from 1 to 3600", got=life_s)
        return cls(keys, Challenges(float(life_s)))


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file.

    Raises:
        InputError: it cannot be read, or is none.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path} must be readable", got=error.strerror) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} must be TOML", got=error) from None


def load_policies(table: dict[str, Any], path: Path) -> dict[str, Policy]:
    """The policies of a broker's file, by name.

    Raises:
        InputError: there is none, or one of them cannot be used.
    """
    found = {name: Policy.from_table(entry, path.parent)
             for name, entry in _tables(table, "policies").items()}  # fmt: skip
    if not found:
        raise InputError(f"{path} must have a policy", next_step=f"kinds: {', '.join(KINDS)}")
    return found


def read_key(path: Path) -> bytes:
    """A key, from a file that only its owner can read.

    Raises:
        InputError: it cannot be read, others can read it too, or it is empty or long.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            secret = file.read(_MAX_KEY_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} must be readable", got=error.strerror) from None
    if stat.S_IMODE(mode) & 0o077:
        raise InputError(f"{path} must be readable by its owner alone", got=f"{mode & 0o777:o}",
                         next_step=f"chmod 600 {path}")  # fmt: skip
    if not 1 <= len(secret) <= _MAX_KEY_BYTES:
        raise InputError(f"{path} must have 1 to {_MAX_KEY_BYTES} bytes")
    return secret


def _tables(table: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    found = table.get(name, {})
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise InputError(f"[{name}.NAME] must be tables", got=found)
    for one in found:
        if not _NAME.fullmatch(one):
            raise InputError("a name must be letters, digits, '.', '_' and '-', at most 64",
                             got=one)  # fmt: skip
    return found


def _only(table: dict[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise InputError(f"{what} has only {', '.join(sorted(known))}", got=unknown[0])
