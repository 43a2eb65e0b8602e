"""hotloop's own engine: every layer against PyTorch, and files that are not what they claim."""

import json
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.nn import functional as F

from hotloop import kernels
from hotloop.errors import DataError, InputError, ModelError, RunError
from hotloop.infer.capture import export_program, own_copy, read_signature
from hotloop.infer.engines.hotloop import HotloopEngine
from hotloop.infer.lowering import lower
from hotloop.infer.network import Network
from support import examples

pytestmark = pytest.mark.skipif(
    not kernels.is_available(), reason=kernels.unavailable_reason() or ""
)


def lowered(model, x):
    """A twin in eval mode, its network, and the names of its input and output."""
    twin = own_copy(model)
    signature, tensors = read_signature(twin, x)
    program, fixed = export_program(twin, signature, tensors)
    assert fixed is None
    return twin, lower(program), signature


def with_statistics(model, shape):
    """Batch norm that changes what goes through."""
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(8, *shape) * 2 + 1)
    return model.eval()


def assert_as_torch(model, shape, batches=(1, 2, 5, 33), threads=(1, 2)):
    twin, network, signature = lowered(model, torch.randn(4, *shape))
    for count in threads:
        engine = HotloopEngine(network, signature.inputs, signature.outputs, num_threads=count)
        for batch in batches:
            x = torch.randn(batch, *shape)
            with torch.inference_mode():
                want = twin(x)
            (got,) = engine.run([x.numpy()])
            assert got.shape == tuple(want.shape)
            assert got.dtype == numpy.float32
            error = numpy.abs(got - want.numpy()).max() / max(1e-6, float(want.abs().max()))
            assert error < 2e-5
    return network


