"""Actions as the chat template's own tool calls."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .chat_format import Chat, escape, first_query, read_chat_format
from .limits import SearchLimits
from .protocol import SearchProtocol
from .trajectory import Action
from .written_turns import written_turns

SEARCH_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search for passages of text. Returns the best ones.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to search for."}},
            "required": ["query"],
        },
    },
}
_THINK = "Before you call or reply, you may reason between <think> and </think>. "
PROMPT = (
    "Answer the question below. If you lack some knowledge, call the tool search: the best passages come back as its "
    "response. You can search at most {max_searches} times, with one query at a time. "
    + _THINK
    + "When you know enough, reply with nothing but the answer, in as few words as "
    "possible and without an explanation, for example: Beijing\n\n"
    "Question: {question}"
)
HINT = (
    'The last message was not valid. To search, call the tool search with a text as its argument "query", one query at a '
    "time; to answer, reply with the answer alone. Keep messages short."
)


class ToolCallProtocol(SearchProtocol):
    """
    Actions as the chat template's tool calls, for every template that has a response template: that of the tokenizer, or that
    of TRL. The tokenizer parses the messages with it.

    A turn is an assistant message. A message with a call of `search` searches; a message without a call is the answer: its
    content, without its thoughts. The passages are shown as the response of the tool, in the text that the template writes
    between two messages.

    - If a message has several calls, the first well-formed call is executed, and its response answers all of them.
    - A message is invalid if it lacks its end, if it cannot be parsed, if none of its calls is well-formed, if its content
      has the markup of a call, or if it ends inside a thought. So a call in a thought is never executed.
    - Tokens are only appended to a context. Many templates drop the thoughts of earlier messages when they render a
      conversation again. Here no conversation is rendered again, so the model keeps seeing its thoughts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model, with a chat template that supports tools. It is not changed.
        max_searches (`int`, *optional*, defaults to `4`):
            Maximum number of searches, named in the prompt.
        eos_token_ids (`Collection[int]`, *optional*):
            Tokens that end a message of the model. Defaults to the end-of-sequence token of the tokenizer. Some templates end
            a call and an answer with different tokens.
        prompt_template (`str`, *optional*):
            Template of the prompts, with `{question}` and optionally `{max_searches}` in it. Defaults to `PROMPT`, without its
            sentence on `<think>` if the template marks thoughts in another way.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        `ValueError`: If the chat template is missing, is unknown, omits tools or their responses, belongs to another
            tokenizer, or ends messages with a token that does not end generation.
    """

    tools = (SEARCH_TOOL,)
    default_prompt_template = PROMPT

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_searches: int = SearchLimits.max_searches,
        *,
        eos_token_ids: Collection[int] | None = None,
        prompt_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        ends = [i for i in (eos_token_ids or [tokenizer.eos_token_id]) if i is not None]
        self._format = read_chat_format(tokenizer, SEARCH_TOOL, ends, chat_template_kwargs or {})
        self._chat = Chat(tokenizer, SEARCH_TOOL, dict(chat_template_kwargs or {}))
        thought = self._format.thought
        if prompt_template in (None, PROMPT) and (thought is None or thought.close != "</think>"):
            prompt_template = PROMPT.replace(_THINK, "")
        self._end = self._format.call_end
        self._eos_token_ids = frozenset(ends)
        self._end_texts = [str(text) for text in tokenizer.convert_ids_to_tokens(ends)]
        super().__init__(
            tokenizer,
            max_searches,
            opening=self._format.opening,
            closing=self._format.closing,
            before=str(tokenizer.convert_ids_to_tokens(self._end)),
            tags=self._format.tags,
            ends_line=self._format.closing.startswith("\n"),  # then that line feed is the closing's own
            escape=escape if self._format.escaped else None,
            prompt_template=prompt_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        self._hint = self._open + self._encode(self._as_written(HINT + self._line_end), self._opened) + self._close
        self._user_hint: list[int] = []
        if self._format.user_hint is not None:
            before, after = self._format.user_hint
            self._user_hint = self._encode(before + HINT + after)
        fields = self._format.response_template["fields"]
        unthinking = {name: field for name, field in fields.items() if thought is None or name != thought.field}
        self._without_thought = {**self._format.response_template, "fields": unthinking}

    def prompt(self, question: str) -> list[dict[str, str]]:
        """
        The prompt for a question: a conversation of one user message.

        Args:
            question (`str`):
                The question.
        """
        return [{"role": "user", "content": self._write_prompt(question)}]

    def read(self, token_ids: Sequence[int], *, ended: bool, before: Sequence[int] = ()) -> tuple[str, Action, str]:
        """
        Read a turn: the action of its message, see [`ToolCallProtocol.parse`]. Its text has all control tokens except the one
        that ends it.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.
            ended (`bool`):
                Whether the model ended its message (the last token is an end-of-sequence token).
            before (`Sequence[int]`, *optional*):
                Tokens before the turn: the prompt, or the last observation.
        """
        ids = list(token_ids)
        text = str(self.tokenizer.decode(ids[:-1] if ended else ids))
        if not ended:
            return text, "invalid", ""
        return text, *self._read_message(text, ids[-1], after_response=self._ends_with_response(before))

    def parse(self, text: str, *, ended: bool = False) -> tuple[Action, str]:
        """
        Read the action of a turn: its first well-formed call, or its answer.

        Args:
            text (`str`):
                The model-written text of one turn, with its control tokens. If it lacks the token that ends it, that of an
                answer is assumed.
            ended (`bool`, *optional*, defaults to `False`):
                Whether the model ended its message (sampled an end-of-sequence token).

        Returns:
            `tuple[str, str]`: The action and its stripped content. `"invalid"` for a turn that was cut, that cannot be
            parsed, that ends inside a thought, or whose calls are all malformed (cut, another name, a query that is missing,
            empty or not a string); `"none"` if the model ended its message without a call or an answer.
        """
        if not ended:
            return "invalid", ""
        end = next((token for token in self._end_texts if text.endswith(token)), None)
        if end is None:
            return self._read_message(text, self._format.answer_end)
        return self._read_message(text.removesuffix(end), self._token_id(end))

    def _token_id(self, token: str) -> int:
        number: Any = self.tokenizer.convert_tokens_to_ids(token)
        return int(number)

    def _ends_with_response(self, token_ids: Sequence[int]) -> bool:
        """Whether tokens end with a response of the tool."""
        return any(list(token_ids[-len(close) :]) == close for close in (self._close, self._close_cut))

    def _read_message(self, text: str, end: int, *, after_response: bool = False) -> tuple[Action, str]:
        """The action of a message that was ended by a token."""
        # A response template knows the ends that the chat template writes; a model may have others
        known = end in (self._format.call_end, self._format.answer_end)
        end_text = str(self.tokenizer.convert_ids_to_tokens(end if known else self._format.answer_end))
        start = self._format.starts[after_response]
        template, thought = self._format.response_template, self._format.thought
        if thought is not None and not thought.has_opening and thought.close not in text:
            if thought.close not in start:
                return "invalid", ""  # the chat template has opened a thought that the message does not close
            template = self._without_thought  # the search for the end of a thought takes long in a long text
        try:
            message = self.tokenizer.parse_response(text + end_text, template, prefix=start, tools=list(self.tools))
        except (ValueError, KeyError, RecursionError):
            return "invalid", ""
        thoughts = message.get(thought.field) if thought is not None else None
        if str(thoughts[-1] if isinstance(thoughts, list) else thoughts).endswith(
            end_text
        ):  # a thought that is never closed has the end of the message in it
            return "invalid", ""
        if query := first_query(message, SEARCH_TOOL["function"]["name"]):
            return "search", query
        content = message.get("content")
        content = content.removesuffix(end_text).strip() if isinstance(content, str) else ""
        is_call = end == self._format.call_end != self._format.answer_end
        if message.get("tool_calls") or is_call or any(mark in content for mark in self._format.call_marks):
            return "invalid", ""
        if content:
            return "answer", content
        return ("invalid" if text.strip() and not thoughts else "none"), ""

    def write(self, action: Action, content: str, *, after_response: bool) -> list[int]:
        """
        Write a message with a call or an answer as the chat template does, without a thought. See [`SearchProtocol.write`].

        Args:
            action (`str`):
                `"search"` or `"answer"`.
            content (`str`):
                The query or the answer.
            after_response (`bool`):
                Whether the message follows the response of the tool. Otherwise it follows the question.
        """
        before = self._close if after_response else []
        start = self._format.starts[after_response]
        written: list[int] = []
        for text in written_turns(self._chat, self._format, action, content, after_response=after_response):
            written = self._encode(text, start)
            if self.read(written, ended=True, before=before)[1:] == (action, content):
                break
        return written

    @property
    def hint_ids(self) -> list[int]:
        """The observation after an invalid action: the hint as the tool's response."""
        return list(self._hint)

    def hint_after(self, token_ids: Sequence[int]) -> list[int]:
        """
        The observation after a turn with an invalid action: the hint as the tool's response. If the template cannot write a
        response after a message without a call, and the message did not end as calls do, the hint is a message of the user.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.
        """
        if not self._user_hint or token_ids[-1] == self._end:
            return super().hint_after(token_ids)
        return self._user_hint[token_ids[-1] in self._eos_token_ids :]  # its first token ends a message

    def closing_ids(self, token_ids: Sequence[int]) -> list[int]:
        """
        The token that ends the message, if a turn was cut before it or ended with another token.

        Args:
            token_ids (`Sequence[int]`):
                The T tokens of the turn.
        """
        return [] if token_ids[-1] == self._end else [self._end]

    @property
    def min_observation_tokens(self) -> int:
        """Minimum number of tokens of an observation with content, after a turn that lacks its end token."""
        return 1 + super().min_observation_tokens

    def observation_text(self, observation_ids: Sequence[int]) -> str:
        """
        The content of the tool's response, without the text of the template around it.

        Args:
            observation_ids (`Sequence[int]`):
                The O tokens of an observation.
        """
        ids = list(observation_ids)
        if self._user_hint and ids in (self._user_hint, self._user_hint[1:]):
            return HINT
        ids = ids[len(self._open) + (ids[0] == self._end) :]
        text = self._response_text(ids)
        try:
            return str(json.loads(f'"{text}"')) if self._format.escaped else text
        except ValueError:
            return text

    def _response_text(self, ids: list[int]) -> str:
        """The text of a response as it is written, without the closing."""
        text = str(self.tokenizer.decode(ids))
        if text.endswith(self._format.closing):
            return text.removesuffix(self._format.closing)
        # SentencePiece decodes control tokens with spaces around them, so the closing is found by its tokens
        for closing, line_end in ((self._close_cut, ""), (self._close, self._line_end)):
            if ids[-len(closing) :] == closing:
                return str(self.tokenizer.decode(ids[: -len(closing)])).removesuffix(line_end)
        return text
