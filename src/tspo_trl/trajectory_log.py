"""Rollouts on disk: JSONL, one line a rollout, one file a process."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isnan
from os import SEEK_END
from pathlib import Path
from typing import Any

from .metrics import FACTS
from .trajectory import Trajectory


def rollout_record(
    trajectory: Trajectory,
    row: Mapping[str, Any],
    rewards: Sequence[float],
    outcome: float,
    facts: Sequence[int],
    turn_rewards: Sequence[float],
    turn_advantages: Sequence[float],
    *,
    reward_names: Sequence[str],
    step: int,
    group: int,
    rollout: int,
) -> dict[str, Any]:
    """
    One line of the log: a rollout and why its turns were rewarded.

    Args:
        trajectory ([`Trajectory`]):
            The rollout, of K turns.
        row (`Mapping`):
            The row of the data set, with `question` and `golden_answers`.
        rewards (`Sequence[float]`):
            What the reward functions gave, NaN for none.
        outcome (`float`):
            Their weighted sum, NaN if unscorable.
        facts (`Sequence[int]`):
            The values of `metrics.FACTS`.
        turn_rewards (`Sequence[float]`):
            At least K values; those after the K-th are left out.
        turn_advantages (`Sequence[float]`):
            Likewise.
        reward_names (`Sequence[str]`):
            The names of the reward functions.
        step (`int`):
            The optimizer steps made before the rollout was sampled.
        group (`int`):
            Which group of the step it belongs to.
        rollout (`int`):
            Its place in the group.

    Returns:
        `dict`: The record. NaN becomes `None`: JSON has no NaN.
    """
    num_turns = len(trajectory.turns)
    by_name = dict(zip(FACTS, facts, strict=True))
    return {
        "step": step,
        "group": group,
        "rollout": rollout,
        "question": row["question"],
        "golden_answers": list(row["golden_answers"]),
        "rewards": dict(zip(reward_names, _known(rewards), strict=True)),
        "outcome": _known([outcome])[0],
        "first_occurrence": by_name["occurrence"] if by_name["occurrence"] >= 0 else None,
        "credited_turn": by_name["credited"] if by_name["credited"] >= 0 else None,
        "turn_rewards": _known(turn_rewards[:num_turns]),
        "turn_advantages": _known(turn_advantages[:num_turns]),
        "trajectory": trajectory,
    }


def _known(values: Sequence[float]) -> list[float | None]:
    return [None if isnan(value) else value for value in values]


def append_rollouts(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """
    Append rollouts to a file, in one write, so that a killed run leaves at most one incomplete line.

    Args:
        path (`str` or `Path`):
            The file; its folder is made.
        records (`Iterable[dict]`):
            What to write: the trajectory under `"trajectory"` and anything else that JSON can hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**r, "trajectory": r["trajectory"].to_dict()}, ensure_ascii=False) + "\n" for r in records]
    # A run that was killed may have left half a line; a lone surrogate (JSON allows it, UTF-8 does not) stays an escape
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            file.write(b"\n")
        file.write("".join(lines).encode("utf-8", errors="backslashreplace"))


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, SEEK_END)
        return file.read(1) == b"\n"


def read_rollouts(path: str | Path) -> Iterator[dict[str, Any]]:
    """
    Read rollouts back.

    Args:
        path (`str` or `Path`):
            A file that [`append_rollouts`] wrote, or a folder of such files (those of a run, in order of their names).

    Yields:
        `dict`: The records, with a [`Trajectory`] under `"trajectory"`.

    Raises:
        `ValueError`: If a line is not such a record; the message names file and line.
    """
    path = Path(path)
    for file_path in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        with file_path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = json.loads(line)
                    record["trajectory"] = Trajectory.from_dict(record["trajectory"])
                except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{file_path}, line {number}: not a rollout ({error!r}).") from error
                yield record
