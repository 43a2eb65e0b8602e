"""Manifests against expectations written by hand: every key is one that is published."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.enclave.gramine import INSECURE, GramineManifest, toml_text
from hotloop.enclave.guests import Guest
from hotloop.enclave.image import image_bytes, image_files
from hotloop.enclave.needs import Needs
from hotloop.enclave.sizing import size_enclave
from hotloop.errors import InputError
from hotloop.units import MIB

# Gramine 1.9, python/graminelibos/manifest_check.py: what a manifest may have of these tables.
GRAMINE_KEYS = {
    "fs": {"mounts", "root", "start_dir", "insecure__keys"},
    "libos": {"entrypoint", "check_invalid_pointers"},
    "loader": {
        "entrypoint", "argv", "argv_src_file", "env", "env_src_file", "gid", "uid", "log_file",
        "insecure__use_cmdline_argv", "insecure__use_host_env", "insecure__disable_aslr",
        "log_level",
    },
    "sgx": {
        "allowed_files", "cpu_features", "debug", "edmm_enable", "enable_stats", "enclave_size",
        "file_check_policy", "insecure__allow_memfaults_without_exinfo",
        "insecure__rpc_thread_num", "isvprodid", "isvsvn", "max_threads", "preheat_enclave",
        "profile", "remote_attestation", "seal_key", "trusted_files", "use_exinfo",
        "vtune_profile",
    },
    "sys": {
        "allowed_ioctls", "brk", "disallow_subprocesses", "enable_sigterm_injection",
        "enable_extra_runtime_domain_names_conf", "experimental__enable_flock",
        "insecure__allow_eventfd", "ioctl_structs", "debug__mock_syscalls", "stack", "fds",
    },
}  # fmt: skip


def size(kind):
    needs = Needs(
        phase="infer", batch_size=64, micro_batch_size=64,
        components=(("Runtime base", 60 * MIB),), threads=2, mapped_files_bytes=70 * MIB,
        mapped_resident_bytes=30 * MIB, needs_torch=False,
    )  # fmt: skip
    return size_enclave(needs, kind, image_bytes=100 * MIB)


def manifest(tmp_path, **options):
    file = tmp_path / "model" / "weights"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"weights")
    return GramineManifest(
        size=size("gramine-sgx"), entrypoint=Path("/usr/bin/python3"),
        arguments=("python3", "-m", "hotloop", 'a "quoted" word'), trusted_files=(file,), **options,
    )  # fmt: skip


def test_a_gramine_manifest_word_by_word(tmp_path):
    document = tomllib.loads(manifest(tmp_path, environment={"LANG": "C.UTF-8"}).text())
    folder = tmp_path / "model"
    assert document == {
        "loader": {
            "entrypoint": {"uri": "file:/usr/lib/x86_64-linux-gnu/gramine/libsysdb.so"},
            "log_level": "error",
            "argv": ["python3", "-m", "hotloop", 'a "quoted" word'],
            "env": {
                "LD_LIBRARY_PATH": "/lib:/lib/x86_64-linux-gnu:/usr/lib/x86_64-linux-gnu",
                "LANG": "C.UTF-8",
            },
        },
        "libos": {"entrypoint": "/usr/bin/python3", "check_invalid_pointers": True},
        "sys": {"stack": {"size": "2048K"}, "disallow_subprocesses": True},
        "fs": {
            "mounts": [
                {"path": "/lib", "uri": "file:/usr/lib/x86_64-linux-gnu/gramine/runtime/glibc"},
                {"path": str(folder), "uri": f"file:{folder}"},
                {"type": "tmpfs", "path": "/tmp"},
            ]
        },
        "sgx": {
            "debug": False,
            "edmm_enable": False,
            "enclave_size": "262144K",
            "max_threads": 9,
            "file_check_policy": "strict",
            "remote_attestation": "dcap",
            "trusted_files": [
                {
                    "uri": f"file:{folder}/weights",
                    "sha256": hashlib.sha256(b"weights").hexdigest(),
                }
            ],
        },
    }


@pytest.mark.parametrize("name", INSECURE)
def test_an_insecure_option_is_there_only_by_name_and_told(tmp_path, name):
    plain = manifest(tmp_path)
    weak = manifest(tmp_path, insecure=(name,))
    table, key, value, why = INSECURE[name]
    assert plain.document()[table].get(key, not value) is not value
    assert weak.document()[table][key] is value
    assert plain.warnings() == []
    assert weak.warnings() == [f"{name}: {why}"]
    assert "insecure__" not in plain.text()


def test_every_option_has_a_published_key(tmp_path):
    full = manifest(
        tmp_path, allowed_folders=(Path("/out"),), encrypted_folders=(Path("/in"),),
        passed=("TOKEN",), edmm=True, insecure=tuple(INSECURE),
    )  # fmt: skip
    document = tomllib.loads(full.text())
    for table, keys in document.items():
        assert keys.keys() <= GRAMINE_KEYS[table]
    assert document["sgx"]["max_threads"] == 1
    assert document["sgx"]["allowed_files"] == ["file:/out/"]
    assert document["loader"]["env"]["TOKEN"] == {"passthrough": True}
    mounts = document["fs"]["mounts"]
    assert {"type": "encrypted", "path": "/in", "uri": "file:/in", "key_name": "default"} in mounts
    assert len(full.warnings()) == len(INSECURE) + 2


def test_an_unknown_insecure_option_is_refused(tmp_path):
    with pytest.raises(InputError, match="'all'"):
        manifest(tmp_path, insecure=("all",)).text()


VALUES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4))
def test_what_is_written_as_toml_is_read_back(document):
    assert tomllib.loads(toml_text(document)) == document


def guest(kind, **options):
    return Guest(
        name="cnn", size=size(kind), command=("/usr/bin/python3", "-m", "hotloop"), num_cpus=3,
        **options,
    )  # fmt: skip


def test_nitro_s_files():
    files = guest("nitro", base_image="debian@sha256:00", environment={"A": "b c"}).nitro_files()
    memory_mib = size("nitro").size_bytes // MIB
    assert json.loads(files["enclave.json"]) == {
        "enclave_name": "cnn", "cpu_count": 4, "memory_mib": memory_mib, "eif_path": "cnn.eif",
        "enclave_cid": 16, "debug_mode": False,
    }  # fmt: skip
    assert files["allocator.yaml"] == f"---\nmemory_mib: {memory_mib}\ncpu_count: 4\n"
    assert files["Dockerfile"].splitlines() == [
        "FROM debian@sha256:00", 'ENV A="b c"', "COPY image/ /",
        'CMD ["/usr/bin/python3", "-m", "hotloop"]',
    ]  # fmt: skip


def test_a_base_image_without_a_digest_is_refused():
    with pytest.raises(InputError, match="digest"):
        guest("nitro", base_image="debian:12").nitro_files()


@pytest.mark.parametrize(
    ("kind", "debug", "wanted"),
    [
        ("sev-snp", False, "policy=0x30000"),
        ("sev-snp", True, "policy=0xb0000"),
        ("tdx", False, "tdx-guest,id=cgs0"),
        ("tdx", True, "tdx-guest,id=cgs0,attributes=1"),
    ],
)
def test_qemu_s_command_line(kind, debug, wanted):
    words = guest(kind, debug=debug, environment={"A": "b"}).qemu_command()
    options = dict(zip(words[1::2], words[2::2], strict=False))
    assert words[words.index("-m") + 1] == f"{size(kind).size_bytes // MIB}M"
    assert options["-accel"] == "kvm"
    assert "confidential-guest-support=cgs0" in options["-machine"]
    assert any(word.endswith(wanted) for word in words)
    append = words[words.index("-append") + 1]
    assert append == "console=ttyS0 panic=-1 A=b -- /usr/bin/python3 -m hotloop"
    assert words[-2:] == ["-net", "none"]


def test_the_unit_gives_the_devices_and_nothing_else():
    unit = guest("sev-snp", initrd=Path("/a b/$x%")).unit()
    assert '-initrd "/a b/$$x%%"' in unit
    assert [line for line in unit.splitlines() if line.startswith("DeviceAllow")] == [
        "DeviceAllow=/dev/kvm rw", "DeviceAllow=/dev/sev rw", "DeviceAllow=/dev/vhost-vsock rw",
    ]  # fmt: skip
    assert "PrivateNetwork=yes" in unit


def test_the_image_has_the_interpreter_and_no_torch():
    files = image_files(needs_torch=False)
    names = {path.name for path in files}
    assert {"os.py", "loader.py", "runner.py"} <= names
    assert not any("/torch/" in str(path) for path in files)
    assert image_bytes(False) > sum(path.stat().st_size for path in files) * 0.99
