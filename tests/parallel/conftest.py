"""The captured machines, for the placement of workers."""

from support.machine_trees import captured, probe, write_tree

__all__ = ["captured", "probe", "write_tree"]
