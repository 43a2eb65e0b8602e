"""Inputs and answers of any structure are eager's; what is no function only eager gives."""

import collections
import dataclasses

import numpy
import pytest
import torch
from torch import nn

import hotloop
from hotloop.errors import DataError, ModelError

QUICK = {"budget_s": 0.3, "cache": False, "batch_sizes": [3]}
ENGINES = ["eager", "onnxruntime"]
Pair = collections.namedtuple("Pair", "scores hidden")


def compiled(model, example, **options):
    return hotloop.compile_inference(model, example, **{"engines": ENGINES, **QUICK, **options})


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As the answers of Transformers: a mapping that is a dataclass too."""

    scores: torch.Tensor = None
    hidden: tuple = None
    loss: torch.Tensor = None

    def __post_init__(self):
        for part in dataclasses.fields(self):
            if getattr(self, part.name) is not None:
                self[part.name] = getattr(self, part.name)

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)


@dataclasses.dataclass(frozen=True)
class Images:
    pixels: torch.Tensor
    scale: float = 2.0


class Encoder(nn.Module):
    """``kind`` chooses what it answers with."""

    def __init__(self, kind):
        super().__init__()
        self.words, self.head, self.kind = nn.Embedding(20, 6), nn.Linear(6, 4), kind

    def forward(self, ids, mask=None, *, double=False):
        hidden = self.words(ids)
        if mask is not None:
            hidden = hidden * mask[..., None]
        scores = self.head(hidden.mean(1)) * (2 if double else 1)
        return self.kind(scores, hidden)


def _ids(rows=3):
    return torch.randint(20, (rows, 5)), torch.rand(rows, 5)


def _flat(answer):
    if isinstance(answer, torch.Tensor | numpy.ndarray):
        return [torch.as_tensor(answer)]
    if dataclasses.is_dataclass(answer) and not isinstance(answer, dict):
        answer = vars(answer)
    parts = answer.values() if isinstance(answer, dict) else answer
    return [tensor for part in parts if part is not None for tensor in _flat(part)]


def assert_alike(got, want):
    assert type(got) is type(want)
    for a, b in zip(_flat(got), _flat(want), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (lambda s, h: {"logits": s, "states": (h, None, h)}, ["logits", "states_0", "states_2"]),
        (lambda s, h: {"ids": s}, ["output.ids"]),
        (lambda s, h: (s, [h]), ["output", "output_1"]),
        (lambda s, h: Pair(s, h), ["scores", "hidden"]),
        (lambda s, h: Output(scores=s, hidden=(h,)), ["scores", "hidden_0"]),
        (lambda s, h: Images(s, None), ["pixels"]),
    ],
    ids=["dict", "name of an input", "nested", "named tuple", "model output", "dataclass"],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_answer_of_any_type(engine, kind, names):
    model = Encoder(kind).eval()
    ids, mask = _ids()
    with compiled(model, {"ids": ids, "mask": mask}, engines=[engine]) as runner:
        assert runner.engine.name == engine
        assert [spec.name for spec in runner.inputs] == ["ids", "mask"]
        assert [spec.name for spec in runner.outputs] == names
        for rows in (1, 3, 8):
            ids, mask = _ids(rows)
            with torch.no_grad():
                want = model(ids, mask)
            assert_alike(runner(ids=ids, mask=mask), want)
            assert_alike(runner({"ids": ids, "mask": mask}), want)
            arrays = runner({"ids": ids.numpy(), "mask": mask.numpy()})
            assert type(arrays) is type(want)
            assert all(isinstance(a, numpy.ndarray) for a in _leaves(arrays))


def _leaves(answer):
    if isinstance(answer, numpy.ndarray | torch.Tensor):
        return [answer]
    if dataclasses.is_dataclass(answer) and not isinstance(answer, dict):
        answer = vars(answer)
    parts = answer.values() if isinstance(answer, dict) else answer
    return [leaf for part in parts if part is not None for leaf in _leaves(part)]


def test_a_model_is_called_as_a_step_calls_it():
    model = Encoder(lambda s, h: s).eval()
    ids, mask = _ids()
    with torch.no_grad():
        want, twice = model(ids, mask), model(ids, mask, double=True)
    for example in ((ids, mask), [ids, mask], hotloop.Arguments(ids, mask)):
        with compiled(model, example) as runner:
            assert_alike(runner(ids, mask), want)
            assert_alike(runner(example), want)
            (answer,) = runner.map([example])
            assert_alike(answer, want)
    with compiled(model, hotloop.Arguments(ids, mask=mask, double=True)) as runner:
        assert [spec.name for spec in runner.inputs] == ["ids", "mask"]
        assert_alike(runner(ids, mask=mask, double=True), twice)
        assert_alike(runner(hotloop.Arguments(ids, mask=mask, double=True)), twice)
        with pytest.raises(DataError, match="another arrangement"):
            runner(ids, mask=mask, double=False)


def test_one_argument_may_be_a_tree():
    class OnImages(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, images):
            return self.layer(images.pixels * images.scale)

    class OnDict(OnImages):
        def forward(self, batch):
            return self.layer(batch["a"] + batch["b"])

    x = torch.randn(3, 4)
    for model, example, names in (
        (OnImages().eval(), Images(x), ["images.pixels"]),
        (OnDict().eval(), hotloop.Arguments({"a": x, "b": x}), ["batch.a", "batch.b"]),
    ):  # fmt: skip
        value = example.args[0] if isinstance(example, hotloop.Arguments) else example
        with torch.no_grad():
            want = model(value)
        with compiled(model, example, engines=["eager"]) as runner:
            assert [spec.name for spec in runner.inputs] == names
            assert_alike(runner(value), want)
            assert_alike(runner(example), want)


def test_an_export_has_the_names_and_gives_dicts_for_types_of_the_models_own(tmp_path):
    model = Encoder(lambda s, h: Output(scores=s, hidden=(h,))).eval()
    ids, mask = _ids()
    with compiled(model, {"ids": ids, "mask": mask}, engines=["onnxruntime"]) as runner:
        folder = runner.save(tmp_path / "export")
        want = runner(ids=ids, mask=mask)
    with hotloop.load_inference(folder) as loaded:
        assert [spec.name for spec in loaded.outputs] == ["scores", "hidden_0"]
        got = loaded({"ids": ids, "mask": mask})
        assert type(got) is dict
        assert list(got) == ["scores", "hidden"]
        assert torch.equal(got["scores"], want.scores)


# ---- What only the module itself answers --------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 64)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x), 0.5)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.random = numpy.random.default_rng(0)

    def forward(self, x):
        return x + float(self.random.random())


class Streaming(nn.Module):
    """The answer follows from the calls before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x):
        self.total += x.sum(0)
        return x + self.total


