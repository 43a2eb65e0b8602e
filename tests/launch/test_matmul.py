"""The products of a launched script, where there are no kernels."""

import pytest

from hotloop import kernels
from hotloop.errors import RunError
from hotloop.kernels import router
from hotloop.launch import matmul


def test_without_kernels_it_says_so(monkeypatch):
    def refuse():
        raise RunError("hotloop's kernels must be installed")

    monkeypatch.setattr(kernels.loader, "library", refuse)
    router.product_router.cache_clear()
    with pytest.raises(RunError, match="kernels must be installed"):
        matmul.route()
    router.product_router.cache_clear()
