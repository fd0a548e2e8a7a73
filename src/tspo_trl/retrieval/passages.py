"""One reader of passages: for corpus files, replies of servers and objects of retrievers in Python."""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from .base import Passage

# Published names, the first one with a value counts. In MS MARCO, `docid` is the document of the passage `pid`
ID_KEYS = ("id", "_id", "pid", "passage_id", "psg_id", "docid", "doc_id", "docno", "idx")
TITLE_KEYS = ("title", "wikipedia_title", "article_title")
TEXT_KEYS = (
    *("text", "content", "contents", "passage", "segment"),
    *("passage_text", "paragraph_text", "page_content", "body"),
)
_TITLED = re.compile(r'\(Title: ("[^\n]*?"|[^)\n]*)\) (.*)', re.DOTALL)


def read_passage(record: Any, where: str, *, default_id: str = "", score: float | None = None) -> Passage:
    """
    Read a passage in one of its published forms.

    - A [`Passage`], or a mapping with a text and, optionally, an id, a title and a score.
    - The id is under `id`, `_id` (BEIR), `pid`, `passage_id`, `psg_id`, `docid`, `doc_id`, `docno` or `idx`. Integers
      of any type become strings.
    - The title is under `title`, `wikipedia_title` or `article_title`. A null title is the same as no title.
    - The text is under `text`, `content`, `contents` (Pyserini, FlashRAG, Search-R1), `passage` or `segment` (MS MARCO),
      `passage_text`, `paragraph_text` (MuSiQue), `page_content` or `body`.
    - `contents` without a title beside it starts with a line that is the title; quotes around the title are removed. If
      `contents` has one line only, it is a text without a title.
    - A string is read like `contents`. `"(Title: …) …"` is also read, as the rerankers of Search-R1 return it.
    - `{"document": …, "score": …}`, as in Search-R1, with any of these forms as the document.
    - A missing or null score is 0. NaN and infinite scores are refused.

    Args:
        record (`Passage`, `Mapping` or `str`):
            The passage.
        where (`str`):
            Name of its place in error messages.
        default_id (`str`, *optional*, defaults to `""`):
            Id of a passage that has none.
        score (`float`, *optional*):
            Score of the passage. Defaults to the score of the record.

    Raises:
        `ValueError`: If the record is not a passage. The message names the place and the type found.
    """
    if isinstance(record, Passage):
        if score is None and _is_plain(record):
            return record
        record = {"id": record.id, "title": record.title, "text": record.text, "score": record.score}
    fields = _flatten(record, where)
    title, text = _read_texts(fields, where)
    identifier = _first(fields, ID_KEYS)
    return Passage(
        id=default_id if identifier is None or identifier == "" else _read_id(identifier, where),
        title=title,
        text=text,
        score=_read_score(fields.get("score"), where) if score is None else score,
    )


def read_passages(records: Iterable[Any], name: str) -> Iterator[Passage]:
    """
    Read the passages of an argument. Passages without an id get their position as id.

    Args:
        records (`Iterable`):
            Passages in the forms of [`read_passage`]. They are read one by one.
        name (`str`):
            Name of the argument in error messages.

    Raises:
        `TypeError`: If the argument is not a collection of passages.
        `ValueError`: If a record is not a passage.
    """
    if isinstance(records, (str, Mapping, Passage)) or not isinstance(records, Iterable):
        raise TypeError(f"`{name}` must be a list of passages, got {describe_type(records)}.")
    return (read_passage(record, f"`{name}`, item {i}", default_id=str(i)) for i, record in enumerate(records))


def hold_passages(passages: Iterable[Any], retriever: str, of_file: str) -> list[Passage]:
    """
    Read the argument `passages` of a retriever that holds them in memory.

    Args:
        passages (`Iterable`):
            Passages in the forms of [`read_passage`].
        retriever (`str`):
            Name of the retriever in error messages.
        of_file (`str`):
            The call that indexes a file instead, with `{}` for its path.

    Raises:
        `TypeError`: If `passages` is a path, or no collection of passages.
        `ValueError`: If there are no passages, one is malformed, or two share an id.
    """
    if isinstance(passages, (str, Path)):
        call = of_file.format(repr(str(passages)))
        raise TypeError(f"`passages` must be a list of passages, got {str(passages)!r}. To index a file, use `{call}`.")
    held = list(read_passages(passages, "passages"))
    if not held:
        raise ValueError(f"`passages` is empty: {retriever} needs at least one passage to search in.")
    seen: set[str] = set()
    for passage in held:
        if passage.id in seen:
            raise ValueError(f"`passages` has two passages with the id {passage.id!r}: ids must be unique.")
        seen.add(passage.id)
    return held


