"""What a recorded step took for constant: each change of it is found and named, nothing else is."""

import contextlib
import enum
import functools
import random
import sys
import types
import weakref
from collections import deque
from dataclasses import dataclass, field

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hotloop import kernels
from hotloop.step.guards import Guards, PythonState
from support import examples

RATE = 1.0
UNUSED = 1
TABLE = {"scale": [1, 2]}
DRAWS = numpy.random.default_rng(0)
MASK = torch.ones(3)
settings_module = types.ModuleType("settings_module")
settings_module.FACTOR = 2
settings_module.OTHER = 3


class Kind(enum.Enum):
    A = 1
    B = 2


@dataclass
class Config:
    rate: float = 0.5
    sizes: list = field(default_factory=lambda: [1, 2])


class Options:
    limit = 3

    def __init__(self):
        self.beta, self.not_read = 1, 1


class Slotted:
    __slots__ = ("gain",)

    def __init__(self):
        self.gain = 2


def helper(x, power=2, *, shift=0.0):
    return x**power * RATE + shift + settings_module.FACTOR + helper.offset


helper.offset = 0.0


def made_with(factor):
    def inner(x):
        return x * factor

    return inner


class Block(nn.Module):
    width = 3

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.0)
        self.register_buffer("scale", torch.ones(3))
        self.register_parameter("gate", None)
        self.config, self.options, self.slotted = Config(), Options(), Slotted()
        self.names, self.table, self.flags = ["a", "b"], {"k": 1}, {"x"}
        self.kind, self.pair, self.dtype = Kind.A, (1, 2.5), torch.float32
        self.space = types.SimpleNamespace(depth=1, inner=types.SimpleNamespace(leaf=[1]))
        self.offset = torch.zeros(3)
        self.closed = made_with([1.0])
        self.queue, self.array = deque([1]), numpy.ones(4)
        self.ratio = float("nan")
        self.random = random.Random(3)

    def forward(self, x):
        x = self.second(self.drop(self.fc(x)))
        return x * self.scale + self.options.beta + self.options.limit + self.offset * MASK

    def second(self, x):
        return helper(x) + TABLE["scale"][0]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = Block(), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(F.relu(self.first(x)))


class CallableLoss:
    def __init__(self):
        self.weight = 1.0

    def __call__(self, output, y):
        return F.mse_loss(output, y) * self.weight


class ModuleLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(1))

    def forward(self, output, y):
        return (F.mse_loss(output, y) * self.weight).sum()


def plain_loss(output, y, scale=1.0):
    return F.mse_loss(output, y) * scale * LOSS_SCALE


LOSS_SCALE = 1.0


class Case:
    def __init__(self, loss=plain_loss):
        self.net, self.loss = Net(), loss
        self.block = self.net.first
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.guards = Guards(self.net, self.loss, self.optimizer)


def set_global(name, value):
    globals()[name] = value


def replaced_in_list(values):
    values[0] = "c"


def new_data(p, change):
    p.data = change(p.data)


@contextlib.contextmanager
def restored():
    """The module's globals and classes, and torch's settings, as they were."""
    kept = {n: globals()[n] for n in ("RATE", "UNUSED", "LOSS_SCALE", "helper", "MASK")}
    defaults, by_keyword, code = helper.__defaults__, helper.__kwdefaults__, helper.__code__
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    forward = Block.forward
    try:
        yield
    finally:
        globals().update(kept)
        helper.__defaults__, helper.__kwdefaults__, helper.__code__ = defaults, {"shift": 0.0}, code
        assert by_keyword is not None
        helper.offset = 0.0
        settings_module.FACTOR, TABLE["scale"][:], Block.width, Options.limit = 2, [1, 2], 3, 3
        Block.forward = forward
        if hasattr(Block, "extra"):
            del Block.extra
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


