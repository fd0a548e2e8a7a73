"""Checks of questions, shared by training, evaluation and the audit."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from .rows import load_call, read_answers, read_question
from .values import as_text, check_no_list

_AS_TEXT = "`load_questions(dataset)` reads numbers, dates and single answers as text."


def check_columns(dataset: Dataset | IterableDataset, name: str = "train_dataset") -> None:
    """
    Check that a data set has rows, and the columns `golden_answers` and `question` or `prompt`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the data set in error messages.

    Raises:
        `TypeError`: If it is not a data set.
        `ValueError`: If it is empty or a column is missing.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(f"`{name}` must be a `Dataset` or `IterableDataset`, got `{type(dataset).__name__}`.")
    columns = dataset.column_names
    if columns is None:  # a stream without known features
        columns = list(next(iter(dataset), {}))
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError(f"`{name}` is empty.")
    if "golden_answers" not in columns:
        raise ValueError(
            f"`{name}` has no column 'golden_answers' (a list of strings a row). Found the columns: {sorted(columns)}. "
            f"Load it with `{load_call(dataset)}`."
        )
    if "question" not in columns and "prompt" not in columns:
        raise ValueError(
            f"`{name}` has neither a column 'question' nor a column 'prompt'. Found the columns: {sorted(columns)}. "
            f"Load it with `{load_call(dataset)}`."
        )


def check_row(row: Mapping[str, Any], where: str, *, needs_question: bool = True) -> None:
    """
    Check the question and the golden answers of a row.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        where (`str`):
            Name of the data set and number of the row in error messages.
        needs_question (`bool`, *optional*, defaults to `True`):
            Whether `question` is required. In training, a row with a `prompt` needs none.

    Raises:
        `ValueError`: If `golden_answers` is not a list of strings of which at least one is not blank, or `question` is
            not a non-empty string.
    """
    golds, question = row.get("golden_answers"), row.get("question")
    if not _is_list_of_strings(golds) or not golds:
        hint = _hint(golds, read_answers)
        raise ValueError(f"{where}: 'golden_answers' must be a non-empty list of strings, found {golds!r}.{hint}")
    if not any(gold.strip() for gold in golds):
        raise ValueError(
            f"{where}: 'golden_answers' must have at least one answer that is not blank ('noanswer' if the question has "
            f"none), found {golds!r}."
        )
    if question is None and not needs_question:
        return
    if not isinstance(question, str) or (needs_question and not question.strip()):
        expected = "a non-empty string" if needs_question else "a string"
        hint = "" if isinstance(question, str) else _hint(question, read_question)
        raise ValueError(f"{where}: 'question' must be {expected}, found {question!r}.{hint}")


def read_texts(row: Mapping[str, Any], column: str, where: str) -> list[str]:
    """
    Read an optional column with a list of texts, for instance `supporting_titles`. Numbers and dates are read as text.

    Args:
        row (`Mapping[str, Any]`):
            The row.
        column (`str`):
            Name of the column.
        where (`str`):
            Name of the data set and number of the row in error messages.

    Returns:
        `list[str]`: The texts, none if the row has no value.

    Raises:
        `ValueError`: If the value is not a list of texts.
    """
    values = row.get(column)
    expected = f"{where}: {column!r} must be a list of strings, found {values!r}."
    if values is not None and not isinstance(values, (list, tuple)):
        raise ValueError(expected)
    return [as_text(value, expected) for value in values or []]


def _hint(value: Any, read: Callable[[Any], Any]) -> str:
    """The hint to load the data set, if `load_questions` can read the value."""
    try:
        read(check_no_list(value))
    except ValueError:
        return ""
    return f" {_AS_TEXT}"


def _is_list_of_strings(value: Any) -> bool:
    """Whether a value of a row is a list (or tuple) of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
