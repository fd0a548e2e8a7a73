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
_ACRONYM = regex.compile(rf"(?<![{LETTERS}])[A-Z]{{2,5}}(?![{LETTERS}])", regex.V1)
_DOTTED = regex.compile(r"(?:\p{L}\.)+\p{L}\.?")
_INITIAL = rf"(?<![{LETTERS}])\p{{L}}"  # a letter that is a word
_INSIDE_WORD = regex.compile(r"(?<=\p{L})(?=[\p{L}\p{N}])|(?<=\p{N})(?=\p{L})")  # not between digits
_DIGITS_OF_WORD = regex.compile(r"(?<=\p{L}(?:-\?)?)[0-9]+$")  # of F16, or of the pattern F-?16
_LEADING_ARTICLE = re.compile(r"^(?:a|an|the)\s+(?=\S)")
#: Characters that are read as an ASCII apostrophe: quotation marks, modifier letters, the prime.
APOSTROPHES = "’‘‛ʻʼ′"
_ASCII = {**dict.fromkeys(APOSTROPHES, "'"), "″": '"', "‐": "-", "‑": "-"}
# Superscript digits are often footnotes, so they are no digits of a text: each becomes a character of private use
_SUPERSCRIPTS = {digit: chr(0xE000 + value) for value, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_RAISED = {ord(str(value)): chr(0xE000 + value) for value in range(10)}
_LOWERED = {ord(raised): chr(digit) for digit, raised in _RAISED.items()}
_RAISED_OF_WORD = regex.compile(r"(?<=\p{L})[\ue000-\ue009]+")
_INVISIBLE = [0xAD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF]
_TATWEEL = 0x640  # lengthens an Arabic word
_REMOVED = dict.fromkeys(map(chr, [*_INVISIBLE, _TATWEEL]), "")
_SPECIAL = {**_ASCII, **_SUPERSCRIPTS, **_REMOVED, **dict.fromkeys("™℠ª", " ")}
# 20 times as fast as `str.translate`
_ASCII_CHARACTERS = re.compile(f"[{''.join(_ASCII)}]")
_SPECIAL_CHARACTERS = re.compile(f"[{''.join(_SPECIAL)}]")
# Marks of stress and of vowels that are optional in writing: after NFKC, the accents of a spelling are parts of letters
_OPTIONAL_MARKS = re.compile("[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u064b-\u065f\u0670]")


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
    return " ".join(_ARTICLES.sub(" ", _without_punctuation(text.lower()).decode("utf-8", "surrogatepass")).split())


#: The same for golden answers, which are read again for every rollout
normalize_gold = lru_cache(maxsize=65_536)(normalize_answer)


def _without_punctuation(text: str) -> bytes:
    """The text in UTF-8, without ASCII punctuation: 20 times as fast as `str.translate`."""
    return text.encode("utf-8", "surrogatepass").translate(None, _PUNCTUATION)


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
    - **separated words**: case and Unicode forms are folded by [`fold`], and punctuation separates words. `"Paris"`
      occurs in `"Paris-based"`, `"Paris/London"` and `"Paris's"`, and `"1969"` in `"1969–70"`. Digits are not taken out
      of a number: `"12"` does not occur in `"12,000"`. An acronym may have dots, but is not a part of a longer one:
      `"US"` occurs in `"U.S.-based"`, not in `"U.S.S.R."`. A word may have hyphens: `"F16"` occurs in `"F-16's"`.
      Chinese, Japanese, Thai, Lao, Khmer and Burmese have no spaces between words, so their characters are compared.
      Korean particles follow a word without a space, so Hangul may follow an answer: `"서울"` occurs in `"서울은"`.

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
    return bool(text) and searched_text(text or "").contains(golden_answers)


@dataclass(frozen=True, slots=True)
class SearchedText:
    """
    A text, prepared by [`searched_text`] for the two rules of [`contains_answer`].

    Args:
        text (`str`):
            The text itself.
        folded (`str`):
            The text after [`fold`].
        joined (`bytes`):
            The text in lower case, without punctuation, and also `folded` without punctuation where that differs. Every
            occurrence contains a key of its answer here.
    """

    text: str
    folded: str
    joined: bytes

    def contains(self, golden_answers: Iterable[str]) -> bool:
        """Whether any golden answer occurs, see [`contains_answer`]."""
        return any(self._contains(searched_answer(gold)) for gold in golden_answers)

    def _contains(self, answer: "SearchedAnswer") -> bool:
        # Most passages contain no part of an answer: this is seen before anything else is done
        for forms in answer.keys:
            if not any(map(self.joined.__contains__, forms)):
                return False
        if not answer.joined:
            return bool(answer.pattern) and bool(_compiled(answer.pattern).search(self.text))
        if all(map(self.joined.__contains__, answer.joined_words)) and f" {answer.joined} " in _padded(self.text):
            return True
        return bool(answer.pattern) and bool(_compiled(answer.pattern).search(self.folded))


@lru_cache(maxsize=2048)  # the passages of a large step, which several functions read
def searched_text(text: str) -> SearchedText:
    """
    Prepare a text, see [`SearchedText`].

    Args:
        text (`str`):
            The text to search.
    """
    if not _is_unusual(text):
        folded = text.lower()
        return SearchedText(text, folded, _without_punctuation(folded))
    folded = _folded(text)
    joined = _without_punctuation(_straight(text).lower()) + b"\n" + _without_punctuation(folded)
    return SearchedText(text, folded, joined)


@dataclass(frozen=True, slots=True)
class SearchedAnswer:
    """
    A golden answer, prepared by [`searched_answer`] for the two rules of [`contains_answer`].

    Args:
        joined (`str`):
            The normalised answer, `""` if nothing is left of it.
        joined_words (`tuple[bytes, ...]`):
            Its words, without which the first rule cannot match.
        pattern (`str`):
            The expression that the second rule searches for in a text after [`fold`]; without `joined`, in the text
            itself. `""` for none.
        keys (`tuple[tuple[bytes, ...], ...]`):
            The forms of some words. If the answer occurs, [`SearchedText`]'s `joined` contains a form of each of them.
    """

    joined: str
    joined_words: tuple[bytes, ...] = ()
    pattern: str = ""
    keys: tuple[tuple[bytes, ...], ...] = ()

    def finditer(self, searched: str) -> Iterable[regex.Match[str]]:
        """All places that the second rule finds."""
        return _compiled(self.pattern).finditer(searched) if self.pattern else ()


@lru_cache(maxsize=16_384)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.V1)


