"""The log of rollouts: JSONL files with one line per rollout, a numbered series for each process, limited in size."""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import isfinite, isnan, nan
from os import SEEK_END
from pathlib import Path
from typing import Any

from .._version import __version__
from ..support.files import replace_file
from .facts import RolloutFacts
from .trajectory import Trajectory

# The options that determine turn rewards
_SETTINGS = (
    "advantage_level",
    "turn_baseline",
    "scale_rewards",
    "multi_objective_aggregation",
    "folr_alpha",
    "folr_placement",
    "folr_guard",
    "success_threshold",
    "num_generations",
    "num_generations_eval",
    "max_searches",
    "mask_truncated_completions",
)
_PARTS = 32  # maximum number of files of a log, half of them recent
_LOG = re.compile(r"(train|eval)-rank\d+.*\.jsonl|trajectories\.jsonl")  # of a trainer, or of `tspo evaluate`
_MOST_NAMED = 5
_NUMBER = re.compile(r"\.(\d{5,})$")  # before ".jsonl"; the first file has no number


def rollout_record(
    trajectory: Trajectory,
    row: Mapping[str, Any],
    rewards: Sequence[float],
    outcome: float,
    facts: RolloutFacts,
    turn_rewards: Sequence[float],
    turn_advantages: Sequence[float],
    chance: float = nan,
    turn_weight: float = 1.0,
    *,
    reward_names: Sequence[str],
    step: int,
    group: int,
    rollout: int,
) -> dict[str, Any]:
    """
    Make a record for the log: a rollout with its rewards and advantages.

    Args:
        trajectory ([`Trajectory`]):
            The rollout, of K turns.
        row (`Mapping`):
            The row of the data set, with `question` and `golden_answers`.
        rewards (`Sequence[float]`):
            The rewards of the reward functions, NaN if a function gave none.
        outcome (`float`):
            The weighted sum of the rewards, NaN if the rollout cannot be scored.
        facts ([`RolloutFacts`]):
            The facts of the rollout.
        turn_rewards (`Sequence[float]`):
            At least K values; only the first K are written.
        turn_advantages (`Sequence[float]`):
            At least K values; only the first K are written.
        chance (`float`, *optional*):
            Share of the searches of other questions whose passages contain a golden answer, NaN if it is not known.
        turn_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the turn advantages of the group, see [`~chance.chance_weights`].
        reward_names (`Sequence[str]`):
            The names of the reward functions.
        step (`int`):
            The number of optimizer steps before the rollout was sampled.
        group (`int`):
            The index of the group in the step.
        rollout (`int`):
            The index of the rollout in the group.

    Returns:
        `dict`: The record, with `None` for NaN, because JSON has no NaN.
    """
    num_turns = len(trajectory.turns)
    return {
        "step": step,
        "group": group,
        "rollout": rollout,
        "question": row["question"],
        "golden_answers": list(row["golden_answers"]),
        "rewards": dict(zip(reward_names, _nan_to_none(rewards), strict=True)),
        "outcome": _nan_to_none([outcome])[0],
        "first_occurrence": facts.occurrence if facts.occurrence >= 0 else None,
        "credited_turn": facts.credited if facts.credited >= 0 else None,
        "chance": _nan_to_none([chance])[0],
        "turn_weight": turn_weight,
        "turn_rewards": _nan_to_none(turn_rewards[:num_turns]),
        "turn_advantages": _nan_to_none(turn_advantages[:num_turns]),
        "trajectory": trajectory,
    }


