"""What libraries that ask whether a graph is traced are told."""

import sys
import threading
import types

import pytest
import torch

from hotloop.graph import tracing
from hotloop.graph.recording import Recorder


@pytest.fixture
def library(monkeypatch):
    """Two modules of a library like Transformers: who answers, and one that has imported it."""
    utils, masks = (
        types.ModuleType(name) for name in ("transformers.utils.import_utils", "transformers.masks")
    )
    utils.is_tracing = masks.is_tracing = lambda tensor=None: tensor == "fake"
    for module in (utils, masks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return utils, masks


def test_a_library_is_told_while_a_step_is_recorded(library):
    tracing.answer_for_libraries()
    elsewhere = []
    for module in library:
        assert not module.is_tracing(torch.ones(1))
        assert module.is_tracing("fake")
        with Recorder({}):
            assert module.is_tracing(torch.ones(1))
            thread = threading.Thread(target=lambda: elsewhere.append(library[0].is_tracing()))
            thread.start()
            thread.join()
        assert not module.is_tracing()
    assert elsewhere == [False, False]


def test_a_module_that_comes_later_asks_here_too(library, monkeypatch):
    before = library[1].is_tracing
    tracing.answer_for_libraries()
    answer = library[1].is_tracing
    later = types.ModuleType("transformers.later")
    later.is_tracing = before
    monkeypatch.setitem(sys.modules, later.__name__, later)
    tracing.answer_for_libraries()
    assert later.is_tracing is library[0].is_tracing is answer


def test_an_error_while_recording_ends_it(library):
    tracing.answer_for_libraries()
    with pytest.raises(ZeroDivisionError), Recorder({}):
        _ = 1 / 0
    assert not library[0].is_tracing()
