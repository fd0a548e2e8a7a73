"""The audit of a data set and a retriever before training. Pure functions of rows and passages: no I/O."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch

from .chance import PooledRollout, SearchPool, chance_hits, chance_weights
from .credit import eligible_golds, first_occurrence
from .retrieval.base import Passage
from .rollout.limits import SearchLimits
from .rollout.trajectory import Turn
from .scoring import exact_match, normalize_answer, searched_text

#: Why FOLR cannot use a golden answer. The guard "degenerate" excludes the first three, "strict" all four.
REASONS = {
    "yes_no": "yes, no or noanswer",
    "empty": "empty after normalisation",
    "one_character": "a single character",
    "in_question": "contained in the question",
}
# Thresholds of the warnings
LOW_HIT, HIGH_UNUSABLE, HIGH_CONSTANT, HIGH_CHANCE = 0.30, 0.10, 0.05, 0.20
#: A golden answer is common if more than this share of the searches for other questions finds it.
COMMON = 0.05


class Chance(NamedTuple):
    """How often searches for other questions find a golden answer of a question."""

    rates: tuple[float, ...]  # the share of these searches that find one in their first k passages, for k = 1, 2, …
    gold: str | None = None  # the golden answer that most of them find; `None` if none finds one


class Ranks(NamedTuple):
    """
    The first ranks (from 1) at which the searches of a question found something, `None` if they did not find it; and how
    often chance finds it.
    """

    plain: int | None  # of a golden answer, with the question as the query
    ideal: int | None  # of a golden answer, the best rank of the searches for the supporting titles
    supporting: tuple[int | None, ...]  # of each supporting passage, with the question as the query
    chance: Chance | None = None  # `None` if there are no searches for other questions


@dataclass(frozen=True, slots=True)
class Curve:
    """
    A rate as a function of the number of passages of a search.

    Args:
        questions (`int`):
            Number of questions over which the rates are means.
        rates (`tuple[float, ...]`):
            The rates at k = 1…`top_k`.
    """

    questions: int
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """
    The result of an audit. The recipe writes `to_dict()` as JSON.

    Args:
        num_questions (`int`):
            Number of audited questions.
        num_eligible (`int`):
            Number of questions with a golden answer that FOLR can use with the guard `"degenerate"`. Hit rates are over
            these questions.
        num_eligible_strict (`int`):
            The same with the guard `"strict"`.
        num_passages (`int`):
            Number of passages of a search in training: the k of the verdict.
        plain ([`Curve`] or `None`):
            Share of questions with a golden answer among the first k passages for the question itself. `None` if no
            question is eligible.
        ideal ([`Curve`] or `None`):
            The same for any of the searches for the supporting titles. `None` if no eligible question has such titles.
        chance ([`Curve`] or `None`):
            The probability that a search for another question finds a golden answer among its first k passages, averaged
            over questions. It is estimated as in training, see [`SampledSearches`]. `None` without other questions.
        chance_hits (`tuple[float, ...]`):
            The probability that a rollout with n = 1…`max_searches` such searches finds one in `num_passages` passages each,
            see [`~chance.chance_hits`]. Empty if `chance` is `None`.
        chance_weights (`tuple[float, ...]`):
            For each n, the squared share of the finds that chance does not explain, if as many rollouts find an answer as
            plain questions do: what a find counts with the guard `"chance"`, see [`~chance.chance_weights`]. Empty if `chance` is
            `None`.
        supporting ([`Curve`] or `None`):
            Recall of the supporting passages among the first k passages for the question itself, averaged over all
            questions that have supporting ids. `None` if no question has them.
        unusable (`dict[str, dict]`):
            For each reason of `REASONS`: the number of `questions` with such a golden answer, their `share` of all
            questions, and up to three `examples` with different golden answers (`gold` and `question`). The key
            `"chance"` has the same for golden answers that more than 5 % of the searches for other questions find, the
            most frequent first.
        constant_answers (`dict[str, float]`):
            Exact match of always giving the same answer, best first: yes, no, and the most frequent golden answers.
        about (`dict`, *optional*):
            A description of the audited data, for instance the options of the command line.
    """

    num_questions: int
    num_eligible: int
    num_eligible_strict: int
    num_passages: int
    plain: Curve | None
    ideal: Curve | None
    chance: Curve | None
    chance_hits: tuple[float, ...] = ()
    chance_weights: tuple[float, ...] = ()
    supporting: Curve | None
    unusable: dict[str, dict[str, Any]]
    constant_answers: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)

    def at_k(self, curve: Curve | None) -> float | None:
        """The rate at `num_passages`."""
        return None if curve is None else curve.rates[self.num_passages - 1]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-serialisable data, and `verdict`, a list of strings."""
        return asdict(self) | {"verdict": verdict(self)}


