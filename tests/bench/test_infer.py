"""The inference race: its figures, its peers for real, and what must never count as a win."""

import importlib.util
import json
import subprocess
import sys
import threading
import time

import numpy
import pytest
import torch

from hotloop.bench import infer, infer_peer
from hotloop.bench.infer import race_inference
from hotloop.bench.infer_peers import PEERS, Job, Prepared, variants
from hotloop.bench.infer_result import COLUMNS, GUIDE, InferRace, InferTiming
from hotloop.bench.models import build_race_model
from hotloop.bench.shapes import SAMPLE_SHAPES
from hotloop.cli import bench_infer
from hotloop.cli.main import main
from hotloop.errors import InputError


def timing(peer, *rates, **values):
    seconds = tuple(1 / rate for rate in rates)
    values = {"error": 1e-6, "resident_bytes": 2**20} | values
    return InferTiming(peer, rates, seconds, seconds, **values)


def race(*timings):
    return InferRace("small", (1, 28, 28), 32, 2, "throughput", timings)


EAGER = timing("pytorch", 100.0, 80.0, 120.0, error=0.0)


def test_the_ratio_is_to_the_fastest_peer_that_is_not_hotloop():
    mine = timing("hotloop", 400.0, 300.0, 500.0)
    export = timing("hotloop-export", 900.0, 900.0, 900.0)
    fast = timing("onnxruntime", 200.0, 250.0, 150.0)
    result = race(EAGER, fast, mine, export)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in result.rows()]
    assert [row["peer"] for row in rows] == ["hotloop-export", "hotloop", "onnxruntime", "pytorch"]
    assert rows[1]["x fastest peer"] == "2.00"
    assert rows[1]["x eager"] == "4.00"
    assert rows[1]["min to max"] == "300 to 500"
    # Round by round: 400/200, 300/250, 500/150.
    assert result.ratios(mine) == pytest.approx([2.0, 1.2, 10 / 3])
    document = result.to_dict()
    assert document["fastest_peer"] == "onnxruntime"
    of_rounds = document["timings"][2]["of_fastest_peer"]["of_rounds"]
    assert (of_rounds["median"], of_rounds["n"]) == (pytest.approx(2.0), 3)
    json.dumps(document, allow_nan=False)


@pytest.mark.parametrize("error", [0.1, float("inf"), float("nan")])
def test_a_peer_with_wrong_outputs_wins_nothing(error):
    wrong = timing("openvino", 1000.0, 1000.0, 1000.0, error=error)
    result = race(EAGER, wrong)
    assert result.fastest_peer() is EAGER
    assert "wrong" in result.rows()[-1][1]
    assert result.to_dict()["timings"][1]["wrong"]


def test_a_missing_peer_is_named_not_faked():
    rows = race(EAGER, InferTiming("openvino", missing="not installed: pip install x")).rows()
    assert rows[-1][:2] == ["openvino", "not installed: pip install x"]
    assert not any(rows[-1][2:])


def test_the_guide_is_the_guide():
    assert GUIDE == ((1, 120, 0.5), (32, 2_800, 0.7), (64, 5_200, 0.9))


def test_the_guides_table_has_both_and_names_what_is_missing(capsys):
    mine = timing("hotloop", 4000.0, resident_bytes=300 * 2**20)
    bench_infer._print_guide([race(mine, InferTiming("hotloop-export", missing="no engine"))])
    first, second = [line for line in capsys.readouterr().out.splitlines() if "hotloop" in line][1:]
    for text in ("small", "32", "4,000", "2,800", "300", "0.7"):
        assert text in first
    assert "no engine" in second