CHANGES = {
    # Attributes.
    "dropout": (lambda c: setattr(c.block.drop, "p", 0.5),
        "attribute p of module first.drop (Dropout) changed from 0.0 to 0.5"),
    "training": (lambda c: c.block.drop.eval(),
        "attribute training of module first.drop (Dropout) changed from True to False"),
    "enum": (lambda c: setattr(c.block, "kind", Kind.B), "attribute kind of module first (Block)"),
    "tuple": (lambda c: setattr(c.block, "pair", (1, 2.0)), "from (1, 2.5) to (1, 2.0)"),
    "dtype": (lambda c: setattr(c.block, "dtype", torch.float64), "attribute dtype"),
    "type": (lambda c: setattr(c.block, "pair", [1, 2.5]), "attribute pair"),
    "new": (lambda c: setattr(c.block, "added", 1), "attribute added of module first (Block)"),
    "deleted": (lambda c: delattr(c.block, "kind"),
        "attribute kind of module first (Block) was removed"),
    "list item": (lambda c: replaced_in_list(c.block.names),
        "attribute names[0] of module first (Block) changed from 'a' to 'c'"),
    "list longer": (lambda c: c.block.names.append("z"), "attribute names[2]"),
    "list shorter": (lambda c: c.block.names.pop(), "attribute names[1]"),
    "another list": (lambda c: setattr(c.block, "names", ["a", "q"]), "attribute names[1]"),
    "dict": (lambda c: c.block.table.update(k=2), "attribute table['k']"),
    "set": (lambda c: c.block.flags.add("y"), "attribute flags of module first (Block)"),
    "set swapped": (lambda c: (c.block.flags.clear(), c.block.flags.add("y")), "attribute flags"),
    "deque": (lambda c: c.block.queue.append(2), "attribute queue[1]"),
    "array": (lambda c: c.block.array.fill(3), "attribute array of module first (Block)"),
    "dataclass": (lambda c: setattr(c.block.config, "rate", 0.7),
        "attribute config.rate of module first (Block) changed from 0.5 to 0.7"),
    "list in dataclass": (lambda c: c.block.config.sizes.append(3), "attribute config.sizes[2]"),
    "another dataclass": (lambda c: setattr(c.block, "config", Config(0.6)), "config.rate"),
    "object": (lambda c: setattr(c.block.options, "beta", 2), "attribute options.beta"),
    "what it had of its class": (lambda c: setattr(c.block.options, "limit", 5),
        "attribute options.limit"),
    "slots": (lambda c: setattr(c.block.slotted, "gain", 3), "attribute slotted.gain"),
    "namespace": (lambda c: setattr(c.block.space.inner, "leaf", [2]), "space.inner.leaf[0]"),
    "namespace new": (lambda c: setattr(c.block.space, "more", 2), "attribute space.more"),
    "their dict": (lambda c: setattr(c.block.options, "__dict__", {"beta": 5, "not_read": 1}),
        "attribute options.beta"),
    "function": (lambda c: setattr(c.block, "closed", made_with([1.0])), "attribute closed"),
    "method": (lambda c: setattr(c.net, "forward", types.MethodType(Net.forward, c.net)),
        "attribute forward of the model (Net) was added"),
    # Classes.
    "class attribute": (lambda c: setattr(Block, "width", 4),
        "class attribute width of Block changed from 3 to 4"),
    "class attribute new": (lambda c: setattr(Block, "extra", 4), "class attribute extra of Block"),
    "class of options": (lambda c: setattr(Options, "limit", 4), "attribute limit of Options"),
    "forward": (lambda c: setattr(Block, "forward", lambda self, x: x),
        "class attribute forward of Block"),
    "class of a module": (lambda c: setattr(c.net.last, "__class__", type("L", (nn.Linear,), {})),
        "attribute __class__ of module last"),
    # Modules, parameters, buffers.
    "module": (lambda c: setattr(c.block, "fc", nn.Linear(3, 3)), "module first.fc was replaced"),
    "module new": (lambda c: c.net.add_module("more", nn.ReLU()), "module more was added"),
    "module gone": (lambda c: delattr(c.block, "drop"), "module first.drop was removed"),
    "module order": (lambda c: c.net._modules.update(first=c.net._modules.pop("first")), "order"),
    "parameter": (lambda c: setattr(c.block.fc, "weight", nn.Parameter(torch.zeros(3, 3))),
        "parameter first.fc.weight was assigned anew"),
    "parameter given": (lambda c: setattr(c.block, "gate", nn.Parameter(torch.ones(3))),
        "parameter first.gate changed from None to a tensor"),
    "buffer": (lambda c: setattr(c.block, "scale", torch.ones(3)),
        "buffer first.scale was assigned anew"),
    "frozen": (lambda c: c.block.fc.weight.requires_grad_(False),
        "parameter first.fc.weight became frozen"),
    "buffer trained": (lambda c: c.block.scale.requires_grad_(True),
        "buffer first.scale became trainable"),
    "data": (lambda c: new_data(c.net.last.weight, torch.clone),
        "parameter last.weight moved to other memory"),
    "data transposed": (lambda c: new_data(c.block.fc.weight, torch.t),
        "stride of parameter first.fc.weight changed from (3, 1) to (1, 3)"),
    "buffer set": (lambda c: c.block.scale.set_(torch.ones(3)), "buffer first.scale moved"),
    "storage": (lambda c: c.block.scale.untyped_storage().resize_(1 << 20), "buffer first.scale"),
    "constant in place": (lambda c: c.block.offset.add_(1),
        "attribute offset of module first (Block) was changed in place"),
    "constant": (lambda c: setattr(c.block, "offset", torch.zeros(3)),
        "attribute offset of module first (Block) was assigned anew"),
    "global tensor": (lambda c: set_global("MASK", torch.ones(3)), "global MASK of test_guards.py"),
    # Hooks.
    "forward hook": (lambda c: c.block.fc.register_forward_hook(lambda *_: None),
        "a forward hook was added to module first.fc (Linear)"),
    "pre-hook": (lambda c: c.block.register_forward_pre_hook(lambda *_: None),
        "a forward pre-hook was added to module first (Block)"),
    "backward hook": (lambda c: c.net.register_full_backward_hook(lambda *_: None),
        "a backward hook was added to the model (Net)"),
    "backward pre-hook": (lambda c: c.net.register_full_backward_pre_hook(lambda *_: None),
        "a backward pre-hook was added to the model (Net)"),
    "parameter hook": (lambda c: c.net.last.bias.register_hook(lambda g: g),
        "a gradient hook was added to parameter last.bias"),
    "hook after gradient": (
        lambda c: c.net.last.bias.register_post_accumulate_grad_hook(lambda p: None),
        "a hook after its gradient was added to parameter last.bias"),
    "optimizer hook": (lambda c: c.optimizer.register_step_post_hook(lambda *_: None),
        "a step hook was added to the optimizer"),
    # Globals, closures, functions.
    "global": (lambda c: set_global("RATE", 2.0),
        "global RATE of test_guards.py changed from 1.0 to 2.0"),
    "global of loss": (lambda c: set_global("LOSS_SCALE", 2.0), "global LOSS_SCALE"),
    "global list": (lambda c: TABLE["scale"].append(3), "global TABLE['scale'][2]"),
    "global function": (lambda c: set_global("helper", lambda x: x), "global helper of"),
    "global of a module": (lambda c: setattr(settings_module, "FACTOR", 3),
        "global FACTOR of settings_module changed from 2 to 3"),
    "closure": (lambda c: setattr(c.block.closed.__closure__[0], "cell_contents", [2.0]),
        "variable factor[0] in the closure of made_with.inner"),
    "list in closure": (lambda c: c.block.closed.__closure__[0].cell_contents.append(1),
        "variable factor[1] in the closure of made_with.inner"),
    "defaults": (lambda c: setattr(helper, "__defaults__", (3,)),
        "default values of function helper of test_guards.py changed from (2,) to (3,)"),
    "defaults by keyword": (lambda c: helper.__kwdefaults__.update(shift=1.0),
        "default values by keyword"),
    "attribute of a function": (lambda c: setattr(helper, "offset", 1.0),
        "attribute offset of function helper of test_guards.py changed from 0.0 to 1.0"),
    "code": (lambda c: setattr(helper, "__code__", (lambda x, power=2, *, shift=0.0: x).__code__),
        "code of function helper"),
    # Optimizer.
    "parameter group": (
        lambda c: c.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
        "optimizer parameter groups changed"),
    "parameter of a group": (lambda c: c.optimizer.param_groups[0]["params"].pop(),
        "optimizer parameter groups changed"),
    "groups": (lambda c: c.optimizer.load_state_dict(c.optimizer.state_dict()),
        "optimizer parameter groups changed"),
    "option": (lambda c: c.optimizer.param_groups[0].update(amsgrad=True),
        "option amsgrad of optimizer group 0 changed from False to True"),
    # torch.
    "grad mode": (lambda c: torch.set_grad_enabled(False), "torch's grad mode"),
    "default dtype": (lambda c: torch.set_default_dtype(torch.float64), "torch's default dtype"),
    "threads": (lambda c: torch.set_num_threads(torch.get_num_threads() + 1), "number of threads"),
    "deterministic": (lambda c: torch.use_deterministic_algorithms(True), "deterministic"),
    "precision": (lambda c: torch.set_float32_matmul_precision("medium"), "matmul precision"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was():
    with restored():
        yield


@pytest.fixture(params=["fast", "compared"])
def answer(request, monkeypatch):
    """``changed`` with and without the memory of objects."""
    if request.param == "compared":
        monkeypatch.setattr(kernels, "is_available", lambda: False)
    elif not kernels.is_available():
        pytest.skip(kernels.unavailable_reason())
    return Guards.changed


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(name, answer):
    case = Case()
    assert answer(case.guards) is None
    change, words = CHANGES[name]
    change(case)
    assert words in (answer(case.guards) or "nothing")
    assert answer(case.guards) is not None  # It stays so.
    assert Guards.compare(case.guards) is not None
    assert answer(Guards(case.net, case.loss, case.optimizer)) is None


def hooked_and_back(c):
    c.block.fc.register_forward_hook(lambda *_: None).remove()
    c.net.last.bias.register_hook(lambda g: g).remove()


def same_list(c):
    c.block.names = ["a", "b"]
    c.block.config.sizes = [1, 2]


def one_step(c):
    c.optimizer.zero_grad()
    c.loss(c.net(torch.randn(4, 3)), torch.randn(4, 2)).backward()
    c.optimizer.step()


NON_CHANGES = {
    "same value": lambda c: setattr(c.block.drop, "p", float("0.0")),
    "round trip": lambda c: (c.net.eval(), c.net.train()),
    "frozen and back": lambda c: c.net.requires_grad_(False).requires_grad_(True),
    "equal lists": same_list,
    "equal dataclass": lambda c: setattr(c.block, "config", Config()),
    "equal object": lambda c: setattr(c.block, "options", Options()),
    "nan": lambda c: setattr(c.block, "ratio", float("nan")),
    "list and back": lambda c: (c.block.names.append("x"), c.block.names.pop()),
    "set and back": lambda c: (c.block.flags.add("q"), c.block.flags.remove("q")),
    "dict and back": lambda c: (c.block.table.update(k=5), c.block.table.update(k=1)),
    "hooked and back": hooked_and_back,
    "global of no code": lambda c: set_global("UNUSED", 7),
    "attribute of no code": lambda c: setattr(c.block.options, "not_read", 7),
    "global equal": lambda c: set_global("RATE", float("1.0")),
    "module global of no code": lambda c: setattr(settings_module, "OTHER", 7),
    "learning rate": lambda c: c.optimizer.param_groups[0].update(lr=0.5, betas=(0.5, 0.9)),
    "values": lambda c: (c.block.fc.weight.data.add_(1), c.block.scale.mul_(2)),
    "gradient": lambda c: setattr(c.block.fc.weight, "grad", torch.ones(3, 3)),
    "a step": one_step,
    "scheduler": lambda c: torch.optim.lr_scheduler.StepLR(c.optimizer, 1),
    "state_dict": lambda c: c.net.load_state_dict(c.net.state_dict()),
    "nothing": lambda c: None,
}


@pytest.mark.parametrize("name", NON_CHANGES)
def test_what_does_not_count_is_no_change(name, answer):
    case = Case()
    NON_CHANGES[name](case)
    assert answer(case.guards) is None
    case.block.drop.p = 0.5
    assert "drop" in answer(case.guards)


def test_equal_lists_are_watched_after_they_were_exchanged(answer):
    case = Case()
    same_list(case)
    assert answer(case.guards) is None
    case.block.config.sizes.append(9)
    assert "config.sizes[2]" in answer(case.guards)


def test_a_partial(answer):
    case = Case(functools.partial(plain_loss, scale=2.0))
    assert answer(case.guards) is None
    case.loss.keywords["scale"] = 3.0
    assert "keywords['scale']" in answer(case.guards)
    other = Case(functools.partial(plain_loss))
    set_global("LOSS_SCALE", 2.0)
    assert "LOSS_SCALE" in answer(other.guards)


def test_a_callable_object(answer):
    case = Case(CallableLoss())
    assert answer(case.guards) is None
    case.loss.weight = 2.0
    assert answer(case.guards) == "attribute weight of the loss changed from 1.0 to 2.0"


def test_a_method(answer):
    loss = CallableLoss()
    case = Case(loss.__call__)
    loss.weight = 2.0
    assert answer(case.guards) == "attribute weight of the loss changed from 1.0 to 2.0"


def test_a_loss_with_a_buffer(answer):
    case = Case(ModuleLoss())
    case.loss.weight.mul_(2)
    assert answer(case.guards) is None
    case.loss.weight = torch.ones(1)
    assert answer(case.guards) == "buffer loss_fn.weight was assigned anew"


def test_a_loss_of_torch(answer):
    case = Case(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert answer(case.guards) is None
    case.loss.label_smoothing = 0.2
    assert "label_smoothing of module loss_fn (CrossEntropyLoss)" in answer(case.guards)


def test_a_constant_that_the_recording_met(answer):
    case, constant = Case(), torch.ones(2)
    guards = Guards(case.net, case.loss, case.optimizer, [constant, case.net.last.weight])
    case.net.last.weight.data.add_(1)
    assert answer(guards) is None
    constant.add_(1)
    assert answer(guards) == "constant tensor 0 was changed in place"


def test_modes_of_torch(answer):
    case = Case()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in answer(case.guards)
        inside = Guards(case.net, case.loss, case.optimizer)
        assert answer(inside) is None
    assert "autocast" in answer(inside)
    with torch.device("cpu"):
        assert "number of function modes" in answer(case.guards)
    with torch.inference_mode():
        assert answer(case.guards) is not None
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert "number of dispatch modes" in answer(case.guards)
    assert answer(case.guards) is None


def test_hooks_of_all_modules(answer):
    case = Case()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert answer(case.guards) == "a forward hook was added to all modules"
    handle.remove()
    assert answer(case.guards) is None


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * RATE


def test_a_method_that_torch_calls(answer):
    net = nn.Sequential(OwnConvolution(1, 1, 3))
    guards = Guards(net, nn.MSELoss(), torch.optim.SGD(net.parameters()))
    set_global("RATE", 3.0)
    assert "global RATE of test_guards.py" in answer(guards)


def without_gradients(x):
    return x * RATE


class Decorated(nn.Module):
    @torch.no_grad()
    def part(self, x):
        return without_gradients(x)

    def forward(self, x):
        return x + self.part(x)


def test_a_function_below_a_decorator_of_torch(answer):
    net = nn.Sequential(nn.Linear(1, 1), Decorated())
    guards = Guards(net, nn.MSELoss(), torch.optim.SGD(net.parameters()))
    set_global("RATE", 3.0)
    assert "global RATE of test_guards.py" in answer(guards)


def test_circles_and_references_that_are_gone(answer):
    case = Case()
    case.block.names = [case.block, case.block.options]
    case.block.names.append(case.block.names)
    config = Config()
    case.net.proxy = weakref.proxy(config)
    del config
    case.net.bound = case.block.forward
    case.net.weights = [case.net.last.weight]
    guards = Guards(case.net, case.loss, case.optimizer)
    one_step(case)
    assert answer(guards) is None
    case.block.names.pop()
    assert "attribute names[2]" in answer(guards)


def test_a_script_whose_globals_change_each_step():
    values = {"__name__": "script", "__file__": "script.py", "RATE": 2, "F": F}
    exec("def loss(output, y): return F.mse_loss(output, y) * RATE + len(y)", values)
    case = Case(values["loss"])
    for number in range(20):
        values["x"], values[f"new{number}"] = object(), number
        assert case.guards.changed() is None
    values["len"] = max
    assert "global len of script.py was added" in case.guards.changed()
    del values["len"]
    assert case.guards.changed() is None
    values["RATE"] = 3
    assert case.guards.changed() == "global RATE of script.py changed from 2 to 3"


def test_memory_shows_everything_here():
    """On these versions nothing but a deque has to be compared at each step."""
    if not kernels.is_available() or sys.version_info >= (3, 13):
        pytest.skip("values are compared")
    others = [watch.key for watch in Case().guards._others]
    assert others == ["contents of attribute queue of module first (Block)"]


def test_a_step_changes_no_memory_that_is_looked_at():
    if not kernels.is_available() or sys.version_info >= (3, 13):
        pytest.skip("values are compared")
    case = Case()
    case.net.append = nn.BatchNorm1d(2)
    guards = Guards(case.net, case.loss, case.optimizer)
    for _ in range(3):
        one_step(case)
        assert guards._blocks.first_changed() is None
        assert guards._words.first_changed() == -1


def test_parameters_that_have_no_shape_yet_and_sparse_ones(answer):
    net = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    net.register_buffer("sparse", torch.eye(3).to_sparse())
    guards = Guards(net, nn.MSELoss(), torch.optim.SGD(net[1].parameters()))
    assert answer(guards) is None
    net(torch.ones(1, 3))
    assert "0" in answer(guards)


def test_swapped_tensors(answer):
    case = Case()
    torch.utils.swap_tensors(case.net.last.weight, nn.Parameter(torch.ones(2, 3)))
    assert "last.weight" in answer(case.guards)


DRAWN = {
    "module random": (lambda c: random.random(), "the module random"),
    "numpy.random": (lambda c: numpy.random.rand(), "the module numpy.random"),
    "attribute": (lambda c: c.block.random.random(), "attribute random of module first (Block)"),
    "generator": (lambda c: c.net.draw.random(), "attribute draw of the model (Net)"),
    "legacy": (lambda c: c.net.legacy.rand(), "attribute legacy of the model (Net)"),
    "torch": (lambda c: torch.rand(1, generator=c.net.torch), "attribute torch of the model (Net)"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_pythons_random_numbers(name):
    case = Case()
    case.net.draw, case.net.legacy = numpy.random.default_rng(1), numpy.random.RandomState(1)
    case.net.torch = torch.Generator()
    state = PythonState(Guards(case.net, case.loss, case.optimizer).generators)
    assert state.changed() is None
    draw, place = DRAWN[name]
    draw(case)
    assert state.changed() == f"Python's random numbers are drawn in the step ({place})"


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # One of the changes adds it.
@settings(max_examples=examples(60), deadline=None)
@given(st.lists(st.sampled_from(sorted(CHANGES) + sorted(NON_CHANGES)), max_size=5))
def test_memory_and_values_agree(names):
    with restored():
        case = Case()
        fast, slow = case.guards, Guards(case.net, case.loss, case.optimizer)
        for name in names:
            try:
                if name in CHANGES:
                    CHANGES[name][0](case)
                else:
                    NON_CHANGES[name](case)
            except (AttributeError, RuntimeError, TypeError, IndexError, KeyError, ValueError):
                pass  # An earlier change has taken away what this one changes.
            assert (fast.changed() is None) == (slow.compare() is None)
            assert fast.changed() == fast.changed()
