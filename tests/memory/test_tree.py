"""Batches as trees."""

import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from hotloop import Arguments, ModelError
from hotloop.memory.tree import (
    call,
    flatten,
    map_tensors,
    named_tensors,
    num_samples,
    opaque_names,
    split,
)

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass(frozen=True)
class Sample:
    tokens: torch.Tensor
    length: int


class Encoding(UserDict):  # type: ignore[type-arg]
    """As the BatchEncoding of Transformers: a mapping that is no dict."""


def _a(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


TREES = [
    _a(3, 2),
    (_a(3), _a(3, 2)),
    [_a(3), (_a(3), 4, None)],
    {"a": _a(3), "b": {"c": _a(3, 1), "name": "x"}},
    OrderedDict(a=_a(3), b=_a(3)),
    Pair(_a(3), _a(3)),
    Sample(_a(3), 7),
    Arguments(_a(3), 2, mask=_a(3), deep=[_a(3)]),
    Encoding(ids=_a(3), mask=_a(3)),
    (),
    {},
    5,
]


def _text(tree: Any) -> str:
    return repr(dict(tree)) if isinstance(tree, Encoding) else repr(tree)


@pytest.mark.parametrize("tree", TREES, ids=lambda t: type(t).__name__)
def test_a_tree_is_built_again_from_its_tensors(tree: Any) -> None:
    tensors, structure = flatten(tree)
    again = structure.unflatten(tensors)
    assert type(again) is type(tree)
    assert _text(again) == _text(tree)
    doubled = map_tensors(lambda t: t * 2, tree)
    assert [t.tolist() for t in flatten(doubled)[0]] == [(t * 2).tolist() for t in tensors]
    assert flatten(doubled)[1] == structure
    assert hash(flatten(doubled)[1]) == hash(structure)
    assert _text(again) == _text(tree), "the tree itself was changed"


def test_structures_differ_where_plain_values_types_or_names_do() -> None:
    x = _a(2)
    trees = [
        (x, 1), (x, True), (x, 1.0), (x, 0.0), (x, -0.0), [x, 1], {"a": x}, {"b": x},
        {"a": x, "b": 1}, Pair(x, 1), Arguments(x, 1), Arguments(x, a=1), Sample(x, 1),
        Sample(x, 2), x, (x, None), (x, float("nan")), (x, (x,)), (x, x),
    ]  # fmt: skip
    structures = [flatten(tree)[1] for tree in trees]
    assert len(set(structures)) == len(trees)
    assert flatten((x, float("nan")))[1] == flatten((x, float("nan")))[1]


def test_an_object_of_another_kind_is_alike_only_with_itself() -> None:
    one, other = object(), object()
    assert flatten([one])[1] == flatten([one])[1]
    assert flatten([one])[1] != flatten([other])[1]
    assert flatten([one])[1].unflatten([]) == [one]


def test_a_structure_holds_no_tensor() -> None:
    structure = flatten(Encoding(ids=_a(3), mask=_a(3)))[1]
    assert flatten(structure.like)[0] == []
    assert flatten(flatten(Sample(_a(3), 1))[1].like)[0] == []


def test_packed_sequences_stay_packed() -> None:
    packed = pack_sequence([_a(3), _a(2)])
    tensors, structure = flatten(packed)
    again = structure.unflatten([t.clone() for t in tensors])
    assert isinstance(again, PackedSequence)
    assert again.batch_sizes.tolist() == [2, 2, 1]
    assert call(lambda x: x, packed) is packed


def test_how_a_model_is_called() -> None:
    def model(*args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    x = _a(2)
    sample = Sample(x, 1)
    assert call(model, x) == ((x,), {})
    assert call(model, (x, 1)) == ((x, 1), {})
    assert call(model, [x, 1]) == ((x, 1), {})
    assert call(model, Pair(x, 1)) == ((x, 1), {})
    assert call(model, {"a": x}) == ((), {"a": x})
    assert call(model, Encoding(a=x)) == ((), {"a": x})
    assert call(model, Arguments(x, a=1)) == ((x,), {"a": 1})
    assert call(model, Arguments({"a": x})) == (({"a": x},), {})
    assert call(model, sample) == ((sample,), {})


def test_samples_are_counted_and_cut() -> None:
    batch = {"a": _a(5, 2), "scale": torch.tensor(3.0), "name": "n"}, _a(5)
    assert num_samples(*batch) == 5
    parts = list(split(batch, 2))
    assert [num_samples(*part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([x["a"] for x, _ in parts]), batch[0]["a"])
    assert all(x["scale"] is batch[0]["scale"] and x["name"] == "n" for x, _ in parts)
    assert num_samples(_a(5), _a(4)) is None
    assert num_samples(3, None) is None


def test_what_has_no_common_number_of_samples_is_not_cut() -> None:
    with pytest.raises(ModelError, match=r"first dimension .*\(4,\), \(5, 2\)"):
        list(split((_a(5, 2), _a(4)), 2))


def test_tensors_and_what_may_change_unseen_have_names() -> None:
    tree = {"ids": _a(2), "pairs": [Pair(_a(1), 3), Sample(_a(1), 2)], "how": object()}
    names = ["x.ids", "x.pairs[0].left", "x.pairs[1].tokens"]
    assert [name for name, _ in named_tensors(tree, "x")] == names
    assert opaque_names(tree, "x") == ["x.how"]
    packed = {"text": pack_sequence([torch.ones(2, 1)]), "mask": _a(2)}
    assert [name for name, _ in named_tensors(packed, "x")] == ["x.text.data", "x.mask"]


def test_the_lengths_of_packed_sequences_are_no_data() -> None:
    """They decide which operations follow; alike are only batches of the same lengths."""

    def packed(*lengths: int) -> PackedSequence:
        return pack_sequence([torch.ones(length, 2) for length in lengths])

    tensors, structure = flatten(packed(3, 2))
    assert [tuple(t.shape) for t in tensors] == [(5, 2)]
    assert structure == flatten(packed(3, 2))[1] != flatten(packed(4, 1))[1]
    assert hash(structure) == hash(flatten(packed(3, 2))[1])
    again = structure.unflatten([2 * tensors[0]])
    assert isinstance(again, PackedSequence)
    assert again.batch_sizes.tolist() == [2, 2, 1]