def test_the_last_table_has_hotloop_over_the_fastest_peer(capsys):
    mine = timing("hotloop", 400.0, 300.0, 500.0)
    bench_infer._print_ratios([race(EAGER, mine), race(EAGER)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "pytorch" in line]
    assert row.split() == ["small", "32", "4.000", "3.750", "to", "4.167", "pytorch"]


# --- the models


@pytest.mark.parametrize("name", SAMPLE_SHAPES)
def test_models_are_the_same_each_time_and_answer_any_batch(name):
    one, two = build_race_model(name), build_race_model(name)
    assert not one.training
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with torch.inference_mode():
        x = torch.randn(3, *SAMPLE_SHAPES[name])
        whole, alone = one(x), one(x[1:2])
    assert whole.isfinite().all()
    assert whole.std() > 1e-3  # Not all the same: a comparison of outputs means something.
    assert torch.allclose(whole[1:2], alone, atol=1e-4 * float(whole.abs().max()))


def test_resnet18_and_the_encoder_have_their_size():
    def count(name):
        return sum(p.numel() for p in build_race_model(name).parameters())

    assert count("resnet18") == 11_689_512  # As published, with 1,000 classes.
    assert count("encoder") == 6 * (12 * 384**2 + 13 * 384) + 3_850


@pytest.mark.parametrize("name", SAMPLE_SHAPES)
def test_the_jax_twin_computes_the_same(name):
    pytest.importorskip("jax")
    import jax

    from hotloop.bench.jax_models import forward_of, weights_of

    model = build_race_model(name)
    state = {key: value.numpy(force=True) for key, value in model.state_dict().items()}
    x = torch.randn(2, *SAMPLE_SHAPES[name])
    got = numpy.asarray(jax.jit(forward_of(name))(weights_of(state), x.numpy()))
    with torch.inference_mode():
        wanted = model(x).numpy()
    assert numpy.abs(got - wanted).max() < 1e-4 * numpy.abs(wanted).max()


# --- variants and measuring


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("peer", PEERS)
def test_variants_use_no_more_than_the_threads(peer, threads, goal):
    for model in SAMPLE_SHAPES:
        found = variants(peer, model, threads, goal)
        assert found
        for settings in found:
            assert settings.get("threads", 1) * settings.get("streams", 1) <= threads
            assert goal == "throughput" or settings.get("streams", 1) == 1


def test_layouts_are_tried_for_images_with_convolutions_only():
    def layouts(model):
        return {v["layout"] for v in variants("pytorch", model, 2, "latency")}

    assert layouts("cnn") == layouts("resnet18") == {"contiguous", "channels_last"}
    assert layouts("big") == layouts("encoder") == {"contiguous"}


def prepared(*calls):
    return Prepared(calls, lambda x: x, lambda y: y)


def test_a_measurement_counts_the_calls_of_all_callers():
    seen = []

    def call(x):
        seen.append((threading.get_ident(), x))
        time.sleep(0.01)

    found = infer_peer.measure(prepared(call, call), [0, 1, 2], 8, 0.2)
    assert len({thread for thread, _ in seen}) == 2
    assert {x for _, x in seen} == {0, 1, 2}  # Not one input again and again.
    assert found["calls"] == len(seen) - 2  # The first call of each caller is not counted.
    assert found["samples_per_s"] == pytest.approx(2 * 8 / 0.01, rel=0.5)
    assert found["p99_s"] >= found["p50_s"] >= 0.01


def test_a_call_that_fails_in_a_thread_is_told():
    def call(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        infer_peer.measure(prepared(call, call), [0], 1, 0.05)


def test_outputs_are_compared_in_every_batch():
    inputs = [numpy.ones((2, 3)), numpy.full((2, 3), 2.0)]
    expected = numpy.stack(inputs)
    assert infer_peer._error(prepared(lambda x: x), inputs, expected) == 0
    only_second = prepared(lambda x: x + (x > 1))
    assert infer_peer._error(only_second, inputs, expected) == pytest.approx(0.5)
    for wrong in (lambda x: x[:1], lambda x: x * numpy.nan):
        assert infer_peer._error(prepared(wrong), inputs, expected) == float("inf")


def test_accuracy_counts_the_last_part_batch(tmp_path):
    labels = numpy.arange(7) % 3
    numpy.save(tmp_path / "test_x.npy", numpy.eye(3, dtype=numpy.float32)[labels])
    labels[6] = 1 - labels[6]
    numpy.save(tmp_path / "test_y.npy", labels)
    sizes = []

    def call(x):
        sizes.append(len(x))
        return x

    job = Job("small", 4, 1, "latency", tmp_path)
    assert infer_peer._accuracy(prepared(call), job) == pytest.approx(6 / 7)
    assert sizes == [4, 4]


# --- for real


@pytest.fixture
def quick(monkeypatch):
    """No scouting: the first settings of each peer."""
    monkeypatch.setattr(
        infer,
        "_fastest_settings",
        lambda peer, setup: variants(peer, setup["model"], setup["threads"], setup["goal"])[0],
    )


# Name -> what a user installs for it.
NEEDS = {"onnxruntime": "onnxruntime", "openvino": "openvino", "jax-jit": "jax"}


@pytest.mark.parametrize(
    "peer",
    [
        "torchscript",
        pytest.param("inductor", marks=pytest.mark.full),
        "onnxruntime",
        "openvino",
        "jax-jit",
    ],
)
def test_a_peer_answers_as_eager_does(peer, quick):
    if peer in NEEDS:
        pytest.importorskip(NEEDS[peer])
    done = race_inference("small", [peer], batch_size=2, rounds=1, seconds=0.02)
    (found,) = done.timings
    assert found.missing is None
    assert 0 < found.error < 1e-4  # Not eager itself, and as near as float32 gets.
    assert found.median_per_s > 0
    assert found.p99_s[0] >= found.p50_s[0] > 0
    assert found.peak_bytes >= found.resident_bytes > 2**24


@pytest.mark.full
def test_hotloop_races_beside_its_peers_and_its_export_needs_no_torch(capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "infer.json"
    flags = ["--models", "small", "--batch-sizes", "4", "--rounds", "1", "--seconds", "0.05"]
    peers = ["--peers", "hotloop,hotloop-export,pytorch"]
    assert main(["bench", "infer", *flags, *peers, "--out", str(out)]) == 0
    (document,) = json.loads(out.read_text())
    mine, export, eager = document["timings"]
    for entry in (mine, export):
        assert entry["missing"] is None
        assert entry["error"] < 1e-4
        assert entry["settings"]["precision"] == "float32"
        assert entry["of_fastest_peer"]["of_medians"] > 0
    assert document["fastest_peer"] == "pytorch"
    if export["settings"]["engine"] in ("onnxruntime", "openvino"):
        assert not export["torch_imported"]
        assert export["resident_bytes"] < eager["resident_bytes"]
    assert "over the fastest peer" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["infer_peer", "load", "requests"])
def test_a_process_without_torch_stays_without_it(module):
    code = f"import hotloop.bench.{module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_peer_is_scouted_and_races_with_one_of_its_settings(capsys, tmp_path):
    out = tmp_path / "infer.json"
    flags = ["--models", "small", "--batch-sizes", "2", "--peers", "pytorch", "--rounds", "2"]
    assert main(["bench", "infer", *flags, "--seconds", "0.05", "--out", str(out)]) == 0
    (document,) = json.loads(out.read_text())
    (entry,) = document["timings"]
    assert entry["settings"] in variants("pytorch", "small", document["threads"], "throughput")
    assert entry["samples_per_s"]["n"] == len(entry["rounds_samples_per_s"]) == 2
    assert entry["error"] == 0  # It is eager.
    assert {"torch", "python", "numpy"} <= set(document["about"]["versions"])
    printed = capsys.readouterr().out
    assert "pytorch" in printed
    assert "accuracy" not in printed  # Columns with nothing to say are left out.


def test_a_peer_whose_library_is_not_there_is_left_out(monkeypatch, quick):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name)
    )
    done = race_inference("small", ["openvino"], batch_size=1, rounds=1, seconds=0.01)
    (found,) = done.timings
    assert found.samples_per_s == ()
    assert "pip install 'hotloop[onnx,openvino]'" in found.missing