def unusable_reason(gold: str, question: str) -> str | None:
    """Why FOLR cannot use a golden answer: a key of `REASONS`, or `None` if it can use it with every guard."""
    if eligible_golds([gold], question=question, guard="strict"):
        return None
    if eligible_golds([gold], guard="degenerate"):
        return "in_question"
    normalized = normalize_answer(gold)
    return "empty" if not normalized else "one_character" if len(normalized) == 1 else "yes_no"


def first_rank(passages: Sequence[Passage], golden_answers: Sequence[str]) -> int | None:
    """The rank (from 1) of the first passage with an eligible golden answer, found by the code of training."""
    # Each passage is its own turn, so that the first turn is the first rank
    rank = first_occurrence([_text(passage) for passage in passages], golden_answers)
    return None if rank is None else rank + 1


def _text(*passages: Passage) -> str | None:
    """What training reads of the passages of a search."""
    return Turn(token_ids=[], passages=list(passages)).passage_text


class SampledSearches:
    """
    A sample of searches, in which golden answers of other questions are looked for: a [`~chance.SearchPool`] as in training,
    which also knows the ranks of passages.

    Args:
        searches (`Sequence[tuple[Mapping, Sequence[Passage]]]`):
            Questions, with `question` and `golden_answers`, and the passages found for them, best first.
    """

    def __init__(self, searches: Sequence[tuple[Mapping[str, Any], Sequence[Passage]]]):
        self._pool = SearchPool(len(searches))
        self._passages = [[searched_text(_text(p) or "") for p in passages] for _, passages in searches]
        for row, passages in searches:  # one by one: the pool takes the rollouts of a step in turn
            self._pool.add([PooledRollout(row["question"], row["golden_answers"], [_text(*passages)])])

    def chance(self, row: Mapping[str, Any], top_k: int) -> Chance | None:
        """
        How often the searches for other questions find a golden answer of a question.

        Args:
            row (`Mapping`):
                The question, with `question` and `golden_answers`.
            top_k (`int`):
                Maximum number of passages of the searches.

        Returns:
            [`Chance`] or `None`: With rates at k = 1…`top_k`; `None` if the sample has no searches for other questions.
        """
        golds = eligible_golds(row["golden_answers"])
        finds = self._pool.finds(row["question"], row["golden_answers"], golds)
        others = sum(found is not None for found in finds)
        if not others:
            return None
        at_rank, by_gold = [0] * top_k, Counter[str]()
        for passages, found in zip(self._passages, finds, strict=True):
            # Ranks are needed only of the few searches that found one
            rank = next((i for i, p in enumerate(passages) if p.contains(golds)), None) if found else None
            if rank is not None:
                at_rank[rank] += 1
                by_gold.update(gold for gold in golds if passages[rank].contains([gold]))
        rates = tuple(count / others for count in accumulate(at_rank))
        return Chance(rates, next((gold for gold, _ in by_gold.most_common(1)), None))


def find_ranks(row: Mapping[str, Any], results: Sequence[Sequence[Passage]]) -> Ranks:
    """
    Compute the ranks of a question from the results of its searches.

    Args:
        row (`Mapping`):
            The question, with `golden_answers` and `supporting_ids`.
        results (`Sequence[Sequence[Passage]]`):
            The passages for the question itself, then those for each of its supporting titles; each best first.
    """
    plain, *ideal = (first_rank(passages, row["golden_answers"]) for passages in results)
    ids = [passage.id for passage in results[0]]
    return Ranks(
        plain=plain,
        ideal=min((rank for rank in ideal if rank is not None), default=None),
        supporting=tuple(ids.index(i) + 1 if i in ids else None for i in row["supporting_ids"]),
    )


def constant_answers(golden_answers: Sequence[Sequence[str]], count: int = 5) -> dict[str, float]:
    """Exact match of always answering yes, no, or one of the `count` most frequent golden answers; best first."""
    # Normalised form -> its first spelling in the data
    spellings = {normalize_answer(gold): gold for golds in reversed(golden_answers) for gold in reversed(golds)}
    frequency = Counter(form for golds in golden_answers for form in {normalize_answer(gold): None for gold in golds})
    frequent = [spellings[form] for form, _ in frequency.most_common() if form not in ("", "yes", "no")][:count]
    scores = {a: sum(exact_match(a, golds) for golds in golden_answers) for a in ("yes", "no", *frequent)}
    return {a: scores[a] / len(golden_answers) for a in sorted(scores, key=lambda a: -scores[a])}


