"""Keys, sealed files and folders, counters."""

import io
import os
import shutil
import subprocess
import time

import pytest

from hotloop.cli.main import main
from hotloop.errors import HotloopError, InputError, SealedError, StorageError
from hotloop.sealed import FileCounter, Sealed, SealingKey, new_key_file, read_key, seal, unseal
from hotloop.sealed.counter import parse_counter

pytest.importorskip("cryptography", reason="pip install 'hotloop[enclave]'")

KEY = SealingKey(bytes(range(32)))


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "plain"
    (source / "sub").mkdir(parents=True)
    (source / "a.bin").write_bytes(b"first secret" * 9)
    (source / "sub" / "b.bin").write_bytes(b"second secret")
    (source / "empty").write_bytes(b"")
    seal(source, tmp_path / "sealed", KEY)
    return tmp_path


def test_a_key_is_for_its_owner_alone(tmp_path, monkeypatch):
    path = tmp_path / "key"
    new_key_file(path)
    key = read_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.secret.hex() not in repr(key)
    with pytest.raises(InputError, match="never written over"):
        new_key_file(path)
    path.chmod(0o640)
    with pytest.raises(InputError, match="0600"):
        read_key(path)
    path.chmod(0o600)
    fd = os.open(path, os.O_RDONLY)
    monkeypatch.setenv("HOTLOOP_KEY_FD", str(fd))
    assert read_key("fd").secret == key.secret
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert read_key("-").secret == key.secret
    path.write_bytes(b"almost a secret")
    with pytest.raises(InputError) as caught:
        read_key(path)
    assert "almost" not in str(caught.value)


def test_a_folder_comes_back_and_nothing_plain_is_in_it(folder):
    for path in (folder / "sealed").rglob("*.sealed"):
        assert b"secret" not in path.read_bytes()
    unseal(folder / "sealed", folder / "back", KEY)
    for name in ("a.bin", "sub/b.bin", "empty"):
        assert (folder / "back" / name).read_bytes() == (folder / "plain" / name).read_bytes()
    place = Sealed(folder / "sealed", KEY)
    assert [p.name for p in place.iterdir()] == ["a.bin", "empty", "sub"]
    assert (place / "sub").is_dir()
    assert (place / "sub" / "b.bin").read_bytes() == b"second secret"


def _swap(folder):
    place = folder / "sealed"
    shutil.copy(place / "a.bin.sealed", place / "empty.sealed")


def _of_another_folder(folder):
    seal(folder / "plain", folder / "other", KEY)
    shutil.copy(folder / "other" / "a.bin.sealed", folder / "sealed" / "a.bin.sealed")


def _index_of_another_folder(folder):
    seal(folder / "plain", folder / "other", KEY)
    shutil.copy(folder / "other" / "index.json.sealed", folder / "sealed")


def _missing(folder):
    (folder / "sealed" / "sub" / "b.bin.sealed").unlink()


def _no_index(folder):
    (folder / "sealed" / "index.json.sealed").unlink()


@pytest.mark.parametrize(
    "harm", [_swap, _of_another_folder, _index_of_another_folder, _missing, _no_index]
)
def test_a_folder_is_whole_or_refused(folder, harm):
    harm(folder)
    with pytest.raises(SealedError):
        unseal(folder / "sealed", folder / "back", KEY)
    assert sorted(p.name for p in folder.iterdir() if p.name != "other") == ["plain", "sealed"]


def test_a_file_keeps_its_name_and_plain_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"data")
    seal(path, tmp_path / "a.npz.sealed", KEY)
    assert Sealed(tmp_path / "a.npz.sealed", KEY).suffix == ".npz"
    (tmp_path / "a.npz.sealed").rename(tmp_path / "b.npz.sealed")
    with pytest.raises(SealedError, match="as another file"):
        Sealed(tmp_path / "b.npz.sealed", KEY).read_bytes()
    with pytest.raises(SealedError, match="must be named"):
        Sealed(path, KEY).read_bytes()
    with pytest.raises(InputError, match="must be new"):
        seal(path, tmp_path / "b.npz.sealed", KEY)


def test_a_link_in_a_folder_is_not_followed(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "link").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="plain files"):
        seal(tmp_path / "plain", tmp_path / "sealed", KEY)
    assert not (tmp_path / "sealed").exists()


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("x,label\n1,0\n")
    assert main(["enclave", "key", "new", "key"]) == 0
    assert main(["enclave", "seal", "data.csv", "--key-file", "key"]) == 0
    assert main(["enclave", "unseal", "data.csv.sealed", "--key-file", "key", "--out", "b"]) == 0
    assert (tmp_path / "b").read_text() == "x,label\n1,0\n"
    assert main(["enclave", "key", "new", "other"]) == 0
    assert main(["enclave", "unseal", "data.csv.sealed", "--key-file", "other", "--out", "c"]) == 2
    assert main(["enclave", "seal", "data.csv"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all(line.startswith("hotloop: error: ") for line in errors)
    assert not (tmp_path / "c").exists()


def test_a_counter_in_a_file_only_grows(tmp_path):
    counter = FileCounter(tmp_path / "counter")
    with pytest.raises(InputError, match="counter new"):
        counter.read()
    counter.create()
    counter.advance(5)
    counter.advance(3)
    assert counter.read() == 5
    (tmp_path / "counter").write_text("-1\n")
    with pytest.raises(InputError, match="must hold a number"):
        counter.read()
    with pytest.raises(InputError, match="tpm:0x"):
        parse_counter("tpm:12")


@pytest.fixture
def tpm(tmp_path, monkeypatch):
    if not (shutil.which("swtpm") and shutil.which("tpm2_nvread")):
        pytest.skip("apt-get install swtpm tpm2-tools")
    (tmp_path / "tpm").mkdir()
    socket = tmp_path / "tpm" / "socket"
    process = subprocess.Popen(
        ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path / 'tpm'}", "--flags",
         "not-need-init,startup-clear", "--server", f"type=unixio,path={socket}",
         "--ctrl", f"type=unixio,path={socket}.ctrl"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 20
    while not socket.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    monkeypatch.setenv("TPM2TOOLS_TCTI", f"swtpm:path={socket}")
    yield "tpm:0x1500016"
    process.terminate()
    process.wait(20)


def test_a_counter_in_a_tpm_only_grows(tpm):
    counter = parse_counter(tpm)
    with pytest.raises(InputError, match="counter new"):
        counter.read()
    counter.create()
    start = counter.read()
    counter.advance(start + 2)
    counter.advance(start)
    assert counter.read() == start + 2
    with pytest.raises(StorageError, match="1000"):
        counter.advance(start + 5000)
    with pytest.raises(HotloopError):
        counter.create()
    assert counter.read() == start + 2