def test_a_model_that_onnx_cannot_take_is_named(monkeypatch, quick):
    pytest.importorskip("onnxruntime")

    def fails(*_, **__):
        raise ValueError("no such\noperation")

    monkeypatch.setattr(torch.onnx, "export", fails)
    done = race_inference("small", ["onnxruntime"], batch_size=1, rounds=1, seconds=0.01)
    assert "no such operation" in done.timings[0].missing


def test_a_loss_of_accuracy_is_shown_on_a_trained_model(quick):
    with pytest.raises(InputError, match="trained"):
        race_inference("small", ["pytorch"], max_accuracy_loss=0.01)
    trained = infer.train_on_mnist("small", num_samples=2_000)
    done = race_inference(
        "small", ["pytorch"], batch_size=64, rounds=1, seconds=0.02,
        max_accuracy_loss=0.01, trained=trained,
    )  # fmt: skip
    assert done.eager_accuracy > 0.7  # It has learnt something.
    # Counted in batches in another process, it is the same to a digit or two near a tie.
    assert done.timings[0].accuracy == pytest.approx(done.eager_accuracy, abs=5e-4)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--models", "huge"], "huge"),
        (["--peers", "tensorrt"], "tensorrt"),
        (["--batch-sizes", "1,x"], "1,x"),
        (["--batch-sizes", "0"], "--batch-sizes"),
        (["--rounds", "0"], "--rounds"),
        (["--seconds", "nan"], "--seconds"),
        (["--max-accuracy-loss", "1.5"], "1.5"),
        (["--models", "encoder", "--max-accuracy-loss", "0.002"], "encoder"),
    ],
)
def test_bad_flags_are_one_line(capsys, flags, named):
    assert main(["bench", "infer", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.strip().splitlines()) == 1
