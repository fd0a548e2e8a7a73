"""Reading the rows of any data set as questions: the mapping of columns, and the check of values."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeAlias

from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List, Value, concatenate_datasets

from ..scoring import normalize_answer
from .values import as_text, check_no_list, follow, is_missing, join, read_cell, to_python

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = Dataset | IterableDataset
Keys: TypeAlias = tuple[str, ...]  # the keys that lead to a value

#: The columns of questions.
FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "golden_answers": List(Value("string")),
        "data_source": Value("string"),
    }
)
#: The columns of published data sets, in order of preference. The answers of several columns are joined.
FORMS: dict[str, list[list[str]]] = {
    "id": [["id"], ["_id"]],
    "question": [["question"], ["extra_info.question"]],
    "golden_answers": [
        ["golden_answers"],
        ["reward_model.ground_truth.target"],
        ["reward_model.ground_truth"],
        ["extra_info.golden_answers"],
        ["extra_info.answers"],
        ["answer", "answer_aliases"],
        ["possible_answers"],
    ],
    "data_source": [["data_source"]],
}
_JSON_ANSWERS = ("possible_answers",)  # PopQA's lists are JSON, in its TSV file and on the Hub
READ_COLUMNS = [path for forms in FORMS.values() for form in forms for path in form]

_SYNONYMS = {"question": ["query", "problem", "input"], "golden_answers": ["answers", "answer", "target"]}
_TEXT_FIELDS = ["text", "aliases", "value", "answer", "name"]  # fields of structs of answers, in order of preference


def check_mapping(columns: Mapping[str, str]) -> None:
    """
    Check the keys of a column mapping.

    Args:
        columns (`dict[str, str]`):
            Names of our columns to names of columns of the source.

    Raises:
        `TypeError`: If it is not a mapping.
        `ValueError`: If a key is not one of our columns; the message suggests the nearest.
    """
    if not isinstance(columns, Mapping):
        raise TypeError(f"`columns` must be a mapping such as {{'question': 'query'}}, got {columns!r}.")
    known = [*FEATURES, "prompt"]
    for ours, theirs in columns.items():
        if ours not in known:
            near = get_close_matches(str(ours), known, n=1)
            turned = theirs in known and isinstance(ours, str)
            meant = {theirs: ours} if turned else {near[0]: theirs} if near else {}
            rest = {other: path for other, path in columns.items() if other != ours}
            hint = f" Did you mean `columns={ {**rest, **meant}!r}`?" if meant else ""
            raise ValueError(f"`columns` maps one of {known} to a column of the source, got the key {ours!r}.{hint}")
        if not isinstance(theirs, str) or not theirs:
            raise ValueError(f"`columns[{ours!r}]` must be the name of a column, got {theirs!r}.")


def choose_columns(names: Sequence[str], structure: Any, columns: Mapping[str, str]) -> dict[str, list[Keys]]:
    """
    Choose the columns of a source that are read.

    Args:
        names (`list[str]`):
            The columns of the source.
        structure (`Features`, or `list` of rows):
            Their types or some of their values, in which the fields of structs are looked for.
        columns (`dict[str, str]`):
            The mapping of columns, see `load_questions`.

    Returns:
        `dict`: For each of our columns that was found, the keys that lead to its values. Several are joined.
    """
    found = {ours: [_keys(path, names)] for ours, path in columns.items()}
    for ours, forms in FORMS.items():
        if ours in found:
            continue
        for form in forms:
            paths = [_keys(path, names) for path in form]
            if (form == [ours] and ours in names) or all(k[0] in names and _leads(structure, k) for k in paths):
                found[ours] = paths
                break
    return found


def _keys(path: str, names: Sequence[str]) -> Keys:
    return (path,) if path in names else tuple(path.split("."))  # a name may have a dot in it


def _leads(level: Any, keys: Keys) -> bool:
    """Whether keys lead to something other than a struct, in the types or in one of the values."""
    if isinstance(level, (List, LargeList)):
        return _leads(level.feature, keys)
    if isinstance(level, list) and level:
        return any(_leads(item, keys) for item in level)
    if not keys:
        return not isinstance(level, Mapping)
    if isinstance(level, Mapping):
        return keys[0] in level and _leads(level[keys[0]], keys[1:])
    return type(level).__name__ == "Json"  # its fields are not known before it is read


def _check_fields(label: str, found: Mapping[str, list[Keys]], names: list[str], features: Features | None) -> None:
    """Check that the columns and fields of a mapping exist."""
    for ours, paths in found.items():
        for keys in paths:
            level: Any = features if features is not None else dict.fromkeys(names)
            for i, key in enumerate(keys):
                while isinstance(level, (List, LargeList)):
                    level = level.feature
                if not isinstance(level, dict):
                    break  # its fields are not known before it is read
                if key not in level:
                    near = _nearest(key, list(level))
                    missing = f"column {key!r}" if i == 0 else f"field {key!r} in {'.'.join(keys[:i])!r}"
                    raise ValueError(
                        f"{label} has no {missing}, from which {ours!r} is to be read. Found {_list(list(level))}."
                        + (f" Did you mean {near!r}?" if near else "")
                    )
                level = level[key]


def _find_columns(
    label: str, names: list[str], features: Features | None, first: Mapping[str, Any], columns: Mapping[str, str]
) -> dict[str, list[Keys]]:
    """The keys that lead to the values of each of our columns."""
    found = choose_columns(names, [first] if features is None else features, columns)
    _check_fields(label, found, names, features)
    missing = [ours for ours in ("question", "golden_answers") if ours not in found]
    if missing:
        mapping = _suggest(first if features is None else features, found, columns)
        hint = "Map yours with " + ("`columns`." if mapping is None else f"`columns={mapping!r}`.")
        raise ValueError(f"{label} has no column {missing[0]!r}. Found the columns {_list(names)}. {hint}")
    return found


def _list(names: list[str]) -> str:
    shown = repr(names[:30])
    return shown if len(names) <= 30 else f"{shown[:-1]}, and {len(names) - 30} more]"


def load_call(dataset: AnyDataset) -> str:
    """
    The call that reads a data set whose columns have other names.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.

    Returns:
        `str`: A call of [`load_questions`], with a mapping of the columns if it needs one and one can be suggested.
    """
    source: Mapping[str, Any] = next(iter(dataset), {}) if dataset.features is None else dataset.features
    found = choose_columns(list(source), [source] if dataset.features is None else source, {})
    mapping = _suggest(source, found, {}) or {}
    return f"load_questions(dataset, columns={mapping!r})" if mapping else "load_questions(dataset)"


def _suggest(
    source: Mapping[str, Any], found: Mapping[str, list[Keys]], columns: Mapping[str, str]
) -> dict[str, str] | None:
    """A mapping with the columns that are missing, according to the types of a source or a row of it."""
    mapping = dict(columns)
    used = {keys[0] for paths in found.values() for keys in paths}
    for ours in ("question", "golden_answers"):
        if ours in found:
            continue
        free = [name for name in source if name not in used and _text_field(source[name], ours) is not None]
        near = _nearest(ours, free)
        path = near + (_text_field(source[near], ours) or "") if near else _nearest_field(source, ours)
        if path is None:
            return None
        mapping[ours] = path
    return mapping


def _nearest_field(source: Mapping[str, Any], ours: str) -> str | None:
    """The path of a field with such a name in a struct, for instance verl's `extra_info.answer`."""
    for name, level in source.items():
        if isinstance(level, Mapping):
            near = _nearest(ours, [field for field in level if _text_field(level[field], ours, 1) == ""])
            if near:
                return f"{name}.{near}"
    return None


