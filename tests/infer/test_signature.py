"""Arguments and results to flat lists and back, for any nesting."""

import json

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotloop.errors import ModelError
from hotloop.infer.signature import arguments, flatten, unflatten

PLAIN = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
LEAVES = st.none() | PLAIN | st.integers(0, 9).map(lambda n: numpy.full(2, n))
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, numpy.ndarray):
        return numpy.array_equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(VALUES)
def test_there_and_back_also_through_json(value):
    leaves, structure = flatten(value, "x")
    structure = json.loads(json.dumps(structure))
    assert same(unflatten(structure, leaves), value)
    assert flatten(value, "x")[1] == structure


@pytest.mark.parametrize("value", [{numpy.zeros}, [object()], {"a": object()}])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(ModelError, match="x must be tensors"):
        flatten(value, "x")


def test_examples_as_arguments():
    x = numpy.zeros(1)
    assert arguments(x) == ((x,), {})
    assert arguments([x, x]) == ((x, x), {})
    assert arguments({"a": x}) == ((), {"a": x})


def test_plain_values_are_told_apart_by_their_type():
    structures = [flatten(value, "x")[1] for value in (1, True, 1.0, "1", None)]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