def describe_type(value: Any) -> str:
    """A value for error messages: its type, and the keys of a mapping."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        keys = [str(key) for key in value][:10]
        return f"a {type(value).__name__} with the keys {keys}"
    return f"`{type(value).__name__}`"


def _is_plain(passage: Passage) -> bool:
    """Whether a passage has an id and fields of exactly the declared types."""
    texts = all(type(text) is str for text in (passage.id, passage.title, passage.text))
    return texts and passage.id != "" and type(passage.score) is float and math.isfinite(passage.score)


def _is_missing(value: Any) -> bool:
    """Whether a value is null. pandas writes NaN for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _first(fields: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The value of the first key that has one. `None` if there is none."""
    for key in keys:
        if key in fields and not _is_missing(value := fields[key]):
            return value
    return None


def _flatten(record: Any, where: str) -> Mapping[str, Any]:
    """The fields of a record, with those of its `document`."""
    if isinstance(record, str):
        return {"contents": record}
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a passage (an object with a text, or a string), found {_type(record)}.")
    document = record.get("document")
    if _is_missing(document):
        return record
    if isinstance(document, Passage):
        inner: dict[str, Any] = {"id": document.id, "title": document.title, "text": document.text}
    elif isinstance(document, str):
        inner = {"contents": document}
    elif isinstance(document, Mapping):
        inner = {key: value for key, value in document.items() if not _is_missing(value)}
        inner = inner if any(key in inner for key in TEXT_KEYS) else dict(document)
    else:
        raise ValueError(f'{where}: expected an object or a string under "document", found {_type(document)}.')
    return {**{key: value for key, value in record.items() if key != "document"}, **inner}


def _read_texts(fields: Mapping[str, Any], where: str) -> tuple[str, str]:
    """The title and the text of a record."""
    title = _first(fields, TITLE_KEYS)
    if title is not None and not isinstance(title, str):
        raise ValueError(f'{where}: expected a string under "title", found {_type(title)}.')
    for key in TEXT_KEYS:
        if key in fields and isinstance(fields[key], str):
            break
    else:
        if present := [key for key in TEXT_KEYS if key in fields]:
            raise ValueError(f'{where}: expected a string under "{present[0]}", found {_type(fields[present[0]])}.')
        keys = [str(key) for key in fields][:10]
        raise ValueError(f'{where}: expected a text under "text" or "contents", found the keys {keys}.')
    text = str(fields[key])
    if key != "contents":
        return str(title or ""), text
    first, rest = _split_contents(text)
    if title is None:
        return first, rest
    return str(title), rest if first and first == _unquote(title.strip()) else text


def _split_contents(contents: str) -> tuple[str, str]:
    """The title and the text of `contents`."""
    if contents.startswith("(Title: ") and (titled := _TITLED.fullmatch(contents)):
        return _unquote(titled[1].strip()), titled[2]
    first, newline, rest = contents.partition("\n")
    title = _unquote(first.strip())
    if not newline or (not rest.strip() and title == first.strip()):  # one line, not a quoted title of an empty text
        return "", contents.removesuffix("\n")
    return title, rest


def _unquote(title: str) -> str:
    """A title without the quotes around it. Quotes within it are kept, as in `"Weird Al" Yankovic`."""
    while len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return title


def _read_id(value: Any, where: str) -> str:
    if isinstance(value, (str, UUID)):
        return str(value)
    if not isinstance(value, (bool, np.bool_)):  # older versions of NumPy take `np.bool_` as an index
        try:
            return str(operator.index(value))
        except TypeError:
            pass
        if isinstance(value, (float, np.floating)) and float(value).is_integer():  # integers of pandas beside nulls
            return str(int(value))
    raise ValueError(f"{where}: expected a string or an integer as id, found {_type(value)}.")


def _read_score(value: Any, where: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, (bool, np.bool_, str, bytes)) or not hasattr(value, "__float__"):
        raise ValueError(f'{where}: expected a number under "score", found {_type(value)}.')
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f'{where}: expected a number under "score", found {_type(value)} ({error}).') from error
    if not math.isfinite(score):
        raise ValueError(f'{where}: expected a finite number under "score", found {score}.')
    return score


def _type(value: Any) -> str:
    return type(value).__name__
