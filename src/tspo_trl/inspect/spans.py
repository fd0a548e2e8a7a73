"""The places of golden answers in a text, with the normalisation of scoring."""

import re
import string
import unicodedata
from collections.abc import Sequence

import regex

from ..scoring import APOSTROPHES, fold, searched_answer

_PUNCTUATION = frozenset(string.punctuation + APOSTROPHES + "″‐‑")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CHARACTERS = regex.compile(r"\X")  # with their accents


def find_answers(text: str, golden_answers: Sequence[str]) -> list[tuple[int, int]]:
    """
    Find the places where a golden answer occurs in a text. These are the occurrences that
    [`~tspo_trl.scoring.contains_answer`] detects, by either of its rules.

    Args:
        text (`str`):
            The text.
        golden_answers (`Sequence[str]`):
            The golden answers.

    Returns:
        `list[tuple[int, int]]`: Start and end of each place in `text`, in order and without overlap.

    Example:

    ```python
    >>> find_answers("In the U.S., and on a bus", ["US"])
    [(7, 10)]
    ```
    """
    answers = [searched_answer(gold) for gold in golden_answers]
    found = []
    # Separated words: patterns in the folded text
    folded, places = _fold_with_places(text)
    for answer in answers:
        if not answer.joined:
            found += [match.span() for match in answer.finditer(text)]
        else:
            for match in answer.finditer(folded):
                found.append((places[match.start()][0], places[match.end() - 1][1]))
    # Joined words: the words of the text without punctuation and articles
    lower = text.lower()
    origin = [i for i, letter in enumerate(text) for _ in letter.lower()]  # a few letters become two in lower case
    kept = [i for i, letter in enumerate(lower) if letter not in _PUNCTUATION]
    plain = _ARTICLES.sub(lambda match: " " * len(match[0]), "".join(lower[i] for i in kept))
    words = [(match[0], match.start(), match.end() - 1) for match in re.finditer(r"\S+", plain)]
    for target in filter(None, (answer.joined.split() for answer in answers)):
        for first in range(len(words) - len(target) + 1):
            if [word for word, _, _ in words[first : first + len(target)]] == target:
                begin, end = words[first][1], words[first + len(target) - 1][2]
                found.append((origin[kept[begin]], origin[kept[end]] + 1))
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _fold_with_places(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The folded text, and for each of its letters the start and the end of the character of `text` that it is from."""
    if text.isascii():
        return fold(text), [(i, i + 1) for i in range(len(text))]
    visible = [i for i, letter in enumerate(text) if fold(letter) or unicodedata.combining(letter)]
    folded, places = [], []
    for character in _CHARACTERS.finditer("".join(text[i] for i in visible)):
        folded.append(fold(character[0]))
        places += [(visible[character.start()], visible[character.end() - 1] + 1)] * len(folded[-1])
    return "".join(folded), places


def in_utf16(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """
    Convert places in a text to those of JavaScript, which counts units of UTF-16.

    Args:
        text (`str`):
            The text.
        spans (`Sequence[tuple[int, int]]`):
            Starts and ends in the text.

    Returns:
        `list[int]`: Starts and ends in units of UTF-16, flattened.
    """
    if text.isascii():
        return [place for span in spans for place in span]
    return [len(text[:place].encode("utf-16-le", "surrogatepass")) // 2 for span in spans for place in span]