def summarize(
    rows: Sequence[Mapping[str, Any]],
    ranks: Sequence[Ranks],
    *,
    top_k: int,
    num_passages: int,
    max_searches: int = SearchLimits.max_searches,
) -> Audit:
    """
    Audit a data set.

    Args:
        rows (`Sequence[Mapping]`):
            The questions, at least one, with `question`, `golden_answers` and `supporting_titles`.
        ranks (`Sequence[Ranks]`):
            The results of [`find_ranks`], one for each question.
        top_k (`int`):
            Maximum number of passages of the searches.
        num_passages (`int`):
            Number of passages of a search in training, at most `top_k`.
        max_searches (`int`, *optional*, defaults to `4`):
            Maximum number of searches of a rollout in training.
    """
    pairs = list(zip(rows, ranks, strict=True))
    eligible = [(row, found) for row, found in pairs if eligible_golds(row["golden_answers"])]
    strict = [row for row in rows if eligible_golds(row["golden_answers"], question=row["question"], guard="strict")]
    compared = [(found.plain, found.chance) for _, found in eligible if found.chance is not None]
    by_chance = [chance.rates[num_passages - 1] for _, chance in compared]
    hits, weights = _by_searches(
        [plain is not None and plain <= num_passages for plain, _ in compared], by_chance, max_searches
    )
    return Audit(
        num_questions=len(rows),
        num_eligible=len(eligible),
        num_eligible_strict=len(strict),
        num_passages=num_passages,
        plain=_curve([(found.plain,) for _, found in eligible], top_k),
        ideal=_curve([(found.ideal,) for row, found in eligible if row["supporting_titles"]], top_k),
        chance=_mean_curve([chance.rates for _, chance in compared]),
        chance_hits=hits,
        chance_weights=weights,
        supporting=_curve([found.supporting for found in ranks if found.supporting], top_k),
        unusable=_unusable(pairs, num_passages),
        constant_answers=constant_answers([row["golden_answers"] for row in rows]),
    )


def _unusable(pairs: Sequence[tuple[Mapping[str, Any], Ranks]], num_passages: int) -> dict[str, dict[str, Any]]:
    """For each reason, the questions with such a golden answer, and examples."""
    found: dict[str, list[tuple[str, str]]] = {reason: [] for reason in REASONS}  # golden answers and questions
    for row, _ in pairs:
        golds = {unusable_reason(gold, row["question"]): gold for gold in reversed(row["golden_answers"])}
        for reason in REASONS:
            if reason in golds:
                found[reason].append((golds[reason], row["question"]))
    common = [
        (chance.rates[num_passages - 1], chance.gold, row["question"])
        for row, (*_, chance) in pairs
        if chance is not None and chance.gold is not None and chance.rates[num_passages - 1] > COMMON
    ]
    found["chance"] = [(gold, question) for _, gold, question in sorted(common, key=lambda entry: -entry[0])]
    return {
        reason: {"questions": len(entries), "share": len(entries) / len(pairs), "examples": _examples(entries)}
        for reason, entries in found.items()
    }


