"""`tspo memory`: estimate the peak GPU memory of training."""

from ..memory.estimate import main

__all__ = ["main"]
