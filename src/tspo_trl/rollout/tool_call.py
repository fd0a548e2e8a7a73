"""Actions as the chat template's own tool calls."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .protocol import CONTROLS, SearchProtocol
from .trajectory import Action

_CALL = re.compile(r"<tool_call>((?:(?!</?tool_call>).)*)</tool_call>", re.DOTALL)
_CALL_TAG = re.compile(r"</?tool_call>")
_THOUGHT = re.compile(r"<think>(?:(?!</?think>).)*</think>", re.DOTALL)

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
PROMPT = (
    "Answer the question below. If you lack some knowledge, call the tool search: the best passages come back as its "
    "response. You can search at most {max_searches} times, with one query at a time. Before you call or reply, you may "
    "reason between <think> and </think>. When you know enough, reply with nothing but the answer, in as few words as "
    "possible and without an explanation, for example: Beijing\n\n"
    "Question: {question}"
)
HINT = (
    'The last message was not valid. To search, call the tool search with a text as its argument "query", one query at a '
    "time; to answer, reply with the answer alone. Keep messages short."
)

# Placeholders in a conversation that is rendered to read the format of the template
_QUESTION, _QUERY, _RESPONSE = "tspo-question", "tspo-query", "tspo-response"
_ADVICE = (
    "Take the tokenizer of an instruction-tuned model of a family like Qwen2.5 or Qwen3, set `tokenizer.chat_template` to "
    "a template that TRL ships for it (`trl.chat_template_utils`, `get_training_chat_template`), or set `protocol='tags'`."
)


class ToolCallProtocol(SearchProtocol):
    """
    Actions as the chat template's tool calls, for templates that write a call as `<tool_call>{"name": "search",
    "arguments": {"query": "…"}}</tool_call>` (Qwen2.5, Qwen3 and others).

    A turn is an assistant message. A message with a call of `search` searches; a message without a call is the answer. The
    passages are shown as the response of the tool, in the tokens that the template writes between two messages.

    - If a message has several calls, the first well-formed call is executed, and its response answers all of them.
    - Text in `<think>…</think>` is not read: a call in it is not executed, and it is not part of the answer. The text of a
      thought that is not closed is not part of the answer either, but a call in it is executed.
    - Tokens are only appended to a context. Templates such as Qwen3's drop the thoughts of earlier messages when they
      render a conversation again. Here no conversation is rendered again, so the model keeps seeing its thoughts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model, with a chat template that supports tools.
        max_searches (`int`, *optional*, defaults to `4`):
            Maximum number of searches, named in the prompt.
        eos_token_ids (`Collection[int]`, *optional*):
            Tokens that end a message of the model. Defaults to the end-of-sequence token of the tokenizer.
        prompt_template (`str`, *optional*):
            Template of the prompts, with `{question}` and optionally `{max_searches}` in it. Defaults to `PROMPT`.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        `ValueError`: If the chat template is missing, omits tools or their responses, writes calls in another format, or
            ends messages with a token that does not end generation.
    """

    tools = (SEARCH_TOOL,)
    default_prompt_template = PROMPT
    _opens_thought = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_searches: int = 4,
        *,
        eos_token_ids: Collection[int] | None = None,
        prompt_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self._end, opening, self._closing = self._read_template(tokenizer, eos_token_ids, chat_template_kwargs or {})
        tags = {"tool_call", "think", *re.findall(r"</?(\w+)>", opening + self._closing)}
        super().__init__(
            tokenizer,
            max_searches,
            opening=opening,
            closing=self._closing,
            before=str(tokenizer.convert_ids_to_tokens(self._end)),
            tags=sorted(tags),
            prompt_template=prompt_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        # Some templates write the <think> themselves, before the model's first token
        self._opens_thought = self._closing.rfind("<think>") > self._closing.rfind("</think>")
        self._hint = self._open + self._encode(HINT + self._line_end, self._opened) + self._close

    def _read_template(
        self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int] | None, kwargs: Mapping[str, Any]
    ) -> tuple[int, str, str]:
        """The token that ends a message with a call, and the text of the template before and after a response."""
        if tokenizer.chat_template is None:
            raise ValueError(f"`protocol='tool_call'` needs a chat template, but the tokenizer has none. {_ADVICE}")
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": _QUERY}}}
        messages: list[Any] = [
            {"role": "user", "content": _QUESTION},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "search", "content": _RESPONSE},
        ]
        try:
            text = str(
                tokenizer.apply_chat_template(
                    messages, tools=[SEARCH_TOOL], tokenize=False, add_generation_prompt=True, **kwargs
                )
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"`protocol='tool_call'` needs a chat template that renders tool calls, this one fails: {error!r}. {_ADVICE}"
            ) from error
        written = {"tools": SEARCH_TOOL["function"]["description"], "calls": _QUERY, "responses": _RESPONSE}
        if missing := [name for name, part in written.items() if part not in text]:
            raise ValueError(
                "`protocol='tool_call'` needs a chat template that writes tools, their calls and their responses; this one "
                f"leaves out the {' and the '.join(missing)}. {_ADVICE}"
            )
        message, _, closing = text.rpartition(_RESPONSE)
        # Decode the call as a turn is decoded: without special tokens, which would hide a special <tool_call>
        call_ids = tokenizer(message.rpartition(_QUESTION)[2], add_special_tokens=False)["input_ids"]
        call_text = str(tokenizer.decode(call_ids, skip_special_tokens=True))
        if self.parse(call_text, ended=True) != ("search", _QUERY):
            raise ValueError(
                '`protocol=\'tool_call\'` reads calls as `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, but '
                f"the chat template (or the tokenizer, if these tags are special tokens) writes {call_text!r}. {_ADVICE}"
            )
        call_end = message.rpartition(_QUERY)[2]
        ids = [tokenizer.eos_token_id] if eos_token_ids is None else list(eos_token_ids)
        tokens: dict[str, int] = dict(zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True))
        ends = [token for token in tokens if token in call_end]
        if not ends:
            raise ValueError(
                f"`protocol='tool_call'`: after a call, this chat template writes {call_end!r}, but generation ends only at "
                f"{list(tokens)}. Set `tokenizer.eos_token` to the token that ends a message of the template."
            )
        end = min(ends, key=call_end.find)
        return tokens[end], call_end.partition(end)[2], closing

    def prompt(self, question: str) -> list[dict[str, str]]:
        """
        The prompt for a question: a conversation of one user message.

        Args:
            question (`str`):
                The question.
        """
        return [{"role": "user", "content": self._write_prompt(question)}]

    def parse(self, text: str, *, ended: bool = False) -> tuple[Action, str]:
        """
        Read the action of a turn: its first well-formed call, or its answer.

        Args:
            text (`str`):
                The model-written text of one turn.
            ended (`bool`, *optional*, defaults to `False`):
                Whether the model ended its message (sampled an end-of-sequence token).

        Returns:
            `tuple[str, str]`: The action and its stripped content. `"invalid"` for a turn that was cut, or if all
            calls are malformed (not a JSON object, another name, a query that is missing, empty or not a string);
            `"none"` if the model ended its message without a call or an answer.
        """
        if not ended:
            return "invalid", ""
        text = _THOUGHT.sub("", "<think>" + text if self._opens_thought else text)
        for call in _CALL.findall(text):
            if query := _query(call):
                return "search", query
        if _CALL_TAG.search(text):
            return "invalid", ""
        # Text before a lone </think> or after a lone <think> is a thought too
        answer = text.rpartition("</think>")[2].partition("<think>")[0].strip()
        return ("answer", answer) if answer else ("none", "")

    @property
    def hint_ids(self) -> list[int]:
        """The observation after an invalid action: the hint as the tool's response."""
        return list(self._hint)

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
        start = len(self._open) + (observation_ids[0] == self._end)
        ids = list(observation_ids[start:])
        text = str(self.tokenizer.decode(ids))
        if text.endswith(self._closing):
            return text.removesuffix(self._closing)
        # SentencePiece decodes control tokens with spaces around them, so the closing is found by its tokens
        for closing, line_end in ((self._close_cut, ""), (self._close, self._line_end)):
            if ids[-len(closing) :] == closing:
                return str(self.tokenizer.decode(ids[: -len(closing)])).removesuffix(line_end)
        return text


def _query(call: str) -> str:
    """The query of a well-formed call, else `""`."""
    try:
        data = json.loads(call)
    except (ValueError, RecursionError):
        return ""
    match data:
        case {"name": "search", "arguments": {"query": str(query)}}:
            return CONTROLS.sub("", query).strip()  # JSON can contain a lone surrogate, which cannot be encoded
    return ""
