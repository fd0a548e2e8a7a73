"""The tokens of passages: what each of them shows, and how a budget is split over them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..retrieval.base import Passage


@dataclass(frozen=True, slots=True)
class EncodedPassage:
    """The tokens of a passage with its header, the end of each in characters, and the positions of title and text."""

    token_ids: list[int]
    ends: list[int]
    title: str
    title_start: int
    text: str
    text_start: int
    inside: frozenset[int]  # numbers of tokens that end inside an escape

    def whole(self, num_tokens: int) -> int:
        """The largest number of tokens up to `num_tokens` that does not end inside an escape."""
        while num_tokens in self.inside:
            num_tokens -= 1
        return num_tokens

    def as_shown(self, passage: Passage, num_tokens: int) -> Passage:
        """The part of the passage in its first tokens; the same object if it is complete and unchanged."""
        end = self.ends[num_tokens - 1]
        title, text = self.title[: max(end - self.title_start, 0)], self.text[: max(end - self.text_start, 0)]
        if (title, text) == (passage.title, passage.text):
            return passage
        return replace(passage, title=title, text=text)


def escaped_positions(
    content: str, ends: Sequence[int], escape: Callable[[str], str]
) -> tuple[list[int], frozenset[int]]:
    """
    Convert positions in an escaped text to positions in the text.

    Args:
        content (`str`):
            The text.
        ends (`Sequence[int]`):
            The N positions where tokens end in the escaped text.
        escape (`Callable`):
            Escapes each character on its own.

    Returns:
        `tuple[list[int], frozenset[int]]`: For each token the number of characters that are complete at its end, and the
            numbers of tokens, from 1, that end inside the escape of a character.
    """
    starts = list(accumulate((len(escape(char)) for char in content), initial=0))
    complete = [bisect_right(starts, end) - 1 for end in ends]
    inside = frozenset(n for n, (k, end) in enumerate(zip(complete, ends, strict=True), start=1) if starts[k] != end)
    return complete, inside


def split_budget(lengths: Sequence[int], budget: int) -> list[int]:
    """Split a budget of tokens evenly; long passages get the tokens that short ones do not need."""
    shares = [0] * len(lengths)
    for done, i in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        shares[i] = min(lengths[i], (budget - sum(shares)) // (len(lengths) - done))
    return shares
