"""`tspo memory`: estimate the peak memory of a GPU in training."""

from ..memory.estimate import main

__all__ = ["main"]
