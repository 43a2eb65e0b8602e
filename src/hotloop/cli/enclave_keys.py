"""``hotloop enclave keys``: keys for attested enclaves alone, and servers that prove themselves."""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, RunError
from ..listening import is_loopback, load_certificate

if TYPE_CHECKING:
    from ..enclave.attestation import Claims, Policy
    from ..enclave.attestation.sources import EvidenceSource

KINDS = ("tpm", "nitro", "sev-snp", "tdx")


def add_parser(kinds: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``keys`` to ``hotloop enclave``."""
    parser = kinds.add_parser(
        "keys",
        help="release keys to attested enclaves alone",
        description="Release keys to enclaves that prove what they run, fetch one from inside, or "
        "have a server prove itself.",
    )
    what = parser.add_subparsers(dest="keys_what", metavar="WHAT", required=True)
    _add_serve(what)
    _add_fetch(what)
    _add_verify(what)
    _add_describe(what)
    _add_make_tpm_key(what)
    for one in what.choices.values():
        one.allow_abbrev = False
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS,
                         help="print JSON")  # fmt: skip
        one.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                         help="show the traceback when something goes wrong")  # fmt: skip


def add_source_options(add: Any) -> None:
    """The options that say which TPM key, registers and certificates evidence is made of."""
    add("--tpm-key", default="0x81010002", metavar="HANDLE",
        help="the TPM's attestation key: handle or context file (default: 0x81010002)")  # fmt: skip
    add("--pcrs", default="0,1,2,3,4,5,7,8,9", metavar="LIST",
        help="registers that the TPM quotes (default: 0,1,2,3,4,5,7,8,9)")  # fmt: skip
    add("--certificates", type=Path, action="append", default=[], metavar="FILE",
        help="chain that the device does not give: the TPM key's, SEV-SNP's chip's")  # fmt: skip


def source_of(kind: str, args: argparse.Namespace) -> EvidenceSource:
    """The source of evidence that those options name.

    Raises:
        InputError: the registers are no numbers, or a file cannot be read.
    """
    from ..enclave.attestation.sources import open_source

    try:
        pcrs = [int(one) for one in args.pcrs.split(",")]
    except ValueError:
        raise InputError("--pcrs must be numbers with commas between", got=args.pcrs) from None
    return open_source(kind, tpm_key=args.tpm_key, pcrs=pcrs, certificates=args.certificates)


def _add_serve(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = what.add_parser(
        "serve", help="the owner's broker",
        description="Release the keys of FILE to evidence that its policies accept, until Ctrl-C.",
    )  # fmt: skip
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="policies and keys, TOML (docs/attestation.md)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8443, help="0: any that is free (default: 8443)")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain, PEM")
    add("--tls-key", type=Path, metavar="FILE", help="its private key, PEM")
    add("--insecure", action="store_true", help="another host without TLS is meant")
    parser.set_defaults(run=_serve)


def _add_fetch(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = what.add_parser(
        "fetch", help="inside: get a key from the broker",
        description="Prove to the broker at URL what runs here, and write the key to a file that "
        "only its owner can read.",
    )  # fmt: skip
    add = parser.add_argument
    add("url", metavar="URL", help="of hotloop enclave keys serve")
    add("key", metavar="KEY", help="its name")
    add("--kind", choices=KINDS, required=True, help="what vouches for this machine")
    add("--out", type=Path, metavar="FILE", required=True,
        help="where the key goes: keep it on a tmpfs; - is standard output")  # fmt: skip
    add("--ca", type=Path, metavar="FILE", help="certificates that the broker's TLS may have")
    add_source_options(add)
    parser.set_defaults(run=_fetch)


def _add_verify(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = what.add_parser(
        "verify", help="outside: have a server prove what it runs",
        description="Ask hotloop serve --attest at URL for evidence, and accept it by a policy.",
    )  # fmt: skip
    add = parser.add_argument
    add("url", metavar="URL", help="https://HOST:PORT of hotloop serve --attest")
    add("--policy", type=Path, required=True, metavar="FILE", help="TOML with [policies.NAME]")
    add("--policy-name", metavar="NAME", help="where the file has several")
    parser.set_defaults(run=_verify)


def _add_describe(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = what.add_parser(
        "describe", help="inside: the policy that accepts this machine",
        description="Make evidence here, verify it, and print the policy that accepts exactly it.",
    )  # fmt: skip
    add = parser.add_argument
    add("--kind", choices=KINDS, required=True, help="what vouches for this machine")
    add("--root", type=Path, action="append", default=[], metavar="FILE",
        help="root certificate of its maker; a TPM's key can do without")  # fmt: skip
    add_source_options(add)
    parser.set_defaults(run=_describe)


def _add_make_tpm_key(what: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = what.add_parser(
        "make-tpm-key", help="inside: make the TPM's attestation key",
        description="Make an attestation key in the TPM, keep it at a handle, print its name.",
    )  # fmt: skip
    parser.add_argument("handle", nargs="?", default="0x81010002", metavar="HANDLE",
                        help="persistent handle (default: 0x81010002)")  # fmt: skip
    parser.set_defaults(run=_make_tpm_key)


def _serve(args: argparse.Namespace) -> int:
    from ..enclave.attestation.broker import Broker
    from ..enclave.attestation.broker_server import BrokerServer

    if (args.tls_cert is None) != (args.tls_key is None):
        raise InputError("--tls-cert and --tls-key go together", next_step="give both")
    if not 0 <= args.port < 65536:
        raise InputError("--port must be from 0 to 65535", got=args.port)
    if not (is_loopback(args.host) or args.tls_cert or args.insecure):
        raise InputError(
            "a host that is not loopback needs --tls-cert and --tls-key", got=args.host,
            next_step="add them, or --insecure: keys are sealed to the enclave either way",
        )  # fmt: skip
    tls = None
    if args.tls_cert is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.minimum_version = ssl.TLSVersion.TLSv1_2
        load_certificate(tls, args.tls_cert, args.tls_key)
    server = BrokerServer(Broker.load(args.file), args.host, args.port, sys.stderr, tls)
    names = sorted(server.broker.keys)
    if args.json:
        print(json.dumps({"address": server.address, "keys": names}), flush=True)
    else:
        print(f"keeping {', '.join(names)} at {server.address} (Ctrl-C stops)", flush=True)
    with server:
        server.serve_forever(poll_interval=0.2)
    return 0


def _fetch(args: argparse.Namespace) -> int:
    from ..enclave.attestation.client import fetch_key

    if str(args.out) != "-" and args.out.exists():
        raise InputError("--out must be a new file", got=args.out)
    tls = None
    if args.ca is not None:
        try:
            tls = ssl.create_default_context(cafile=str(args.ca))
        except (OSError, ssl.SSLError) as error:
            raise InputError("--ca must be certificates in PEM", got=error) from None
    key = fetch_key(args.url, args.key, source_of(args.kind, args), tls=tls)
    if str(args.out) == "-":
        sys.stdout.buffer.write(key)
        sys.stdout.buffer.flush()
        return 0
    try:
        # Never readable by others, not even for a moment; a file that is there is not written.
        file = os.open(args.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InputError(f"{args.out} must be a new file", got=error.strerror) from None
    try:
        with os.fdopen(file, "wb") as out:
            out.write(key)
    except OSError as error:
        raise RunError(f"{args.out} must be writable", got=error.strerror) from None
    if args.json:
        print(json.dumps({"key": args.key, "file": str(args.out), "bytes": len(key)}))
    else:
        print(f"{args.key}: {len(key)} bytes in {args.out}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ..enclave.attestation.broker import load_policies, read_toml
    from ..enclave.attestation.client import AttestedConnection, split_url

    policies = load_policies(read_toml(args.policy), args.policy)
    name = args.policy_name or (next(iter(policies)) if len(policies) == 1 else None)
    if name not in policies:
        raise InputError("--policy-name must be a policy of the file", got=name,
                         next_step=f"one of {', '.join(policies)}")  # fmt: skip
    scheme, host, port = split_url(args.url)
    if scheme != "https":
        raise InputError("a server that proves itself must be https://", got=args.url)
    connection = AttestedConnection(host, port, policies[name])
    connection.connect()
    connection.close()
    assert connection.claims is not None
    _print_claims(connection.claims, as_json=args.json, title=f"{args.url} runs what {name} allows")
    return 0


def _print_claims(claims: Claims, *, as_json: bool, title: str) -> None:
    document = {
        "kind": claims.kind, "signer": claims.signer, "root_sha256": claims.root_sha256,
        "debug": claims.debug, "made_at_s": claims.made_at_s, "tcb": dict(claims.tcb),
        "measurements": {name: value.hex() for name, value in claims.measurements.items()},
    }  # fmt: skip
    if as_json:
        print(json.dumps(document))
        return
    print(title)
    for name, value in claims.measurements.items():
        print(f"  {name:16} {value.hex()}")
    print(f"  {'signed by':16} {claims.signer}")


def _describe(args: argparse.Namespace) -> int:
    from ..enclave.attestation import Policy, bind, tpm, verify
    from ..enclave.attestation.certificates import load_certificates

    class Describing(Policy):
        """Every signature is verified; what is said is what is asked for."""

        def admit(self, claims: Claims, now_s: float) -> Claims:
            return claims

    challenge = os.urandom(32)
    nonce = bind("describe", challenge, b"")
    evidence = source_of(args.kind, args).make(nonce, b"none")
    roots = [one for path in args.root for one in load_certificates(_read(path), str(path))]
    keys = frozenset([tpm.key_name(evidence)]) if args.kind == "tpm" and not roots else frozenset()
    register = {"tpm": "PCR0", "nitro": "PCR0", "sev-snp": "MEASUREMENT", "tdx": "MRTD"}[args.kind]
    policy: Policy = Describing(args.kind, {register: frozenset([b"any"])}, roots=tuple(roots),
                                keys=keys)  # fmt: skip
    claims = verify(evidence, policy=policy, nonce=nonce, now_s=time.time())
    if args.json:
        _print_claims(claims, as_json=True, title="")
        return 0
    print(f'[policies.NAME]\nkind = "{claims.kind}"')
    if keys:
        print(f'keys = ["{claims.signer}"]')
    else:
        print("roots = [" + ", ".join(f'"{path}"' for path in args.root) + "]")
    if claims.tcb:
        print("[policies.NAME.min_tcb]")
        for name, version in claims.tcb.items():
            print(f"{name} = {version}")
    print("[policies.NAME.measurements]")
    for name, value in claims.measurements.items():
        print(f'{name} = ["{value.hex()}"]')
    if claims.debug:
        print("# The enclave is in debug mode: this policy refuses it without allow_debug = true.")
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} must be readable", got=error.strerror) from None


def _make_tpm_key(args: argparse.Namespace) -> int:
    from ..enclave.attestation.sources.tpm_tools import make_attestation_key

    name = make_attestation_key(args.handle).hex()
    if args.json:
        print(json.dumps({"handle": args.handle, "name": name}))
    else:
        print(f'the key at {args.handle}, for a policy: keys = ["{name}"]')
    return 0
