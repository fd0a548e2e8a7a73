"""The cost of a call of the search loop."""

from collections import Counter
from dataclasses import dataclass, field

from ..retrieval.base import FailureKind


@dataclass(slots=True, kw_only=True)
class RolloutStats:
    """
    What a call of [`SearchLoop.run`] cost.

    Args:
        generate_seconds (`float`, *optional*, defaults to `0.0`):
            Time in the engine. Includes time in which searches ran in parallel.
        searches (`int`, *optional*, defaults to `0`):
            Searches that turns asked for.
        failed_searches (`Counter[str]`, *optional*):
            How many of them failed, by the kind of failure.
        queries (`int`, *optional*, defaults to `0`):
            Queries sent to the retriever, after removing duplicates.
        latencies (`list[float]`, *optional*):
            Seconds of each call of the retriever, failed ones included.
        error (`Exception`, *optional*):
            The last failure of the retriever.
    """

    generate_seconds: float = 0.0
    searches: int = 0
    failed_searches: Counter[FailureKind] = field(default_factory=Counter)
    queries: int = 0
    latencies: list[float] = field(default_factory=list)
    error: Exception | None = None
