"""The audit of a data set and a retriever before training. Pure functions of rows and passages: no I/O."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from typing import Any, NamedTuple

from .credit import eligible_golds, first_occurrence
from .retrieval.base import Passage
from .rollout.trajectory import Turn
from .scoring import exact_match, normalize_answer

#: Why FOLR cannot use a golden answer. The guard "degenerate" excludes the first three, "strict" all four.
REASONS = {
    "yes_no": "yes, no or noanswer",
    "empty": "empty after normalisation",
    "one_character": "a single character",
    "in_question": "contained in the question",
}
# Thresholds of the warnings
LOW_HIT, HIGH_UNUSABLE, HIGH_CONSTANT, HIGH_CHANCE = 0.30, 0.10, 0.05, 0.20


class Ranks(NamedTuple):
    """The first ranks (from 1) at which the searches of a question found something; `None` if they did not find it."""

    plain: int | None  # of a golden answer, with the question as the query
    ideal: int | None  # of a golden answer, the best rank of the searches for the supporting titles
    chance: int | None  # of a golden answer, in the passages of another question
    chance_gold: str | None  # the golden answer found there
    supporting: tuple[int | None, ...]  # of each supporting passage, with the question as the query


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
            The same for the passages of another question, drawn at random. `None` with fewer than two questions.
        supporting ([`Curve`] or `None`):
            Recall of the supporting passages among the first k passages for the question itself, averaged over all
            questions that have supporting ids. `None` if no question has them.
        unusable (`dict[str, dict]`):
            For each reason of `REASONS`: the number of `questions` with such a golden answer, their `share` of all
            questions, and up to three `examples` with different golden answers (`gold` and `question`). The key
            `"chance"` has the same for golden answers among the first `num_passages` passages of another question.
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
    rank = first_occurrence([Turn(token_ids=[], passages=[p]).passage_text for p in passages], golden_answers)
    return None if rank is None else rank + 1


def find_ranks(row: Mapping[str, Any], results: Sequence[Sequence[Passage]], others: Sequence[Passage] = ()) -> Ranks:
    """
    Compute the ranks of a question from the results of its searches.

    Args:
        row (`Mapping`):
            The question, with `golden_answers` and `supporting_ids`.
        results (`Sequence[Sequence[Passage]]`):
            The passages for the question itself, then those for each of its supporting titles; each best first.
        others (`Sequence[Passage]`, *optional*, defaults to `()`):
            The passages for another question.
    """
    plain, *ideal = (first_rank(passages, row["golden_answers"]) for passages in results)
    chance = first_rank(others, row["golden_answers"])
    found = [] if chance is None else [others[chance - 1]]
    ids = [passage.id for passage in results[0]]
    return Ranks(
        plain=plain,
        ideal=min((rank for rank in ideal if rank is not None), default=None),
        chance=chance,
        chance_gold=next((gold for gold in row["golden_answers"] if first_rank(found, [gold])), None),
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


def summarize(rows: Sequence[Mapping[str, Any]], ranks: Sequence[Ranks], *, top_k: int, num_passages: int) -> Audit:
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
    """
    pairs = list(zip(rows, ranks, strict=True))
    eligible = [(row, found) for row, found in pairs if eligible_golds(row["golden_answers"])]
    strict = [row for row in rows if eligible_golds(row["golden_answers"], question=row["question"], guard="strict")]
    # Questions for each reason, and examples of them: golden answer -> question
    count, examples = Counter[str](), {reason: dict[str, str]() for reason in (*REASONS, "chance")}
    for row, found in pairs:
        golds = {unusable_reason(gold, row["question"]): gold for gold in reversed(row["golden_answers"])}
        if found.chance is not None and found.chance_gold is not None and found.chance <= num_passages:
            golds["chance"] = found.chance_gold
        for reason in examples:
            if reason in golds:
                count[reason] += 1
                examples[reason].setdefault(golds[reason], row["question"])
    return Audit(
        num_questions=len(rows),
        num_eligible=len(eligible),
        num_eligible_strict=len(strict),
        num_passages=num_passages,
        plain=_curve([(found.plain,) for _, found in eligible], top_k),
        ideal=_curve([(found.ideal,) for row, found in eligible if row["supporting_titles"]], top_k),
        chance=_curve([(found.chance,) for _, found in eligible] if len(rows) > 1 else [], top_k),
        supporting=_curve([found.supporting for found in ranks if found.supporting], top_k),
        unusable={
            reason: {
                "questions": count[reason],
                "share": count[reason] / len(rows),
                "examples": [{"gold": gold, "question": question} for gold, question in islice(found.items(), 3)],
            }
            for reason, found in examples.items()
        },
        constant_answers=constant_answers([row["golden_answers"] for row in rows]),
    )


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
        f"Constant answer: always answering {answer!r} scores an exact match of {score:.3f}.": True,
        f"Warning: one search for the plain question finds a golden answer for only {hit:.1%} of the eligible "
        f"questions, less than {LOW_HIT:.0%}: {remedy}": audit.plain is not None and hit < LOW_HIT,
        f"Warning: for {chance:.1%} of the questions, the passages of another question contain a golden answer, more "
        f"than {HIGH_CHANCE:.0%} of the hit rate: FOLR would reward many accidental occurrences.": (
            chance > HIGH_CHANCE * hit
        ),
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
