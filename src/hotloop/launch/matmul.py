"""Matrix products of a launched script: routed while it runs, choices kept for the next run."""

from __future__ import annotations

import atexit
import os

from ..kernels.router import ProductRouter, product_router
from ..measure.product_winners import recall, remember


def route(fingerprint: str | None = None) -> ProductRouter:
    """Take the products over until the process ends, and remember then what was chosen.

    Args:
        fingerprint: of the machine, where the caller has it.

    Raises:
        RunError: there are no kernels here.
    """
    router = product_router()
    known = recall(fingerprint)
    router.install(known)
    pid = os.getpid()

    def at_exit() -> None:
        if os.getpid() == pid:
            remember(router.products(), known, fingerprint)

    atexit.register(at_exit)
    return router
