"""How a captured step is run: ``backend`` is parametrized indirectly."""

import pytest

from hotloop.step.compiled import CompiledStep
from support import interpreted


@pytest.fixture
def backend(request, monkeypatch):
    """``"compiled"``, or ``"interpreted"``: the same graph without the compiler."""
    if request.param == "interpreted":
        monkeypatch.setattr(CompiledStep, "load", interpreted.load)
    return request.param
