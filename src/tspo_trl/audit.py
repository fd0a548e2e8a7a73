"""What a data set and a retriever allow, before anything is trained: pure functions of rows and passages, no I/O."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from typing import Any, NamedTuple

from .credit import eligible_golds, first_occurrence
from .retrieval.base import Passage
from .rollout.trajectory import Turn
from .scoring import exact_match, normalize_answer

#: Why FOLR cannot use a gold. The guard "degenerate" leaves out the first three, "strict" all four.
REASONS = {
    "yes_no": "yes, no or noanswer",
    "empty": "empty after normalisation",
    "one_character": "a single character",
    "in_question": "contained in the question",
}
LOW_HIT, HIGH_UNUSABLE, HIGH_CONSTANT, HIGH_CHANCE = 0.30, 0.10, 0.05, 0.20


class Ranks(NamedTuple):
    """The ranks (from 1) at which the searches of one question first found what was looked for, `None` for never."""

    plain: int | None  # a gold, searching for the question
    ideal: int | None  # a gold, the best rank of the searches for the supporting titles
    chance: int | None  # a gold, in the passages of another question
    chance_gold: str | None  # that gold
    supporting: tuple[int | None, ...]  # each supporting passage, searching for the question


@dataclass(frozen=True, slots=True)
class Curve:
    """
    A rate against the number of passages of a search.

    Args:
        questions (`int`):
            How many questions the rates are means over.
        rates (`tuple[float, ...]`):
            The rates at k = 1…`top_k`.
    """

    questions: int
    rates: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """
    What a data set and a retriever allow. The recipe writes `to_dict()` as JSON.

    Args:
        num_questions (`int`):
            How many questions were audited.
        num_eligible (`int`):
            How many of them have a gold that FOLR can use with the guard `"degenerate"`. Hit rates are over these.
        num_eligible_strict (`int`):
            The same with the guard `"strict"`.
        num_passages (`int`):
            The passages of a search in training: the k of the verdict.
        plain ([`Curve`] or `None`):
            Share of questions with a gold among the first k passages for the question itself. `None` if no question is
            eligible.
        ideal ([`Curve`] or `None`):
            The same in any of the searches for the supporting titles. `None` if no eligible question has such titles.
        chance ([`Curve`] or `None`):
            The same in the passages of another question, drawn at random. `None` with fewer than two questions.
        supporting ([`Curve`] or `None`):
            Recall of the supporting passages among the first k passages for the question itself, mean over all
            questions that have any. `None` without supporting ids.
        unusable (`dict[str, dict]`):
            For each reason of `REASONS`: how many `questions` have such a gold, their `share` of all questions, and
            `examples` with different golds (`gold` and `question`, at most three). Under `"chance"`, likewise, the
            golds that are among the first `num_passages` passages of another question.
        constant_answers (`dict[str, float]`):
            Exact match of always giving the same answer, best first: yes, no, and the most frequent golds.
        about (`dict`, *optional*):
            What was audited, for instance the options of a command line.
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
    """Why FOLR cannot use a gold: one of `REASONS`, or `None` if it can with every guard."""
    if eligible_golds([gold], question=question, guard="strict"):
        return None
    if eligible_golds([gold], guard="degenerate"):
        return "in_question"
    normalized = normalize_answer(gold)
    return "empty" if not normalized else "one_character" if len(normalized) == 1 else "yes_no"


def first_rank(passages: Sequence[Passage], golden_answers: Sequence[str]) -> int | None:
    """The rank (from 1) of the first passage that contains an eligible gold, by the code that training uses."""
    # Each passage as a turn of its own: the first turn is the first rank
    rank = first_occurrence([Turn(token_ids=[], passages=[p]).passage_text for p in passages], golden_answers)
    return None if rank is None else rank + 1


def find_ranks(row: Mapping[str, Any], results: Sequence[Sequence[Passage]], others: Sequence[Passage] = ()) -> Ranks:
    """
    Reduce the searches of a question to ranks.

    Args:
        row (`Mapping`):
            The question, with `golden_answers` and `supporting_ids`.
        results (`Sequence[Sequence[Passage]]`):
            The passages for the question itself, then for each of its supporting titles; best first.
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
    """Exact match of always answering yes, no, or one of the `count` most frequent golds; best first."""
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
            What [`find_ranks`] returned for each.
        top_k (`int`):
            Maximum number of passages that the searches asked for.
        num_passages (`int`):
            The passages of a search in training, at most `top_k`.
    """
    pairs = list(zip(rows, ranks, strict=True))
    eligible = [(row, found) for row, found in pairs if eligible_golds(row["golden_answers"])]
    strict = [row for row in rows if eligible_golds(row["golden_answers"], question=row["question"], guard="strict")]
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
    """The share of ranks up to k at k = 1…`top_k`: mean over the ranks of a question, then over questions."""
    gains = [0.0] * top_k
    for group in ranks:
        for rank in group:
            if rank is not None:
                gains[rank - 1] += 1 / len(group)
    return Curve(len(ranks), tuple(gain / len(ranks) for gain in accumulate(gains))) if ranks else None


def verdict(audit: Audit) -> list[str]:
    """What the numbers mean for training, in sentences; those that call for a change begin with "Warning"."""
    total, eligible, strict, k = audit.num_questions, audit.num_eligible, audit.num_eligible_strict, audit.num_passages
    hit, ideal, chance = (audit.at_k(curve) or 0.0 for curve in (audit.plain, audit.ideal, audit.chance))
    none, in_question = (total - eligible) / total, (eligible - strict) / total
    ceiling = (hit * eligible + total - eligible) / total
    answer, score = next(iter(audit.constant_answers.items()))
    remedy = "the policy must learn better queries." if ideal >= LOW_HIT else "does the corpus cover the questions?"
    lines = {
        f"Golds: FOLR can use a gold of {eligible} of {total} questions with the guard 'degenerate', of {strict} with "
        "'strict'.": True,
        f"Ceiling: one search for the plain question finds a gold in {k} passages for {hit:.1%} of the eligible questions. "
        f"An agent that answers from these passages alone reaches an exact match of at most {ceiling:.3f} over all "
        "questions (those without an eligible gold counted as answered).": audit.plain is not None,
        f"Ideal queries find a gold in {k} passages of a search for {ideal:.1%}.": audit.ideal is not None,
        f"Constant answer: always answering {answer!r} scores an exact match of {score:.3f}.": True,
        f"Warning: {hit:.1%} of the eligible questions find a gold with one plain search, fewer than {LOW_HIT:.0%}: "
        f"{remedy}": audit.plain is not None and hit < LOW_HIT,
        f"Warning: {chance:.1%} of the questions find a gold in the passages of another, more than {HIGH_CHANCE:.0%} of the hit "
        "rate: FOLR would pay many occurrences that say nothing.": chance > HIGH_CHANCE * hit,
        f"Warning: {none:.1%} of the questions have no eligible gold: FOLR cannot help them.": none > HIGH_UNUSABLE,
        f"Warning: {in_question:.1%} of the questions name their only eligible golds: consider folr_guard='strict'.": (
            in_question > HIGH_UNUSABLE
        ),
        f"Warning: the constant answer {answer!r} scores over {HIGH_CONSTANT:.0%}: judge by the questions that it does "
        "not answer, too.": score > HIGH_CONSTANT,
        "Warning: no supporting passage was found at any rank: do the ids of data set and corpus agree?": (
            audit.supporting is not None and not any(audit.supporting.rates)
        ),
    }
    return [line for line, holds in lines.items() if holds]
