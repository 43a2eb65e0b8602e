"""Programs whose kernels nobody times: torch's, for tests of what is computed and when."""

import contextlib

import pytest

from hotloop.graph import choices, convolutions, routes


@contextlib.contextmanager
def torchs_kernels():
    """While it lasts, products are MKL's and convolutions oneDNN's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "fastest", lambda work: choices.Route("mkl", {"mkl": 1.0}))
        patch.setattr(
            convolutions, "fastest", lambda work: choices.Route("onednn", {"onednn": 1.0})
        )
        yield