def batch_records(
    rows: Sequence[Mapping[str, Any]],
    rewards: Sequence[Sequence[float]],
    outcomes: Sequence[float],
    facts: Sequence[Sequence[float]],
    turn_rewards: Sequence[Sequence[float]],
    turn_advantages: Sequence[Sequence[float]],
    chance: Sequence[float],
    turn_weights: Sequence[float],
    *,
    reward_names: Sequence[str],
    step: int,
    first: int,
    num_generations: int,
) -> list[dict[str, Any]]:
    """
    Make the records of a batch, see [`rollout_record`].

    Args:
        rows (`Sequence[Mapping]`):
            B rows of the data set, each with its `trajectory`. The other columns have at least B values.
        rewards (`Sequence[Sequence[float]]`):
            The rewards of the reward functions.
        outcomes (`Sequence[float]`):
            The outcome rewards.
        facts (`Sequence[Sequence[float]]`):
            The fields of [`RolloutFacts`].
        turn_rewards (`Sequence[Sequence[float]]`):
            The rewards of the turns.
        turn_advantages (`Sequence[Sequence[float]]`):
            The advantages of the turns.
        chance (`Sequence[float]`):
            How often a search of another question finds a golden answer.
        turn_weights (`Sequence[float]`):
            The weights of turn advantages.
        reward_names (`Sequence[str]`):
            The names of the reward functions.
        step (`int`):
            The number of optimizer steps before the rollouts were sampled.
        first (`int`):
            The number of the first rollout in the step.
        num_generations (`int`):
            Number of rollouts in a group.

    Returns:
        `list[dict]`: B records.
    """
    return [
        rollout_record(
            row["trajectory"],
            row,
            rewards[i],
            outcomes[i],
            RolloutFacts(*facts[i]),  # type: ignore[arg-type]
            turn_rewards[i],
            turn_advantages[i],
            chance[i],
            turn_weights[i],
            reward_names=reward_names,
            step=step,
            group=(first + i) // num_generations,
            rollout=(first + i) % num_generations,
        )
        for i, row in enumerate(rows)
    ]


def _nan_to_none(values: Sequence[float]) -> list[float | None]:
    return [None if isnan(value) else value for value in values]


def append_rollouts(path: str | Path, records: Iterable[dict[str, Any]], *, max_bytes: int | None = None) -> None:
    """
    Append rollouts to a log in one write, so that a killed run leaves at most one incomplete line.

    With `max_bytes`, the log is a series of files (`train.jsonl`, `train.00001.jsonl`, `train.00002.jsonl`, …), each of at
    most 1/32 of `max_bytes`. If the files are too large together, the recent half stays complete, and earlier files are
    thinned evenly: every 2nd file stays, or every 4th, every 8th … This keeps the whole history of the policy; deleting the
    oldest files would lose its beginning. The numbers of the files alone determine which of them stay. Therefore a run that
    was killed and resumed ends with the same files as an uninterrupted run (unless it writes more than half of `max_bytes`
    between two checkpoints, or more than 1/32 of it at once).

    Args:
        path (`str` or `Path`):
            The first file of the log. Its folder is created if necessary.
        records (`Iterable[dict]`):
            The records: the trajectory under `"trajectory"`, and any other values that JSON supports.
        max_bytes (`int`, *optional*):
            Maximum size of all files of the log together. The newest file stays even if it is larger. With `None`, the log
            is a single file without a limit.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False, default=_dataclass_fields) + "\n" for record in records]
    # A lone surrogate stays an escape: JSON allows it, UTF-8 does not
    data = "".join(lines).encode("utf-8", errors="backslashreplace")
    # Choose the file: the newest one, or the next number if the newest is full
    newest = next(reversed(log_files(path)), path)
    if max_bytes is not None and newest.is_file():
        size = newest.stat().st_size
        if size and size + len(data) > max_bytes // _PARTS:
            newest = path.with_name(f"{path.stem}.{_number(newest) + 1:05d}.jsonl")
    # Append in one write
    with newest.open("ab") as file:
        if file.tell() and not _ends_with_newline(newest):  # a killed run may have left half a line
            file.write(b"\n")
        file.write(data)
    if max_bytes is not None:
        _drop_files(path, max_bytes)


def _dataclass_fields(value: Any) -> dict[str, Any]:
    """The fields of a trajectory, a turn or a passage; `asdict` would copy every token."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, SEEK_END)
        return file.read(1) == b"\n"


