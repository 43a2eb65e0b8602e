import gzip
import hashlib
import http.server
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hotloop.data import download, load_mnist, mnist, open_dataset
from hotloop.data.download import RemoteFile, fetch
from hotloop.errors import DataError

from .conftest import idx_bytes


def remote(name, content):
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return RemoteFile(name, len(content), md5, hashlib.sha256(content).hexdigest())


@contextmanager
def server(bodies, *, cut=0):
    """A mirror on the loopback; ``cut`` bytes fewer are sent than the header announces."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            asked.append(name)
            if name not in bodies:
                self.send_error(404)
                return
            body = bodies[name]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - cut])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/mnist/", asked
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture
def nobody():
    """An address of the loopback where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/"


BODY = bytes(range(256)) * 900
FILE = remote("file.gz", BODY)


def test_a_good_download_is_kept_and_not_fetched_again(tmp_path):
    with server({"file.gz": BODY}) as (address, asked):
        assert fetch([FILE], tmp_path / "new", [address]) is None
        assert fetch([FILE], tmp_path / "new", [address]) is None
    assert (tmp_path / "new" / "file.gz").read_bytes() == BODY
    assert asked == ["file.gz"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["file.gz"]


@pytest.mark.parametrize(
    ("body", "cut", "reason"),
    [
        (BODY[:-1] + b"\0", 0, "wrong checksum"),
        (BODY, 1000, "instead of"),
        (BODY[:1000], 0, "1000 bytes instead of"),
        (BODY + b"more", 0, "more than"),
        (b"", 0, "0 bytes instead of"),
    ],
)
def test_a_wrong_body_leaves_nothing_behind(tmp_path, body, cut, reason):
    with server({"file.gz": body}, cut=cut) as (address, _):
        text = fetch([FILE], tmp_path, [address])
    assert reason in text
    assert "127.0.0.1" in text
    assert list(tmp_path.iterdir()) == []


def test_the_next_mirror_is_tried_and_a_dead_one_only_once(tmp_path, nobody):
    other = remote("other.gz", b"other")
    with server({"file.gz": BODY, "other.gz": b"other"}) as (address, asked):
        assert fetch([FILE, other], tmp_path, [nobody, address]) is None
    assert asked == ["file.gz", "other.gz"]
    text = fetch([remote("third.gz", b"third")], tmp_path, [nobody])
    assert "refused" in text


def test_a_mirror_without_the_file_says_so(tmp_path):
    with server({}) as (address, _):
        assert "Not Found" in fetch([FILE], tmp_path, [address])


def test_a_resolver_that_hangs_is_given_up_on(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(download.socket, "getaddrinfo", lambda *_: release.wait())
    try:
        text = fetch([FILE], tmp_path, ["http://mirror.invalid/"], connect_timeout_s=0.05)
    finally:
        release.set()
    assert "no answer about its address" in text


def test_an_unwritable_cache_is_a_reason_and_not_a_crash(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with server({"file.gz": BODY}) as (address, _):
        assert "directory" in fetch([FILE], tmp_path / "file" / "mnist", [address]).lower()


@pytest.fixture
def published(monkeypatch, digits):
    """A small training split that the mirrors are said to have."""
    bodies = {
        name: gzip.compress(idx_bytes(array))
        for name, array in zip((f.name for f in mnist.FILES["train"]), digits, strict=True)
    }
    files = tuple(remote(name, body) for name, body in bodies.items())
    monkeypatch.setitem(mnist.FILES, "train", files)
    return bodies


def pixels(data):
    x = torch.empty(data.num_samples, *data.sample_shape)
    y = torch.empty(data.num_samples, dtype=torch.int64)
    data.gather(torch.arange(data.num_samples), x, y)
    return x, y


def test_the_full_set_is_fetched_into_the_cache_and_found_there(published, digits):
    with server(published) as (address, asked):
        fetched = load_mnist("train", mirrors=[address], transforms=())
        again = load_mnist("train", mirrors=[address])
    assert asked == list(published)
    assert "fetched to" in fetched.description
    assert "40 real digits" in again.description
    x, y = pixels(fetched)
    np.testing.assert_array_equal(x[:, 0].numpy(), digits[0].astype(np.float32) / 255)
    np.testing.assert_array_equal(y.numpy(), digits[1])


def test_a_download_that_was_cut_short_is_gone_on_with(published, nobody, tmp_path):
    first = next(iter(published))
    with server({first: published[first]}) as (address, _):
        data = load_mnist("train", mirrors=[address])
    assert "shipped in the package" in data.description
    assert [p.name for p in (tmp_path / "xdg-cache/hotloop/mnist").iterdir()] == [first]
    assert "refused" in load_mnist("train", mirrors=[nobody]).description
    with server(published) as (address, asked):
        data = load_mnist("train", mirrors=[address])
    assert "fetched to" in data.description
    assert asked == list(published)[1:]


def test_offline_the_shipped_digits_are_used_and_the_report_says_so(published, nobody):
    data = load_mnist("train", mirrors=[nobody])
    assert data.num_samples == 10_000
    assert "shipped in the package" in data.description
    assert "refused" in data.description
    with pytest.raises(DataError, match="full MNIST train split") as error:
        load_mnist("train", mirrors=[nobody], prefer="full")
    assert "HOTLOOP_DATA" in str(error.value)


def test_dead_mirrors_are_asked_once_a_process(published, nobody, monkeypatch):
    calls = []
    monkeypatch.setattr(mnist, "fetch", lambda *_: calls.append(1) or "no network")
    load_mnist("train", mirrors=[nobody])
    load_mnist("test", mirrors=[nobody])
    assert calls == [1]


def test_the_network_is_left_alone_when_told(published):
    with server(published) as (address, asked):
        data = load_mnist("train", mirrors=[address], allow_download=False)
        load_mnist("train", mirrors=[address], prefer="shipped")
    assert asked == []
    assert "shipped" in data.description


def test_a_folder_and_hotloop_data_go_before_the_cache(idx_folder, monkeypatch, tmp_path):
    assert str(idx_folder) in load_mnist("test", folder=idx_folder).description
    assert load_mnist("train", folder=str(idx_folder)).num_samples == 40
    monkeypatch.setenv("HOTLOOP_DATA", str(idx_folder))
    assert load_mnist("train", allow_download=False).num_samples == 40
    (tmp_path / "mnist").symlink_to(idx_folder)
    monkeypatch.setenv("HOTLOOP_DATA", str(tmp_path))
    assert open_dataset("mnist", split="test", allow_download=False).num_samples == 40
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="an empty folder"):
        load_mnist("train", folder=tmp_path / "empty")


def test_other_images_and_labels_are_refused(idx_folder, digits):
    (idx_folder / "train-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx_bytes(np.full(40, 11, np.uint8)))
    )
    with pytest.raises(DataError, match="between 0 and 9; got 11 for sample 0"):
        load_mnist("train", folder=idx_folder)
    (idx_folder / "t10k-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(idx_bytes(digits[0][:, :20, :20].copy()))
    )
    with pytest.raises(DataError, match="28 by 28"):
        load_mnist("test", folder=idx_folder)


@pytest.mark.parametrize("options", [{"split": "valid"}, {"split": "train", "prefer": "best"}])
def test_unknown_names_are_refused(options):
    with pytest.raises(DataError):
        load_mnist(**options)


def test_more_samples_than_there_are_come_from_small_distortions(idx_folder):
    def load(num_samples, **options):
        return load_mnist(
            "train", folder=idx_folder, num_samples=num_samples, transforms=(), **options
        )

    more = load(100, seed=5)
    assert "40 real digits" in more.description
    assert "60 small affine distortions" in more.description
    x, y = pixels(more)
    real_x, real_y = pixels(load(None))
    assert torch.equal(x[:40], real_x)
    assert torch.equal(y, real_y[torch.arange(100) % 40])
    assert not torch.equal(x[40:80], real_x)
    # Drawn from seed and position alone: a larger set begins with the smaller one.
    assert torch.equal(pixels(load(130, seed=5))[0][:100], x)
    assert not torch.equal(pixels(load(100, seed=6))[0][40:], x[40:])
    assert torch.equal(pixels(load(7))[0], real_x[:7])


def test_distorted_digits_stay_themselves():
    data = load_mnist("train", prefer="shipped", num_samples=10_500, transforms=())
    x, _ = pixels(data)
    real, distorted = x[:500].flatten(1), x[10_000:].flatten(1)
    similarity = torch.cosine_similarity(real, distorted)
    strangers = torch.cosine_similarity(real, distorted.roll(1, 0))
    assert similarity.median() > 0.6 > strangers.median()
    assert (similarity < 0.9999).all()


def test_the_real_set_has_its_sizes(real_mnist):
    train = load_mnist("train", folder=real_mnist)
    test = load_mnist("test", folder=real_mnist)
    assert (train.num_samples, test.num_samples) == (60_000, 10_000)
    assert train.is_mapped
    assert not test.is_mapped
    x, y = (torch.empty(60_000, 1, 28, 28), torch.empty(60_000, dtype=torch.int64))
    train.gather(torch.arange(60_000), x, y)
    assert x.mean().abs() < 1e-3
    assert (x.std() - 1).abs() < 1e-3
    assert y[:5].tolist() == [5, 0, 4, 1, 9]
