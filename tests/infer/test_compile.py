"""`compile_inference`: what eager gives, whichever engine wins, and a model left as it was."""

import contextlib
import copy
import functools

import numpy
import pytest
import torch

import hotloop
from hotloop.errors import DataError, InputError, MissingExtraError, ModelError
from support import inference_models as models

QUICK = {"budget_s": 0.3, "cache": False}
ENGINES = ["eager", "onnxruntime", "openvino"]
# Those that take any model; hotloop's own takes what its layers do.
ALL = ["hotloop", *ENGINES]


def compiled(model, example, **options):
    return hotloop.compile_inference(model, example, **{"engines": ENGINES, **QUICK, **options})


def eager(model, *args, **kwargs):
    twin = copy.deepcopy(model).eval()
    with torch.inference_mode():
        return twin(*args, **kwargs)


def assert_alike(got, want):
    if isinstance(want, dict):
        assert list(got) == list(want)
        got, want = list(got.values()), list(want.values())
    if isinstance(want, tuple | list):
        assert type(got) is type(want)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert_alike(a, b)
        return
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def runners_of(model, example, **options):
    """Yields the model, and a function: its runner on an engine, compiled when first asked for."""
    with contextlib.ExitStack() as opened:

        @functools.cache
        def runner_on(engine):
            return opened.enter_context(compiled(model, example, engines=[engine], **options))

        yield model, runner_on


@pytest.fixture(scope="module")
def residual():
    yield from runners_of(models.Residual(), torch.randn(4, 1, 9, 9), batch_sizes=[1, 8])


@pytest.fixture(scope="module")
def perceptron():
    yield from runners_of(models.perceptron(), torch.randn(4, 12), batch_sizes=[4])


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("batch", [1, 2, 7, 33, 64, 200])
def test_each_engine_answers_any_batch_size_as_eager(residual, engine, batch):
    model, runner_on = residual
    runner = runner_on(engine)
    assert runner.engine.name == engine
    x = torch.randn(batch, 1, 9, 9)
    assert_alike(runner(x), eager(model, x))
    answer = runner(x.numpy())
    assert type(answer) is numpy.ndarray
    assert_alike(torch.from_numpy(answer), eager(model, x))