class Block(nn.Module):
    def __init__(self, channels, made, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, made, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(made)
        self.conv2 = nn.Conv2d(made, made, 3, 1, 1)
        self.norm2 = nn.BatchNorm2d(made)
        self.skip = nn.Conv2d(channels, made, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


def test_residual_blocks_are_one_layer_for_each_convolution():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(16, 16, 1),
        Block(16, 40, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 7),
    )  # fmt: skip
    network = assert_as_torch(with_statistics(model, (3, 37, 30)), (3, 37, 30))
    kinds = [layer.kind for layer in network.layers]
    assert kinds == [
        "nchw_to_nhwc", "convolution", "max_pool", *["convolution"] * 5, "mean", "linear",
    ]  # fmt: skip


class Attention(nn.Module):
    """One encoder layer, pre-norm, queries and keys in another order than values."""

    def __init__(self, width, heads, causal, parts):
        super().__init__()
        self.heads, self.causal, self.parts = heads, causal, parts
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.act = nn.GELU("tanh" if causal else "none")

    def forward(self, x):
        batch, rows, width = x.shape
        y = self.qkv(self.norm(x))
        if self.parts == "unbind":
            y = y.view(batch, rows, 3, self.heads, width // self.heads)
            q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            split = y.chunk(3, -1) if self.parts == "chunk" else y.split(width, 2)
            q, k, v = (
                p.unflatten(2, (self.heads, width // self.heads)).transpose(1, 2) for p in split
            )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, rows, width))
        return x + self.down(self.act(self.up(x)))


@pytest.mark.parametrize("parts", ["unbind", "chunk", "split"])
@pytest.mark.parametrize(("rows", "causal"), [(1, False), (7, True), (70, False), (131, True)])
def test_attention(rows, causal, parts):
    torch.manual_seed(rows)
    network = assert_as_torch(Attention(24, 3, causal, parts), (rows, 24), batches=(1, 3))
    # What only looks at a value in another way costs nothing.
    kinds = [layer.kind for layer in network.layers]
    assert kinds == ["layer_norm", "linear", "attention", "linear", "linear", "linear"]


@pytest.mark.parametrize("first", [False, True])
def test_pytorchs_own_encoder(first):
    layer = nn.TransformerEncoderLayer(
        32, 4, 64, activation="gelu" if first else "relu", batch_first=True, norm_first=first
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    network = assert_as_torch(model, (7, 32), batches=(1, 2, 9))
    assert [layer.kind for layer in network.layers].count("attention") == 2


class Tokens(nn.Module):
    """Rows of all samples side by side, as many write it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x):
        y = torch.relu(self.one(x.reshape(-1, 6)))
        return self.two(y).view(x.shape[0], -1, 5).mean(1)


def test_rows_of_all_samples_side_by_side():
    network = assert_as_torch(Tokens(), (4, 6))
    assert [layer.kind for layer in network.layers] == ["linear", "linear", "mean"]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(5, 3), nn.LogSoftmax(1)), (5,)),
        (nn.Sequential(nn.Linear(5, 300), nn.Softmax(-1)), (4, 5)),
        (nn.Sequential(nn.Linear(9, 70), nn.BatchNorm1d(70), nn.GELU(), nn.Dropout()), (9,)),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), (2, 3, 4)),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), (2, 6, 5)),
        (nn.Sequential(nn.Conv2d(9, 8, 3, padding=2), nn.MaxPool2d(2), nn.ReLU()), (9, 7, 9)),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(72, 2)),
         (1, 6, 6)),
        (nn.Sequential(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Softmax(1)),
         (1, 9, 8)),
        (nn.Sequential(nn.Conv2d(32, 5, 1), nn.Conv2d(5, 3, (2, 5), (2, 3), (1, 2))), (32, 9, 11)),
        (nn.Sequential(nn.LayerNorm(33), nn.Linear(33, 1000), nn.ReLU()), (3, 33)),
        (nn.Sequential(nn.LayerNorm(33, elementwise_affine=False)), (33,)),
    ],
    ids=lambda value: str(value).replace("\n", "")[:40],
)  # fmt: skip
def test_single_layers(model, shape):
    torch.manual_seed(0)
    if any(isinstance(part, nn.BatchNorm1d) for part in model):
        with_statistics(model, shape)
    assert_as_torch(model, shape)


@st.composite
def convolutional(draw):
    """Layers that fit each other, and the image they begin with."""
    channels, height, width = draw(st.integers(1, 20)), draw(st.integers(3, 14)), 9
    shape = (channels, height, width)
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        made, kernel = draw(st.integers(1, 70)), draw(st.integers(1, min(3, height, width)))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, kernel - 1))
        layers.append(nn.Conv2d(channels, made, kernel, stride, padding, bias=draw(st.booleans())))
        height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
        layers += [nn.BatchNorm2d(made)] * draw(st.booleans()) + [nn.ReLU()] * draw(st.booleans())
        if min(height, width) >= 2 and draw(st.booleans()):
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        channels = made
    if draw(st.booleans()):
        layers += [nn.Flatten(), nn.Linear(channels * height * width, draw(st.integers(1, 130)))]
    return nn.Sequential(*layers), shape


@settings(max_examples=examples(25), deadline=None)
@given(convolutional(), st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 3))
def test_any_convolutional_network(drawn, seed, batch, threads):
    model, shape = drawn
    torch.manual_seed(seed)
    assert_as_torch(with_statistics(model, shape), shape, (batch,), (threads,))


@settings(max_examples=examples(25), deadline=None)
@given(st.integers(1, 300), st.integers(1, 150), st.integers(1, 210), st.integers(1, 3))
def test_any_product(depth, outputs, batch, threads):
    torch.manual_seed(depth)
    assert_as_torch(nn.Linear(depth, outputs), (depth,), (batch,), (threads,))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.ReLU()], ids=str)
def test_what_follows_holds_over_all_numbers(act):
    twin, network, signature = lowered(nn.Sequential(act), torch.randn(2, 4))
    engine = HotloopEngine(network, signature.inputs, signature.outputs)
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, 1e-30, -1e30, 1e30, 1e37])])
    x = torch.nn.functional.pad(x, (0, -len(x) % 4)).reshape(-1, 4)
    want = twin(x)
    got = torch.from_numpy(engine.run([x.numpy()])[0])
    # The error function is off by some roundings, times x over 2; beyond its tails by nothing.
    torch.testing.assert_close(got, want, rtol=3e-7, atol=3e-6)
    if act.__class__ is nn.GELU and act.approximate == "none":
        far = x.abs() > 6
        assert torch.equal(got[far], torch.where(x[far] > 0, x[far], 0.0))


def test_what_is_not_a_number_stays_so():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                          nn.Linear(32, 40), nn.GELU(), nn.Softmax(1))  # fmt: skip
    _, network, signature = lowered(model, torch.randn(2, 1, 6, 6))
    engine = HotloopEngine(network, signature.inputs, signature.outputs)
    x = torch.randn(3, 1, 6, 6)
    x[1, 0, 2, 2] = math.nan
    (got,) = engine.run([x.numpy()])
    assert numpy.isnan(got[1]).all()
    assert numpy.isfinite(got[[0, 2]]).all()


def test_values_share_memory_and_a_large_batch_takes_no_more():
    model = nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(4)])
    _, network, signature = lowered(model, torch.randn(2, 4096))
    offsets, floats = network.offsets()
    # Of four values one is the result; of the others no more than two live at once.
    assert floats == 2 * 4096
    assert offsets[0] == -1
    assert offsets[-1] == -2
    engine = HotloopEngine(network, signature.inputs, signature.outputs)
    assert engine.working_bytes(1) == 2 * 4096 * 4
    assert 32 << 20 < engine.working_bytes(5000) <= 64 << 20
    assert engine.working_bytes(0) == 0
    x = numpy.random.default_rng(0).standard_normal((5000, 4096), dtype="float32")
    before = kernels.library().hotloop_scratch_bytes()
    whole = engine.run_one(x)  # 160 MB of values, were they all there at once.
    assert numpy.array_equal(whole[4000:4100], engine.run_one(x[4000:4100]))
    assert kernels.library().hotloop_scratch_bytes() - before < 100e6


def test_results_do_not_depend_on_the_number_of_threads():
    model = nn.Sequential(nn.Linear(700, 500), nn.ReLU(), nn.Linear(500, 65))
    _, network, signature = lowered(model, torch.randn(2, 700))
    x = torch.randn(77, 700).numpy()
    runs = [
        HotloopEngine(network, signature.inputs, signature.outputs, num_threads=n).run_one(x)
        for n in (1, 2, 3)
    ]
    assert numpy.array_equal(runs[0], runs[1])
    assert numpy.array_equal(runs[0], runs[2])


class AlwaysDrops(nn.Module):
    def forward(self, x):
        return F.dropout(x, training=True)


@pytest.mark.parametrize(
    ("model", "shape", "rule"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (4,), "tanh"),
        (nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5), "without groups"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), (4, 5, 5), "ceil_mode"),
        (nn.GRU(4, 4, batch_first=True), (3, 4), "one output"),
        (nn.Linear(4, 2).double(), (4,), "float32"),
        (AlwaysDrops(), (4,), "in eval mode"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
         (4, 5, 5), "batch norm with its statistics"),
    ],
    ids=["tanh", "groups", "ceil", "gru", "double", "dropout", "norm of the batch"],
)  # fmt: skip
def test_what_no_layer_does_is_named(model, shape, rule):
    x = torch.randn(3, *shape, dtype=next(iter(model.parameters()), torch.ones(1)).dtype)
    with pytest.raises(ModelError, match=rule):
        lowered(model, x)


def test_a_tensor_elsewhere_or_a_closed_engine_is_one_clear_line():
    _, network, signature = lowered(nn.Linear(4, 2), torch.randn(2, 4))
    engine = HotloopEngine(network, signature.inputs, signature.outputs)
    with pytest.raises(InputError, match=r"pass x.cpu\(\)"):
        engine.run_tensors([torch.empty(2, 4, device="meta")])
    with pytest.raises(DataError, match="float32"):
        engine.run([numpy.zeros((2, 5), "float32")])
    assert engine.run([numpy.zeros((0, 4), "float32")])[0].shape == (0, 2)
    engine.close()
    with pytest.raises(RunError, match="must be open"):
        engine.run_one(numpy.zeros((2, 4), "float32"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A file with every kind of layer, and its header."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(8, 12, 3), nn.MaxPool2d(2),
        nn.Flatten(2), nn.Linear(4, 24), Attention(24, 3, True, "unbind"), nn.Softmax(-1),
    )  # fmt: skip
    _, network, _ = lowered(with_statistics(model, (3, 15, 15)), torch.randn(2, 3, 15, 15))
    path = tmp_path_factory.mktemp("network") / "network.safetensors"
    network.save(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    return path, json.loads(header["__metadata__"]["hotloop"]), model


def test_a_file_gives_the_same_network(kept):
    path, _, model = kept
    again = Network.load(path)
    twin, network, signature = lowered(model, torch.randn(2, 3, 15, 15))
    assert again.layers == network.layers
    assert again.shapes == network.shapes
    x = torch.randn(5, 3, 15, 15)
    engine = HotloopEngine(path, signature.inputs, signature.outputs)
    torch.testing.assert_close(torch.from_numpy(engine.run([x.numpy()])[0]), twin(x))


def _leaves(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _leaves(inner, (*path, place))
    else:
        yield path


@settings(max_examples=examples(60), deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_runs_within_its_memory(kept, tmp_path_factory, data):
    path, document, _ = kept
    changed = json.loads(json.dumps(document))
    where = data.draw(st.sampled_from(sorted(_leaves(changed), key=str)))
    value = data.draw(
        st.one_of(
            st.integers(-3, 40),
            st.integers(),
            st.none(),
            st.booleans(),
            st.text(max_size=4),
            st.floats(),
            st.lists(st.integers(-1, 3), max_size=3),
            st.sampled_from(["0.weight", "1.bias", "relu", "mean", "linear"]),
        )
    )
    inner = changed
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    damaged = tmp_path_factory.mktemp("damaged") / "network.safetensors"
    try:
        text = json.dumps(changed)
    except ValueError:
        return
    save_file(load_file(path), damaged, metadata={"hotloop": text})
    try:
        network = Network.load(damaged)
    except ModelError:
        return
    from hotloop.infer import TensorSpec

    specs = [TensorSpec("x", "float32", (None, *network.input_shape))]
    engine = HotloopEngine(network, specs, specs)
    assert engine.run_one(numpy.ones((2, *network.input_shape), "float32")).shape[0] == 2


def test_a_file_with_the_names_of_earlier_versions_loads(tmp_path):
    network = Network((3, 4, 5))
    network.nhwc_to_nchw(network.nchw_to_nhwc(0))
    network.arrays["unused"] = numpy.zeros(1, "float32")
    path = tmp_path / "network.safetensors"
    network.save(path)
    with safe_open(path, framework="numpy") as file:
        document = file.metadata()["hotloop"]
    former = document.replace("nchw_to_nhwc", "turn_in").replace("nhwc_to_nchw", "turn_out")
    assert former != document
    save_file(load_file(path), path, metadata={"hotloop": former})
    assert [layer.kind for layer in Network.load(path).layers] == ["nchw_to_nhwc", "nhwc_to_nchw"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x02\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "network.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="must be a network of hotloop"):
        Network.load(path)