def _examples(entries: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The first three different golden answers, each with its first question."""
    questions: dict[str, str] = {}
    for gold, question in entries:
        questions.setdefault(gold, question)
    return [{"gold": gold, "question": question} for gold, question in islice(questions.items(), 3)]


def _by_searches(
    found: Sequence[bool], by_chance: Sequence[float], max_searches: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """
    For rollouts with n = 1…`max_searches` searches, the probability of a find by chance, and the weight of
    training, with the questions as the rollouts of one group.
    """
    if not found:
        return (), ()
    hits, weights = [], []
    plain, probabilities = torch.tensor(found), torch.tensor(by_chance, dtype=torch.float64)
    for searches in range(1, max_searches + 1):
        hit = chance_hits(probabilities, torch.full_like(plain, searches, dtype=torch.int64), num_generations=1)
        weight = chance_weights(plain, hit, torch.ones_like(plain), num_generations=len(found))
        hits.append(hit.mean().item())
        weights.append(weight.item())
    return tuple(hits), tuple(weights)


def _mean_curve(rates: Sequence[Sequence[float]]) -> Curve | None:
    """The mean of curves of questions."""
    return Curve(len(rates), tuple(sum(at_k) / len(rates) for at_k in zip(*rates, strict=True))) if rates else None


def _curve(ranks: Sequence[Sequence[int | None]], top_k: int) -> Curve | None:
    """The share of ranks up to k, for k = 1…`top_k`: averaged over the ranks of a question, then over questions."""
    gains = [0.0] * top_k
    for group in ranks:
        for rank in group:
            if rank is not None:
                gains[rank - 1] += 1 / len(group)
    return Curve(len(ranks), tuple(gain / len(ranks) for gain in accumulate(gains))) if ranks else None


def verdict(audit: Audit) -> list[str]:
    """The meaning of the numbers for training, as sentences; those that suggest a change begin with "Warning"."""
    total, eligible, strict, k = audit.num_questions, audit.num_eligible, audit.num_eligible_strict, audit.num_passages
    hit, ideal, chance = (audit.at_k(curve) or 0.0 for curve in (audit.plain, audit.ideal, audit.chance))
    none, in_question = (total - eligible) / total, (eligible - strict) / total
    ceiling = (hit * eligible + total - eligible) / total
    answer, score = next(iter(audit.constant_answers.items()))
    remedy = "the policy must learn better queries." if ideal >= LOW_HIT else "does the corpus cover the questions?"
    lines = {
        f"Golden answers: FOLR can use one for {eligible} of {total} questions with the guard 'degenerate', and for "
        f"{strict} with 'strict'.": True,
        f"Ceiling: one search for the plain question finds a golden answer in {k} passages for {hit:.1%} of the "
        "eligible questions. An agent that answers only from these passages reaches an exact match of at most "
        f"{ceiling:.3f} over all questions (questions without an eligible golden answer count as correct).": (
            audit.plain is not None
        ),
        f"Ideal queries: searches for the supporting titles find a golden answer in {k} passages for {ideal:.1%}.": (
            audit.ideal is not None
        ),
        **dict.fromkeys(_chance_lines(audit), True),
        f"Constant answer: always answering {answer!r} scores an exact match of {score:.3f}.": True,
        f"Warning: one search for the plain question finds a golden answer for only {hit:.1%} of the eligible "
        f"questions, less than {LOW_HIT:.0%}: {remedy}": audit.plain is not None and hit < LOW_HIT,
        f"Warning: a search for another question finds a golden answer with a probability of {chance:.1%}, more than "
        f"{HIGH_CHANCE:.0%} of the hit rate: many finds are accidental. Only folr_guard='chance', the default, reduces "
        "their reward.": (chance > HIGH_CHANCE * hit),
        f"Warning: {none:.1%} of the questions have no eligible golden answer: FOLR cannot help.": none > HIGH_UNUSABLE,
        f"Warning: {in_question:.1%} of the questions contain all their eligible golden answers: consider "
        "folr_guard='strict'.": in_question > HIGH_UNUSABLE,
        f"Warning: the constant answer {answer!r} scores over {HIGH_CONSTANT:.0%}: also look at the scores of the "
        "questions that it does not answer.": score > HIGH_CONSTANT,
        "Warning: no supporting passage was found at any rank: do the ids of the data set and the corpus agree?": (
            audit.supporting is not None and not any(audit.supporting.rates)
        ),
    }
    return [line for line, holds in lines.items() if holds]


def _chance_lines(audit: Audit) -> list[str]:
    """What chance does to turn rewards, without and with `folr_guard="chance"`."""
    if not audit.chance_hits or audit.chance is None or audit.plain is None:
        return []
    searches, k = len(audit.chance_hits), audit.num_passages
    if not audit.chance_hits[-1]:
        return [
            f"Chance: no search for another question finds a golden answer in {k} passages: every find counts fully."
        ]
    several = f", with {searches} searches of {audit.chance_hits[-1]:.1%}" if searches > 1 else ""
    most = f", and {audit.chance_weights[-1]:.2f} with {searches} searches" if searches > 1 else ""
    return [
        f"Chance: a rollout that searches for something else finds a golden answer in {k} passages with a probability of "
        f"{audit.chance_hits[0]:.1%}{several}. TSPO as published (folr_guard='degenerate') pays such finds like all others.",
        f"Turn rewards: with the default folr_guard='chance', a find counts {audit.chance_weights[0]:.2f} in rollouts with one search"
        f"{most}, as long as {audit.at_k(audit.plain):.1%} of the rollouts find an answer, as plain questions do.",
    ]


def compare(audits: Mapping[str, Audit]) -> list[str]:
    """
    Compare retrievers on the same questions.

    Args:
        audits (`Mapping[str, Audit]`):
            The audits, by the names of their retrievers.

    Returns:
        `list[str]`: Sentences; none if there are fewer than two retrievers.
    """
    lines = []
    for curve, text in {"plain": "A golden answer", "supporting": "The share of supporting passages"}.items():
        rates = {
            name: rate for name, audit in audits.items() if (rate := audit.at_k(getattr(audit, curve))) is not None
        }
        if len(rates) < 2:
            continue
        ranked = sorted(rates, key=lambda name: -rates[name])
        listed = ", ".join(f"{name} {rates[name]:.1%}" for name in ranked)
        (first, *_) = audits.values()
        # Twice the error of a difference of two such rates, as if the questions were different ones: an upper bound
        rate, questions = sum(rates.values()) / len(rates), getattr(first, curve).questions
        error = 2 * (2 * rate * (1 - rate) / questions) ** 0.5
        lines.append(
            f"{text} in {first.num_passages} passages for the plain question: {listed} ({questions} questions; differences "
            f"below {100 * error:.1f} points may be chance)."
        )
    return lines
