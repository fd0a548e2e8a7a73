"""What the searches of a rollout found, and whether its answer is supported by it. Pure functions, the facts of training."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..credit import eligible_golds, first_occurrence
from ..rollout.facts import rollout_facts
from ..rollout.trajectory import Trajectory
from ..scoring import contains_answer

#: The metrics of [`evidence_scores`], which evaluations of earlier versions do not have.
EVIDENCE = ("evidence", "after_evidence", "from_memory", "unsupported")


def evidence_scores(trajectory: Trajectory, golden_answers: Sequence[str], em: float) -> dict[str, float]:
    """
    What the searches of a rollout found, and whether its answer is supported by it. Each value has a mean over all rollouts, so
    that two models can be compared on the same questions.

    Args:
        trajectory ([`Trajectory`]):
            The rollout.
        golden_answers (`Sequence[str]`):
            The golden answers of its question.
        em (`float`):
            Its exact match.

    Returns:
        `dict[str, float]`: `evidence`, the number of searches whose passages contain a golden answer; `after_evidence`, the
        number of searches after the first of them; `from_memory`, 1 if the answer is correct although no passage contains a
        golden answer; `unsupported`, 1 if the rollout answered, right or wrong, although no passage contains one.
    """
    texts, golds = trajectory.passage_texts, eligible_golds(golden_answers)
    occurrence = first_occurrence(texts, golden_answers)
    later = [] if occurrence is None else texts[occurrence:]
    facts = rollout_facts(trajectory, occurrence, None, sum(contains_answer(text, golds) for text in later))
    return {
        "evidence": facts.evidence,
        "after_evidence": facts.after_evidence,
        "from_memory": float(em == 1 and occurrence is None),
        "unsupported": float(facts.answered and occurrence is None),
    }


def all_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """
    The scores of a rollout read from a file. Those that an earlier version did not write are computed from the rollout.

    Args:
        record (`Mapping`):
            The JSON of a line of `trajectories.jsonl`.

    Raises:
        `LookupError`, `TypeError`, `AttributeError`: If the record is not a rollout.
    """
    scores = dict(record["scores"])
    if all(name in scores for name in EVIDENCE):
        return scores
    trajectory = Trajectory.from_dict(record["trajectory"])
    return {**evidence_scores(trajectory, record["golden_answers"], scores["em"]), **scores}
