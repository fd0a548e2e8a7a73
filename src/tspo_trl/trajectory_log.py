"""Rollouts on disk: JSONL, one line a rollout, one file a process."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .trajectory import Trajectory


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
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


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
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise ValueError(f"{file_path}, line {number}: not a rollout ({error!r}).") from error
                yield record