def _text_field(level: Any, ours: str, depth: int = 0) -> str | None:
    """The field of a column that holds text: `""` for the column itself, `None` if no field does."""
    if isinstance(level, (List, LargeList, list)):
        if ours == "question" or not level:
            return None
        return _text_field(level[0] if isinstance(level, list) else level.feature, ours, depth)
    if isinstance(level, Mapping):
        fields = sorted(level, key=lambda field: _TEXT_FIELDS.index(field) if field in _TEXT_FIELDS else 9)
        found = (field for field in fields if depth == 0 and _text_field(level[field], ours, 1) is not None)
        return next((f".{field}" for field in found), None)
    if isinstance(level, Value):
        return "" if "string" in level.dtype else None
    return "" if isinstance(level, str) or type(level).__name__ == "Json" else None


def _nearest(name: str, names: Sequence[str]) -> str | None:
    for candidate in [name, *_SYNONYMS.get(name, [])]:
        if near := get_close_matches(candidate, names, n=1, cutoff=0.7):
            return near[0]
    return None


def to_questions(
    dataset: AnyDataset,
    where: Callable[[int], str],
    columns: Mapping[str, str],
    data_source: str,
    features: Features | None = None,
    *,
    cells: bool = False,
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
        features ([`~datasets.Features`], *optional*):
            The types of the columns of a stream that does not know them.
        cells (`bool`, *optional*, defaults to `False`):
            Whether the values are cells of a table, in which a list of answers is written as JSON.

    Returns:
        The same kind of data set, see [`load_questions`].

    Raises:
        `ValueError`: If there are no rows, a column is missing, or a value is not as described.
    """
    label = where(-1)
    source = dataset.features if features is None else features
    first: Mapping[str, Any] = next(iter(dataset), {}) if source is None else {}
    names = list(first if source is None else source)
    if not names or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"{label} has no rows.")
    paths = _find_columns(label, names, source, first, columns)
    names_of_classes = {ours: _class_names(source or {}, several[0]) for ours, several in paths.items()}
    read = partial(_read_rows, paths=paths, where=where, data_source=data_source, classes=names_of_classes, cells=cells)
    every = [keys for several in paths.values() for keys in several]
    used = list(dict.fromkeys(keys[0] for keys in every))
    # A column that is read whole is renamed, other columns stay. Prompts of the source are dropped.
    dropped = {*FEATURES, "prompt", *(keys[0] for keys in every if len(keys) == 1)}
    rest = [column for column in names if column not in dropped]
    ours = Features(FEATURES)
    if "prompt" in paths and len(paths["prompt"][0]) == 1 and source is not None:
        ours["prompt"] = source[paths["prompt"][0][0]]
    complete = "prompt" not in paths or "prompt" in ours

    if isinstance(dataset, Dataset):
        # Decode only the columns that are read: passages and other metadata may be large
        questions = dataset.select_columns(used).map(
            read,
            batched=True,
            with_indices=True,
            remove_columns=used,
            features=ours if complete else None,
            desc=f"Reading {label}",
        )
        _warn_of_degenerate(questions, where)
        if not rest:
            return questions
        return concatenate_datasets([questions, dataset.select_columns(rest)], axis=1)

    known = None
    if source is not None and complete:
        known = Features({**ours, **{column: source[column] for column in rest}})
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
    paths: Mapping[str, list[Keys]],
    where: Callable[[int], str],
    data_source: str,
    classes: Mapping[str, Sequence[str] | None],
    cells: bool,
) -> dict[str, list[Any]]:
    """Read a batch of rows into our columns."""
    columns: dict[str, list[Any]] = defaultdict(list)
    for position, index in enumerate(indices):
        for ours in (*FEATURES, *(["prompt"] if "prompt" in paths else [])):
            chosen = paths.get(ours, [(ours,)])
            values = [follow(batch[keys[0]][position], keys[1:]) if ours in paths else None for keys in chosen]
            if names := classes.get(ours):
                values[0] = _name_classes(values[0], names)
            value = values[0]
            try:
                if ours == "golden_answers":
                    read_text = read_cell if cells or chosen == [_JSON_ANSWERS] else check_no_list
                    values = [read_text(value) for value in values]
                    value = values[0] if len(values) == 1 else join(values)
                columns[ours].append(_READERS[ours](value, index, data_source))
            except ValueError as error:
                column = " and ".join(repr(".".join(keys)) for keys in chosen)
                raise ValueError(f"{where(index)}, column {column}: expected {error}, found {_short(value)}.") from None
    return columns


def _class_names(features: Any, keys: Keys) -> Sequence[str] | None:
    """The names of the classes, if the values are numbers of classes."""
    for key in (*keys, None):
        while isinstance(features, (List, LargeList)):
            features = features.feature
        if key is not None:
            features = features.get(key) if isinstance(features, dict) else None
    return features.names if isinstance(features, ClassLabel) else None


def _name_classes(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_name_classes(item, names) for item in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _read_id(value: Any, index: int, *_: Any) -> str:
    return str(index) if is_missing(value) else as_text(value, "a text")


def read_question(value: Any, *_: Any) -> str:
    """Read a value as a question; the `ValueError` says what is expected."""
    text = as_text(value, "a non-empty string")
    if not text.strip():
        raise ValueError("a non-empty string")
    return text


def read_answers(value: Any, *_: Any) -> list[str]:
    """Read a value as golden answers; the `ValueError` says what is expected."""
    value = to_python(value)
    answers = [
        as_text(answer, "a string or a list of strings") for answer in (value if isinstance(value, list) else [value])
    ]
    answers = [answer for answer in answers if answer.strip()]
    if not answers:
        raise ValueError("at least one answer that is not blank ('noanswer' if the question has none)")
    return answers


def _read_data_source(value: Any, _: int, data_source: str) -> str:
    return data_source if is_missing(value) else as_text(value, "a text")


_READERS: dict[str, Callable[..., Any]] = {
    "id": _read_id,
    "question": read_question,
    "golden_answers": read_answers,
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