@lru_cache(maxsize=65_536)
def searched_answer(gold: str) -> SearchedAnswer:
    """
    Prepare a golden answer, see [`SearchedAnswer`].

    Args:
        gold (`str`):
            The golden answer.
    """
    gold = gold.strip()
    joined = normalize_answer(_straight(gold))
    if not joined:
        # Only punctuation and articles: searched in the text itself
        if not gold:
            return SearchedAnswer("")
        if (
            _ARTICLES.fullmatch(gold.lower()) and gold != gold.lower()
        ):  # an answer such as "A" is not every "a" of a text
            pattern = rf"(?<!\w){gold}(?!\w)|\A\s*(?i:{gold})\s*\Z"
        else:
            pattern = rf"(?<!\w)(?i:{re.escape(gold)})(?!\w)"
        return SearchedAnswer("", pattern=pattern)
    joined_words = tuple(map(_encoded, joined.split()))
    folded = _LEADING_ARTICLE.sub("", fold(gold).strip())
    # A superscript digit of an answer is a digit after a letter ("km²"), else a footnote
    folded = _RAISED_OF_WORD.sub(lambda match: match[0].translate(_LOWERED), folded)
    words = list(_WORDS.finditer(folded))
    if not words or (len(words) == 1 and len(words[0][0]) == 1 and words[0][0].isascii() and words[0][0].isalpha()):
        # A single letter occurs in too many places: "s" in "Austen's", "t" in "don't"
        return SearchedAnswer(joined, joined_words, keys=((max(joined_words, key=len),),))
    acronyms = frozenset(map(str.lower, _ACRONYM.findall(gold)))
    alone = len(words) == 1
    parts = [_before(words[0][0]), _word(words[0][0], acronyms, alone)]
    for left, right in pairwise(words):
        parts.append(_between(left[0], folded[left.end() : right.start()], right[0]))
        parts.append(_word(right[0], acronyms, alone))
    pattern = "".join([*parts, _after(words[-1][0])])
    if _DOTTED.fullmatch(gold):
        pattern = _no_longer_acronym(pattern)
    spelled = [word[0] for word in words if alone or word[0] not in acronyms]
    if gold.isascii():  # of the words that both rules need, the two longest
        common = sorted((word for word in spelled if word in joined), key=len, reverse=True)
        words_or_forms = [{word, _raised(word)} for word in common[:2]]
    else:
        longest = max(spelled, key=len, default="")
        words_or_forms = [{longest, _raised(longest), max(joined.split(), key=len)}]
    keys = tuple(tuple(sorted(map(_encoded, forms))) for forms in words_or_forms)
    return SearchedAnswer(joined, joined_words, pattern, keys)


def _straight(text: str) -> str:
    """The text with apostrophes and hyphens of ASCII."""
    return text if text.isascii() else _ASCII_CHARACTERS.sub(lambda match: _ASCII[match[0]], text)


def _encoded(word: str) -> bytes:
    return word.encode("utf-8", "surrogatepass")


