"""State into tensors and JSON and back: every type kept, every refusal named."""

import contextlib
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.errors import CheckpointError
from hotloop.train.encode import join_state, split_state
from support import examples


def through_json(state):
    """The state after its tensors and its document went somewhere else and came back."""
    tensors, document = split_state(state)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    return join_state(copies, json.loads(json.dumps(document, allow_nan=False)))


def same(a, b):
    """Equal in type, order, bits: what ``==`` does not say (1 == True == 1.0, nan != nan)."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, set | frozenset):  # nan is in no set twice, and repr tells 1 from 1.0
        return sorted(map(repr, a)) == sorted(map(repr, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def raw(tensor):
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())


numbers = st.integers() | st.floats() | st.booleans()
keys = st.none() | numbers | st.text(max_size=4) | st.tuples(st.integers(), st.text(max_size=2))
hashables = keys | st.frozensets(st.integers(0, 9), max_size=1) | st.binary(max_size=4)
dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8, torch.complex64]
tensors = st.builds(
    lambda shape, dtype: torch.ones(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(dtypes),
)
leaves = (
    hashables
    | st.just(torch.float16)
    | st.just(torch.device("cpu"))
    | st.just(torch.Size([2, 3]))
    | st.sampled_from([np.float64(0.1), np.int32(-5), np.bool_(True), np.float32("nan")])
    | st.builds(np.zeros, st.lists(st.integers(0, 3), max_size=2), st.sampled_from(["f4", "i8"]))
    | tensors
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(keys, st.integers(-3, 3), max_size=3).map(Counter)
        | st.sets(hashables, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=examples(200), deadline=None)
@given(states)
def test_every_state_comes_back_as_it_was(state):
    back = through_json(state)
    assert same(state, back)
    assert split_state(back)[1] == split_state(state)[1]


def test_numbers_keep_their_kind_and_bits():
    odd_nan = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    state = [1, True, 1.0, -0.0, 0.1, math.inf, -math.inf, odd_nan, 2**63, -(2**70), 10**5000]
    assert same(state, through_json(state))


def test_keys_that_look_alike_stay_apart():
    ones = {1: torch.zeros(1), "1": torch.ones(1), (1,): torch.full((1,), 2.0)}
    back = through_json({"state": ones, "": torch.ones(2), "__metadata__": torch.ones(3)})
    assert list(back["state"]) == [1, "1", (1,)]
    assert [value.item() for value in back["state"].values()] == [0.0, 1.0, 2.0]
    assert len(back[""]) == 2
    assert "__metadata__" not in split_state({"__metadata__": torch.ones(3)})[0]


def test_one_tensor_at_two_places_is_one_again():
    shared = torch.ones(3)
    tensors, document = split_state({"a": shared, "b": [shared, torch.ones(3)]})
    assert sorted(tensors) == ["a", "b.1"]
    back = join_state(tensors, document)
    assert back["a"] is back["b"][0]
    assert back["a"] is not back["b"][1]


def test_tensors_are_not_copied():
    weight = torch.nn.Parameter(torch.ones(3))
    tensors, _ = split_state([weight])
    assert tensors["0"].data_ptr() == weight.data_ptr()
    assert not tensors["0"].requires_grad


def parameters():
    return [torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)), torch.nn.Parameter(torch.ones(3))]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}]),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True, betas=(0.8, 0.9)),
    "tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "rprop": lambda p: torch.optim.Rprop(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit(name):
    def run(optimizer, group, num_steps):
        def closure():
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in group)
            loss.backward()
            return loss

        for _ in range(num_steps):
            optimizer.step(closure)

    group = parameters()
    optimizer = OPTIMIZERS[name](group)
    run(optimizer, group, 3)
    saved = through_json(optimizer.state_dict())
    assert same(saved, optimizer.state_dict())
    resumed_group = [torch.nn.Parameter(p.detach().clone()) for p in group]
    resumed = OPTIMIZERS[name](resumed_group)
    resumed.load_state_dict(saved)
    run(resumed, resumed_group, 3)
    run(optimizer, group, 3)
    assert [raw(p) for p in resumed_group] == [raw(p) for p in group]


S = torch.optim.lr_scheduler
SCHEDULERS = {
    "multistep": lambda o: S.MultiStepLR(o, [2, 2, 5]),
    "onecycle": lambda o: S.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "plateau": lambda o: S.ReduceLROnPlateau(o),
    "restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: S.SequentialLR(o, [S.ConstantLR(o), S.ExponentialLR(o, 0.9)], [2]),
    "lambda": lambda o: S.LambdaLR(o, lambda epoch: 0.9**epoch),
    "cyclic": lambda o: S.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_comes_back(name):
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    schedule = SCHEDULERS[name](optimizer)
    for _ in range(3):
        optimizer.step()
        schedule.step(*([1.0] if name == "plateau" else []))
    state = schedule.state_dict()
    assert same(through_json(state), state)


class Odd:
    pass


@pytest.mark.parametrize(
    ("state", "path", "kind"),
    [
        ({"state": {0: {"hook": len}}}, "state.0.hook", "builtin_function_or_method"),
        ([1, Odd()], "1", "Odd"),
        ({"a": defaultdict(int)}, "a", "collections.defaultdict"),
        ({Odd: 1}, "the key", "type"),
        (Odd(), "the top", "Odd"),
        ({"x": np.array(["text"])}, "x", "<U4"),
        ({"x": np.str_("text")}, "x", "numpy.str_"),
    ],
)
def test_what_cannot_be_kept_is_named_with_its_path(state, path, kind):
    with pytest.raises(CheckpointError) as caught:
        split_state(state)
    assert path in str(caught.value)
    assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_state_that_contains_itself_is_refused():
    loop = {"a": []}
    loop["a"].append(loop)
    with pytest.raises(CheckpointError, match=r"contain itself; got at a\.0"):
        split_state(loop)
    deep = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(CheckpointError, match="nest over 64 levels"):
        split_state(deep)


@pytest.mark.parametrize(
    "document",
    [
        {"tensor": "missing"},
        {"tensor": ["unhashable"]},
        {"pickle": "gASVBg=="},
        {"tuple": [1], "list": [2]},
        {},
        {"dict": [[1]]},
        {"dict": [[[1], 2]]},
        {"dict": 5},
        {"set": [[1]]},
        {"float": "00"},
        {"float": 0.5},
        {"int": "0xzz"},
        {"bytes": "0"},
        {"torch.dtype": "torch.load"},
        {"torch.device": "nowhere"},
        {"torch.Size": ["a"]},
        {"numpy": ["O", "0000000000000000"]},
        {"numpy": ["(", "00"]},
        {"numpy": ["<f8", ""]},
        {"numpy": 3},
    ],
)
def test_a_document_made_by_another_hand_is_refused(document):
    with pytest.raises(CheckpointError):
        join_state({}, document)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["dict", "tuple", "set", "float", "numpy", "tensor", "int", "bytes"])
            | st.text(max_size=4),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(json_values)
def test_any_json_is_decoded_or_refused(document):
    with contextlib.suppress(CheckpointError):
        join_state({"a": torch.ones(1)}, document)
