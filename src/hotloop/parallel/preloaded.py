"""What the process that workers are forked from has loaded, so that each is ready at once.

Nothing of it has run: no thread may be there when a process forks.
"""

import torch.fx.experimental.symbolic_shapes  # noqa: F401  # Shapes without memory ask for it: 0.7 s.

from .. import kernels
from . import worker  # noqa: F401

kernels.is_available()