def fold(text: str) -> str:
    """
    Fold the case and the Unicode forms of a text: decomposed accents, ligatures, full-width letters. Apostrophes and
    hyphens become those of ASCII. Invisible characters are removed, and marks of stress and of vowels (Cyrillic, Hebrew,
    Arabic), which are optional. Superscript digits, which are often footnotes, become characters that are no digits.

    Args:
        text (`str`):
            Any text.
    """
    if not _is_unusual(text):
        return text.lower()
    return _folded(text)


def _folded(text: str) -> str:
    return _OPTIONAL_MARKS.sub(
        "", unicodedata.normalize("NFKC", _SPECIAL_CHARACTERS.sub(lambda match: _SPECIAL[match[0]], text)).casefold()
    )


def _is_unusual(text: str) -> bool:
    """Whether folding a text does more than `str.lower`, which is fast."""
    return not text.isascii() and bool(_unusual_characters().search(text))


@lru_cache(maxsize=1)
def _unusual_characters() -> re.Pattern[str]:
    def is_unusual(character: str) -> bool:
        if unicodedata.category(character)[0] == "M" or "\u1100" <= character <= "\u11ff":
            return True  # marks and Korean letters change with their neighbours
        # After a letter, because a Greek sigma at the end of a word has another form
        return f"a{character}".lower() != _folded(f"a{character}")

    found = [number for number in range(0x80, 0x10000) if is_unusual(chr(number))]
    return re.compile("[" + "".join(map(re.escape, map(chr, found))) + "\U00010000-\U0010ffff]")


def _word(word: str, acronyms: frozenset[str], alone: bool) -> str:
    """What a word of an answer is in a text."""
    if word in acronyms:
        forms = [word, _no_longer_acronym(r"\.?".join(word))]  # US, U.S.
        if not alone:
            forms.append(_no_longer_acronym(r"\.\s?".join(word) + r"(?=\.)", r"\s?"))  # J. R. R. Tolkien
        return f"(?:{'|'.join(forms)})"
    if len(word) > 2:
        word = _INSIDE_WORD.sub("-?", word)  # F-16, e-mail
    raised = _raised(word)
    return word if raised == word else f"(?:{word}|{raised})"


def _no_longer_acronym(pattern: str, space: str = "") -> str:
    """The pattern of letters and dots, where no other letters with dots are around it."""
    return rf"(?<!{_INITIAL}\.{space}){pattern}(?!\.{space}\p{{L}}(?![{LETTERS}]))"


def _raised(word: str) -> str:
    """The word with superscript digits at its end, if it ends with digits after a letter."""
    return _DIGITS_OF_WORD.sub(lambda match: match[0].translate(_RAISED), word)


def _before(word: str) -> str:
    """What must not be before an answer that begins with a word."""
    if _SPACELESS_CHARACTER.match(word):
        return ""
    return rf"(?<![{LETTERS}--[{SPACELESS}]])" + (r"(?<!\d[.,:'])" if word[0].isdigit() else "")


def _after(word: str) -> str:
    """What must not be after an answer that ends with a word."""
    if _SPACELESS_CHARACTER.match(word[-1]):
        return r"(?!\p{M})"
    if word[-1].isdigit():
        # 12만 is 120,000
        return rf"(?![{LETTERS}--[{SPACELESS}\p{{Hangul}}]])(?![.,:']\d)(?![십백천만억조])"
    if len(word) == 1 and regex.match(r"\p{Hangul}", word):  # begins too many words
        return rf"(?![{LETTERS}--[{SPACELESS}]])"
    return rf"(?![{LETTERS}--[{SPACELESS}\p{{Hangul}}]])"


def _between(left: str, gap: str, right: str) -> str:
    """What may stand in a text between two words of an answer, whose gap there is given."""
    if left[-1].isdigit() and right[0].isdigit() and gap in {".", ",", ":", "'"}:
        return regex.escape(gap) + ("?" if gap == "," else "")  # a number: 12,000 or 12000
    if regex.search(r"\s", gap):
        return rf"[^{LETTERS}{BREAK}]+"
    if left[-1].isdigit() and right[0].isdigit():
        return rf"\s*[^{LETTERS}{BREAK}\s]+\s*"  # 1969-70, not 1969 70
    if len(left) == 1 or len(right) == 1:
        space = ""
        letter, other = sorted((left, right), key=len)
        if gap == "-" and len(other) > 1 and letter.isalpha() and letter not in {"a", "i"}:
            space = rf"|(?<!'{left})\s"  # X Men, not "a team" for "A-Team", not "Austen's team" for "S-Team"
        return rf"(?:[^{LETTERS}{BREAK}\s]*|\.\s{space})"  # AT&T, not "at T"; J.R.R. or J. R. R.
    return rf"[^{LETTERS}{BREAK}]*"  # Spider-Man, Spider Man, Spiderman


@lru_cache(maxsize=2048)
def _padded(text: str) -> str:
    return f" {normalize_answer(_straight(text))} "


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
