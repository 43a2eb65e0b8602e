"""Enclaves that are virtual machines: an AWS Nitro enclave, an SEV-SNP guest, a TDX guest.

Keys of ``nitro-cli run-enclave --config`` and of ``/etc/nitro_enclaves/allocator.yaml``: AWS Nitro
Enclaves User Guide. Options of QEMU: ``docs/system/i386/amd-memory-encryption.rst`` (10.0) and
``docs/system/i386/tdx.rst`` (10.1). The guests have no network: a vsock to the host alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..units import MIB
from .sizing import EnclaveSize

# Nitro gives whole cores to an enclave: two CPUs each where cores have two threads.
_NITRO_LEAST_CPUS = 2
# SEV Secure Nested Paging Firmware ABI, guest policy: bit 17 must be one, bit 16 allows two
# threads a core, bit 19 lets the host debug the guest.
_SNP_POLICY, _SNP_DEBUG = 0x30000, 0x80000
# Of QEMU itself beside the guest's memory; assumed.
_QEMU_BYTES = 256 * MIB
DEVICES = {"sev-snp": ("/dev/kvm", "/dev/sev"), "tdx": ("/dev/kvm",)}


@dataclass(frozen=True, kw_only=True)
class Guest:
    """A virtual machine for an enclave.

    Attributes:
        name: of the enclave. size: of a kind that is a virtual machine.
        command: program and arguments inside.
        num_cpus: virtual CPUs.
        kernel, initrd, firmware: files that start it (SEV-SNP, TDX).
        base_image: that Nitro's image is made from, with its digest.
        environment: variables inside.
        vsock_cid: its address for the host, 3 or more.
        debug: whether the host may read its memory.
    """

    name: str
    size: EnclaveSize
    command: tuple[str, ...]
    num_cpus: int
    kernel: Path = Path("/boot/vmlinuz")
    initrd: Path = Path("initramfs.img")
    firmware: Path = Path("/usr/share/ovmf/OVMF.fd")
    base_image: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    vsock_cid: int = 16
    debug: bool = False

    def nitro_files(self) -> dict[str, str]:
        """Name and text of each file that a Nitro enclave is built and started from.

        Raises:
            InputError: the base image has no digest.
        """
        if "@sha256:" not in self.base_image:
            raise InputError(
                "the base image must be named with its digest", got=self.base_image or "none",
                next_step="pass --base-image NAME@sha256:DIGEST",
            )  # fmt: skip
        memory_mib = self.size.size_bytes // MIB
        cpus = max(_NITRO_LEAST_CPUS, self.num_cpus + self.num_cpus % 2)
        config = {
            "enclave_name": self.name,
            "cpu_count": cpus,
            "memory_mib": memory_mib,
            "eif_path": f"{self.name}.eif",
            "enclave_cid": self.vsock_cid,
            "debug_mode": self.debug,
        }
        dockerfile = [
            f"FROM {self.base_image}",
            *(f"ENV {name}={json.dumps(value)}" for name, value in self.environment.items()),
            "COPY image/ /",
            f"CMD {json.dumps(list(self.command))}",
        ]
        steps = [
            "#!/bin/sh",
            "set -e",
            f"docker build -t {shlex.quote(self.name)} .",
            f"nitro-cli build-enclave --docker-uri {shlex.quote(self.name)}"
            f" --output-file {shlex.quote(self.name)}.eif",
            "nitro-cli run-enclave --config enclave.json",
        ]
        return {
            "Dockerfile": "\n".join(dockerfile) + "\n",
            "enclave.json": json.dumps(config, indent=2) + "\n",
            "allocator.yaml": f"---\nmemory_mib: {memory_mib}\ncpu_count: {cpus}\n",
            "build.sh": "\n".join(steps) + "\n",
        }

    def qemu_command(self) -> list[str]:
        """QEMU's command line for an SEV-SNP or TDX guest."""
        memory = f"{self.size.size_bytes // MIB}M"
        if self.size.kind == "sev-snp":
            policy = _SNP_POLICY | (_SNP_DEBUG if self.debug else 0)
            machine = "q35,confidential-guest-support=cgs0,memory-backend=ram0"
            protection = [
                "-object", f"memory-backend-memfd,id=ram0,size={memory},share=true,prealloc=false",
                "-object", "sev-snp-guest,id=cgs0,cbitpos=51,reduced-phys-bits=1,"
                f"kernel-hashes=on,policy={policy:#x}",
            ]  # fmt: skip
            cpu = "EPYC-v4"
        else:
            machine = "q35,kernel-irqchip=split,confidential-guest-support=cgs0"
            attributes = ",attributes=1" if self.debug else ""  # Bit 0: DEBUG of the TD attributes.
            protection = ["-object", f"tdx-guest,id=cgs0{attributes}"]
            cpu = "host"
        # The kernel gives init the variables that it does not know itself, and what follows --.
        variables = " ".join(f"{name}={value}" for name, value in self.environment.items())
        arguments = " ".join(shlex.quote(word) for word in self.command)
        return [
            "qemu-system-x86_64", "-accel", "kvm", "-cpu", cpu, "-machine", machine, *protection,
            "-smp", str(self.num_cpus), "-m", memory, "-bios", str(self.firmware),
            "-kernel", str(self.kernel), "-initrd", str(self.initrd),
            "-append", f"console=ttyS0 panic=-1 {variables} -- {arguments}",
            "-device", f"vhost-vsock-pci,guest-cid={self.vsock_cid}",
            "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio", "-net", "none",
        ]  # fmt: skip

    def unit(self) -> str:
        """A systemd unit that starts the guest, with nothing but the devices that it needs."""
        words = " ".join(_quoted(word) for word in self.qemu_command())
        devices = (*DEVICES[self.size.kind], "/dev/vhost-vsock")
        lines = [
            "[Unit]",
            f"Description=hotloop enclave {self.name}",
            "",
            "[Service]",
            f"ExecStart={words}",
            f"MemoryMax={self.size.size_bytes + _QEMU_BYTES}",
            "MemorySwapMax=0",
            "NoNewPrivileges=yes",
            "ProtectSystem=strict",
            "ProtectHome=yes",
            "PrivateTmp=yes",
            "PrivateNetwork=yes",
            "CapabilityBoundingSet=",
            "DevicePolicy=closed",
            *(f"DeviceAllow={device} rw" for device in devices),
            "Restart=no",
            "",
            "[Install]",
            "WantedBy=multi-user.target",
        ]
        return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """A word of ``ExecStart``: systemd expands % and $ and takes C's escapes."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    plain = escaped == word and word and not any(c.isspace() or c == "'" for c in word)
    return word if plain else f'"{escaped}"'
