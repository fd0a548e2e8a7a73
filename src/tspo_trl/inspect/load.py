"""Loading the rollouts of a run from its folder, and selecting the ones to show."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from ..rollout.log import find_logs, is_sampled_again, parse_rollout, read_settings, sampled_again

_MODE = re.compile(r"(train|eval)-rank(\d+)")
# The start of a line of the trainer. It is enough to select lines without reading their tokens
_PLACE = re.compile(rb'\{"step": (\d+), "group": (\d+), "rollout": (\d+), "question": ("(?:[^"\\]|\\.)*"), ')
_MOST_NOTES = 20
_OF_EVALUATIONS = {"success_threshold": 1.0}  # `tspo evaluate` scores by exact match


@dataclass(frozen=True, slots=True)
class Group:
    """
    The rollouts of one question in one step.

    Args:
        step (`int`):
            Number of optimizer steps before the rollouts were sampled.
        rollouts (`list[dict]`):
            The records of the rollouts, see [`~tspo_trl.rollout.log.rollout_record`], in their order in the group.
        mode (`str`, *optional*, defaults to `"train"`):
            `"train"` or `"eval"`. Nothing is learned from the rollouts of an evaluation.
    """

    step: int
    rollouts: list[dict[str, Any]]
    mode: str = "train"

    @property
    def question(self) -> str:
        return self.rollouts[0]["question"]

    @property
    def golden_answers(self) -> list[str]:
        return self.rollouts[0]["golden_answers"]

    @property
    def only_scored(self) -> bool:
        """Whether `tspo evaluate` wrote the rollouts: they have scores, but no rewards and advantages of turns."""
        return "scores" in self.rollouts[0]


@dataclass(slots=True)
class Run:
    """
    The part of a run that is shown.

    Args:
        name (`str`):
            Name of the folder of the run.
        modes (`dict[str, list[Group]]`, *optional*):
            The groups of `"train"` and `"eval"`, by step.
        settings (`dict`, *optional*):
            The settings of rewards and advantages, empty if they were not saved.
        notes (`list[str]`, *optional*):
            Notes about lines that could not be read and rollouts that are not shown.
        tokenizer (`Any`, *optional*):
            The tokenizer of the run, if its folder has one.
    """

    name: str
    modes: dict[str, list[Group]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tokenizer: Any = None


@dataclass(frozen=True, slots=True)
class _Line:
    file: Path
    number: int
    offset: int
    run: int  # an output folder that was used twice holds two runs
    step: int
    batch: int  # a step may sample, and an evaluation does sample, several times
    group: int
    rollout: int
    only_scored: bool
    again: bool  # the step samples its questions again from here on


def parse_steps(text: str) -> list[range]:
    """
    Parse the steps to show.

    Args:
        text (`str`):
            Numbers and ranges, both ends included: `"0-50,100"`.

    Returns:
        `list[range]`: The steps.

    Raises:
        `ValueError`: If the text is not a list of numbers and ranges.
    """
    steps = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found is None:
            raise ValueError(f"`steps` must be numbers and ranges such as '0-50,100', got {part!r} in {text!r}.")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise ValueError(f"A range of `steps` must begin with its smaller number, got {part!r} in {text!r}.")
        steps.append(range(first, last + 1))
    return steps


def load_run(folder: str | Path, *, steps: Iterable[int | range] | None = None, max_rollouts: int = 10_000) -> Run:
    """
    Load rollouts of a run: whole groups of whole steps, spread evenly over the run.

    Args:
        folder (`str` or `Path`):
            The `output_dir` of the run, or its folder `trajectories`; or the folder of a data set that `tspo evaluate` wrote.
        steps (`Iterable[int | range]`, *optional*):
            Steps to load. Defaults to all.
        max_rollouts (`int`, *optional*, defaults to `10_000`):
            Maximum number of rollouts.

    Returns:
        [`Run`]: The run. Its notes name the lines that could not be read.

    Raises:
        `FileNotFoundError`: If there are no files with rollouts.
        `ValueError`: If no line is a rollout, or there are no rollouts of these steps.
    """
    folder = Path(folder).resolve()
    files = find_logs(folder)
    run = Run(name=(folder.parent if folder.name == "trajectories" else folder).name)
    problems: list[str] = []
    lines = _find_lines(files, problems)
    if not lines:
        why = f"The first: {problems[0]}" if problems else "Nothing has been written yet."
        raise ValueError(f"No line of {', '.join(map(str, files))} is a rollout. {why}")
    if all(line.only_scored for found in lines.values() for line in found):
        run.settings = dict(_OF_EVALUATIONS)  # its settings.json is about the model and the search
    else:
        try:
            run.settings = read_settings(files[0].parent)
        except ValueError as error:
            run.notes.append(str(error))
        if not run.settings:
            run.notes.append(
                "trajectories/settings.json is missing (older versions did not write it) or cannot be read. Defaults are "
                "assumed; the explanations say where the numbers do not follow from them."
            )
    wanted = None if steps is None else [s if isinstance(s, range) else range(s, s + 1) for s in steps]
    chosen: dict[str, list[_Line]] = {}
    left = max_rollouts
    for count, (mode, found) in enumerate(sorted(lines.items(), key=lambda item: len(item[1]))):
        if (last := max(line.run for line in found)) > 0:
            others = sum(line.run != last for line in found)
            found = [line for line in found if line.run == last]
            run.notes.append(
                f"The folder holds {last + 1} runs ({mode}): the last is shown, {others} rollouts of the others are not."
            )
        if repeated := [line for line in found if line.again]:
            first, more = repeated[0], f" The same in {len(repeated) - 1} other lines." if repeated[1:] else ""
            run.notes.append(
                f"{first.file}, line {first.number}: {sampled_again(first.step)} All are shown ({mode}).{more}"
            )
        if wanted is not None:
            found = [line for line in found if any(line.step in part for part in wanted)]
        kept = _spread(found, left // (len(lines) - count))
        left -= len(kept)
        if len(kept) < len(found):
            of = [len({line.step for line in part}) for part in (kept, found)]
            run.notes.append(
                f"{len(kept)} of the {len(found)} rollouts ({mode}) are shown, from {of[0]} of {of[1]} steps. "
                "`--max_rollouts` and `--steps` choose others."
            )
        chosen[mode] = kept
    if not any(chosen.values()):
        there = sorted({line.step for found in lines.values() for line in found})
        raise ValueError(f"There are no rollouts of these `steps`; the run has steps {there[0]} to {there[-1]}.")
    for mode in sorted(chosen, reverse=True):  # train, then eval
        if groups := _read_groups(chosen[mode], mode, problems):
            run.modes[mode] = groups
    if not run.modes:
        raise ValueError(f"No line that was chosen can be shown. The first: {problems[0]}")
    run.notes += problems[:_MOST_NOTES]
    if len(problems) > _MOST_NOTES:
        run.notes.append(f"… and {len(problems) - _MOST_NOTES} more lines that cannot be read.")
    run.notes += _incomplete(run)
    run.tokenizer = _find_tokenizer(files[0].parent)
    return run


def _find_lines(files: Sequence[Path], problems: list[str]) -> dict[str, list[_Line]]:
    found: dict[str, list[_Line]] = {}
    before: dict[tuple[str, str], _Line] = {}
    sampled: dict[tuple[str, str], set[tuple[Any, ...]]] = {}  # the rollouts of the last step
    for path in files:
        name = _MODE.match(path.name)
        rank = name[2] if name else path.stem
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    step, group, rollout, question, only_scored = _place(line)
                except ValueError as error:
                    problems.append(f"{path}, line {number}: {error}")
                else:
                    mode = name[1] if name else "eval" if only_scored else "train"
                    last = before.get((mode, rank))
                    run = batch = 0
                    if last is not None:
                        run = last.run + (step < last.step)
                        again = (group, rollout) <= (last.group, last.rollout)
                        batch = last.batch + again if step == last.step else 0
                    if last is None or step != last.step:
                        sampled[mode, rank] = set()
                    repeated = is_sampled_again(sampled[mode, rank], (group, rollout, question))
                    entry = _Line(path, number, offset, run, step, batch, group, rollout, only_scored, repeated)
                    found.setdefault(mode, []).append(entry)
                    before[mode, rank] = entry
                offset += len(line)
    return found


def _place(line: bytes) -> tuple[int, int, int, bytes, bool]:
    """The step, the group, the rollout and the question of a line, and whether `tspo evaluate` wrote it."""
    if (found := _PLACE.match(line)) and line.endswith(b"}\n"):
        return int(found[1]), int(found[2]), int(found[3]), found[4], False
    record = parse_rollout(line)
    values = [record.get(name) for name in ("step", "group", "rollout")]
    if not all(isinstance(value, int) for value in values):
        raise ValueError("a rollout without 'step', 'group' and 'rollout': it cannot be assigned to a group")
    step, group, rollout = map(int, values)  # type: ignore[arg-type]
    question = json.dumps(record.get("question"), ensure_ascii=False).encode(errors="backslashreplace")
    return step, group, rollout, question, "scores" in record


def _spread(lines: list[_Line], most: int) -> list[_Line]:
    """Lines of whole steps, evenly spread, or of whole groups if a single step is too large."""
    by_step: dict[int, list[_Line]] = {}
    for line in lines:
        by_step.setdefault(line.step, []).append(line)
    steps = sorted(by_step)
    for count in range(len(steps), 0, -1):
        # The first and the last step are always among them
        places = sorted({round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)})
        if sum(len(by_step[steps[place]]) for place in places) <= most:
            return [line for place in places for line in by_step[steps[place]]]
    if not steps:
        return []
    last = by_step[steps[-1]]
    sizes = Counter((line.batch, line.group) for line in last)
    groups: set[tuple[int, int]] = set()
    total = 0
    for key in sorted(sizes):
        total += sizes[key]
        if total <= most or not groups:
            groups.add(key)
    return [line for line in last if (line.batch, line.group) in groups]


def _read_groups(lines: list[_Line], mode: str, problems: list[str]) -> list[Group]:
    groups: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    by_file: dict[Path, list[_Line]] = {}
    for line in lines:
        by_file.setdefault(line.file, []).append(line)
    for path, selected in by_file.items():
        with path.open("rb") as file:
            for line in selected:
                file.seek(line.offset)
                try:
                    record = parse_rollout(file.readline())
                    _check_record(record)
                except (ValueError, TypeError) as error:
                    problems.append(f"{path}, line {line.number}: {error}")
                    continue
                groups.setdefault((line.step, line.batch, line.group), []).append(record)
    return [
        Group(step, sorted(rollouts, key=lambda record: record["rollout"]), mode)
        for (step, _, _), rollouts in sorted(groups.items())
    ]


def _check_record(record: dict[str, Any]) -> None:
    """Check that a record has the values that are shown, with the right types."""
    turns = record["trajectory"].turns
    number_per_turn = (f"{len(turns)} numbers", lambda value: _are_numbers(value) and len(value) == len(turns))
    turn_or_none = ("a turn or null", lambda value: value is None or isinstance(value, int))
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "question": ("a string", lambda value: isinstance(value, str)),
        "golden_answers": ("a list of strings", lambda value: _are(str, value)),
        "rewards": ("an object of numbers", lambda value: isinstance(value, dict) and _are_numbers([*value.values()])),
        "outcome": ("a number or null", lambda value: _are_numbers([value])),
        "first_occurrence": turn_or_none,
        "credited_turn": turn_or_none,
        "turn_rewards": number_per_turn,
        "turn_advantages": number_per_turn,
        "chance": ("a number or null", lambda value: _are_numbers([value])),
        "turn_weight": ("a number", lambda value: _are_numbers([value]) and value is not None),
    }
    for name, (what, is_right) in expected.items():
        if name in ("chance", "turn_weight") and name not in record:
            continue  # logs of older versions have none
        if name not in record:
            raise ValueError(f"a rollout without {name!r}: written by another version or program")
        if not is_right(record[name]):
            raise ValueError(f"{name!r} must be {what}, found {json.dumps(record[name])[:60]}")
    texts = [record["trajectory"].status]
    numbers: list[Any] = []
    ids = list(record["trajectory"].prompt_ids)
    for turn in turns:
        texts += [
            turn.text,
            turn.action,
            turn.content,
            turn.retrieval or "",
            *(t for p in turn.passages for t in (p.title, p.text)),
        ]
        numbers += [*(turn.logprobs or []), *(passage.score for passage in turn.passages)]
        ids += [*turn.token_ids, *turn.observation_ids]
    if not (_are(str, texts) and _are_numbers(numbers) and None not in numbers and _are(int, ids)):
        raise ValueError("its texts, tokens, log-probabilities or scores have the wrong type")


def _are(kind: type, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _are_numbers(values: Any) -> bool:
    """Whether all values are finite numbers or null."""
    try:
        return isinstance(values, list) and all(
            value is None or (isinstance(value, (int, float)) and isfinite(value)) for value in values
        )
    except OverflowError:  # an integer that is too large for a float
        return False


def _incomplete(run: Run) -> list[str]:
    notes = []
    for mode, groups in run.modes.items():
        size = max(len(group.rollouts) for group in groups)
        if few := sum(len(group.rollouts) < size for group in groups):
            notes.append(
                f"{few} groups ({mode}) have fewer than {size} rollouts: the others were not written, or lost."
            )
    return notes


def _find_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    places = [folder.parent, *sorted(folder.parent.glob("checkpoint-*"), reverse=True), folder.parent / "warm_start"]
    for place in places:
        if (place / "tokenizer.json").is_file():
            try:
                return Tokenizer.from_file(str(place / "tokenizer.json"))
            except (
                Exception
            ):  # the library raises no more precise error; without a tokenizer, hints are shown as a number of tokens
                continue
    return None
