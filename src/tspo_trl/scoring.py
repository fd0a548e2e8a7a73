"""Scores of text answers. Pure functions of strings: no model, no I/O, no state.

The normalisation and exact match follow the SQuAD v1.1 evaluation (Rajpurkar et al., 2016, arXiv 1606.05250). The
token F1 follows the HotpotQA evaluation (Yang et al., 2018, arXiv 1809.09600).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_ANY_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)  # as in Search-R1: any text between the tags
# As in HotpotQA, these answers must match exactly: tokens in common with a longer text earn no partial score
_CLOSED_ANSWERS = frozenset({"yes", "no", "noanswer"})


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
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


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
    Whether any golden answer occurs in the text as whole words after normalisation (`"us"` does not occur in `"bus"`).

    For a golden answer that normalises to the empty string, the texts are compared without normalisation (only stripped
    and lower-cased), again as whole words.

    Args:
        text (`str` or `None`):
            The text to search, for instance a passage.
        golden_answers (`Sequence[str]`):
            The answers to look for.

    Returns:
        `bool`: `True` if at least one golden answer occurs.
    """
    if not text:
        return False
    padded = f" {normalize_answer(text)} "
    for gold in golden_answers:
        target = normalize_answer(gold)
        if target:
            if f" {target} " in padded:
                return True
        elif (raw := _raw(gold)) and re.search(rf"(?<!\w){re.escape(raw)}(?!\w)", text.lower()):
            return True
    return False


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
