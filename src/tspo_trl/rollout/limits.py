"""The limits of a search loop, with their defaults and minima."""

from dataclasses import dataclass, field, fields
from typing import Any


def _limit(default: int, minimum: int, text: str, **metadata: bool) -> int:
    return field(default=default, metadata={"minimum": minimum, "help": text, **metadata})


@dataclass(frozen=True, kw_only=True)
class SearchLimits:
    """
    The limits of a search loop. The defaults are those of Search-R1.

    Args:
        max_searches (`int`, *optional*, defaults to `4`):
            Maximum number of turns of a rollout that may search. The turn after them is final: a search in it is not
            executed. A turn with an invalid action counts as one of them.
        num_passages (`int`, *optional*, defaults to `3`):
            Number of passages for each search.
        max_turn_tokens (`int`, *optional*, defaults to `500`):
            Maximum number of tokens that the model writes in a turn.
        max_query_tokens (`int`, *optional*, defaults to `64`):
            Maximum number of tokens of a query. A longer query is cut before it is sent to the retriever.
        max_observation_tokens (`int`, *optional*, defaults to `500`):
            Maximum number of tokens of an observation. They are split evenly over its passages, and each passage is cut at
            its end.
        max_completion_length (`int` or `None`, *optional*, defaults to `4096`):
            Maximum number of tokens of a completion, all turns and observations together. A rollout that reaches it ends
            as truncated. With `None`, only the context length of the model and the other limits apply.

    Raises:
        `ValueError`: If a limit is not a whole number, or is too small; the message names it.
    """

    max_searches: int = _limit(4, 0, "Maximum number of turns of a rollout that may search.")
    num_passages: int = _limit(3, 1, "Number of passages for each search.")
    max_turn_tokens: int = _limit(500, 1, "Maximum number of tokens that the model writes in a turn.")
    max_query_tokens: int = _limit(64, 1, "Maximum number of tokens of a query; a longer query is cut.")
    max_observation_tokens: int = _limit(500, 1, "Maximum number of tokens of an observation.")
    max_completion_length: int | None = _limit(
        4096, 1, "Maximum number of tokens of a completion, all turns and observations together.", can_be_none=True
    )

    def __post_init__(self) -> None:
        for limit in fields(SearchLimits):
            value, minimum = getattr(self, limit.name), limit.metadata["minimum"]
            if value is None and limit.metadata.get("can_be_none"):
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"`{limit.name}` must be a whole number, got {value!r}.")
            if value < minimum:
                raise ValueError(f"`{limit.name}` must be at least {minimum}, got {value}.")

    def check_room(self) -> None:
        """
        Check that a rollout has room for an answer after an observation. Without searches there are no observations.

        Raises:
            `ValueError`: If `max_completion_length` is not larger than `max_observation_tokens`.
        """
        if (
            self.max_searches
            and self.max_completion_length is not None
            and self.max_completion_length <= self.max_observation_tokens
        ):
            raise ValueError(
                f"`max_completion_length` ({self.max_completion_length}) counts all turns and observations of a "
                f"rollout, so it must be larger than `max_observation_tokens` ({self.max_observation_tokens}): a "
                "single observation would leave no token for an answer."
            )

    @classmethod
    def of(cls, settings: Any) -> "SearchLimits":
        """
        The limits among the attributes of an object.

        Args:
            settings (`Any`):
                An object with all limits as attributes, for instance a [`TSPOConfig`] or a [`SearchConfig`].
        """
        return SearchLimits(**{limit.name: getattr(settings, limit.name) for limit in fields(SearchLimits)})


def limit_option(name: str) -> Any:
    """
    An option of a configuration with the default and the help text of a limit.

    Args:
        name (`str`):
            The name of the limit and of the option.

    Returns:
        A field of a dataclass.
    """
    limit = SearchLimits.__dataclass_fields__[name]
    return field(default=limit.default, metadata={"help": limit.metadata["help"]})
