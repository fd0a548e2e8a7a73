"""The facts of a rollout that metrics and credit use, as integers that can be gathered over ranks."""

from typing import NamedTuple

from .trajectory import Trajectory


class RolloutFacts(NamedTuple):
    """
    The facts of a rollout that metrics and credit use. All are integers, so that the facts of all rollouts can be gathered
    over ranks as one tensor. `RolloutFacts(*tensor.unbind(dim=1))` names its columns.

    Args:
        turns (`int`):
            Number of turns.
        searches (`int`):
            Number of turns whose search was executed.
        failed (`int`):
            Number of turns whose search failed.
        invalid (`int`):
            Number of turns with an invalid action.
        duplicate (`int`):
            Number of searches that repeat the query of an earlier turn.
        truncated (`int`):
            1 if the rollout reached `max_completion_length`, else 0.
        tokens (`int`):
            Number of tokens that the model wrote.
        occurrence (`int`):
            The 0-based turn whose passages first contain a golden answer, for the metrics; -1 if there is none.
        credited (`int`):
            The same with the configured `folr_guard`: the turn that can earn FOLR; -1 if there is none.
        answered (`int`):
            1 if the rollout gave an answer, else 0.
        evidence (`int`):
            Number of searches whose passages contain a golden answer, for the metrics.
        after_evidence (`int`):
            Number of searches after the turn `occurrence`.
    """

    turns: int
    searches: int
    failed: int
    invalid: int
    duplicate: int
    truncated: int
    tokens: int
    occurrence: int
    credited: int
    answered: int
    evidence: int
    after_evidence: int


def rollout_facts(
    trajectory: Trajectory, occurrence: int | None, credited: int | None, evidence: int = 0
) -> RolloutFacts:
    """
    Compute the facts of a rollout.

    Args:
        trajectory ([`Trajectory`]):
            A rollout.
        occurrence (`int` or `None`):
            The 0-based turn whose passages first contain a golden answer, for the metrics.
        credited (`int` or `None`):
            The same with the configured `folr_guard`: the turn that can earn FOLR.
        evidence (`int`, *optional*, defaults to `0`):
            Number of searches whose passages contain a golden answer.
    """
    searches = [turn for turn in trajectory.turns if turn.retrieval is not None]
    queries = [turn.content.lower() for turn in searches]
    return RolloutFacts(
        turns=len(trajectory.turns),
        searches=len(searches),
        failed=sum(turn.retrieval in ("timeout", "error") for turn in searches),
        invalid=sum(turn.action == "invalid" for turn in trajectory.turns),
        duplicate=len(queries) - len(set(queries)),
        truncated=int(trajectory.status == "truncated"),
        tokens=sum(len(turn.token_ids) for turn in trajectory.turns),
        occurrence=-1 if occurrence is None else occurrence,
        credited=-1 if credited is None else credited,
        answered=int(trajectory.status == "answered"),
        evidence=evidence,
        after_evidence=0
        if occurrence is None
        else sum(t.retrieval is not None for t in trajectory.turns[occurrence + 1 :]),
    )
