"""bfloat16 and int8: only under a bound that was checked, on real digits."""

import copy

import pytest
import torch
from torch import nn

import hotloop
from hotloop.infer.check import accuracy_loss, difference, fresh_inputs
from hotloop.infer.engine import TensorSpec

QUICK = {
    "budget_s": 0.3,
    "cache": False,
    "batch_sizes": [32],
    "engines": ["onnxruntime", "openvino"],
}


def digits(count, split):
    data = hotloop.load_mnist(split, prefer="shipped", num_samples=count)
    x = torch.empty((count, 1, 28, 28))
    y = torch.empty(count, dtype=torch.int64)
    data.gather(torch.arange(count), x, y)
    return x, y


@pytest.fixture(scope="module")
def trained():
    """A small net that knows most digits, and digits it has not seen."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 13 * 13, 32),
        nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    x, y = digits(2000, "train")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        for i in range(0, 2000, 50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 50]), y[i : i + 50]).backward()
            optimizer.step()
    return model, digits(640, "test")


def test_without_a_bound_nothing_but_float32_is_tried(trained):
    model, (x, _) = trained
    with hotloop.compile_inference(model, x[:8], **QUICK) as runner:
        assert {row.setting.precision for row in runner.report.rows} == {"float32"}


def test_every_precision_is_tried_and_keeps_its_bound(trained):
    model, (x, y) = trained
    with hotloop.compile_inference(
        model, x[:8], max_accuracy_loss=0.01, samples=(x, y), **QUICK
    ) as runner:
        rows = runner.report.rows
        raced = [row for row in rows if row.median_s is not None]
        assert {r.setting.precision for r in raced} >= {"float32", "int8"}
        for row in raced:
            if row.setting.precision != "float32":
                assert row.accuracy_loss <= 0.01
                # Fewer bits cannot give the same numbers: the precision asked for was used.
                assert row.error > 1e-5
        eager = copy.deepcopy(model).eval()
        with torch.inference_mode():
            want = (eager(x).argmax(1) == y).double().mean()
        got = torch.cat([runner(x[i : i + 32]) for i in range(0, 640, 32)]).argmax(1) == y
        assert want > 0.8
        assert want - got.double().mean() <= 0.01


def test_a_bound_that_nothing_keeps_leaves_float32(trained):
    model, (x, _) = trained
    with hotloop.compile_inference(model, x[:8], max_error=1e-9, samples=x, **QUICK) as runner:
        assert runner.engine.precision == "float32"
        lower = [r for r in runner.report.rows if r.setting.precision != "float32"]
        assert lower
        assert all(row.median_s is None and row.excluded for row in lower)


def test_without_labels_other_answers_count_as_lost():
    want = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    got = want.clone()
    got[3] = torch.tensor([1.0, 0.0])
    assert accuracy_loss(got, want, None) == 0.25
    assert accuracy_loss(got, want, torch.tensor([1, 0, 1, 0])) == -0.25
    assert accuracy_loss(got, want, torch.tensor([1, 0, 1, 1])) == 0.25


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0.0),
        ([float("-inf"), 1.0], [float("inf"), 1.0], float("inf")),
        ([float("nan"), 1.0], [0.5, 1.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_the_difference(got, want, error):
    assert difference([torch.tensor(got)], [torch.tensor(want)])[0] == error


def test_a_difference_in_kind_is_told():
    one = torch.zeros(2, 3)
    assert "2 outputs" in difference([one, one], [one])[1]
    assert "float64" in difference([one.double()], [one])[1]
    assert "[3, 2]" in difference([one.t()], [one])[1]
    assert difference([torch.tensor([1, 2, 3, 4])], [torch.tensor([1, 2, 3, 5])])[0] == 0.25


def test_fresh_inputs_are_new_and_in_range():
    example = [torch.randn(4, 3) * 5 + 100, torch.tensor([[1], [7], [3], [7]])]
    specs = [TensorSpec("x", "float32", (None, 3)), TensorSpec("ids", "int64", (None, 1))]
    x, ids = fresh_inputs(example, specs, 500, seed=1)
    assert x.shape == (500, 3)
    assert 90 < float(x.mean()) < 110
    assert set(ids.flatten().tolist()) == {1, 3, 7}
    assert not torch.equal(x, fresh_inputs(example, specs, 500, seed=2)[0])


def test_fresh_masks_have_the_forms_of_the_examples():
    mask = (torch.arange(12) < torch.tensor([[3], [7], [12]])).long()
    example = [torch.arange(36).reshape(3, 12), mask, mask.bool()]
    specs = [TensorSpec(name, "int64", (None, 12)) for name in "abc"]
    ids, *masks = fresh_inputs(example, specs, 50, seed=1)
    assert ids.shape == (50, 12)
    assert not (ids.diff(dim=1) == 1).all()
    for drawn, given in zip(masks, example[1:], strict=True):
        assert drawn.dtype == given.dtype
        assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in given.tolist()}
