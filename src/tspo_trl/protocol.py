"""How an action is written and read, and how an observation is shown to the model.

Model-written text is only read here, never changed: tokens stay exactly as they were sampled. Foreign text (passages) is
only written here: it cannot become a control token, close its block, ask for a search or answer for the model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from .retrieval.base import Passage
from .trajectory import Action

_TAGS = ("search", "answer", "information", "think")
_ACTION = re.compile(r"<(search|answer)>((?:(?!</?(?:search|answer|information)>).)*)</\1>", re.DOTALL)
_ATTEMPT = re.compile(r"</?(?:search|answer)>")
_PROTOCOL_TAG = re.compile(rf"<(\s*/?\s*(?:{'|'.join(_TAGS)})\s*/?\s*)>", re.IGNORECASE)
# C0 and C1 controls except tab and line feed, bidirectional controls, and lone surrogates (which cannot be encoded)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CHARS_PER_TOKEN = 64  # no need to encode more of a passage than its budget could ever hold

PROMPT = (
    "Answer the question below. Before every action, reason between <think> and </think>. If you lack some knowledge, "
    "call the search engine with <search> query </search>: the best passages come back between <information> and "
    "</information>. You can search at most {max_searches} times. When you know enough, give the answer between <answer> "
    "and </answer>, in as few words as possible and without an explanation, for example <answer> Beijing </answer>.\n\n"
    "Question: {question}\n"
)
HINT = (
    "My last action was not valid. To search, I write the query between <search> and </search>; to answer, I write the "
    "answer between <answer> and </answer>."
)
NOTHING_FOUND = "Nothing was found."


@dataclass(frozen=True, slots=True)
class Observation:
    """
    What is appended after a turn.

    Args:
        token_ids (`list[int]`):
            The O tokens.
        passages (`list[Passage]`):
            The passages as they were shown: neutralised, and each cut where its budget ended.
    """

    token_ids: list[int]
    passages: list[Passage]


class TagProtocol:
    """
    Actions as tags: `<search>query</search>` and `<answer>…</answer>`, passages between `<information>` and
    `</information>`, as in Search-R1 (arXiv 2503.09516).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        max_searches (`int`, *optional*, defaults to `4`):
            Told to the model in the prompt.
    """

    #: A turn ends as soon as its text ends with one of these.
    stop_strings = ("</search>", "</answer>")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_searches: int = 4):
        self.tokenizer = tokenizer
        self.max_searches = max_searches
        self._open = self._encode("\n\n<information>")
        self._close = self._encode("</information>\n\n")
        self._nothing_found = self._encode(NOTHING_FOUND)
        self._hint = self._encode(f"\n\n{HINT}\n\n")
        # Added tokens that are not special (Qwen3's <think>, <tool_response>…) are matched in any text, so they are
        # broken up; special ones are split by the tokenizer itself.
        added = sorted((t for t in tokenizer.get_added_vocab() if len(t) > 1 and t.strip() == t), key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, added))) if added else None
        # The same passages come back for many rollouts of a group
        self._encode_passage = lru_cache(maxsize=8192)(self._encode_passage_uncached)

    def prompt(self, question: str) -> str | list[dict[str, str]]:
        """
        The prompt for a question: a conversation of one user message if the tokenizer has a chat template, else a text.

        Args:
            question (`str`):
                The question.
        """
        # str.replace and not str.format: a question may contain braces
        text = PROMPT.replace("{max_searches}", str(self.max_searches)).replace("{question}", question)
        return [{"role": "user", "content": text}] if self.tokenizer.chat_template is not None else text

    def parse(self, text: str, *, ended: bool = False) -> tuple[Action, str]:
        """
        Read the action of a turn: the first well-formed pair of tags in it.

        Args:
            text (`str`):
                The model-written text of one turn.
            ended (`bool`, *optional*, defaults to `False`):
                Whether the model ended its message (sampled an end-of-sequence token).

        Returns:
            `tuple[str, str]`: The action and its stripped content. `"invalid"` for malformed tags, an empty query, or a
            turn that was cut before it acted; `"none"` if the model ended its message without trying to act.
        """
        match = _ACTION.search(text)
        if match is None:
            return ("none" if ended and not _ATTEMPT.search(text) else "invalid"), ""
        content = match.group(2).strip()
        if match.group(1) == "search":
            return ("search", content) if content else ("invalid", "")
        return "answer", content

    @property
    def hint_ids(self) -> list[int]:
        """The observation after an invalid action."""
        return list(self._hint)

    @property
    def min_observation_tokens(self) -> int:
        """The fewest tokens of an observation that says anything: its two tags and one token."""
        return len(self._open) + 1 + len(self._close)

    def observe(self, passages: Sequence[Passage], max_tokens: int) -> Observation:
        """
        Show passages to the model.

        The budget is split evenly over the passages, what a short one leaves goes to the others; a passage over its
        share is cut at its end. The closing tag is always there.

        Args:
            passages (`Sequence[Passage]`):
                What a search returned, possibly nothing.
            max_tokens (`int`):
                The budget, tags included; at least [`TagProtocol.min_observation_tokens`].

        Returns:
            [`Observation`]: At most `max_tokens` tokens, and the passages as shown.
        """
        budget = max_tokens - len(self._open) - len(self._close)
        if budget < 1:
            raise ValueError(
                f"`max_tokens` is {max_tokens}, but an observation needs at least {self.min_observation_tokens} tokens."
            )
        if not passages:
            return Observation(self._open + self._nothing_found[:budget] + self._close, [])
        encoded = [
            self._encode_passage(number, passage.title, passage.text, budget)
            for number, passage in enumerate(passages, start=1)
        ]
        shares = _split_budget([len(ids) for ids, _, _ in encoded], budget)
        token_ids, shown = list(self._open), []
        for passage, (ids, ends, text), share in zip(passages, encoded, shares, strict=True):
            if share == 0:
                continue
            token_ids += ids[:share]
            shown.append(self._as_shown(passage, text, ends[share - 1]))
        return Observation(token_ids + self._close, shown)

    def cut_query(self, query: str, max_tokens: int) -> str:
        """
        Cut a query to a number of tokens.

        Args:
            query (`str`):
                The query as the model wrote it.
            max_tokens (`int`):
                The largest number of tokens.
        """
        ids = self._encode(query[: max_tokens * _CHARS_PER_TOKEN])
        if len(ids) <= max_tokens:
            return query[: max_tokens * _CHARS_PER_TOKEN]
        return str(self.tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)).strip()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _neutralize(self, text: str) -> str:
        text = _PROTOCOL_TAG.sub(r"[\1]", _CONTROLS.sub("", text))
        if self._added_token is not None:
            text = self._added_token.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        return text

    def _encode_passage_uncached(
        self, number: int, title: str, text: str, budget: int
    ) -> tuple[list[int], list[int], str]:
        """The tokens of a passage with its header, where each ends in the neutralised text, and that text."""
        limit = budget * _CHARS_PER_TOKEN
        header = f"Doc {number} (Title: {self._neutralize(title[:limit])}) " if title else f"Doc {number} "
        text = self._neutralize(text[:limit])
        encoding = self.tokenizer(
            f"{header}{text}\n",
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=self.tokenizer.is_fast,
        )
        ids = encoding["input_ids"]
        if self.tokenizer.is_fast:
            ends = [end - len(header) for _, end in encoding["offset_mapping"]]
        else:
            ends = [len(self.tokenizer.decode(ids[: i + 1])) - len(header) for i in range(len(ids))]
        return ids, ends, text

    @staticmethod
    def _as_shown(passage: Passage, text: str, end: int) -> Passage:
        """The passage with its text cut after `end` characters; the same object if all of it was shown unchanged."""
        shown = text[: max(end, 0)]
        return passage if shown == passage.text else replace(passage, text=shown)


def _split_budget(lengths: Sequence[int], budget: int) -> list[int]:
    """Split a budget of tokens evenly; what the short ones leave goes to the long ones. Sums to at most `budget`."""
    shares = [0] * len(lengths)
    for done, i in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        shares[i] = min(lengths[i], (budget - sum(shares)) // (len(lengths) - done))
    return shares
