"""The race of inference: the same model and batches for each engine, a stretch of time a turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError, RunError
from ..machine import Machine
from .infer_peers import PEERS, variants
from .infer_result import HOTLOOP, InferRace, InferTiming
from .shapes import MNIST_MODELS, SAMPLE_SHAPES
from .turns import Answers, about, need, start_peer, take_turns

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..train.child import Child

_MODULE = "hotloop.bench.infer_peer"
# What preparing (compiling, choosing) and one turn may take.
_PREPARE_S = 300.0
_TURN_S = 120.0
# Different batches, so that no input lies in a register or a cache of answers.
_BATCHES = 4
_LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "jax", "jaxlib", "numpy")


def race_inference(
    model: str,
    peers: Sequence[str],
    *,
    batch_size: int = 1,
    goal: str = "auto",
    rounds: int = 5,
    seconds: float = 0.5,
    threads: int | None = None,
    max_accuracy_loss: float | None = None,
    trained: nn.Module | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> InferRace:
    """Answer the same batches with each peer, ``seconds`` a turn.

    Each peer is a process of its own; its outputs are compared with those of eager PyTorch first.
    A peer with several usual settings times them in a process before, and races with the fastest.

    Args:
        model: a name of ``SAMPLE_SHAPES``.
        peers: names of ``bench.infer_peers.PEERS``.
        goal: ``"latency"``: one call at a time; ``"throughput"``: as many at the same time as a
            peer likes; ``"auto"``: latency for batch 1, throughput for larger ones.
        rounds: measured turns of each peer.
        threads: CPUs of each peer; ``None``: the usable ones.
        max_accuracy_loss: lets hotloop, and it alone, compute in bfloat16 or int8.
        trained: weights for ``model``, trained on MNIST; the accuracy on its test digits is told.
        say: told what is going on.

    Raises:
        InputError: a loss of accuracy is allowed and there is no trained model to show it on.
    """
    if max_accuracy_loss is not None and trained is None:
        raise InputError("max_accuracy_loss needs a model trained on MNIST", got=model)
    machine = Machine.probe()
    threads = threads or machine.usable_cpus
    if goal == "auto":
        goal = "latency" if batch_size == 1 else "throughput"
    with tempfile.TemporaryDirectory(prefix="hotloop-bench-") as name:
        onnx_missing = _write_inputs(model, batch_size, threads, Path(name), trained)
        setup = {
            "model": model, "folder": name, "batch_size": batch_size, "threads": threads,
            "goal": goal, "seconds": seconds, "max_accuracy_loss": max_accuracy_loss,
            # What hotloop remembers of earlier races is not used: it races anew.
            "environment": {"XDG_CACHE_HOME": str(Path(name) / "cache")},
        }  # fmt: skip

        def start(peer: str) -> Child:
            _, libraries, extra = PEERS[peer]
            need(*libraries, extra=extra)
            if "onnx" in libraries and onnx_missing is not None:
                raise RunError(onnx_missing)
            settings = _fastest_settings(peer, setup)
            return start_peer(_MODULE, peer, {**setup, "settings": settings})

        told = take_turns(
            peers, start, rounds, prepare_s=_PREPARE_S, turn_s=_TURN_S,
            say=lambda line: say(f"{model} batch {batch_size}: {line}"),
        )  # fmt: skip
        accuracy = None if trained is None else _eager_accuracy(trained, Path(name))
    return InferRace(
        model, SAMPLE_SHAPES[model], batch_size, threads, goal,
        tuple(_timing(peer, turns) for peer, turns in told.items()),
        max_accuracy_loss, accuracy, {**about(machine, _LIBRARIES), "seconds_a_turn": seconds},
    )  # fmt: skip


def _timing(peer: str, turns: Answers) -> InferTiming:
    if turns.missing is not None:
        return InferTiming(peer, missing=turns.missing)
    measured, last = turns.answers[1:], turns.answers[-1]
    return InferTiming(
        peer,
        tuple(answer["samples_per_s"] for answer in measured),
        tuple(answer["p50_s"] for answer in measured),
        tuple(answer["p99_s"] for answer in measured),
        turns.ready.get("error"),
        turns.ready.get("accuracy"),
        last["resident_bytes"],
        last["peak_bytes"],
        turns.ready["settings"],
        turns.ready["torch_imported"],
        turns.ready["prepared_s"],
    )


def _fastest_settings(peer: str, setup: dict[str, Any]) -> dict[str, Any]:
    """The fastest of a peer's variants, timed in a process that is ended before the race."""
    listed = variants(peer, setup["model"], setup["threads"], setup["goal"])
    if peer in HOTLOOP:
        # One race of its own for both ways of using it.
        if (Path(setup["folder"]) / "export").exists():
            return {}
    elif len(listed) == 1:
        return listed[0]
    scout = start_peer(_MODULE, peer, {**setup, "settings": None})
    try:
        rates: list[float] = scout.answer(_PREPARE_S)["rates"]
    finally:
        scout.close()
    return listed[max(range(len(rates)), key=rates.__getitem__)]


