"""How an action is written and read, and how an observation is shown to the model.

Model-written text is only read here, never changed: tokens stay exactly as they were sampled. Foreign text (passages) is
only written here: it cannot become a control token, close its block, ask for a search or answer for the model.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..retrieval.base import Passage
from .trajectory import Action

# C0 and C1 controls except tab and line feed, bidirectional controls, and lone surrogates (which cannot be encoded)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CHARS_PER_TOKEN = 64  # no need to encode more of a passage than its budget could ever hold

NOTHING_FOUND = "Nothing was found."


@dataclass(frozen=True, slots=True)
class Observation:
    """
    What is appended after a turn.

    Args:
        token_ids (`list[int]`):
            The O tokens.
        passages (`list[Passage]`):
            The passages as they were shown: titles and texts neutralised, and cut where the budget ended.
    """

    token_ids: list[int]
    passages: list[Passage]


class SearchProtocol(ABC):
    """
    How actions are written and read, and how passages are shown. What all protocols share is here: budgets, and passages
    that stay text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        max_searches (`int`, *optional*, defaults to `4`):
            Told to the model in the prompt.
        opening (`str`, *optional*, defaults to `""`):
            What an observation begins with.
        closing (`str`, *optional*, defaults to `""`):
            What an observation ends with. A line feed at its beginning is that of the last passage.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Names of tags that mean something to the model or the parser: passages cannot hold them.
        prompt_template (`str`, *optional*):
            What prompts are written from, with `{question}` and, if wanted, `{max_searches}` in it. Defaults to the
            protocol's own.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            What else the chat template gets, for instance `{"enable_thinking": False}`.
    """

    #: A turn ends as soon as its text ends with one of these, or with an end-of-sequence token.
    stop_strings: tuple[str, ...] = ()
    #: The schemas of the tools that the chat template writes into the prompt.
    tools: tuple[dict[str, Any], ...] = ()
    #: What prompts are written from unless another template is given.
    default_prompt_template: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_searches: int = 4,
        *,
        opening: str = "",
        closing: str = "",
        tags: Sequence[str] = (),
        prompt_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.max_searches = max_searches
        self.prompt_template = self.default_prompt_template if prompt_template is None else prompt_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._open = self._encode(opening)
        # Passages end their lines. Tokenizers join a line feed to what is before it, so that the closing is encoded
        # without it; a passage that is cut has lost its own.
        self._close, self._close_cut = self._encode(closing.removeprefix("\n")), self._encode(closing)
        self._line_end = "\n" if closing.startswith("\n") else ""
        self._nothing_found = self._encode(NOTHING_FOUND + self._line_end)
        self._tag = re.compile(rf"<(\s*(?:/\s*)?(?:{'|'.join(map(re.escape, tags))})\s*(?:/\s*)?)>", re.IGNORECASE)
        # Added tokens that are not special (Qwen3's <think>, <tool_response>…) are matched in any text, so they are
        # broken up; special ones are split by the tokenizer itself.
        added = sorted((t for t in tokenizer.get_added_vocab() if len(t) > 1 and t.strip() == t), key=len, reverse=True)
        self._added_token = re.compile("|".join(map(re.escape, added))) if added else None
        # The same passages come back for many rollouts of a group
        self._encode_passage = lru_cache(maxsize=8192)(self._encode_passage_uncached)

    @abstractmethod
    def prompt(self, question: str) -> str | list[dict[str, str]]:
        """
        The prompt for a question: a text or a conversation.

        Args:
            question (`str`):
                The question.
        """

    def _write_prompt(self, question: str) -> str:
        # str.replace and not str.format: a question may contain braces
        text = self.prompt_template.replace("{max_searches}", str(self.max_searches))
        return text.replace("{question}", question)

    def encode_prompts(self, prompts: Sequence[str | list[dict[str, str]]]) -> list[list[int]]:
        """
        Prompts as the model reads them: a text as it is, a conversation by the chat template, with the schemas of the
        tools and the beginning of the model's message.

        Args:
            prompts (`Sequence`):
                B texts or B conversations.

        Returns:
            `list[list[int]]`: Their tokens.
        """
        if isinstance(prompts[0], str):
            return self.tokenizer(text=list(prompts))["input_ids"]
        encoding: Any = self.tokenizer.apply_chat_template(
            list(prompts),  # type: ignore[arg-type]
            tools=list(self.tools) or None,  # some templates write about tools where there is an empty list of them
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **self.chat_template_kwargs,
        )
        return encoding["input_ids"]

    @abstractmethod
    def parse(self, text: str, *, ended: bool = False) -> tuple[Action, str]:
        """
        Read the action of a turn.

        Args:
            text (`str`):
                The model-written text of one turn.
            ended (`bool`, *optional*, defaults to `False`):
                Whether the model ended its message (sampled an end-of-sequence token).

        Returns:
            `tuple[str, str]`: The action and its stripped content: a query, an answer or `""`.
        """

    @property
    @abstractmethod
    def hint_ids(self) -> list[int]:
        """The observation after an invalid action."""

    def closing_ids(self, token_ids: Sequence[int]) -> list[int]:
        """
        What is missing at the end of a turn before an observation may follow.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.

        Returns:
            `list[int]`: Tokens that begin the observation. They were not sampled.
        """
        return []

    @property
    def min_observation_tokens(self) -> int:
        """Minimum number of tokens of an observation with content: its opening, its closing and one token."""
        return len(self._open) + 1 + len(self._close_cut)

    def observation_text(self, observation_ids: Sequence[int]) -> str:
        """
        What an observation says, for reward functions and logs.

        Args:
            observation_ids (`Sequence[int]`):
                The O tokens of an observation.
        """
        return str(self.tokenizer.decode(list(observation_ids))).strip()

    def observe(self, passages: Sequence[Passage], max_tokens: int) -> Observation:
        """
        Show passages to the model.

        The budget is split evenly over the passages, what a short one leaves goes to the others; a passage over its
        share is cut at its end. What closes the block is always there.

        Args:
            passages (`Sequence[Passage]`):
                What a search returned, possibly nothing.
            max_tokens (`int`):
                The budget, opening and closing included; at least [`SearchProtocol.min_observation_tokens`].

        Returns:
            [`Observation`]: At most `max_tokens` tokens, and the passages as shown.
        """
        budget = max_tokens - len(self._open) - len(self._close_cut)
        if budget < 1:
            raise ValueError(
                f"`max_tokens` is {max_tokens}, but an observation needs at least {max_tokens - budget + 1} tokens."
            )
        if not passages:
            whole = len(self._nothing_found) <= budget
            close = self._close if whole else self._close_cut
            return Observation(self._open + self._nothing_found[:budget] + close, [])
        # Encode the passages, split the budget over them, and cut each to its share
        encoded = [
            self._encode_passage(number, passage.title, passage.text, budget)
            for number, passage in enumerate(passages, start=1)
        ]
        shares = _split_budget([len(p.token_ids) for p in encoded], budget)
        token_ids, shown, close = list(self._open), [], self._close
        for passage, item, share in zip(passages, encoded, shares, strict=True):
            if share > 0:
                token_ids += item.token_ids[:share]
                shown.append(item.as_shown(passage, share))
                close = self._close if share == len(item.token_ids) else self._close_cut
        return Observation(token_ids + close, shown)

    def cut_query(self, query: str, max_tokens: int) -> str:
        """
        Cut a query to a number of tokens.

        Args:
            query (`str`):
                The query as the model wrote it.
            max_tokens (`int`):
                Maximum number of tokens.
        """
        ids = self._encode(query[: max_tokens * _CHARS_PER_TOKEN])
        if len(ids) <= max_tokens:
            return query[: max_tokens * _CHARS_PER_TOKEN]
        return str(self.tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)).strip()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _neutralize(self, text: str) -> str:
        text = self._tag.sub(r"[\1]", CONTROLS.sub("", text))
        if self._added_token is not None:
            text = self._added_token.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        return text

    def _encode_passage_uncached(self, number: int, title: str, text: str, budget: int) -> "_EncodedPassage":
        limit = budget * _CHARS_PER_TOKEN
        title, text = self._neutralize(title[:limit]), self._neutralize(text[:limit])
        before, after = (f"Doc {number} (Title: ", ") ") if title else (f"Doc {number} ", "")
        encoding = self.tokenizer(
            f"{before}{title}{after}{text}\n",
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=self.tokenizer.is_fast,
        )
        ids = encoding["input_ids"]
        if self.tokenizer.is_fast:
            spans = encoding["offset_mapping"]
            # Several tokens may share a character: it is shown only when the last of them is
            nexts = [start for start, _ in spans[1:]] + [spans[-1][1]]
            ends = [end if end <= following else start for (start, end), following in zip(spans, nexts, strict=True)]
        else:
            ends = [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        return _EncodedPassage(ids, ends, title, len(before), text, len(before) + len(title) + len(after))


@dataclass(frozen=True, slots=True)
class _EncodedPassage:
    """The tokens of a passage with its header, where each ends, and where title and text stand in the whole."""

    token_ids: list[int]
    ends: list[int]
    title: str
    title_start: int
    text: str
    text_start: int

    def as_shown(self, passage: Passage, num_tokens: int) -> Passage:
        """The passage as far as its first tokens show it; the same object if all of it was shown unchanged."""
        end = self.ends[num_tokens - 1]
        title, text = self.title[: max(end - self.title_start, 0)], self.text[: max(end - self.text_start, 0)]
        if (title, text) == (passage.title, passage.text):
            return passage
        return replace(passage, title=title, text=text)


def _split_budget(lengths: Sequence[int], budget: int) -> list[int]:
    """Split a budget of tokens evenly; what the short ones leave goes to the long ones. Sums to at most `budget`."""
    shares = [0] * len(lengths)
    for done, i in enumerate(sorted(range(len(lengths)), key=lambda i: lengths[i])):
        shares[i] = min(lengths[i], (budget - sum(shares)) // (len(lengths) - done))
    return shares
