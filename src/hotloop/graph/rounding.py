"""Which steps in bfloat16 hotloop computes by its own products, and which under torch's autocast.

Under autocast each factor is rounded into a copy of its own, the weights anew in every step,
results are rounded once more, and a weight's gradient goes through memory. hotloop's products take
float32 as it lies, round while they pack, and give float32; the update stays in the product of the
gradient.
"""

from __future__ import annotations

from torch import fx

from ..kernels.calls import has_bfloat16
from .operators import GEMM_UPDATES, PRODUCTS

# Parts of names: what autocast computes in bfloat16 and hotloop has no kernel for.
_OTHERS = ("conv", "bmm", "rnn", "attention")


def rounds_products() -> bool:
    """Whether this processor has an instruction for products in bfloat16, and hotloop its kernels.

    Raises:
        RunError: there are no kernels here.
    """
    return has_bfloat16()


def covers(graph: fx.GraphModule) -> bool:
    """Whether hotloop's products are all that autocast would compute in bfloat16.

    Args:
        graph: a step recorded in float32, before its products are routed.
    """
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return any(t in PRODUCTS or t in GEMM_UPDATES for t in targets) and not any(
        part in str(t) for t in targets for part in _OTHERS
    )