def _write_inputs(
    name: str, batch_size: int, threads: int, folder: Path, trained: nn.Module | None
) -> str | None:
    """Weights, batches, eager's answers and the ONNX file; says why there is no ONNX file."""
    import numpy
    import torch

    from ..machine.threads import num_threads
    from .models import build_race_model

    model = build_race_model(name) if trained is None else trained.eval()
    state = {key: value.numpy(force=True) for key, value in model.state_dict().items()}
    numpy.savez(folder / "weights.npz", **state)
    count = _BATCHES * batch_size
    if trained is None:
        x = torch.randn(count, *SAMPLE_SHAPES[name], generator=torch.Generator().manual_seed(1))
    else:
        test_x, test_y = _digits("test", 10_000)
        numpy.save(folder / "test_x.npy", test_x.numpy())
        numpy.save(folder / "test_y.npy", test_y.numpy())
        train_x, train_y = _digits("train", 10_000)  # To calibrate and choose with.
        numpy.save(folder / "train_x.npy", train_x.numpy())
        numpy.save(folder / "train_y.npy", train_y.numpy())
        x = test_x[:count]
    batches = x.reshape(_BATCHES, batch_size, *SAMPLE_SHAPES[name])
    with num_threads(threads), torch.inference_mode():
        expected = torch.stack([model(batch) for batch in batches])
    numpy.save(folder / "x.npy", batches.numpy())
    numpy.save(folder / "expected.npy", expected.numpy())
    return _write_onnx(model, batches[0], folder / "model.onnx")


def _write_onnx(model: nn.Module, example: torch.Tensor, path: Path) -> str | None:
    import logging
    import warnings

    import torch

    try:
        need("onnx", "onnxscript", extra="onnx")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                model, (example,), path, dynamo=True, external_data=False, verbose=False
            )
    except RunError as error:
        return str(error)
    except Exception as error:
        return f"torch.onnx.export failed: {' '.join(str(error).split())[:200]}"
    return None


def _digits(part: Literal["train", "test"], num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST as far as it is here: ``[n, 1, 28, 28]`` float32 and int64 labels."""
    import torch

    from ..data import load_mnist

    dataset = load_mnist(part)
    count = min(num_samples, dataset.num_samples)
    x = torch.empty(count, *dataset.sample_shape)
    y = torch.empty(count, dtype=torch.int64)
    dataset.gather(torch.arange(count), x, y)
    return x, y


def train_on_mnist(
    name: str, *, epochs: int = 1, num_samples: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> nn.Module:  # fmt: skip
    """A zoo model after ``epochs`` on MNIST, by hotloop's Trainer: batch 64, Adam, seed 0.

    Raises:
        InputError: the model does not take MNIST's images.
    """
    if name not in MNIST_MODELS:
        raise InputError(f"models trained on MNIST are {', '.join(MNIST_MODELS)}", got=name)
    import torch

    from ..train import Trainer
    from ..train.zoo import build_model

    say(f"training {name} on MNIST, {epochs} epochs")
    torch.manual_seed(0)
    model = build_model(name)
    data = _digits("train", num_samples or 60_000)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer)
    trainer.fit(data, batch_size=64, epochs=epochs, monitor=False)
    return model.eval()


def _eager_accuracy(model: nn.Module, folder: Path) -> float:
    import numpy
    import torch

    x = torch.from_numpy(numpy.load(folder / "test_x.npy"))
    y = torch.from_numpy(numpy.load(folder / "test_y.npy"))
    with torch.inference_mode():
        return float((model(x).argmax(1) == y).float().mean())
