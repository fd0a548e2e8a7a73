"""What a demonstration searches for: queries whose passages have the evidence, and failed queries before them."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..credit import eligible_golds
from ..retrieval.base import Passage
from ..scoring import contains_answer, normalize_answer

#: Searches for Q queries at once, and returns the passages of each as the model would see them.
Search = Callable[[Sequence[str]], list[list[Passage]]]

_IN_BRACKETS = re.compile(r"\s*\([^()]*\)$")  # "Emma (novel)" is called Emma
_POOR_QUERIES = 4  # tried for a failed search of a question


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The searches and the answer of a demonstration.

    Args:
        queries (`tuple[str, ...]`):
            The queries, in order.
        answer (`str`):
            The golden answer to give.
        by_titles (`bool`):
            Whether all supporting titles are among the titles of the passages. Otherwise only the golden answer is known to
            occur in them.
        num_failed (`int`, *optional*, defaults to `0`):
            Number of queries at the beginning that do not find any evidence.
    """

    queries: tuple[str, ...]
    answer: str
    by_titles: bool
    num_failed: int = 0


@dataclass(slots=True)
class _Chain:
    """Searches for the evidence of a question, one after another. Each query follows from the question or from passages."""

    question: str
    golds: Sequence[str]
    titles: list[str]  # supporting titles that were not found yet
    queries: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)

    def next_query(self) -> str | None:
        """The next query, `None` if there is nothing left to search for, or no remaining title has been named."""
        if self.titles:
            text = "\n".join([self.question, *self.passages])
            names = [_name(title) for title in self.titles]
            if known := [name for name in names if contains_answer(text, [name])]:
                first = min(known, key=lambda name: normalize_answer(text).find(normalize_answer(name)))
                return None if first in self.queries else first
        return None if self.queries else self.question

    def read(self, query: str, passages: Sequence[Passage]) -> None:
        """Read the passages of a query."""
        self.queries.append(query)
        self.passages += [f"{passage.title}\n{passage.text}" for passage in passages]
        found = {_key(passage.title) for passage in passages}
        self.titles = [title for title in self.titles if _key(title) not in found]

    def plan(self, by_titles: bool) -> Plan | None:
        """The plan, if its searches find the evidence."""
        text = "\n¶\n".join(self.passages)
        eligible = eligible_golds(self.golds)
        answer = next((gold for gold in eligible if contains_answer(text, [gold])), None)
        if answer is None and by_titles and not eligible:
            answer = next((gold for gold in self.golds if gold.strip()), None)  # yes and no need not be in the passages
        if answer is None or self.titles or not self.queries:
            return None
        return Plan(tuple(self.queries), answer.strip(), by_titles)


def find_plans(rows: Sequence[Mapping[str, Any]], search: Search, max_searches: int) -> list[Plan | None]:
    """
    Find searches whose passages have the evidence of questions. With `supporting_titles`, a title is searched for as soon as
    it is named in the question or in a passage, until passages of all titles are found. If that is not possible, and without
    titles, the question itself is searched for, and its passages must contain a golden answer.

    Args:
        rows (`Sequence[Mapping]`):
            N rows with `question`, `golden_answers` and optionally `supporting_titles`.
        search (`Callable`):
            Searches for several queries, and returns the passages of each as the model would see them.
        max_searches (`int`):
            Maximum number of searches of a plan.

    Returns:
        `list[Plan | None]`: N plans, `None` for questions without evidence.
    """
    titled = [i for i, row in enumerate(rows) if row.get("supporting_titles")]
    plans = dict(zip(titled, _follow([_chain(rows[i], True) for i in titled], search, max_searches), strict=True))
    others = [i for i in range(len(rows)) if plans.get(i) is None]
    by_question = _follow([_chain(rows[i], False) for i in others], search, 1)
    plans |= dict(zip(others, by_question, strict=True))
    return [plans[i] for i in range(len(rows))]


def _chain(row: Mapping[str, Any], by_titles: bool) -> _Chain:
    titles = [title for title in dict.fromkeys(row["supporting_titles"]) if title.strip()] if by_titles else []
    return _Chain(row["question"].strip(), row["golden_answers"], titles)


def _follow(chains: Sequence[_Chain], search: Search, max_searches: int) -> list[Plan | None]:
    """The plans of chains, all searches of a round at once."""
    by_titles = [bool(chain.titles) for chain in chains]
    for _ in range(max_searches):
        asked = [(chain, query) for chain in chains if (query := chain.next_query()) is not None]
        if not asked:
            break
        for (chain, query), passages in zip(asked, search([query for _, query in asked]), strict=True):
            chain.read(query, passages)
    return [chain.plan(titled) for chain, titled in zip(chains, by_titles, strict=True)]


def add_failed_searches(
    plans: Sequence[Plan],
    rows: Sequence[Mapping[str, Any]],
    search: Search,
    max_searches: int,
    *,
    count: int,
    rng: random.Random,
) -> list[Plan]:
    """
    Begin some plans with a search that does not find any evidence: neither a golden answer nor a supporting title. Its query
    is the question, if the plan searches for titles, or a few successive words of the question.

    Args:
        plans (`Sequence[Plan]`):
            N plans.
        rows (`Sequence[Mapping]`):
            The N rows that they belong to.
        search (`Callable`):
            See [`find_plans`].
        max_searches (`int`):
            Maximum number of searches of a plan.
        count (`int`):
            Number of plans to change, drawn at random. Plans for which no query fails stay as they are.
        rng (`random.Random`):
            Draws the plans and the queries.

    Returns:
        `list[Plan]`: N plans.
    """
    changed = list(plans)
    left = [i for i in rng.sample(range(len(plans)), len(plans)) if len(plans[i].queries) < max_searches]
    while count > 0 and left:
        chosen, left = left[:count], left[count:]
        queries = {i: _poor_queries(rows[i]["question"], plans[i], rng) for i in chosen}
        asked = list(dict.fromkeys(query for i in chosen for query in queries[i]))
        found = dict(zip(asked, search(asked), strict=True)) if asked else {}
        for i in chosen:
            failed = next((query for query in queries[i] if not _has_evidence(rows[i], found[query])), None)
            if failed is not None:
                changed[i] = replace(plans[i], queries=(failed, *plans[i].queries), num_failed=1)
                count -= 1
    return changed


def _poor_queries(question: str, plan: Plan, rng: random.Random) -> list[str]:
    """Queries that may fail."""
    words = question.strip().rstrip("?").split()
    queries = [question.strip()]
    for _ in range(_POOR_QUERIES if len(words) > 3 else 0):
        length = rng.randint(3, max(3, len(words) // 2))
        start = rng.randint(0, len(words) - length)
        queries.append(" ".join(words[start : start + length]))
    return [query for query in dict.fromkeys(queries) if query not in plan.queries]


def _has_evidence(row: Mapping[str, Any], passages: Sequence[Passage]) -> bool:
    titles = {_key(title) for title in row.get("supporting_titles") or []}
    golds = eligible_golds(row["golden_answers"])
    return any(
        _key(passage.title) in titles or contains_answer(f"{passage.title}\n¶\n{passage.text}", golds)
        for passage in passages
    )


def _name(title: str) -> str:
    """What an article is called, without the words in brackets that tell it from others."""
    return _IN_BRACKETS.sub("", title).strip() or title.strip()


def _key(title: str) -> str:
    return " ".join(title.split()).casefold()
