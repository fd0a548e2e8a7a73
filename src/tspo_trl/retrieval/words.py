"""The words of passages and queries, by which BM25 finds passages."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import regex
import Stemmer
from bm25s import stopwords

from ..support.scripts import SPACELESS

#: Changes whenever the same text gets other words, so that indexes and caches of an older version are not used.
WORDS_VERSION = 2
#: The languages that have a stemmer.
LANGUAGES = tuple(name for name in Stemmer.algorithms() if name not in {"porter", "dutch_porter"})
_STOP_WORDS: dict[str, Sequence[str]] = {
    "english": stopwords.STOPWORDS_EN,
    **{
        name.removeprefix("STOPWORDS_").lower(): getattr(stopwords, name)
        for name in dir(stopwords)
        if name.startswith("STOPWORDS_") and name not in {"STOPWORDS_EN", "STOPWORDS_EN_PLUS"}
    },
}
# A single letter after an apostrophe ("Austen's", "don't") is not a word; any other is ("R", "Apollo 9")
_WORD = re.compile(r"\w\w+|(?<!')\w")
_WORD_WITH_MARKS = regex.compile(r"[\w\p{M}]{2,}|(?<!['’])\w")
_RUN = regex.compile(rf"[{SPACELESS}\p{{M}}]+|[^{SPACELESS}]+")
_SPACELESS_CHARACTER = regex.compile(rf"[{SPACELESS}]")
_AFTER_APOSTROPHE = re.compile(r"'\w(?!\w)")
_LOWER_ASCII = "".join(chr(i).lower() if _WORD.fullmatch(chr(i)) else " " for i in range(128))
_STOP = -1  # instead of the number of a stop word
_MAX_FORMS = 2_000_000  # about 0.4 GB


def check_language(language: Any) -> None:
    """
    Check the language of an index.

    Args:
        language (`str` or `None`):
            The language.

    Raises:
        `ValueError`: If there is no stemmer for it.
    """
    if language is not None and language not in LANGUAGES:
        raise ValueError(
            f"`language` must be None (no stop words, no stemmer) or one of {', '.join(LANGUAGES)}; got {language!r}. "
            "Chinese, Japanese, Thai and other scripts without spaces are indexed with every language."
        )


def split_words(text: str) -> list[str]:
    """
    Split a text into words. Scripts without spaces between words are split into pairs of characters, as in Lucene.

    Args:
        text (`str`):
            Any text.

    Returns:
        `list[str]`: The words as they are written.

    Example:

    ```python
    >>> split_words("Jane Austen's R, 北京大学")
    ['Jane', 'Austen', 'R', '北京', '京大', '大学']
    ```
    """
    if text.isascii():
        return _WORD.findall(text)
    words: list[str] = []
    for word in _WORD_WITH_MARKS.findall(unicodedata.normalize("NFKC", text)):
        if word.isascii() or not _SPACELESS_CHARACTER.search(word):
            words.append(word)
            continue
        for run in _RUN.findall(word):
            if len(run) > 1 and _SPACELESS_CHARACTER.search(run):
                words += [run[i : i + 2] for i in range(len(run) - 1)]
            else:
                words.append(run)
    return words


def index_words(texts: Sequence[str], language: str | None) -> list[list[str]]:
    """
    The words of texts in lower case, without stop words, and stemmed.

    Args:
        texts (`Sequence[str]`):
            N texts.
        language (`str` or `None`):
            The language of stop words and stemmer; `None` for neither.

    Returns:
        `list[list[str]]`: N lists of words.
    """
    stop_words, stem = _analysis(language)
    return [stem([word for word in _lower_words(text) if word not in stop_words]) for text in texts]


class WordNumbers:
    """
    Numbers the words of [`index_words`] in the order in which they first occur, so that texts can be held as integers.

    Args:
        language (`str` or `None`):
            The language of stop words and stemmer; `None` for neither.
    """

    def __init__(self, language: str | None):
        #: The number of each word
        self.numbers: dict[str, int] = {}
        self._forms = _Forms(language, self.numbers)

    def of(self, text: str) -> list[int]:
        """The numbers of the words of a text."""
        return [number for number in map(self._forms.__getitem__, _lower_words(text)) if number != _STOP]


class _Forms(dict[str, int]):
    """The numbers of words as they are written in lower case. Each form is stemmed once."""

    def __init__(self, language: str | None, numbers: dict[str, int]):
        self._stop_words, self._stem = _analysis(language)
        self._numbers = numbers

    def __missing__(self, form: str) -> int:
        if len(self) >= _MAX_FORMS:
            self.clear()  # only a cache
        if form in self._stop_words:
            number = _STOP
        else:
            (word,) = self._stem([form])
            number = self._numbers.setdefault(word, len(self._numbers))
        self[form] = number
        return number


def _analysis(language: str | None) -> tuple[frozenset[str], Callable[[list[str]], list[str]]]:
    """The stop words of a language, and its stemmer. A stemmer must not be shared by threads."""
    if language is None:
        return frozenset(), list
    return frozenset(_STOP_WORDS.get(language, ())), Stemmer.Stemmer(language).stemWords


def _lower_words(text: str) -> list[str]:
    """The words of [`split_words`] in lower case."""
    if not text.isascii():
        return " ".join(split_words(text)).lower().split()
    if "'" in text:
        text = _AFTER_APOSTROPHE.sub(" ", text)
    return text.translate(_LOWER_ASCII).split()  # three times as fast as an expression
