"""Values of rows: reaching them, and reading them as text."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import numpy as np

#: Halves of surrogate pairs, which are no characters.
SURROGATES = re.compile(r"[\ud800-\udfff]")
_QUOTED_LIST = re.compile(r"\s*\[\s*['\"]")


def follow(value: Any, keys: Sequence[str]) -> Any:
    """
    Follow keys into a value. In a list, all items are followed.

    Args:
        value (`Any`):
            A value of a row.
        keys (`Sequence[str]`):
            The keys, outermost first.

    Returns:
        `Any`: The value found, or `None`.
    """
    for i, key in enumerate(keys):
        if isinstance(value, list):
            return [follow(item, keys[i:]) for item in value]
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def join(values: Sequence[Any]) -> list[Any]:
    """Join the answers of several columns, each once."""
    joined = []
    for value in values:
        value = to_python(value)
        joined += value if isinstance(value, list) else [] if value is None else [value]
    return [value for i, value in enumerate(joined) if value not in joined[:i]]


def to_python(value: Any) -> Any:
    """Convert arrays and tuples to Python objects."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def read_cell(value: Any) -> Any:
    """
    Read the answers in a cell of a table.

    Args:
        value (`Any`):
            A cell: one answer, or a list of strings as JSON. `[0, 1]` is one answer, like any other text.

    Returns:
        `Any`: The list, or the value.

    Raises:
        `ValueError`: If it is another list. Lists written by Python or numpy cannot be distinguished from text with
            certainty.
    """
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    try:
        items = json.loads(value)
    except json.JSONDecodeError:
        items = None
    numbers = bool(items) and all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in items)
    if items is not None and all(isinstance(item, str) for item in items):
        return items
    if (items is not None and not numbers) or _QUOTED_LIST.match(value):
        raise ValueError('one answer, or a list as JSON such as ["Paris", "Paris, France"]')
    return value


def check_no_list(value: Any) -> Any:
    """
    Refuse a text that holds a list of texts. Only cells of tables are converted.

    Args:
        value (`Any`):
            A value that is not a cell of a table.

    Raises:
        `ValueError`: If it is such a text.
    """
    if isinstance(value, str) and _QUOTED_LIST.match(value):
        raise ValueError('one answer, or a list such as ["Paris", "Paris, France"] that is not written as text')
    return value


def is_missing(value: Any) -> bool:
    """Whether a value of a row is null, empty or NaN."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any, expected: str) -> str:
    """
    Write a value as the text that a file had. Readers of files turn text into numbers, dates and so on.

    Args:
        value (`Any`):
            A text, number, boolean, date, time, or bytes in UTF-8.
        expected (`str`):
            What is expected, for the error.

    Raises:
        `ValueError`: With `expected` as message, if the value has no such text.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # the numbers of a table become floats if one of them is missing
    if isinstance(value, datetime) and value.tzinfo is None and value.time() == time():
        return value.date().isoformat()
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise ValueError(expected) from None
    if isinstance(value, (int, Decimal)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str) or SURROGATES.search(value):
        raise ValueError(expected)
    return value