@pytest.mark.parametrize("engine", ENGINES)
def test_several_inputs_and_results(engine):
    model = models.Pair()
    example = (torch.randn(4, 5), torch.randn(4, 3))
    with compiled(model, example, engines=[engine], batch_sizes=[4]) as runner:
        assert [s.name for s in runner.inputs] == ["left", "right"]
        inputs = torch.randn(9, 5), torch.randn(9, 3)
        assert_alike(runner(*inputs), eager(model, *inputs))
        arrays = [x.numpy() for x in inputs]
        scores, best = runner(*arrays)
        assert type(scores) is type(best) is numpy.ndarray
        with pytest.raises(DataError, match="one batch size"):
            runner(inputs[0], inputs[1][:5])
        with pytest.raises(DataError, match="another arrangement"):
            runner(inputs[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_named_inputs_and_a_dict_of_results(engine):
    model = models.Named()
    example = {"ids": torch.randint(11, (3, 6)), "mask": torch.ones(3, 6)}
    with compiled(model, example, engines=[engine], batch_sizes=[3]) as runner:
        inputs = {"ids": torch.randint(11, (5, 6)), "mask": torch.rand(5, 6)}
        assert_alike(runner(**inputs), eager(model, **inputs))


def test_the_model_is_left_as_it_was():
    model = models.Residual().train()
    before = copy.deepcopy(model.state_dict())
    with compiled(model, torch.randn(4, 1, 9, 9), batch_sizes=[4]) as runner:
        x = torch.randn(6, 1, 9, 9)
        want = eager(model, x)
        assert all(part.training for part in model.modules())
        assert all(p.requires_grad for p in model.parameters())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        # Trained on, the model is another; the runner keeps what it was given.
        assert_alike(runner(x), want)


@pytest.mark.parametrize("engine", ALL)
def test_what_goes_in_may_have_gradients_strides_or_be_read_only(perceptron, engine):
    model, runner_on = perceptron
    runner = runner_on(engine)
    x = torch.randn(5, 12)
    want = eager(model, x)
    assert_alike(runner(x.clone().requires_grad_()), want)
    assert_alike(runner(x.t().contiguous().t()), want)
    array = x.numpy()[::-1]
    assert_alike(torch.from_numpy(runner(array)), want.flip(0))
    array = x.numpy().copy()
    array.flags.writeable = False
    assert_alike(torch.from_numpy(runner(array)), want)


@pytest.mark.parametrize("engine", ALL)
def test_results_do_not_change_with_the_next_call(perceptron, engine):
    runner = perceptron[1](engine)
    answer = runner(torch.randn(4, 12))
    kept = answer.clone()
    runner(torch.randn(4, 12))
    assert torch.equal(answer, kept)


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize(
    "wrong",
    [
        numpy.zeros((2, 13), "float32"),
        numpy.zeros((2, 12), "float64"),
        numpy.zeros((2, 12), "int64"),
        numpy.zeros(12, "float32"),
        numpy.zeros((), "float32"),
        numpy.zeros((2, 12, 1), "float32"),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_a_wrong_input_is_one_clear_line(perceptron, engine, wrong):
    runner = perceptron[1](engine)
    for value in (wrong, torch.from_numpy(wrong)):
        with pytest.raises(DataError, match=r"float32 \[batch, 12\]"):
            runner(value)


def test_a_graph_bound_to_one_size_and_eager_for_the_others():
    model = models.BoundToFour()
    with compiled(model, torch.randn(4, 6), batch_sizes=[4, 8]) as runner:
        for batch in (1, 4, 5, 8, 2000):
            x = torch.randn(batch, 6)
            assert_alike(runner(x), eager(model, x))
        assert runner.setting_for(8).engine == "eager"
        assert {row.setting.engine for row in runner.report.rows if row.batch_size == 8} == {
            "eager"
        }
    with compiled(model, torch.randn(4, 6), batch_sizes=[4], engines=["onnxruntime"]) as runner:
        assert runner(torch.randn(4, 6)).shape == (4, 2)
        with pytest.raises(DataError, match="batches of 4 alone"):
            runner(torch.randn(5, 6))


def test_a_model_without_a_graph_runs_eagerly_and_says_why():
    model = models.DependsOnValues()
    with compiled(model, torch.randn(4, 4), batch_sizes=[4]) as runner:
        assert runner.engine.name == "eager"
        for x in (torch.ones(3, 4), -torch.ones(3, 4)):
            assert_alike(runner(x), eager(model, x))
        reasons = {row.excluded for row in runner.report.rows if row.setting.engine != "eager"}
        assert all("torch.export must capture the model" in reason for reason in reasons)


def test_the_report_has_every_candidate_at_every_size():
    with compiled(models.perceptron(), torch.randn(4, 12), batch_sizes=[1, 4]) as runner:
        report = runner.report
        assert {row.batch_size for row in report.rows} == {1, 4}
        for size in (1, 4):
            (winner,) = [r for r in report.rows if r.batch_size == size and r.won]
            assert winner.setting == report.winners[size]
            timed = [r for r in report.rows if r.batch_size == size and r.median_s is not None]
            assert {r.setting.engine for r in timed} == set(ENGINES)
            for row in timed:
                assert 0 < row.min_s <= row.median_s <= row.max_s
                assert row.n > 0
                assert row.error <= 1e-4
        assert "batch 4" in report.text()
        assert report.to_dict()["rows"][0]["setting"]["engine"]


def test_a_candidate_with_another_answer_cannot_win(monkeypatch):
    from hotloop.infer.engines import onnxruntime

    honest = onnxruntime.OnnxRuntimeEngine.run

    def off_by_a_little(self, arrays):
        return [y * 1.01 for y in honest(self, arrays)]

    monkeypatch.setattr(onnxruntime.OnnxRuntimeEngine, "run", off_by_a_little)
    with compiled(
        models.perceptron(), torch.randn(4, 12), batch_sizes=[4], engines=["eager", "onnxruntime"]
    ) as runner:
        assert runner.engine.name == "eager"
        rows = [r for r in runner.report.rows if r.setting.engine == "onnxruntime"]
        assert all("error" in row.excluded and row.median_s is None for row in rows)


def test_throughput_maps_batches_in_order_on_shared_weights():
    model = models.perceptron()
    with compiled(model, torch.randn(8, 12), goal="throughput", batch_sizes=[8]) as runner:
        batches = [torch.randn(n, 12) for n in (8, 3, 8, 1, 8, 5, 8, 8)]
        for got, x in zip(runner.map(iter(batches)), batches, strict=True):
            assert_alike(got, eager(model, x))


def test_map_ends_at_the_first_batch_that_fails(perceptron):
    answers = perceptron[1]("onnxruntime").map([torch.randn(2, n) for n in (12, 13, 12)])
    assert next(answers).shape == (2, 3)
    with pytest.raises(DataError):
        next(answers)


def test_a_closed_runner_says_so():
    runner = compiled(models.perceptron(), torch.randn(8, 12), engines=["eager"], batch_sizes=[8])
    runner.close()
    with pytest.raises(InputError, match="must be open"):
        runner(torch.randn(2, 12))


def test_the_second_call_remembers_and_checks_again(monkeypatch):
    from hotloop.infer import compile as room

    monkeypatch.setattr(room, "BUSY", float("inf"))
    model, x = models.perceptron(), torch.randn(4, 12)
    options = {"engines": ["eager", "onnxruntime"], "batch_sizes": [4], "cache": True}
    with compiled(model, x, **options) as first:
        assert not first.report.from_cache
    with compiled(model, x, **options) as second:
        assert second.report.from_cache
        assert second.report.winners == first.report.winners
        assert second.report.race_s == 0
        assert_alike(second(x), eager(model, x))
    # Another structure is another race.
    with compiled(models.perceptron(17), x, **options) as third:
        assert not third.report.from_cache


def test_a_race_beside_other_work_is_not_remembered(monkeypatch):
    from hotloop.infer import compile as room

    monkeypatch.setattr(room, "BUSY", -1.0)
    model, x = models.perceptron(), torch.randn(4, 12)
    options = {"engines": ["eager", "onnxruntime"], "batch_sizes": [4], "cache": True}
    with compiled(model, x, **options) as runner:
        assert any("not remembered" in note for note in runner.report.notes)
    with compiled(model, x, **options) as runner:
        assert not runner.report.from_cache


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"goal": "speed"}, "goal must be"),
        ({"engines": ["tensorrt"]}, "an engine is one of"),
        ({"engines": []}, "name one"),
        ({"max_error": -1.0}, "max_error"),
        ({"max_error": float("nan")}, "max_error"),
        ({"max_accuracy_loss": 0.01}, "needs samples"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"budget_s": 0}, "budget_s"),
        ({"max_error": 0.1, "samples": torch.zeros(4, 13)}, "samples must be"),
        ({"max_error": 0.1, "samples": (torch.zeros(4, 12), torch.zeros(5))}, "samples must be"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments(options, rule):
    with pytest.raises(InputError, match=rule):
        hotloop.compile_inference(models.perceptron(), torch.randn(4, 12), **options)


@pytest.mark.parametrize(
    "example",
    [torch.zeros(4, 11), torch.tensor(1.0), (), "text"],
    ids=["columns", "scalar", "none", "text"],
)
def test_a_bad_example(example):
    with pytest.raises((ModelError, InputError)):
        hotloop.compile_inference(models.perceptron(), example)


def test_a_named_engine_that_is_missing_gives_the_pip_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hotloop\[openvino\]'"):
        compiled(models.perceptron(), torch.randn(4, 12), engines=["openvino"])
    with compiled(
        models.perceptron(), torch.randn(4, 12), engines=None, budget_s=1e-6, batch_sizes=[4]
    ) as runner:
        reasons = [r.excluded for r in runner.report.rows if r.setting.engine == "openvino"]
        assert all("hotloop[openvino]" in reason for reason in reasons)


@pytest.mark.full
def test_the_compiled_graph_answers_as_eager_and_is_built_once():
    model = models.Residual()
    options = {"engines": ["inductor"], "batch_sizes": [1, 4], "budget_s": 120}
    x = torch.randn(4, 1, 9, 9)
    for _ in range(2):
        with compiled(model, x, **options) as runner:
            assert runner.engine.name == "inductor"
            for batch in (1, 3, 50):
                x = torch.randn(batch, 1, 9, 9)
                assert_alike(runner(x), eager(model, x))
