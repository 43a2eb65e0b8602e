"""The arguments of a script reach it as they are, by ``hotloop run`` and through torchrun."""

import pytest
from torch.distributed.run import get_args_parser

from hotloop.cli.main import build_parser
from hotloop.cli.run import _target
from hotloop.errors import InputError
from hotloop.launch.command import argv

ARGUMENTS = [
    [], ["--r=16"], ["--n=5"], ["--m=x", "--l", "3"], ["--no-python"], ["-m", "5"], ["--nproc=7"],
    ["--standalone"], ["--", "--r=1"], ["--max=3", "pos", "--rdzv=1"], ["--help"], ["-h"], [""],
    ["--lr", "-1e-3"], ["--name="], ["a b", "\u00fc"], ["--quiet"], ["--off", "x"],
    ["a", "--", "--"],
]  # fmt: skip


@pytest.mark.parametrize("name", [["script.py"], ["--", "script.py"], ["-m", "module"]])
@pytest.mark.parametrize("given", ARGUMENTS, ids=" ".join)
def test_they_are_the_scripts_own(given, name):
    words = ["run", "--quiet", "--nproc", "2", *name, *given]
    args = build_parser("run").parse_args(words)
    target = _target(args)
    assert args.quiet
    assert (target.name, list(target.args)) == (name[-1], given)
    assert target.is_module == (name[0] == "-m")
    assert argv(target)[-len(given) :] == given or not given
    started = get_args_parser().parse_args(argv(target, args.nproc)[3:])
    assert started.training_script == target.name
    assert list(started.training_script_args) == given
    assert started.module == target.is_module
    assert started.nproc_per_node == "2"


def test_without_a_script_it_is_told():
    with pytest.raises(InputError, match="a script or -m module must be given"):
        _target(build_parser("run").parse_args(["run", "--quiet"]))
