"""The interface of engines. An engine continues many contexts by one turn each; it does not know about searches."""

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
            The T sampled tokens, including the one that ends the turn.
        logprobs (`list[float]`, *optional*):
            Log-probabilities of the T tokens under the sampling distribution, if the engine provides them. Temperature is
            applied. Static batching computes them before truncation such as top-p, the other engines after it.
    """

    token_ids: list[int]
    logprobs: list[float] | None = None


class Engine(Protocol):
    """
    Continues contexts by one turn each. Turns are submitted and collected by the number of their rollout, so that a
    rollout can continue while the turns of other rollouts are generated, or while other rollouts search.

    Attributes:
        in_rounds (`bool`):
            Whether `collect` generates all submitted turns together. A search loop then submits all possible turns before
            it calls `collect`. Otherwise, generation of a turn begins when it is submitted, in the background or during
            `collect`.
        max_context_length (`int` or `None`):
            Maximum number of tokens of a context and its turn together, if the engine has a limit of its own.
    """

    in_rounds: bool
    max_context_length: int | None

    def session(self) -> AbstractContextManager[Any]:
        """
        A context manager that stays open for all turns of a batch of rollouts. Expensive preparations (gathering sharded
        parameters, allocating a cache) are thus done once per batch of rollouts instead of once per turn. Turns that were
        not collected are dropped when it closes.
        """
        ...

    def submit(self, number: int, context: list[int], max_new_tokens: int) -> None:
        """
        Request one turn.

        Args:
            number (`int`):
                Number of the rollout. A rollout has at most one submitted turn at a time.
            context (`list[int]`):
                Token ids of the context.
            max_new_tokens (`int`):
                Maximum number of tokens of the turn, at least 1.
        """
        ...

    def collect(self, *, wait: bool) -> list[tuple[int, Generation]]:
        """
        Return the finished turns.

        Args:
            wait (`bool`):
                Whether to wait until at least one turn is finished. Otherwise `collect` returns soon, possibly without a
                turn.

        Returns:
            `list[tuple[int, Generation]]`: Numbers of rollouts and their turns. Each turn ends with an end-of-sequence
            token, with the token that completes a stop string, or at its maximum number of tokens.
        """
        ...


class BatchEngine(ABC):
    """An [`Engine`] that generates in rounds: all submitted turns form one batch, in the order of their numbers."""

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
        """Generate the turns of a round. Engines that keep state of rollouts between rounds override this method."""
        return self.generate(contexts, max_new_tokens)

    @abstractmethod
    def generate(self, contexts: Sequence[list[int]], max_new_tokens: Sequence[int]) -> list[Generation]:
        """
        Generate one turn for each context. Must be called within `session()`.

        Args:
            contexts (`Sequence[list[int]]`):
                B contexts of token ids, possibly of different lengths.
            max_new_tokens (`Sequence[int]`):
                Maximum number of tokens for each of the B turns, at least 1.

        Returns:
            `list[Generation]`: B turns.
        """
