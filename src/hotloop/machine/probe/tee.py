"""Whether this process runs inside a trusted execution environment (TEE), and which it could start.

The two differ: ``/dev/sgx_enclave`` on a host means that enclaves can be started there, while a
process inside one sees the attestation files of its library OS instead.
"""

from __future__ import annotations

from .isa import CpuInfo
from .tree import Tree


def read_tee(tree: Tree, cpuinfo: CpuInfo) -> str | None:
    """The TEE this process runs in; ``"none"`` when no sign is found, ``None`` when unreadable.

    - ``"nitro"``: ``/dev/nsm``, the security module that only Nitro enclaves have.
    - ``"sgx"``: ``/dev/attestation/attestation_type``. Gramine makes the folder under every
      back end, this file only inside SGX (``libos/src/fs/dev/attestation.c``).
    - ``"tdx"``: the guest device, or the CPU flag ``tdx_guest``.
    - ``"sev-snp"``: the guest device, or the CPU flag ``sev_snp`` of a virtual CPU: without
      ``hypervisor`` it is a host that can start such guests.

    Not told apart from ``"none"``: guests whose paravisor hides the hardware (some clouds).
    """
    flags = cpuinfo.flags or frozenset()
    if tree.exists("/dev/nsm"):
        return "nitro"
    if tree.exists("/dev/attestation/attestation_type"):
        return "sgx"
    if "tdx_guest" in flags or tree.exists("/dev/tdx_guest") or tree.exists("/dev/tdx-guest"):
        return "tdx"
    if tree.exists("/dev/sev-guest") or {"sev_snp", "hypervisor"} <= flags:
        return "sev-snp"
    readable = cpuinfo.flags is not None or tree.is_folder("/dev")
    return "none" if readable else None


def read_tee_hosted(tree: Tree) -> tuple[str, ...]:
    """Kinds of TEE that this machine offers to start; sorted."""
    signs = {
        "nitro": tree.exists("/dev/nitro_enclaves"),
        "sgx": tree.exists("/dev/sgx_enclave") or tree.exists("/dev/sgx/enclave"),
        "tdx": tree.text("/sys/module/kvm_intel/parameters/tdx") in ("Y", "1"),
        "sev-snp": tree.text("/sys/module/kvm_amd/parameters/sev_snp") in ("Y", "1"),
    }
    return tuple(sorted(kind for kind, seen in signs.items() if seen))


# Programs that the enclave commands start, by the name that is told.
_TOOLS = {"bubblewrap": "bwrap", "gVisor": "runsc", "QEMU": "qemu-system-x86_64", "swtpm": "swtpm"}
_FOLDERS = ("/usr/bin", "/usr/local/bin", "/usr/sbin", "/usr/local/sbin")


def read_enclave_tools(tree: Tree) -> tuple[str, ...]:
    """What can isolate a run, or vouch for it, without a TEE: programs in the system's folders, and
    ``"TPM 2.0"`` (``/dev/tpmrm0``, which the kernel makes for version 2 alone)."""
    found = [
        name
        for name, program in _TOOLS.items()
        if any(tree.exists(f"{folder}/{program}") for folder in _FOLDERS)
    ]
    return (*found, *(["TPM 2.0"] if tree.exists("/dev/tpmrm0") else []))
