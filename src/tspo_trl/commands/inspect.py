"""`tspo inspect`: write the rollouts of a run as one page."""

from ..inspect.__main__ import main

__all__ = ["main"]