class Cache:
    def __init__(self, states):
        self.states = states


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, x):
        return {"scores": self.layer(x), "cache": Cache([x]), "rows": len(x), "kind": "cached"}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Dropping, "random numbers"), (Noisy, "another way each time"),
        (Streaming, "another way each time"), (Caching, "Cache"),
    ],
)  # fmt: skip
def test_what_only_eager_gives(make, reason, tmp_path):
    model, x = make().eval(), torch.randn(1, 6).repeat(3, 1)
    state = torch.get_rng_state()
    with compiled(model, x, engines=None) as runner:
        assert torch.equal(torch.get_rng_state(), state)
        assert runner.engine.name == "eager"
        others = [row for row in runner.report.rows if row.setting.engine != "eager"]
        assert others
        assert all(reason in row.excluded for row in others)
        first, again = runner(x), runner(x)
        if make is Caching:
            assert first["rows"] == 3
            assert first["kind"] == "cached"
            assert isinstance(first["cache"], Cache)
            assert runner(x[:2])["rows"] == 2
            assert isinstance(runner(x.numpy())["scores"], numpy.ndarray)
        else:
            assert not torch.equal(first, again)
            assert isinstance(runner(x.numpy()), numpy.ndarray)
        with pytest.raises(ModelError, match=reason):
            runner.save(tmp_path / "export")
    with pytest.raises(ModelError, match=reason) as told:
        compiled(model, x, engines=["onnxruntime"])
    assert "\n" not in str(told.value)


def test_a_stream_begins_at_its_beginning():
    x = torch.ones(3, 6)
    model = Streaming().eval()
    with compiled(model, x, engines=["eager"], batch_sizes=[3]):
        assert torch.equal(model.total, torch.zeros(6))


class Centering(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        x -= x.mean(1, keepdim=True)
        x.div_(x.std(1, keepdim=True) + 1)
        return self.layer(x)


class Masking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x, mask):
        return self.layer(x.masked_fill_(mask, 0.0)), mask.logical_not_()


@pytest.mark.parametrize("engine", [None, "eager", "onnxruntime", "openvino", "hotloop"])
@pytest.mark.parametrize("make", [Centering, Masking])
def test_a_model_that_writes_into_its_input(make, engine):
    model = make().eval()
    inputs = [torch.randn(3, 6) * 3 + 2]
    if make is Masking:
        inputs.append(torch.rand(3, 6) > 0.5)
    example = tuple(tensor.clone() for tensor in inputs)
    try:
        runner = compiled(model, example, engines=engine and [engine])
    except ModelError:
        assert engine not in (None, "eager")
        return
    with runner, torch.no_grad():
        assert all(map(torch.equal, example, inputs)), "the example was changed"
        for _ in range(3):
            want = model(*[tensor.clone() for tensor in inputs])
            assert_alike(runner(*[tensor.clone() for tensor in inputs]), want)
