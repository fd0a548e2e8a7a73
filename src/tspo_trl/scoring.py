"""Scores of text answers. Pure functions of strings: no model, no I/O, no state.

The normalisation and exact match follow the SQuAD v1.1 evaluation (Rajpurkar et al., 2016, arXiv 1606.05250). The
token F1 follows the HotpotQA evaluation (Yang et al., 2018, arXiv 1809.09600).
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import regex

from .support.scripts import LETTERS, SPACELESS

#: Stands between the titles and texts of passages. No answer reaches across it.
BREAK = "¶"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = string.punctuation.encode()
_TRIVIAQA_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}‘’´]")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_ANY_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # as in Search-R1: any text between the tags
# As in HotpotQA, these answers must match exactly: tokens in common with a longer text earn no partial score
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})

_WORDS = regex.compile(rf"[{LETTERS}]+")
_SPACELESS_CHARACTER = regex.compile(rf"[{SPACELESS}]")
_ACRONYM = re.compile(r"[A-Z]{2,5}")
_LEADING_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\S)")
_SUPERSCRIPTS = dict.fromkeys(map(ord, "⁰¹²³⁴⁵⁶⁷⁸⁹"), " ")
_INVISIBLE = dict.fromkeys([0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])
_SPECIAL = {**_SUPERSCRIPTS, **_INVISIBLE}
_SPECIAL_CHARACTERS = [chr(number) for number in _SPECIAL]


def normalize_answer(text: str) -> str:
    """
    Normalise an answer as SQuAD v1.1 does: lower case, ASCII punctuation removed, the articles a/an/the removed,
    whitespace collapsed.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: The normalised text, possibly empty (`"The The"` and `"!!!"` normalise to `""`).

    Example:

    ```python
    >>> normalize_answer("The  Eiffel Tower!")
    'eiffel tower'
    ```
    """
    return " ".join(_ARTICLES.sub(" ", _without_punctuation(text).decode("utf-8", "surrogatepass")).split())


def _without_punctuation(text: str) -> bytes:
    """The text in lower case and UTF-8, without ASCII punctuation: 20 times as fast as `str.translate`."""
    return text.lower().encode("utf-8", "surrogatepass").translate(None, _PUNCTUATION)


def _raw(text: str) -> str:
    return text.strip().lower()


def exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """
    Exact match after normalisation, the maximum over the golden answers.

    A golden answer that normalises to the empty string (`"The The"`, `"!!!"`) is compared without normalisation (only
    stripped and lower-cased), so that an empty or punctuation-only prediction does not match it.

    Args:
        prediction (`str` or `None`):
            The predicted answer; `None` if there is none.
        golden_answers (`Sequence[str]`):
            The correct answers.

    Returns:
        `float`: 1.0 if any golden answer matches, else 0.0.
    """
    if not prediction:
        return 0.0
    normalized = normalize_answer(prediction)
    for gold in golden_answers:
        target = normalize_answer(gold)
        if (normalized == target) if target else (_raw(prediction) == _raw(gold) != ""):
            return 1.0
    return 0.0


def f1_score(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """
    Token F1 as in HotpotQA, the maximum over the golden answers: the harmonic mean of precision and recall over
    normalised tokens. The answers yes, no and noanswer must match exactly.

    Args:
        prediction (`str` or `None`):
            The predicted answer; `None` if there is none.
        golden_answers (`Sequence[str]`):
            The correct answers.

    Returns:
        `float`: A value in [0, 1].
    """
    if not prediction:
        return 0.0
    return max((_f1(prediction, gold) for gold in golden_answers), default=0.0)


def _f1(prediction: str, gold: str) -> float:
    normalized, target = normalize_answer(prediction), normalize_answer(gold)
    if not target or normalized in _CLOSED_ANSWERS or target in _CLOSED_ANSWERS:
        return exact_match(prediction, [gold])
    predicted_tokens, gold_tokens = normalized.split(), target.split()
    common = sum((Counter(predicted_tokens) & Counter(gold_tokens)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted_tokens), common / len(gold_tokens)
    return 2 * precision * recall / (precision + recall)


def contains_answer(text: str | None, golden_answers: Sequence[str]) -> bool:
    """
    Whether any golden answer occurs in the text as whole words (`"us"` does not occur in `"bus"`). Either of two rules is
    enough:

    - **joined words**, as in SQuAD and Search-R1: both sides are normalised by [`normalize_answer`], which deletes
      punctuation. `"US"` occurs in `"the U.S."`.
    - **separated words**: case and Unicode forms are folded, and punctuation separates words. `"Paris"` occurs in
      `"Paris-based"`, `"Paris/London"` and `"Paris's"`, and `"1969"` in `"1969–70"`. Digits are not taken out of a
      number: `"12"` does not occur in `"12,000"`. Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces
      between words, so their characters are compared.

    A golden answer that normalises to the empty string is compared without normalisation (only stripped and
    lower-cased), again as whole words. An article in upper case (`"A"`) must also be in upper case in the text.

    Args:
        text (`str` or `None`):
            The text to search, for instance a passage.
        golden_answers (`Sequence[str]`):
            The answers to look for.

    Returns:
        `bool`: `True` if at least one golden answer occurs.

    Example:

    ```python
    >>> contains_answer("a Paris-based company", ["Paris"])
    True
    >>> contains_answer("12,000 people", ["12"])
    False
    ```
    """
    return bool(text) and SearchedText.of(text or "").contains(golden_answers)


@dataclass(frozen=True, slots=True)
class SearchedText:
    """
    A text, prepared for the two rules of [`contains_answer`]. Use it if many answers are searched in the same text.

    Args:
        text (`str`):
            The text itself.
        folded (`str`):
            The text after [`fold`].
        joined (`bytes`):
            The text in lower case, without punctuation.
    """

    text: str
    folded: str
    joined: bytes

    @classmethod
    def of(cls, text: str) -> "SearchedText":
        """Prepare a text."""
        return cls(text, fold(text), _without_punctuation(text))

    def contains(self, golden_answers: Iterable[str]) -> bool:
        """Whether any golden answer occurs, see [`contains_answer`]."""
        for gold in golden_answers:
            answer = searched_answer(gold)
            # Most passages contain no part of an answer: this is seen before anything is normalised
            searched = self.folded if answer.joined else self.text
            if answer.pattern is not None and answer.key in searched and answer.pattern.search(searched):
                return True
            words = answer.joined_words
            if words and all(map(self.joined.__contains__, words)) and f" {answer.joined} " in _padded(self.text):
                return True
        return False


@dataclass(frozen=True, slots=True)
class SearchedAnswer:
    """
    A golden answer, prepared for the two rules of [`contains_answer`].

    Args:
        joined (`str`):
            The normalised answer, `""` if nothing is left of it.
        joined_words (`tuple[bytes, ...]`):
            Its words, without which the first rule cannot match.
        pattern (`re.Pattern` or `regex.Pattern`, or `None`):
            What the second rule searches for in a text after [`fold`]; without `joined`, in the text itself.
        key (`str`):
            A part of every match of `pattern`.
    """

    joined: str
    joined_words: tuple[bytes, ...]
    pattern: re.Pattern[str] | regex.Pattern[str] | None
    key: str


@lru_cache(maxsize=65_536)
def searched_answer(gold: str) -> SearchedAnswer:
    """
    Prepare a golden answer, see [`SearchedAnswer`].

    Args:
        gold (`str`):
            The golden answer.
    """
    joined = normalize_answer(gold)
    folded = fold(gold).strip()
    if not joined:
        # Only punctuation and articles: searched in the text itself
        raw = gold.strip()
        if not raw:
            return SearchedAnswer("", (), None, "")
        if _ARTICLES.fullmatch(raw.lower()) and raw != raw.lower():  # an answer such as "A" is not every "a" of a text
            pattern = rf"(?<!\w){raw}(?!\w)|\A\s*(?i:{raw})\s*\Z"
        else:
            pattern = rf"(?<!\w)(?i:{re.escape(raw)})(?!\w)"
        return SearchedAnswer("", (), re.compile(pattern), "")
    joined_words = tuple(joined.encode("utf-8", "surrogatepass").split())
    folded = _LEADING_ARTICLE.sub("", folded)
    words = list(_WORDS.finditer(folded))
    if not words or (len(words) == 1 and len(words[0][0]) == 1 and words[0][0].isascii() and words[0][0].isalpha()):
        # A single letter occurs in too many places: "s" in "Austen's", "t" in "don't"
        return SearchedAnswer(joined, joined_words, None, "")
    if len(words) == 1 and _ACRONYM.fullmatch(gold.strip()):
        word = words[0][0]
        pattern = regex.compile(_before(word) + r"\.?".join(word) + _after(word), regex.V1)
        return SearchedAnswer(joined, joined_words, pattern, word[0])  # US, also in "U.S.-based"
    parts = [_before(words[0][0]), words[0][0]]
    for left, right in pairwise(words):
        parts += [_between(left[0], folded[left.end() : right.start()], right[0]), right[0]]
    pattern = regex.compile("".join([*parts, _after(words[-1][0])]), regex.V1)
    return SearchedAnswer(joined, joined_words, pattern, max((word[0] for word in words), key=len))


def fold(text: str) -> str:
    """
    Fold the case and the Unicode forms of a text: decomposed accents, ligatures, full-width letters. Invisible characters
    are removed, and superscript digits, which are often footnotes, become spaces.

    Args:
        text (`str`):
            Any text.
    """
    if text.isascii():
        return text.lower()
    if any(map(text.__contains__, _SPECIAL_CHARACTERS)):  # `translate` is slow, and rarely needed
        text = text.translate(_SPECIAL)
    return unicodedata.normalize("NFKC", text).casefold()


def _before(word: str) -> str:
    """What must not be before an answer that begins with a word."""
    if _SPACELESS_CHARACTER.match(word):
        return ""
    return rf"(?<![{LETTERS}--[{SPACELESS}]])" + (r"(?<!\d[.,:'’])" if word[0].isdigit() else "")


def _after(word: str) -> str:
    """What must not be after an answer that ends with a word."""
    if _SPACELESS_CHARACTER.match(word[-1]):
        return r"(?!\p{M})"
    return rf"(?![{LETTERS}--[{SPACELESS}]])" + (r"(?![.,:'’]\d)" if word[-1].isdigit() else "")


def _between(left: str, gap: str, right: str) -> str:
    """What may stand in a text between two words of an answer, whose gap there is given."""
    if left[-1].isdigit() and right[0].isdigit() and gap in {".", ",", ":", "'", "’"}:
        return regex.escape(gap) + ("?" if gap == "," else "")  # a number: 12,000 or 12000
    if regex.search(r"\s", gap):
        return rf"[^{LETTERS}{BREAK}]+"
    if left[-1].isdigit() and right[0].isdigit():
        return rf"\s*[^{LETTERS}{BREAK}\s]+\s*"  # 1969-70, not 1969 70
    if len(left) == 1 or len(right) == 1:
        return rf"(?:[^{LETTERS}{BREAK}\s]*|\.\s)"  # AT&T, not "at T"; J.R.R. or J. R. R.
    return rf"[^{LETTERS}{BREAK}]*"  # Spider-Man, Spider Man, Spiderman


@lru_cache(maxsize=2048)
def _padded(text: str) -> str:
    return f" {normalize_answer(text)} "


def extract_answer(text: str) -> str | None:
    """
    The content of the last well-formed `<answer>…</answer>` of a text.

    Pass only text that the model wrote: a passage may contain answer tags too.

    Args:
        text (`str`):
            Model-written text.

    Returns:
        `str` or `None`: The stripped content, `""` if the tag is empty, `None` if there is no well-formed tag.
    """
    matches = _ANSWER.findall(text)
    return matches[-1].strip() if matches else None


def normalize_triviaqa(text: str) -> str:
    """
    Normalise an answer as the official evaluation of TriviaQA does (`triviaqa_evaluation.py` of mandarjoshi90/triviaqa,
    Joshi et al., 2017, arXiv 1705.03551). It differs from [`normalize_answer`] as follows: punctuation becomes a space
    instead of being deleted, and the quotation marks ‘ ’ ´ count as punctuation.

    Args:
        text (`str`):
            Any text.

    Returns:
        `str`: The normalised text, possibly empty.

    Example:

    ```python
    >>> normalize_triviaqa("Spider-Man’s"), normalize_answer("Spider-Man’s")
    ('spider man s', 'spiderman’s')
    ```
    """
    return " ".join(_ARTICLES.sub(" ", _TRIVIAQA_PUNCTUATION.sub(" ", text.lower())).split())


def triviaqa_exact_match(prediction: str | None, golden_answers: Sequence[str]) -> float:
    """
    Exact match as the official evaluation of TriviaQA computes it, the maximum over the golden answers. Prefer
    [`exact_match`] for other data sets.

    Args:
        prediction (`str` or `None`):
            The predicted answer; `None` if there is none.
        golden_answers (`Sequence[str]`):
            The correct answers.

    Returns:
        `float`: 1.0 if any golden answer matches, else 0.0. An answer that normalises to the empty string matches none.
    """
    normalized = normalize_triviaqa(prediction or "")
    return float(bool(normalized) and any(normalize_triviaqa(gold) == normalized for gold in golden_answers))


def search_r1_exact_match(sequence: str, golden_answers: Sequence[str]) -> float:
    """
    Exact match as Search-R1 computes it (`verl/utils/reward_score/qa_em.py` of PeterGriffinJin/Search-R1), for
    comparison with published numbers. Prefer [`exact_match`] for any other purpose.

    It reads the whole sequence: the prompt, the model-written text and the passages. The answer is the content of the
    last `<answer>…</answer>` if there are at least two of them; the first one counts as the example in the prompt. A
    golden answer that normalises to the empty string matches every answer that also does.

    Args:
        sequence (`str`):
            The prompt, turns and observations as one text.
        golden_answers (`Sequence[str]`):
            The correct answers.

    Returns:
        `float`: 1.0 if any golden answer matches, else 0.0.
    """
    answers = _ANY_ANSWER.findall(sequence)
    if len(answers) < 2:
        return 0.0
    normalized = normalize_answer(answers[-1])
    return float(any(normalize_answer(gold) == normalized for gold in golden_answers))
