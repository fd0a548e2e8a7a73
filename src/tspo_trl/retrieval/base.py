"""The passage and the protocol that every retriever follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Passage:
    """
    A piece of foreign text that a search returned.

    Args:
        id (`str`):
            Identifier within the corpus.
        title (`str`):
            Title, possibly `""`.
        text (`str`):
            The text without its title.
        score (`float`, *optional*, defaults to `0.0`):
            The retriever's score, higher is better. Scores of different backends are not comparable.
    """

    id: str
    title: str
    text: str
    score: float = 0.0


class RetrievalError(RuntimeError):
    """A retriever could not answer: unreachable, broken, or its reply is not what was asked for."""


@runtime_checkable
class Retriever(Protocol):
    """
    Anything with a batched `search`.

    An exception raised by `search` is data, not a crash: the turns that asked are marked `"timeout"` (for
    `TimeoutError`) or `"error"`, and their rollouts are left out of the training signal.
    """

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for all queries at once.

        Args:
            queries (`Sequence[str]`):
                Q queries.
            k (`int`):
                How many passages to return for each.

        Returns:
            `list[list[Passage]]`: Q lists of at most `k` passages, best first. An empty list means nothing was found.
        """
        ...
