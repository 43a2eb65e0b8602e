"""The captured machines, as fixtures."""

from support.machine_trees import captured, probe, write_tree

__all__ = ["captured", "probe", "write_tree"]
