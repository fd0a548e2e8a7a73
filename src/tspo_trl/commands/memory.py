"""`tspo memory`: estimate the peak GPU memory of training."""

from collections.abc import Sequence
from dataclasses import fields

from ..memory import estimate


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the estimate of a command line, and refuse options that neither it nor a run has."""
    from trl import ModelConfig

    from ..training.config import TSPOConfig
    from .options import ALIASES
    from .train import SearchArguments

    kinds = (SearchArguments, TSPOConfig, ModelConfig)
    estimate.main(arguments, known={field.name for kind in kinds for field in fields(kind)} | {"env", *ALIASES})
