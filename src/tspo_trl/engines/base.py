"""The ways to generate a turn. An engine continues many contexts by one turn each; it knows nothing of searches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Generation:
    """
    One generated turn.

    Args:
        token_ids (`list[int]`):
            The T sampled tokens, the one that ends the turn included.
        logprobs (`list[float]`, *optional*):
            Their T log-probabilities under the sampling distribution, where the engine gives them: with temperature
            applied; before any truncation such as top-p by static batching, after it by the other engines.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None


class Engine(Protocol):
    """
    Continues contexts by one turn each. Turns are submitted and collected under the number of their rollout, so that a
    rollout can go on while others are still generated or search.

    Attributes:
        in_rounds (`bool`):
            Whether `collect` generates all submitted turns together. A search loop then submits whatever it can before.
            Otherwise turns are generated from when they are submitted, in the background or during `collect`.
        max_context_length (`int` or `None`):
            The most tokens of a context and its turn together, where the engine has a limit of its own.
    """

    in_rounds: bool
    max_context_length: int | None

    def session(self) -> AbstractContextManager[Any]:
        """
        Held open around all turns of a rollout, so that what is expensive (gathering sharded parameters, allocating a
        cache) is done once a rollout and not once a turn. Turns that nobody has collected when it closes are dropped.
        """
        ...

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """
        Ask for one turn.

        Args:
            number (`int`):
                The rollout. It has at most one turn under way.
            context (`list[int]`):
                Token ids.
            max_new_tokens (`int`):
                The budget of the turn, at least 1.
        """
        ...

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """
        Take the turns that are finished.

        Args:
            wait (`bool`):
                Whether to wait until at least one is. Otherwise it returns soon, perhaps with none.

        Returns:
            `list[tuple[int, Generation]]`: Rollouts and their turns, each ended by an end-of-sequence token, by the
            token that completes a stop string, or by its budget.
        """
        ...


class BatchEngine(ABC):
    """An [`Engine`] that generates in rounds: all submitted turns as one batch, in the order of their numbers."""

    in_rounds = True
    max_context_length: int | None = None

    def __init__(self) -> None:
        self._submitted: dict[int, tuple[list[int], int]] = {}

    @contextmanager
    def session(self) -> Iterator[None]:
        """See [`Engine.session`]."""
        try:
            yield
        finally:
            self._submitted.clear()

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """See [`Engine.submit`]."""
        self._submitted[number] = (context, max_new_tokens)

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """See [`Engine.collect`]."""
        numbers = sorted(self._submitted)
        if not numbers:
            return []
        contexts, budgets = zip(*(self._submitted.pop(number) for number in numbers), strict=True)
        return list(zip(numbers, self._generate_round(numbers, contexts, budgets), strict=True))

    def _generate_round(
        self, numbers: Sequence[int], contexts: Sequence[list[int]], max_new_tokens: Sequence[int]
    ) -> list[Generation]:
        """Generate the turns of a round, for an engine that keeps something of a rollout (by its number) for the next."""
        return self.generate(contexts, max_new_tokens)

    @abstractmethod
    def generate(self, contexts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Generation]:
        """
        Generate one turn for each context, within `session()`.

        Args:
            contexts (`Sequence[list[int]]`):
                B contexts of token ids, possibly of different lengths.
            max_new_tokens (`Sequence[int]`):
                B budgets, each at least 1.

        Returns:
            `list[Generation]`: B turns.
        """
