"""One reader of passages: for corpus files, replies of servers and objects of retrievers in Python."""

import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np

from .base import Passage

# Published names as `plain_name` writes them, the first one with a value counts. In MS MARCO, `docid` is the document of the
# passage `pid`. `document_id` and `wikipedia_id` are missing here: several passages of a document share them
ID_KEYS = ("id", "pid", "passageid", "psgid", "docid", "docno", "idx", "chunkid", "uid", "corpusid")
TITLE_KEYS = ("title", "wikipediatitle", "articletitle", "pagetitle", "wikititle", "documenttitle", "doctitle")
TEXT_KEYS = (
    *("text", "content", "contents", "passage", "segment"),
    *("passagetext", "paragraphtext", "pagecontent", "body"),
)
# A title in quotes, with pairs of brackets, or without `)`
_TITLED = re.compile(r'\(Title: ("[^\n]*?"|[^()\n]*(?:\([^()\n]*\)[^()\n]*)*|[^)\n]*)\) (.*)', re.DOTALL)
_TWO_QUOTED = re.compile(r'"[^"]*[^"\s]"(?=\W).*(?<=\W)"[^"\s][^"]*"')  # such as `"a" or "b"`
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".gz", ".parquet")


def read_passage(record: Any, where: str, *, default_id: str = "", score: float | None = None) -> Passage:
    """
    Read a passage in one of its published forms.

    - A [`Passage`], or a mapping with a text and, optionally, an id, a title and a score.
    - The id is under `id`, `pid`, `passage_id`, `psg_id`, `docid`, `docno`, `idx`, `chunk_id`, `uid` or
      `corpus_id`. Integers of any type become strings, and `{"$oid": …}` (MongoDB) its value.
    - The title is under `title`, `wikipedia_title`, `article_title`, `page_title`, `wiki_title`, `document_title` or
      `doc_title`. A null title is the same as no title.
    - The text is under `text`, `content`, `contents` (Pyserini, FlashRAG, Search-R1), `passage` or `segment` (MS MARCO),
      `passage_text`, `paragraph_text` (MuSiQue), `page_content` or `body`. The first one that is not empty counts.
    - Case, `_` and `-` in these names do not matter: `_id` (BEIR), `id_` (LlamaIndex) and `ID` are `id`.
    - An `id`, a title or a text that the record lacks is read from its `metadata` (LangChain).
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
    try:
        fields = _flatten(record, where)
        values = _by_plain_name(fields)
        metadata = _by_plain_name(fields["metadata"]) if isinstance(fields.get("metadata"), Mapping) else {}
        title, text = _read_texts(values, metadata, where)
        # Other ids in the metadata may be those of a whole document
        _, identifier = _first(values, ID_KEYS) or _first(metadata, ("id",)) or ("", None)
        return Passage(
            id=(None if identifier is None else _read_id(identifier, where)) or default_id,
            title=title,
            text=text,
            score=_read_score(fields.get("score"), where) if score is None else score,
        )
    except Exception as error:  # the record may be an object of any class
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        raise ValueError(f"{where}: the passage cannot be read: {error!r}") from error


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
    if isinstance(records, (str, Mapping, Passage)) or is_table(records) or not isinstance(records, Iterable):
        raise TypeError(f"`{name}` must be a list of passages, got {describe_type(records)}.")
    if _are_files(records):
        raise TypeError(
            f"`{name}` must be a list of passages, got the file names {_some(records)}. Read a file with `load_corpus`."
        )
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
    if isinstance(passages, (str, Path)) or _are_files(passages):
        names = [str(passages)] if isinstance(passages, (str, Path)) else _some(passages)
        found = f"{names[0]!r}" if isinstance(passages, (str, Path)) else f"the file names {names}"
        call = of_file.format(repr(names[0]))
        raise TypeError(f"`passages` must be a list of passages, got {found}. To index a file, use `{call}`.")
    held = list(read_passages(passages, "passages"))
    if not held:
        raise ValueError(f"`passages` is empty: {retriever} needs at least one passage to search in.")
    seen: set[str] = set()
    for passage in held:
        if passage.id in seen:
            raise ValueError(same_ids("`passages`", passage.id))
        seen.add(passage.id)
    return held


def same_ids(corpus: str, passage_id: str) -> str:
    """The message of an error that two passages share an id."""
    message = f"{corpus} has two passages with the id {passage_id!r}: ids must be unique."
    if passage_id.isdecimal():
        message += (
            " If some passages have an id and some have none: a passage without an id gets its position as id. Give all of "
            "them an id, or none."
        )
    return message


def is_table(value: Any) -> bool:
    """Whether a value is a DataFrame of pandas or Polars, which are not imported here. Its items are its columns."""
    return any(base.__name__ == "DataFrame" for base in type(value).__mro__)


def describe_type(value: Any) -> str:
    """A value for error messages: its type, the keys of a mapping, and how the rows of a DataFrame become passages."""
    if value is None:
        return "None"
    if is_table(value):
        rows = "df.to_dicts()" if hasattr(value, "to_dicts") else 'df.to_dict("records")'
        return f"a DataFrame: convert its rows to passages with `{rows}`"
    if isinstance(value, Mapping):
        keys = [str(key) for key in value][:10]
        return f"a {type(value).__name__} with the keys {keys}"
    return f"`{type(value).__name__}`"


def _is_plain(passage: Passage) -> bool:
    """Whether a passage has an id and fields of exactly the declared types."""
    texts = all(type(text) is str for text in (passage.id, passage.title, passage.text))
    return texts and passage.id != "" and type(passage.score) is float and math.isfinite(passage.score)


def _are_files(records: Any) -> bool:
    """Whether a list has names of files instead of passages."""

    def is_file(record: Any) -> bool:
        named = str(record).lower().endswith(_FILE_ENDINGS) and len(str(record).split()) == 1  # not the end of a text
        return named or os.path.isfile(record)

    return (
        isinstance(records, Sequence)
        and len(records) > 0
        and all(isinstance(record, (str, Path)) and is_file(record) for record in records)
    )


def _some(paths: Any) -> list[str]:
    return [str(path) for path in paths[:5]]


@lru_cache(maxsize=1000)
def plain_name(key: str) -> str:
    """A key without the differences in spelling: `docId`, `doc-id` and `DOC_ID` are `docid`."""
    return key.strip().lower().replace("_", "").replace("-", "").replace(" ", "")


def _by_plain_name(fields: Mapping[Any, Any]) -> dict[str, tuple[str, Any]]:
    """The keys and values of a record, by the plain names of the keys. A key that is plain comes before its variants."""
    values: dict[str, tuple[str, Any]] = {}
    for key, value in fields.items():
        name = plain_name(key) if isinstance(key, str) else str(key)
        if name not in values or _is_missing(values[name][1]) or (name == key and not _is_missing(value)):
            values[name] = key, value
    return values


def _is_missing(value: Any) -> bool:
    """Whether a value is null. pandas writes NaN, NA or NaT for it."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _first(values: Mapping[str, tuple[str, Any]], names: Iterable[str]) -> tuple[str, Any] | None:
    """The key and value of the first name that has a value, if possible one that is not blank."""
    found = [values[name] for name in names if name in values and not _is_missing(values[name][1])]
    return next((item for item in found if not _is_blank(item[1])), found[0] if found else None)


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
        inner = inner if any(plain_name(str(key)) in TEXT_KEYS for key in inner) else dict(document)
    else:
        raise ValueError(f'{where}: expected an object or a string under "document", found {_type(document)}.')
    return {**{key: value for key, value in record.items() if key != "document"}, **inner}


