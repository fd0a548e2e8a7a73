"""Reading the rows of any data set as questions: the mapping of columns, and the check of values."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, LargeList, List, Value, concatenate_datasets

from ..scoring import normalize_answer

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset

#: The columns of questions.
FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "golden_answers": List(Value("string")),
        "data_source": Value("string"),
    }
)
_SEARCH_R1_ANSWERS = "reward_model.ground_truth.target"


def check_mapping(columns: Mapping[str, str]) -> None:
    """
    Check the keys of a column mapping.

    Args:
        columns (`dict[str, str]`):
            Names of our columns to names of columns of the source.

    Raises:
        `ValueError`: If a key is not one of our columns; the message suggests the nearest.
    """
    known = [*FEATURES, "prompt"]
    for ours, theirs in columns.items():
        if ours not in known:
            near = get_close_matches(ours, known, n=1)
            turned = theirs in known
            hint = (
                f" Swap key and value: {{{theirs!r}: {ours!r}}}."
                if turned
                else f" Did you mean {near[0]!r}?"
                if near
                else ""
            )
            raise ValueError(f"`columns` maps one of {known} to a column of the source, got the key {ours!r}.{hint}")
        if not isinstance(theirs, str) or not theirs:
            raise ValueError(f"`columns[{ours!r}]` must be the name of a column, got {theirs!r}.")


def _find_columns(
    label: str, names: list[str], features: Features | None, columns: Mapping[str, str]
) -> dict[str, str]:
    """The column of the source for each of our columns, as names joined by dots."""
    found = dict(columns)
    for ours in FEATURES:
        if ours not in found and ours in names:
            found[ours] = ours
    if "golden_answers" not in found and "reward_model" in names:
        found["golden_answers"] = _SEARCH_R1_ANSWERS
    for ours, path in found.items():
        if path in names:
            continue  # a name with a dot in it
        level: Any = features if features is not None else dict.fromkeys(names)
        for i, key in enumerate(path.split(".")):
            while isinstance(level, (List, LargeList, list)):
                level = level[0] if isinstance(level, list) else level.feature
            if not isinstance(level, dict):
                break  # its fields are not known before it is read
            if key not in level:
                near = _nearest(key, list(level))
                missing = f"column {key!r}" if i == 0 else f"field {key!r} in {'.'.join(path.split('.')[:i])!r}"
                raise ValueError(
                    f"{label} has no {missing}, from which {ours!r} is to be read. Found {list(level)}."
                    + (f" Did you mean {near!r}?" if near else "")
                )
            level = level[key]
    for ours in ("question", "golden_answers"):
        if ours not in found:
            raise ValueError(
                f"{label} has no column {ours!r}. Found the columns {names}. "
                f"Map yours with `columns={{{ours!r}: {_suggest(ours, names, features)!r}}}`."
            )
    return found


def _suggest(ours: str, names: list[str], features: Features | None) -> str:
    near = _nearest(ours, names)
    feature = features[near] if features is not None and near is not None else None
    while isinstance(feature, (List, LargeList)):
        feature = feature.feature
    return f"{near}.{next(iter(feature))}" if isinstance(feature, dict) and feature else near or "..."


def _nearest(name: str, names: list[str]) -> str | None:
    synonyms = {"question": ["query", "problem", "input"], "golden_answers": ["answers", "answer", "target"]}
    for candidate in [name, *synonyms.get(name, [])]:
        if near := get_close_matches(candidate, names, n=1, cutoff=0.7):
            return near[0]
    return None


def to_questions(
    dataset: AnyDataset, where: Callable[[int], str], columns: Mapping[str, str], data_source: str
) -> AnyDataset:
    """
    Read the rows of a data set as questions.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Unchanged rows.
        where (`Callable[[int], str]`):
            Gets the number of a row and returns its name in error messages; -1 stands for the data set.
        columns (`dict[str, str]`):
            Columns of the source with other names.
        data_source (`str`):
            The `data_source` of rows that have none.

    Returns:
        The same kind of data set, see [`load_questions`].

    Raises:
        `ValueError`: If there are no rows, a column is missing, or a value is not as described.
    """
    label = where(-1)
    names = dataset.column_names
    if names is None:  # a stream without known features
        names = list(next(iter(dataset), {}))
    if not names or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{label} has no rows.")
    found = _find_columns(label, names, dataset.features, columns)
    paths = {ours: (path,) if path in names else tuple(path.split(".")) for ours, path in found.items()}
    read = partial(_read_rows, paths=paths, where=where, data_source=data_source)
    used = list(dict.fromkeys(path[0] for path in paths.values()))
    # A column that is read whole is renamed, other columns stay. Prompts of the source are dropped.
    dropped = {*FEATURES, "prompt", *(path[0] for path in paths.values() if len(path) == 1)}
    rest = [column for column in names if column not in dropped]
    features = Features(FEATURES)
    if "prompt" in paths and len(paths["prompt"]) == 1 and dataset.features is not None:
        features["prompt"] = dataset.features[paths["prompt"][0]]

    if isinstance(dataset, Dataset):
        known = None if "prompt" in paths and "prompt" not in features else features
        # Decode only the columns that are read: passages and other metadata may be large
        questions = dataset.select_columns(used).map(
            read,
            batched=True,
            with_indices=True,
            remove_columns=used,
            features=known,
            desc=f"Reading {label}",
        )
        _warn_of_degenerate(questions, where)
        if not rest:
            return questions
        return concatenate_datasets([questions, dataset.select_columns(rest)], axis=1)

    known = None
    if dataset.features is not None and ("prompt" not in paths or "prompt" in features):
        known = Features({**features, **{column: dataset.features[column] for column in rest}})
    stream = dataset.map(
        read,
        batched=True,
        batch_size=1,
        with_indices=True,
        remove_columns=[column for column in names if column not in rest],
        features=known,
    )
    if next(iter(stream), None) is None:  # this also checks the first row at once
        raise ValueError(f"{label} has no rows.")
    return stream


def _read_rows(
    batch: Mapping[str, list[Any]],
    indices: Sequence[int],
    *,
    paths: Mapping[str, tuple[str, ...]],
    where: Callable[[int], str],
    data_source: str,
) -> dict[str, list[Any]]:
    """Read a batch of rows into our columns."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for position, index in enumerate(indices):
        for ours in (*FEATURES, *(["prompt"] if "prompt" in paths else [])):
            value = None
            if ours in paths:
                first, *keys = paths[ours]
                value = _follow(batch[first][position], keys)
            try:
                columns[ours].append(_READERS[ours](value, index, data_source))
            except ValueError as error:
                column = ".".join(paths.get(ours, (ours,)))
                raise ValueError(
                    f"{where(index)}, column {column!r}: expected {error}, found {_short(value)}."
                ) from None
    return columns