def log_files(path: str | Path) -> list[Path]:
    """
    List the files of a log that [`append_rollouts`] wrote, oldest first.

    Args:
        path (`str` or `Path`):
            The first file of the log. It does not have to exist.

    Returns:
        `list[Path]`: The existing files.
    """
    path = Path(path)
    return [file for file in _in_order(path.parent.glob("*.jsonl")) if _first_file(file) == path]


def _first_file(path: Path) -> Path:
    return path.with_name(f"{_NUMBER.sub('', path.stem)}.jsonl")


def _number(path: Path) -> int:
    found = _NUMBER.search(path.stem)
    return int(found[1]) if found else 0


def _in_order(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda path: (_first_file(path).name, _number(path)))


def _drop_files(path: Path, max_bytes: int) -> None:
    sizes = {_number(file): (file, file.stat().st_size) for file in log_files(path)}
    newest = max(sizes)
    half = _PARTS // 2
    while True:
        recent, stride = newest - half, 1
        while recent >= half * stride:  # at most `half` multiples of the stride may lie between 0 and `recent`
            stride *= 2
        kept = {number for number in sizes if number > recent or number % stride == 0}
        if half == 1 or sum(sizes[number][1] for number in kept) <= max_bytes:
            break
        half //= 2  # only if single writes are larger than 1/32 of `max_bytes`
    if sum(sizes[number][1] for number in kept) > max_bytes:
        kept = {newest}
    for number in sizes.keys() - kept:
        sizes[number][0].unlink()


def find_logs(folder: str | Path) -> list[Path]:
    """
    Find the log files of a run.

    Args:
        folder (`str` or `Path`):
            The `output_dir` of the run, or its folder `trajectories`; or the folder of a data set that `tspo evaluate` wrote.

    Returns:
        `list[Path]`: The files, grouped by process, oldest first.

    Raises:
        `NotADirectoryError`: If it is a file.
        `FileNotFoundError`: If there is no log file. The message names the folders inside that have some.
    """
    folder = Path(folder)
    if folder.is_file():
        raise NotADirectoryError(f"{str(folder)!r} is a file: give its folder, {str(folder.parent)!r}.")
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    for place in (folder / "trajectories", folder):
        if files := _in_order(place.glob("*.jsonl")):
            return files
    inside = sorted(
        {
            str(_run_of(file))
            for level in ("*/", "*/*/", "*/*/*/")
            for file in folder.glob(f"{level}*.jsonl")
            if _LOG.fullmatch(file.name)
        }
    )
    more = f" and {len(inside) - _MOST_NAMED} more" if len(inside) > _MOST_NAMED else ""
    raise FileNotFoundError(
        f"There are no rollouts in {str(folder)!r}: neither trajectories/*.jsonl nor *.jsonl exists. "
        + (
            f"Give one of the folders inside that have rollouts: {', '.join(map(repr, inside[:_MOST_NAMED]))}{more}."
            if inside
            else "A `TSPOTrainer` with `log_trajectories=True` writes them from its first step on, and `tspo evaluate` for "
            "each data set."
        )
    )