def _read_texts(
    values: Mapping[str, tuple[str, Any]], metadata: Mapping[str, tuple[str, Any]], where: str
) -> tuple[str, str]:
    """The title and the text of a record."""
    key, title = _first(values, TITLE_KEYS) or _first(metadata, TITLE_KEYS) or ("title", None)
    if title is not None and not isinstance(title, str):
        raise ValueError(f'{where}: expected a string under "{key}", found {_type(title)}.')
    present = [values[name] for name in TEXT_KEYS if name in values]
    texts = {name: item for name, item in values.items() if isinstance(item[1], str)}
    found = _first(texts, TEXT_KEYS) or (None if present else _first(metadata, TEXT_KEYS))
    if found is None:
        if present:
            key, value = present[0]
            raise ValueError(f'{where}: expected a string under "{key}", found {_type(value)}.')
        keys = [str(key) for key, _ in values.values()][:10]
        raise ValueError(f'{where}: expected a text under "text" or "contents", found the keys {keys}.')
    key, value = found
    if not isinstance(value, str):
        raise ValueError(f'{where}: expected a string under "{key}" of its "metadata", found {_type(value)}.')
    text = str(value)
    if plain_name(key) != "contents":
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
    """A title without the quotes around it. Quotes within it are kept, as in `"Weird Al" Yankovic` and `"a" or "b"`."""
    while len(title) > 1 and title[0] == title[-1] == '"' and not _TWO_QUOTED.fullmatch(title):
        title = title[1:-1]
    return title


def _read_id(value: Any, where: str) -> str:
    if isinstance(value, Mapping) and len(value) == 1 and "$oid" in value:  # as MongoDB exports ids
        value = value["$oid"]
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
    except Exception as error:  # of any class that has `__float__`
        raise ValueError(f'{where}: expected a number under "score", found {_type(value)} ({error}).') from error
    if not math.isfinite(score):
        raise ValueError(f'{where}: expected a finite number under "score", found {score}.')
    return score


def _type(value: Any) -> str:
    return type(value).__name__
