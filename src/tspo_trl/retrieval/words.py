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
WORDS_VERSION = 3
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
# Korean has spaces, but its particles follow a word without one: 서울은 is "Seoul" as a topic
_PAIRED = rf"{SPACELESS}\p{{Hangul}}"
_RUN = regex.compile(rf"[{_PAIRED}\p{{M}}]+|[^{_PAIRED}]+")
_PAIRED_CHARACTER = regex.compile(rf"[{_PAIRED}]")
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


def split_words(text: str, *, indexed: bool = False) -> list[str]:
    """
    Split a text into words. Scripts without spaces between words, and Korean, are split into pairs of characters, as in
    Lucene.

    Args:
        text (`str`):
            Any text.
        indexed (`bool`, *optional*, defaults to `False`):
            Whether the text is a passage, not a query. The single characters of pairs are words of it too, so that a
            query of one character finds it.

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
        if word.isascii() or not _PAIRED_CHARACTER.search(word):
            words.append(word)
            continue
        for run in _RUN.findall(word):
            if len(run) > 1 and _PAIRED_CHARACTER.search(run):
                words += [run[i : i + 2] for i in range(len(run) - 1)]
                words += run if indexed else ()
            else:
                words.append(run)
    return words


def index_words(texts: Sequence[str], language: str | None) -> list[list[str]]:
    """
    The words of queries in lower case, without stop words, and stemmed.

    Args:
        texts (`Sequence[str]`):
            N queries.
        language (`str` or `None`):
            The language of stop words and stemmer; `None` for neither.

    Returns:
        `list[list[str]]`: N lists of words.
    """
    stop_words, stem = _analysis(language)
    return [stem([word for word in lower_words(text) if word not in stop_words]) for text in texts]


class WordNumbers:
    """
    Numbers the words of passages, as those of [`index_words`], in the order in which they first occur, so that texts can be held as integers.

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
        return [number for number in map(self._forms.__getitem__, lower_words(text, indexed=True)) if number != _STOP]


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


def lower_words(text: str, *, indexed: bool = False) -> list[str]:
    """The words of [`split_words`] in lower case."""
    if not text.isascii():
        # The lower case of the Turkish İ is an i with a second dot, which nobody types
        return " ".join(split_words(text, indexed=indexed)).lower().replace("i\u0307", "i").split()
    if "'" in text:
        text = _AFTER_APOSTROPHE.sub(" ", text)
    return text.translate(_LOWER_ASCII).split()  # three times as fast as an expression