def _run_of(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "trajectories" else file.parent


def write_settings(folder: str | Path, args: Any) -> None:
    """
    Write the settings of turn rewards to `settings.json`, beside the rollouts.

    Args:
        folder (`str` or `Path`):
            The folder `trajectories` of the run. It is created if necessary.
        args ([`TSPOConfig`]):
            The configuration.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"tspo_trl": __version__, **{name: getattr(args, name) for name in _SETTINGS}}
    replace_file(folder / "settings.json", json.dumps(settings, indent=1))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """
    Read the settings that [`write_settings`] wrote.

    Args:
        folder (`str` or `Path`):
            The folder `trajectories` of the run.

    Returns:
        `dict`: The settings; empty if there are none, because older versions did not write them.

    Raises:
        `ValueError`: If the file cannot be read.
    """
    file = Path(folder) / "settings.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} cannot be read: it must be a JSON object, found {type(settings).__name__}")
    for name, value in settings.items():
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{file} cannot be read: {name!r} must be finite, found {value}")
    return settings


def read_rollouts(path: str | Path, *, on_problem: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """
    Read rollouts. Lines that are not rollouts are skipped and reported. If the folder was used by several runs, all are
    read, and the beginning of each later run is reported, unless it begins at the last step of the run before with other
    questions.

    Args:
        path (`str` or `Path`):
            A file that [`append_rollouts`] wrote, the folder `trajectories` of a run, or the folder of the run.
        on_problem (`Callable[[str], None]`, *optional*):
            Called with a message that has file, line number and reason: for each line that cannot be read, for the first
            line of another run, and where the questions of a step are sampled again. By default, a warning is issued.

    Yields:
        `dict`: The records, with a [`Trajectory`] under `"trajectory"`.

    Raises:
        `FileNotFoundError`: If the file does not exist, or the folder has no rollouts.
    """
    path = Path(path)
    report = on_problem or (lambda message: warnings.warn(message, stacklevel=3))
    last_steps: dict[Path, int] = {}  # by log: a folder has one for each process
    sampled: dict[Path, set[tuple[Any, ...]]] = {}  # the rollouts of the last step, also by log
    for file_path in find_logs(path) if path.is_dir() else [path]:
        with file_path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    record = parse_rollout(line)
                except ValueError as error:
                    report(f"{file_path}, line {number}: {error}")
                    continue
                step, log = record.get("step"), _first_file(file_path)
                if isinstance(step, int):
                    if step < last_steps.get(log, step):
                        report(
                            f"{file_path}, line {number}: another run begins here (step {step} after step "
                            f"{last_steps[log]}). The folder was used twice; all runs are read."
                        )
                    if step != last_steps.get(log):
                        sampled[log] = set()
                    place = (record.get("group"), record.get("rollout"), str(record.get("question")))
                    if is_sampled_again(sampled[log], place):
                        report(f"{file_path}, line {number}: {sampled_again(step)} All are read.")
                    last_steps[log] = step
                yield record


def is_sampled_again(sampled: set[tuple[Any, ...]], place: tuple[Any, ...]) -> bool:
    """
    Whether a step samples its questions again, as a second run in the same folder does that begins at this step.

    Args:
        sampled (`set[tuple]`):
            The places of the step before this one. The place is added; if it was there, the others are removed, so that
            only the first rollout that is sampled again counts.
        place (`tuple`):
            Group, rollout and question.

    Returns:
        `bool`: Whether the place was in `sampled`.
    """
    again = place in sampled
    if again:
        sampled.clear()
    sampled.add(place)
    return again


def sampled_again(step: int) -> str:
    """The text of a report that a step samples its questions again."""
    return (
        f"the questions of step {step} are sampled again here, by another run in the same folder or by another evaluation "
        "of this step."
    )


def parse_rollout(line: bytes) -> dict[str, Any]:
    """
    Read one line of a log.

    Args:
        line (`bytes`):
            The line, in UTF-8.

    Returns:
        `dict`: The record, with a [`Trajectory`] under `"trajectory"`.

    Raises:
        `ValueError`: If the line is not a rollout; the message says why.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        if not line.endswith(b"\n"):
            raise ValueError("half a line: the run is writing it, or was killed") from error
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(record, dict) or "trajectory" not in record:
        raise ValueError("not a rollout (JSON, but no object with a 'trajectory')")
    try:
        record["trajectory"] = Trajectory.from_dict(record["trajectory"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a rollout (its trajectory cannot be read: {error!r})") from error
    return record
