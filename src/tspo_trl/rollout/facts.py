"""What metrics and credit read of a rollout, as integers that can be gathered over ranks."""

from typing import NamedTuple

from .trajectory import Trajectory


class RolloutFacts(NamedTuple):
    """
    What metrics and credit read of a rollout. Integers, so that the facts of all rollouts can be gathered over ranks as one
    tensor: `RolloutFacts(*tensor.unbind(dim=1))` names its columns again.

    Args:
        turns (`int`):
            The number of turns.
        searches (`int`):
            Turns whose search was executed.
        failed (`int`):
            Turns whose search failed.
        invalid (`int`):
            Turns with an invalid action.
        duplicate (`int`):
            Searches for a query that an earlier turn of the rollout has searched for.
        truncated (`int`):
            1 if the rollout reached `max_completion_length`, else 0.
        occurrence (`int`):
            The 0-based turn whose passages first contain a golden answer, for the metrics; -1 for none.
        credited (`int`):
            The same under the configured guard: the turn that may earn FOLR; -1 for none.
    """

    turns: int
    searches: int
    failed: int
    invalid: int
    duplicate: int
    truncated: int
    occurrence: int
    credited: int


def rollout_facts(trajectory: Trajectory, occurrence: int | None, credited: int | None) -> RolloutFacts:
    """
    The facts of a rollout.

    Args:
        trajectory ([`Trajectory`]):
            A rollout.
        occurrence (`int` or `None`):
            The 0-based turn whose passages first contain a golden answer, for the metrics.
        credited (`int` or `None`):
            The same under the configured guard: the turn that may earn FOLR.
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
        occurrence=-1 if occurrence is None else occurrence,
        credited=-1 if credited is None else credited,
    )
