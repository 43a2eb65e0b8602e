"""Trusted execution environments and accelerators, from device files and driver folders."""

import pytest

from hotloop.machine import Accelerator

CPUINFO = "processor : 0\nmodel name : X\nflags : lm avx2 {}\n"


def cpu(flags: str) -> dict[str, str]:
    return {"proc/cpuinfo": CPUINFO.format(flags)}


@pytest.mark.parametrize(
    ("files", "inside", "hosted"),
    [
        (cpu("sgx"), "none", ()),
        ({"dev/sgx_enclave": ""}, "none", ("sgx",)),
        ({"dev/sgx/enclave": ""}, "none", ("sgx",)),
        ({"dev/attestation/attestation_type": "dcap"}, "sgx", ()),
        # Gramine without SGX makes the folder and its keys, but not the type.
        ({"dev/attestation/keys/default": ""}, "none", ()),
        ({"dev/tdx_guest": ""}, "tdx", ()),
        (cpu("hypervisor tdx_guest"), "tdx", ()),
        ({"dev/sev-guest": ""}, "sev-snp", ()),
        (cpu("hypervisor sev sev_es sev_snp"), "sev-snp", ()),
        (cpu("sev sev_es sev_snp"), "none", ()),
        ({**cpu("sev_snp"), "sys/module/kvm_amd/parameters/sev_snp": "Y\n"}, "none", ("sev-snp",)),
        ({"dev/null": "", "sys/module/kvm_intel/parameters/tdx": "Y\n"}, "none", ("tdx",)),
        ({"dev/nsm": ""}, "nitro", ()),
        ({"dev/nitro_enclaves": ""}, "none", ("nitro",)),
        ({"proc/version": "Linux"}, None, ()),
    ],
)
def test_inside_is_told_from_hosting(probe, files, inside, hosted):
    machine = probe(files)
    assert machine.tee == inside
    assert machine.tee_hosted == hosted


def test_nvidia(probe):
    folder = "proc/driver/nvidia/gpus"
    text = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 100\nBus Type: \t PCIe\n"
    files = {
        f"{folder}/0000:19:00.0/information": text,
        f"{folder}/0000:3b:00.0/information": "",
    }
    assert probe(files).accelerators == (
        Accelerator("nvidia", "gpu", "NVIDIA H100 80GB HBM3", None, "0000:19:00.0"),
        Accelerator("nvidia", "gpu", None, None, "0000:3b:00.0"),
    )


def test_amd_counts_gpus_and_their_own_memory_only(probe):
    folder = "sys/class/kfd/kfd/topology/nodes"
    files = {
        f"{folder}/0/properties": "cpu_cores_count 64\nsimd_count 0\n",
        f"{folder}/1/properties": "cpu_cores_count 0\nsimd_count 1216\n",
        f"{folder}/1/name": "ip discovery\n",
        f"{folder}/1/mem_banks/0/properties": "heap_type 1\nsize_in_bytes 1000\n",
        f"{folder}/1/mem_banks/1/properties": "heap_type 0\nsize_in_bytes 7\n",
        f"{folder}/1/mem_banks/2/properties": "heap_type 2\nsize_in_bytes 500\n",
    }
    assert probe(files).accelerators == (Accelerator("amd", "gpu", "ip discovery", 1500, None),)


def test_accel_class_and_neuron(probe):
    device = "sys/class/accel/accel0/device"
    files = {
        f"{device}/vendor": "0x8086\n",
        f"{device}/uevent": "DRIVER=intel_vpu\nPCI_SLOT_NAME=0000:00:0b.0\n",
        "sys/class/accel/accel1/dev": "261:1\n",
        "dev/neuron0": "",
    }
    assert probe(files).accelerators == (
        Accelerator("intel", "accel", "intel_vpu", None, "0000:00:0b.0"),
        Accelerator(None, "accel", None, None, "/dev/accel/accel1"),
        Accelerator("aws", "accel", "neuron", None, "/dev/neuron0"),
    )


def test_no_accelerators(probe):
    assert probe("graviton").accelerators == ()


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (
            ("usr/bin/bwrap", "usr/local/bin/runsc", "dev/tpmrm0", "dev/tpm0"),
            ("bubblewrap", "gVisor", "TPM 2.0"),
        ),
        (("usr/bin/qemu-system-x86_64", "usr/sbin/swtpm"), ("QEMU", "swtpm")),
        (("dev/tpm0", "opt/bwrap"), ()),
    ],
)
def test_sandboxes_and_a_tpm_are_found(probe, paths, found):
    assert probe(dict.fromkeys(paths, "")).enclave_tools == found
