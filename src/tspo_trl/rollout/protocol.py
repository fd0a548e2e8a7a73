"""The base class of protocols: the prompt, the action of a turn, and the observation after it.

A protocol reads the text of the model and never changes it: tokens stay exactly as they were sampled. It writes foreign
text (passages) so that a passage cannot become a control token, close its block, ask for a search or answer for the model.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..retrieval.base import Passage
from .encoded_passages import EncodedPassage, escaped_positions, split_budget
from .limits import SearchLimits
from .tokens import Normalizer, adds_space, control_tokens, first_tokens
from .trajectory import Action

# C0 and C1 controls except tab and line feed, bidirectional controls, and lone surrogates (they cannot be encoded)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_ORDINARY = re.compile("<0x[0-9A-F]{2}>|[Ġ▁].*", re.DOTALL)
_NOT_PLAIN = re.compile(r"[^\w\s.,;:!?'()-]")
_CHARS_PER_TOKEN = 64  # a longer passage is cut before it is encoded: its budget cannot hold more

NOTHING_FOUND = "Nothing was found."


@dataclass(frozen=True, slots=True)
class Observation:
    """
    An observation: the tokens appended after a turn.

    Args:
        token_ids (`list[int]`):
            The O tokens.
        passages (`list[Passage]`):
            The passages as shown to the model: titles and texts are neutralised, and cut at the budget.
    """

    token_ids: list[int]
    passages: list[Passage]


class SearchProtocol(ABC):
    """
    Base class of protocols. A protocol writes prompts, reads actions and shows passages. This class has the code that all
    protocols share: budgets, and the encoding of passages as plain text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        max_searches (`int`, *optional*, defaults to `4`):
            Maximum number of searches, as stated in the prompt.
        opening (`str`, *optional*, defaults to `""`):
            Text at the beginning of an observation.
        closing (`str`, *optional*, defaults to `""`):
            Text at the end of an observation. A line feed at its beginning ends the last passage.
        before (`str`, *optional*, defaults to `""`):
            The end of the text before an observation. It shows how the tokenizer encodes the opening after it.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Names of the tags that the model or the parser reads. They are replaced in passages. A name with `=` stands for
            every tag that begins with the part before it.
        ends_line (`bool`, *optional*, defaults to `True`):
            Whether the last passage ends with a line feed.
        escape (`Callable`, *optional*):
            Changes the content of an observation to what is written, for instance to the text inside a JSON string. It
            changes each character on its own.
        prompt_template (`str`, *optional*):
            Template of the prompts, with `{question}` and optionally `{max_searches}`. Defaults to the template of the
            protocol.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Additional arguments of the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        `ValueError`: If a passage could act for the model with this tokenizer.
    """

    #: A turn ends as soon as its text ends with one of these, or with an end-of-sequence token.
    stop_strings: tuple[str, ...] = ()
    #: The schemas of the tools that the chat template writes into the prompt.
    tools: tuple[dict[str, Any], ...] = ()
    #: The default template of the prompts.
    default_prompt_template: str

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_searches: int = SearchLimits.max_searches,
        *,
        opening: str = "",
        closing: str = "",
        before: str = "",
        tags: Sequence[str] = (),
        ends_line: bool = True,
        escape: Callable[[str], str] | None = None,
        prompt_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        self.max_searches = max_searches
        self.prompt_template = self.default_prompt_template if prompt_template is None else prompt_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        # SentencePiece puts a space before every text that it encodes. The parts of an observation continue a text.
        self._adds_space = adds_space(tokenizer)
        self._opened = opening[opening.rstrip("\n").rfind("\n") + 1 :]  # the last line before the first passage
        self._open = self._encode(opening, before)
        # A passage ends with a line feed. Tokenizers join it to the text before it, so the closing is encoded without it.
        # A passage that is cut has no line feed: the closing after it is encoded with one.
        self._close_cut = self._encode(closing, ".")
        self._close = self._encode(closing.removeprefix("\n"), "\n") if ends_line else self._close_cut
        self._ends_line = ends_line
        self._line_end = "\n" if closing.startswith("\n") else ""
        self._escape = escape
        self._nothing_found = self._encode(self._as_written(NOTHING_FOUND + self._line_end), self._opened)
        self._tag = _tag_pattern(tags)
        # Tokenizers match added tokens that are not special (Qwen3's <think>, <tool_response>…) in any text, so passages
        # are changed. Added words are ordinary text: changing them would hide them from the model and from the scores.
        added = control_tokens(tokenizer)
        self._added_token = re.compile("|".join(re.escape(token.strip()) for token in added)) if added else None
        self._normalizer = Normalizer(tokenizer)
        vocabulary = tokenizer.get_vocab()
        markup = [f"<{slash}{tag}>" for tag in tags for slash in ("", "/")]
        # Bytes (<0x0A>) and words after a space are ordinary text, even if they are special tokens
        forbidden = {vocabulary[t] for t in (*added, *markup) if t in vocabulary and not _ORDINARY.fullmatch(t)}
        self._forbidden = frozenset(forbidden - {tokenizer.unk_token_id})
        # The rollouts of a group often retrieve the same passages
        self._encode_passage = lru_cache(maxsize=8192)(self._encode_passage_uncached)
        self._check_passage("".join([*markup, *added[:200], *markup]))

    @abstractmethod
    def prompt(self, question: str) -> str | list[dict[str, str]]:
        """
        Write the prompt for a question: a text or a conversation.

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
        Encode prompts. A text is encoded as it is, with the tokens that the tokenizer puts before it (such as BOS) once, and
        without those that it puts after it (such as EOS). A conversation is encoded by the chat template, with the schemas
        of the tools and the beginning of the model's message.

        Args:
            prompts (`Sequence`):
                B texts or B conversations.

        Returns:
            `list[list[int]]`: B lists of tokens.
        """
        if isinstance(prompts[0], str):
            before = first_tokens(self.tokenizer)
            if before is None:
                return self.tokenizer(text=list(prompts))["input_ids"]
            encoded: list[list[int]] = self.tokenizer(text=list(prompts), add_special_tokens=False)["input_ids"]
            return [ids if ids[: len(before)] == before else before + ids for ids in encoded]
        encoding: Any = self.tokenizer.apply_chat_template(
            list(prompts),  # type: ignore[arg-type]
            tools=list(self.tools) or None,  # with an empty list, some templates write about tools
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
            `tuple[str, str]`: The action, and its stripped content: a query, an answer or `""`.
        """

    def read(self, token_ids: Sequence[int], *, ended: bool, before: Sequence[int] = ()) -> tuple[str, Action, str]:
        """
        Read a turn.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.
            ended (`bool`):
                Whether the model ended its message (the last token is an end-of-sequence token).
            before (`Sequence[int]`, *optional*):
                Tokens before the turn: the prompt, or the last observation.

        Returns:
            `tuple[str, str, str]`: The text of the turn, its action, and the content of the action as in
                [`SearchProtocol.parse`].
        """
        text = str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        return text, *self.parse(text, ended=ended)

    def write(self, action: Action, content: str, *, after_response: bool) -> list[int]:
        """
        Write a turn, as a model would, so that [`SearchProtocol.read`] reads the action. Demonstrations consist of such turns.

        Args:
            action (`str`):
                `"search"` or `"answer"`.
            content (`str`):
                The query or the answer.
            after_response (`bool`):
                Whether the turn follows the passages of a search. Otherwise it follows the prompt.

        Returns:
            `list[int]`: The T tokens. The action may not be parsed as written if `content` has markup of the protocol.
        """
        raise NotImplementedError(f"`{type(self).__name__}.write` is needed to make demonstrations.")

    @property
    @abstractmethod
    def hint_ids(self) -> list[int]:
        """The observation after an invalid action."""

    def closing_ids(self, token_ids: Sequence[int]) -> list[int]:
        """
        Tokens that must follow a turn before its observation, because the model did not sample them.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.

        Returns:
            `list[int]`: The tokens. They are the beginning of the observation.
        """
        return []

    def hint_after(self, token_ids: Sequence[int]) -> list[int]:
        """
        The observation after a turn with an invalid action.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.

        Returns:
            `list[int]`: The end of the turn, where the model did not sample it, and the hint.
        """
        return self.closing_ids(token_ids) + self.hint_ids

    @property
    def min_observation_tokens(self) -> int:
        """Minimum number of tokens of an observation with content: its opening, its closing and one token."""
        return len(self._open) + 1 + len(self._close_cut)

    def observation_text(self, observation_ids: Sequence[int]) -> str:
        """
        The text of an observation, for reward functions and logs.

        Args:
            observation_ids (`Sequence[int]`):
                The O tokens of an observation.
        """
        return str(self.tokenizer.decode(list(observation_ids))).strip()

    def observe(self, passages: Sequence[Passage], max_tokens: int) -> Observation:
        """
        Show passages to the model.

        The budget is split evenly over the passages; tokens that a short passage does not need go to the others. A passage
        that is longer than its share is cut at its end. The closing is never cut.

        Args:
            passages (`Sequence[Passage]`):
                The passages of a search, possibly none.
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
            self._encode_passage(number, passage.title, passage.text, budget, number == len(passages))
            for number, passage in enumerate(passages, start=1)
        ]
        shares = split_budget([len(p.token_ids) for p in encoded], budget)
        token_ids, shown, close = list(self._open), [], self._close
        for passage, item, share in zip(passages, encoded, shares, strict=True):
            if (share := item.whole(share)) > 0:
                token_ids += item.token_ids[:share]
                shown.append(item.as_shown(passage, share))
                close = self._close if share == len(item.token_ids) else self._close_cut
        return Observation(token_ids + close, shown)

    def _as_written(self, text: str) -> str:
        """A part of the content of an observation as it is written."""
        return text if self._escape is None else self._escape(text)

    def cut_query(self, query: str, max_tokens: int) -> str:
        """
        Cut a query to a number of tokens. Only whole characters are kept, and at least one.

        Args:
            query (`str`):
                The query as the model wrote it.
            max_tokens (`int`):
                Maximum number of tokens.
        """
        ids = self._encode(query[: max_tokens * _CHARS_PER_TOKEN])
        if len(ids) <= max_tokens:
            return query[: max_tokens * _CHARS_PER_TOKEN]
        cut = str(self.tokenizer.decode(ids[:max_tokens], skip_special_tokens=True)).strip()
        # A character may have several tokens. The bytes of an incomplete one are decoded as U+FFFD.
        while cut.endswith("\ufffd") and not query.startswith(cut):
            cut = cut[:-1].rstrip()
        return cut or query[:1]

    def _encode(self, text: str, before: str = "") -> list[int]:
        """The tokens of a text that continues another one."""
        return self._encode_spans(text, before)[0]

    def _encode_spans(self, text: str, before: str, **kwargs: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """The tokens of a text that continues another one, and their positions if the tokenizer is fast."""
        kwargs |= {"add_special_tokens": False, "return_offsets_mapping": self.tokenizer.is_fast}
        if before and self._adds_space and self.tokenizer.is_fast:
            encoding = self.tokenizer(before + text, **kwargs)
            ids, spans, seam = encoding["input_ids"], encoding["offset_mapping"], len(before)
            start = next((n for n, span in enumerate(spans) if span[0] >= seam), len(spans))
            if all(end <= seam for _, end in spans[:start]):  # no token has characters of both
                return ids[start:], [(first - seam, end - seam) for first, end in spans[start:]]
        encoding = self.tokenizer(text, **kwargs)
        return encoding["input_ids"], encoding.get("offset_mapping", [])

    def _neutralize(self, text: str) -> str:
        text = self._tag.sub(r"[\1]", CONTROLS.sub("", text))
        if self._added_token is not None:
            text = self._added_token.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
        return text

    def _encode_passage_uncached(
        self, number: int, title: str, text: str, budget: int, is_last: bool = False
    ) -> EncodedPassage:
        limit = budget * _CHARS_PER_TOKEN
        end = "\n" if self._ends_line or not is_last else ""
        title, text = title[:limit], text[:limit]
        # Tokenizers may change text (NFKC, lower case…) and so make tags of other characters. A passage is changed as little
        # as is needed.
        for change in (_unchanged, self._normalizer.to_ascii, self._normalizer.to_text, _plain_text, _no_text):
            passage = self._encode_changed(number, self._neutralize(change(title)), self._neutralize(change(text)), end)
            if self._is_harmless(passage):
                break
        return passage

    def _check_passage(self, text: str) -> None:
        """Raise an error if a passage of tags and control tokens does not remain plain text."""
        wide = text.translate({code: code + 0xFEE0 for code in range(0x21, 0x7F)})  # NFKC makes ASCII of these
        for hostile in (text, text.upper(), wide):
            passage = self._encode_passage_uncached(1, hostile, hostile, len(hostile))
            if not self._is_harmless(passage):
                shown = str(self.tokenizer.decode(passage.token_ids))
                raise ValueError(
                    "This tokenizer cannot show passages as plain text, so a passage could act for the model. It encodes "
                    f"the passage {hostile[:100]!r} as {shown[:100]!r}, which has a tag or a control token. Remove added "
                    "tokens that are ordinary words from its special tokens, or take another tokenizer."
                )

    def _is_harmless(self, passage: EncodedPassage) -> bool:
        """Whether neither the tokens nor their text have a tag or a control token."""
        if not self._forbidden.isdisjoint(passage.token_ids):
            return False
        if self._tag.search(str(self.tokenizer.decode(passage.token_ids))):
            return False
        texts = [self._normalizer(part) for part in (passage.title, passage.text)]
        patterns = [self._tag] if self._added_token is None else [self._tag, self._added_token]
        return not any(pattern.search(text) for pattern in patterns for text in texts)

    def _encode_changed(self, number: int, title: str, text: str, end: str) -> EncodedPassage:
        before, after = (f"Doc {number} (Title: ", ") ") if title else (f"Doc {number} ", "")
        content = f"{before}{title}{after}{text}{end}"
        ids, spans = self._encode_spans(
            self._as_written(content),
            self._opened if number == 1 else self._as_written("\n"),
            split_special_tokens=True,
        )
        if self.tokenizer.is_fast:
            # Several tokens may share a character: it is shown only if all of them are
            nexts = [start for start, _ in spans[1:]] + [spans[-1][1]]
            ends = [end if end <= following else start for (start, end), following in zip(spans, nexts, strict=True)]
        else:
            ends = [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
        inside = frozenset[int]()
        if self._escape is not None:  # a cut inside an escape would change the text after it
            ends, inside = escaped_positions(content, ends, self._escape)
        return EncodedPassage(ids, ends, title, len(before), text, len(before) + len(title) + len(after), inside)


def _tag_pattern(tags: Sequence[str]) -> re.Pattern[str]:
    """Opening and closing tags with any of the names; a name with `=` stands for all that begin with the part before it."""
    names = [re.escape(name) + sign + "[^<>]*" * bool(sign) for name, sign, _ in (tag.partition("=") for tag in tags)]
    if not names:
        return re.compile("<((?!))>")
    return re.compile(rf"<(\s*(?:/\s*)?(?:{'|'.join(dict.fromkeys(names))})\s*(?:/\s*)?)>", re.IGNORECASE)


def _unchanged(text: str) -> str:
    return text


def _plain_text(text: str) -> str:
    """The words and the punctuation of a text."""
    return _NOT_PLAIN.sub(" ", text)


def _no_text(text: str) -> str:
    return ""
