"""The inference server: one model behind HTTP. Importing and serving loads no torch.

- ``Server``, ``ServerOptions`` (``server.py``): sockets, signals, the end.
- ``Connection`` (``connection.py``): HTTP under ``Limits``. ``ConnectionManager``
  (``connection_manager.py``): what all connections share.
- ``App`` (``app.py``): what each path answers.
- ``tensors.py``, ``values.py``, ``answers.py``: bytes to arrays and back.
- ``Batcher`` (``batcher.py``), ``CostCurve`` (``cost.py``): requests to calls of the engine.
- ``Model`` (``model.py``): what is served, and its replacement. ``security.py``: who may connect.
- ``page/``: the page to try the model. ``openapi.py``, ``stats.py``, ``log.py``: for operators.
"""

from ..listening import is_loopback
from .app import AppOptions
from .limits import Limits
from .log import Log
from .model import BatchOptions, Model
from .security import Tokens, check_exposure, tls_context
from .server import Server, ServerOptions, run_server

__all__ = [
    "AppOptions",
    "BatchOptions",
    "Limits",
    "Log",
    "Model",
    "Server",
    "ServerOptions",
    "Tokens",
    "check_exposure",
    "is_loopback",
    "run_server",
    "tls_context",
]