def _follow(value: Any, keys: Sequence[str]) -> Any:
    for i, key in enumerate(keys):
        if isinstance(value, list):
            return [_follow(item, keys[i:]) for item in value]
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _read_id(value: Any, index: int, *_: Any) -> str:
    if value is None or value == "":
        return str(index)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("a string or an integer")
    return str(value)


def _read_question(value: Any, *_: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value


def _read_answers(value: Any, *_: Any) -> list[str]:
    if isinstance(value, str) and value.strip().startswith("["):
        # A list in a cell of a table. Lists written by pandas or numpy cannot be distinguished from text with certainty
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            if re.match(r"\s*\[\s*['\"]", value):
                raise ValueError('one answer, or a list as JSON such as ["Paris", "Paris, France"]') from None
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, (list, tuple)) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("a string or a list of strings")
    answers = [answer for answer in answers if answer.strip()]
    if not answers:
        raise ValueError("at least one answer that is not blank")
    return answers


def _read_data_source(value: Any, _: int, data_source: str) -> str:
    if value is None or value == "":
        return data_source
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


_READERS: dict[str, Callable[..., Any]] = {
    "id": _read_id,
    "question": _read_question,
    "golden_answers": _read_answers,
    "data_source": _read_data_source,
    "prompt": lambda value, *_: value,  # checked by the trainer, which knows the protocol
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _warn_of_degenerate(questions: Dataset, where: Callable[[int], str]) -> None:
    rows = [i for i, golds in enumerate(questions["golden_answers"]) if not any(map(normalize_answer, golds))]
    if rows:
        logger.warning(
            "%s: in %d of %d rows every golden answer normalises to the empty string, so that only an identical "
            "answer is correct. The first is %s: %s.",
            where(-1),
            len(rows),
            len(questions),
            where(rows[0]),
            _short(questions[rows[0]]["golden_answers"]),
        )
