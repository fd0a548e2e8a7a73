"""The places of golden answers in a text, with the normalisation of scoring."""

import re
import string
from collections.abc import Sequence

from ..scoring import normalize_answer

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def find_answers(text: str, golden_answers: Sequence[str]) -> list[tuple[int, int]]:
    """
    Find the places where a golden answer occurs in a text after normalisation, as whole words. These are the occurrences
    that [`~tspo_trl.scoring.contains_answer`] detects.

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
    lower = text.lower()
    # A few letters become two in lower case, so map each letter of `lower` to its letter of `text`
    origin = [i for i, letter in enumerate(text) for _ in letter.lower()]
    places = [i for i, letter in enumerate(lower) if letter not in _PUNCTUATION]
    plain = _ARTICLES.sub(lambda match: " " * len(match[0]), "".join(lower[i] for i in places))
    words = [(match[0], match.start(), match.end() - 1) for match in re.finditer(r"\S+", plain)]
    found = []
    for gold in golden_answers:
        target = normalize_answer(gold).split()
        if target:
            for first in range(len(words) - len(target) + 1):
                if [word for word, _, _ in words[first : first + len(target)]] == target:
                    begin, end = words[first][1], words[first + len(target) - 1][2]
                    found.append((origin[places[begin]], origin[places[end]] + 1))
        elif raw := gold.strip().lower():
            for match in re.finditer(rf"(?<!\w){re.escape(raw)}(?!\w)", lower):
                found.append((origin[match.start()], origin[match.end() - 1] + 1))
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


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
