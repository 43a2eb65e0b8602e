"""Imported by Python when it starts, because ``hotloop run`` put this folder first on PYTHONPATH.

It sees to it that torch, once imported, is set up; then it runs the sitecustomize that would have
been imported without it. Nothing here may fail or be seen: on any trouble the script runs as plain
Python runs it.
"""

import importlib
import os
import sys


def _begin() -> None:
    text = os.environ.get("HOTLOOP_RUN")
    if not text:
        return
    import json

    try:
        # Another interpreter (a child in another environment) has another torch: it is left alone.
        if json.loads(text)["prefix"] != sys.prefix:
            return
        try:
            from hotloop.launch import inside
        except ModuleNotFoundError:
            # hotloop was on the path of the command only, such as its working folder.
            here = os.path.dirname(os.path.abspath(__file__))
            source = os.path.dirname(os.path.dirname(os.path.dirname(here)))
            sys.path.append(source)
            try:
                from hotloop.launch import inside
            finally:
                sys.path.remove(source)
        inside.begin(text)
    except Exception as error:
        print(f"hotloop: the script runs without it: {error}", file=sys.stderr)


def _chain() -> None:
    """Import the sitecustomize that stands behind this one, if there is one."""
    own = sys.modules.pop("sitecustomize", None)
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        if own is not None:
            sys.modules.setdefault("sitecustomize", own)


_here = os.path.dirname(os.path.abspath(__file__))
# What the script imports is looked up as if this folder were not there.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _here]
_begin()
_chain()
