r"""How often golden answers are found by chance, and how much less a find is worth then.

A golden answer such as "France" occurs in many passages, so a rollout may find it without having looked for it. The
passages that other questions retrieved show how often this happens, because nobody looked for the answer there. They are
all that is needed to estimate the share of a group's finds that chance explains: no annotation and no model.

Notation as in `credit`: N rollouts in groups of G, which are adjacent.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import NamedTuple

import torch

from .scoring import SearchedText, normalize_gold, searched_answer, searched_text

#: Number of recent searches whose passages are kept, over all processes.
POOL_SEARCHES = 256


class PooledRollout(NamedTuple):
    """
    What a pool keeps of a rollout.

    Args:
        question (`str`):
            The question.
        golden_answers (`Sequence[str]`):
            Its golden answers.
        passage_texts (`Sequence[str | None]`):
            The passages of each search that was executed as one string, `None` if it found none.
    """

    question: str
    golden_answers: Sequence[str]
    passage_texts: Sequence[str | None]


@dataclass(frozen=True, slots=True)
class _Search:
    question: str
    answers: frozenset[str]  # golden answers of the question, normalised
    text: SearchedText


class _Words:
    """The distinct words of texts: 5 times as fast to search for a part of a word as the texts one by one."""

    def __init__(self, texts: Iterable[bytes]):
        self._texts: defaultdict[bytes, list[int]] = defaultdict(list)
        self._size = 0
        for text in texts:
            for word in set(text.split()):
                self._texts[word].append(self._size)
            self._size += 1
        self._words = b" ".join([b"", *self._texts, b""])

    def texts_with(self, part: bytes) -> set[int]:
        """The numbers of the texts that contain a part of a word."""
        if not part:
            return set(range(self._size))
        found: set[int] = set()
        at = self._words.find(part)
        while at >= 0:
            end = self._words.index(b" ", at)
            found.update(self._texts[self._words[self._words.rindex(b" ", 0, at) + 1 : end]])
            at = self._words.find(part, end)
        return found


class SearchPool:
    """
    The passages of recent searches, in which golden answers of other questions are looked for. With few questions in a
    step, the pool holds the searches of several steps.

    Args:
        size (`int`, *optional*, defaults to `256`):
            Number of searches that are kept.
    """

    def __init__(self, size: int = POOL_SEARCHES):
        self._searches: deque[_Search] = deque(maxlen=size)
        self._words: _Words | None = None  # of the searches, made when they are needed

    def add(self, rollouts: Sequence[PooledRollout]) -> None:
        """
        Add the searches of a step. If there are more than `size`, the first rollouts of every group are taken.

        Args:
            rollouts (`Sequence[PooledRollout]`):
                The rollouts of the step. Those of a question are adjacent.
        """
        size = self._searches.maxlen or 0
        groups = [list(group) for _, group in groupby(rollouts, key=lambda rollout: rollout.question)]
        added: list[_Search] = []
        for same_number in zip_longest(*groups):
            if len(added) >= size:
                break
            for rollout in filter(None, same_number):
                answers = _normalized(rollout.golden_answers)
                added += [
                    _Search(rollout.question, answers, searched_text(text or "")) for text in rollout.passage_texts
                ]
        self._searches.extend(added[:size])
        self._words = None

    def finds(self, question: str, golden_answers: Sequence[str], eligible: Sequence[str]) -> list[bool | None]:
        """
        Whether the passages of each search contain a golden answer of another question. Questions with an answer in common
        are left out, because their rollouts look for it.

        Args:
            question (`str`):
                The question.
            golden_answers (`Sequence[str]`):
                All its golden answers.
            eligible (`Sequence[str]`):
                The golden answers to look for.

        Returns:
            `list[bool | None]`: A value for each search of the pool, oldest first; `None` for searches of the same
            question, or of one with a shared answer.
        """
        answers = _normalized(golden_answers)
        possible = self._possible(eligible)
        return [
            number in possible and search.text.contains(possible[number])
            if search.question != question and answers.isdisjoint(search.answers)
            else None
            for number, search in enumerate(self._searches)
        ]

    def _possible(self, eligible: Sequence[str]) -> dict[int, list[str]]:
        """The searches that contain a part of golden answers, with these."""
        if self._words is None:
            self._words = _Words(search.text.joined for search in self._searches)
        possible: defaultdict[int, list[str]] = defaultdict(list)
        for gold in eligible:
            with_gold = set(range(len(self._searches)))
            for forms in searched_answer(gold).keys:
                if not with_gold:
                    break
                with_gold &= set().union(*map(self._words.texts_with, forms))
            for number in with_gold:
                possible[number].append(gold)
        return possible

    def count(self, question: str, golden_answers: Sequence[str], eligible: Sequence[str]) -> tuple[int, int]:
        """
        Count the searches of other questions whose passages contain a golden answer.

        Args:
            question, golden_answers, eligible:
                As in [`SearchPool.finds`].

        Returns:
            `tuple[int, int]`: Number of searches that found one, and number of searches of other questions.
        """
        others = [found for found in self.finds(question, golden_answers, eligible) if found is not None]
        return sum(others), len(others)

    def state(self) -> list[tuple[str, list[str], str]]:
        """The pool as plain data, which a checkpoint can hold."""
        return [(search.question, sorted(search.answers), search.text.text) for search in self._searches]

    def load_state(self, state: Iterable[tuple[str, list[str], str]]) -> None:
        """Restore what [`SearchPool.state`] returned."""
        self._searches.clear()
        self._words = None
        self._searches.extend(
            _Search(question, frozenset(answers), searched_text(text)) for question, answers, text in state
        )


def _normalized(answers: Iterable[str]) -> frozenset[str]:
    return frozenset(normalize_gold(answer) or answer.strip().lower() for answer in answers)


def chance_hits(chance: torch.Tensor, num_searches: torch.Tensor, *, num_generations: int) -> torch.Tensor:
    r"""
    The probability that a rollout finds a golden answer by chance alone. A rollout with more searches has more chances:

    $$ b_i = 1 - (1 - p_g)^{n_i} $$

    Args:
        chance (`torch.Tensor`):
            The probability p that a search for something else finds a golden answer of the group, shape
            (N / G,).
        num_searches (`torch.Tensor`):
            Number of executed searches n of each rollout, shape (N,).
        num_generations (`int`):
            G, the size of a group.

    Returns:
        `torch.Tensor`: Probabilities of shape (N,).
    """
    return 1 - (1 - chance.repeat_interleave(num_generations)) ** num_searches


def chance_weights(
    found: torch.Tensor, by_chance: torch.Tensor, scored: torch.Tensor, *, num_generations: int
) -> torch.Tensor:
    r"""
    How much the finds of a group count: the square of the share that chance does not explain,

    $$ w_g = \max\left(0, 1 - \frac{b_g}{h_g}\right)^2 $$

    where \\(h_g\\) is the share of the group's rollouts whose passages contain a golden answer, and \\(b_g\\) the share that is
    expected by chance. It is 1 if chance finds nothing, and 0 if chance finds as much as the group.

    The share counts twice, because a find that may be chance is worth less, and also says less about its rollout: if finds
    are either earned or made by chance, independently of each other, \\(1 - b_g / h_g\\) is the share of finds that are
    earned, and also the squared correlation between finding and earning. See [`turn_advantages`] for what the weight is
    multiplied with.

    Args:
        found (`torch.Tensor`):
            Whether the passages of a rollout contain an eligible golden answer, booleans of shape (N,).
        by_chance (`torch.Tensor`):
            The probability that they do by chance, shape (N,), see [`chance_hits`].
        scored (`torch.Tensor`):
            Whether a rollout has an outcome, booleans of shape (N,). The others do not count.
        num_generations (`int`):
            G, the size of a group.

    Returns:
        `torch.Tensor`: Weights in [0, 1] of shape (N / G,). 1 for a group in which nothing is found, neither by its rollouts
        nor by chance.
    """
    counted = scored.view(-1, num_generations).to(by_chance.dtype)
    size = counted.sum(dim=1).clamp(min=1)
    share = (found.view(-1, num_generations) * counted).sum(dim=1) / size
    expected = (by_chance.view(-1, num_generations) * counted).sum(dim=1) / size
    earned = (1 - expected / share).clamp(min=0.0)  # nothing found: -inf, or NaN without chance
    return torch.where(expected == 0, 1.0, earned**2)
