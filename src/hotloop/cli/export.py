"""``hotloop export``: a model to a folder with its fastest engine, by race on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ModelError
from ..units import format_bytes, format_seconds
from . import export_training
from .tune import progress_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data import PackedDataset

NAME = "export"
IMAGE = (1, 28, 28)
# For accuracy, one batch of 64 after another; more tell little and take time.
MAX_SAMPLES = 10_000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``hotloop``."""
    parser = subparsers.add_parser(
        NAME,
        help="write a model with the engine that is fastest on this machine",
        description="Race PyTorch, AOTInductor, ONNX Runtime and OpenVINO on this model, each "
        "checked against PyTorch, and write the winner to a folder that hotloop serve and "
        "hotloop.load_inference read.",
    )
    parser.add_argument(
        "model", metavar="MODEL",
        help="small, big or cnn; package.module:factory; or the folder of a hotloop train run",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="weights of MODEL as .safetensors"
    )
    parser.add_argument(
        "--shape", action="append", default=[], metavar="SIZES[:DTYPE]",
        help="of one sample of an input, such as 3,224,224 or 128:int64; once for each input, "
        "where the factory gives no example",
    )  # fmt: skip
    parser.add_argument("--goal", choices=("latency", "throughput"), default="latency")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: export-MODEL")
    parser.add_argument(
        "--max-error", type=float, metavar="X",
        help="allow bfloat16 and int8 up to this difference over the largest output",
    )  # fmt: skip
    parser.add_argument(
        "--max-accuracy-loss", type=float, metavar="X",
        help="allow them up to this share of --samples classified worse, such as 0.002",
    )  # fmt: skip
    parser.add_argument(
        "--samples", metavar="DATA",
        help="real samples for the accuracy and int8's ranges: mnist, or an .npz file, Parquet "
        "file or IDX folder",
    )  # fmt: skip
    parser.add_argument(
        "--engines",
        metavar="NAMES",
        help="of hotloop,eager,inductor,onnxruntime,openvino (default: all)",
    )
    parser.add_argument(
        "--batch-sizes", metavar="SIZES", help="that are raced, such as 1,32,64 (the default)"
    )
    parser.add_argument(
        "--budget-s", type=float, default=60.0, metavar="S", help="seconds to spend, about"
    )
    parser.add_argument(
        "--no-cache", dest="cache", action="store_false", help="race again, remember nothing"
    )
    parser.add_argument(
        "--no-measure", dest="measure", action="store_false",
        help="do not load the export in a fresh process to measure its memory",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    export_training.add_training_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Race, write and print; returns the exit code."""
    out: Path = args.out or Path(f"export-{_plain(args.model)}")
    if args.training:
        return export_training.run(args, out)
    engines = args.engines.split(",") if args.engines else None
    sizes = _whole_numbers(args.batch_sizes, "--batch-sizes") if args.batch_sizes else None
    model, example = _model(args)
    samples = _samples(args.samples) if args.samples else None
    from ..infer import compile_inference, measure_memory

    with progress_line(quiet=args.quiet) as show:
        runner = compile_inference(
            model,
            example,
            args.goal,
            engines=engines,
            max_error=args.max_error,
            max_accuracy_loss=args.max_accuracy_loss,
            samples=samples,
            batch_sizes=sizes,
            budget_s=args.budget_s,
            cache=args.cache,
            on_event=show,
        )
        with runner:
            runner.save(out)
            report = runner.report
            inputs = [spec.text() for spec in runner.inputs]
            outputs = [spec.text() for spec in runner.outputs]
            largest = max(report.winners)
        show("measuring the export")
        measured = measure_memory(out, sorted({1, largest})) if args.measure else None
    if args.json:
        document = {
            "out": str(out), "inputs": inputs, "outputs": outputs, "measured": measured,
            "report": report.to_dict(),
        }  # fmt: skip
        print(json.dumps(document, indent=2))
        return 0
    print(report.text())
    print(f"input   {'; '.join(inputs)}\noutput  {'; '.join(outputs)}")
    if measured is not None:
        print(
            f"loaded  {format_bytes(measured['resident_bytes'])} resident after batches of "
            f"{largest}, first answer after {format_seconds(measured['first_answer_s'])}, "
            f"{'with' if measured['imports_torch'] else 'without'} torch"
        )
    print(f"wrote   {out}")
    return 0


def _plain(name: str) -> str:
    """A model's name as part of a folder's name."""
    text = Path(name).name if Path(name).is_dir() else name
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)


def _model(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The module with its weights, and one batch of what it takes."""
    if Path(args.model).is_dir():
        if args.weights is not None or args.shape:
            raise InputError(
                "a run has its own weights and shapes", got=args.model,
                next_step="leave out --weights and --shape",
            )  # fmt: skip
        return _trained(Path(args.model))
    model, example = _built(args.model)
    if args.shape:
        example = tuple(_example(text) for text in args.shape)
    if example is None:
        raise InputError(
            f"{args.model} must tell what goes in", got="a module alone",
            next_step="pass --shape 3,224,224, or return (module, example) from the factory",
        )  # fmt: skip
    if args.weights is not None:
        from ..infer.files import load_weights

        load_weights(model, args.weights)
    return model, example


def _built(name: str) -> tuple[nn.Module, Any]:
    import torch
    from torch import nn

    from .recipe import ZOO

    if name in ZOO:
        from ..train.zoo import build_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_model(name), _images()
    if ":" not in name:
        raise InputError(
            "MODEL must be small, big, cnn, package.module:factory or the folder of a run",
            got=repr(name),
        )
    from ..infer.files import call_factory

    made = call_factory(name)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} must give a torch.nn.Module", got=type(model).__name__)
    return model, getattr(model, "example_input", None) if example is None else example


def _images() -> Any:
    import torch

    return torch.randn(8, *IMAGE, generator=torch.Generator().manual_seed(0))


def _trained(folder: Path) -> tuple[nn.Module, Any]:
    """Model and example of a run's folder (or of its ``checkpoints``), newest checkpoint."""
    from .recipe import trained_model

    recipe, model = trained_model(folder)
    if recipe.dataset == "mnist":
        return model, _images()
    data = recipe.open_training_data(mmap_above_bytes=0)
    return model, _rows(data, 8)[0]


def _example(text: str) -> Any:
    """A batch of eight from ``3,224,224`` or ``128:int64``."""
    import torch

    sizes, _, dtype_name = text.partition(":")
    shape = _whole_numbers(sizes, "--shape") if sizes else []
    dtype = getattr(torch, dtype_name or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise InputError("--shape must end with a dtype of torch", got=dtype_name)
    draw = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(8, *shape, generator=draw).to(dtype)
    # Zeros and ones: whatever the numbers stand for, these are in its range.
    return torch.randint(2, (8, *shape), generator=draw).to(dtype)


def _whole_numbers(text: str, flag: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{flag} takes whole numbers such as 1,32,64", got=repr(text))
    return numbers


def _samples(source: str) -> tuple[Any, Any]:
    """Samples and labels of a data set, at most ``MAX_SAMPLES``."""
    from ..data import open_dataset

    return _rows(open_dataset(source, split="test" if source == "mnist" else "train"), MAX_SAMPLES)


def _rows(data: PackedDataset, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first samples and their targets."""
    import torch

    count = min(count, data.num_samples)
    x = torch.empty((count, *data.sample_shape), dtype=data.sample_dtype)
    y = torch.empty((count, *data.target_shape), dtype=data.target_dtype)
    data.gather(torch.arange(count), x, y)
    return x, y
