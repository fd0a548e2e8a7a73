"""What a chat template writes around messages, calls, responses and thoughts. It is found out by rendering conversations."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .protocol import CONTROLS
from .response_format import find_response_template, template_name

_MARKUP = re.compile(r"<[^\s<>]+>")

# Placeholders in the conversations. The response shows whether the template escapes what it writes.
QUESTION, QUERY, ANSWER, _RESPONSE = "tspo-question", "tspo-query", "tspo-answer", 'tspo"\\\nresponse'
_HARD_QUERIES = ('Who wrote "Emma", and when?', "Emma's author, born 1775", "{x}: [a, b] (c) = 1\\2")

ADVICE = (
    "Take the tokenizer of an instruction-tuned model whose chat template has tool calls, set `tokenizer.chat_template` to a "
    "template that TRL ships for it (`trl.chat_template_utils`), or set `protocol='tags'`."
)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """
    The format of messages in a chat template.

    Args:
        response_template (`dict`):
            The template with which the tokenizer parses a message.
        call_end (`int`):
            The token that ends a message with a call.
        answer_end (`int`):
            The token that ends a message without a call.
        opening (`str`):
            The text between the end of a call and the tool's response.
        closing (`str`):
            The text after the tool's response, the beginning of the model's next message included.
        escaped (`bool`):
            Whether the response is written inside a JSON string.
        starts (`tuple[str, str]`):
            The beginning of the model's message after a message of the user, and after a response.
        user_hint (`tuple[str, str]` or `None`):
            The texts before and after a message of the user that follows one of the model, if the template cannot write a
            response after a message without a call.
        thought (`Thought` or `None`):
            How thoughts are marked.
        call_marks (`tuple[str, ...]`):
            Texts that calls contain and answers do not.
        tags (`tuple[str, ...]`):
            The names of the tags in messages and responses, without angle brackets.
    """

    response_template: dict[str, Any]
    call_end: int
    answer_end: int
    opening: str
    closing: str
    escaped: bool
    starts: tuple[str, str]
    user_hint: tuple[str, str] | None
    thought: "Thought | None"
    call_marks: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Thought:
    """
    The marks of a thought.

    Args:
        field (`str`):
            The name of the thought in a parsed message.
        close (`str`):
            The text that ends a thought.
        has_opening (`bool`):
            Whether the response template reads the opening of a thought. Otherwise the chat template opens it, and a message
            has a thought if it has the end of one.
    """

    field: str
    close: str
    has_opening: bool


def escape(text: str) -> str:
    """The text as it is written inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def first_query(message: Mapping[str, Any], name: str) -> str:
    """The query of the first well-formed call of a parsed message, else `""`."""
    for call in message.get("tool_calls") or []:
        match call:
            case {"function": {"name": str(called), "arguments": {"query": str(query)}}} if called == name:
                # JSON can contain a lone surrogate, which cannot be encoded
                if query := CONTROLS.sub("", query).strip():
                    return query
    return ""


def read_chat_format(
    tokenizer: PreTrainedTokenizerBase,
    tool: dict[str, Any],
    eos_token_ids: Collection[int],
    chat_template_kwargs: Mapping[str, Any],
) -> ChatFormat:
    """
    Read the format of a tokenizer's chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. It is not changed.
        tool (`dict`):
            The schema of the search tool.
        eos_token_ids (`Collection[int]`):
            The tokens that end a message of the model.
        chat_template_kwargs (`Mapping[str, Any]`):
            Further arguments of the chat template.

    Raises:
        `ValueError`: If the model cannot call the tool and answer in this template; the message says what was found and what
            to do.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"`protocol='tool_call'` needs a chat template, but the tokenizer has none. {ADVICE}")
    chat = Chat(tokenizer, tool, dict(chat_template_kwargs))
    # A call and its response
    text = chat.render_call(QUERY, _RESPONSE)
    escaped = escape(_RESPONSE) in text
    response = escape(_RESPONSE) if escaped else _RESPONSE
    written = {"tools": tool["function"]["description"], "calls": QUERY, "responses": response}
    if missing := [name for name, part in written.items() if part not in text]:
        raise ValueError(
            f"`protocol='tool_call'` needs a chat template that writes tools, their calls and their responses; {chat.label} "
            f"leaves out the {' and the '.join(missing)}. {ADVICE}"
        )
    response_template = find_response_template(tokenizer, chat.template)
    conversation, _, closing = text.rpartition(response)
    before, _, after = conversation.rpartition(QUESTION)[2].rpartition(QUERY)
    # An answer, as the last message and before another one
    answer = chat.render([USER, _ANSWERED]).rpartition(QUESTION)[2]
    after_answer = chat.render([USER, _ANSWERED, USER]).rpartition(ANSWER)[2]
    _check_tokens(tokenizer, before + after + closing + answer)
    call_end = _find_end(tokenizer, eos_token_ids, "call", [after])
    answer_end = _find_end(tokenizer, eos_token_ids, "answer", [answer.rpartition(ANSWER)[2], after_answer])
    call_tail, _, opening = after.partition(call_end)
    thought = _find_thought(response_template)
    found = ChatFormat(
        response_template=response_template,
        call_end=_id(tokenizer, call_end),
        answer_end=_id(tokenizer, answer_end),
        opening=opening,
        closing=closing,
        escaped=escaped,
        starts=_find_starts(chat, response_template, closing),
        user_hint=chat.user_hint(),
        thought=thought,
        call_marks=_find_call_marks(before, call_tail, answer + after_answer, tool["function"]["name"]),
        tags=_find_tags(before + after + closing + answer + (thought.close if thought else "")),
    )
    _check_calls(chat, found)
    return found


USER = {"role": "user", "content": QUESTION}
_ANSWERED = {"role": "assistant", "content": ANSWER}


class Chat:
    """
    Renders conversations with a chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        tool (`dict`):
            The schema of the search tool.
        kwargs (`dict`):
            Further arguments of the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tool: dict[str, Any], kwargs: dict[str, Any]):
        self.tokenizer = tokenizer
        self.tool = tool
        self.name: str = tool["function"]["name"]
        self.kwargs = kwargs
        self._arguments_as_text = False  # some templates take a text
        self.template = tokenizer.get_chat_template(tools=[tool])
        name = template_name(self.template)
        self.label = "this one" if name is None else f"this one (TRL's {name!r})"

    def render(self, messages: Sequence[Any], *, start: bool = False) -> str:
        """The text of a conversation, with the beginning of the model's next message if `start` is set."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=[self.tool], tokenize=False, add_generation_prompt=start, **self.kwargs
        )
        return str(text)

    def render_call(self, query: str, response: str, *, start: bool = True) -> str:
        """The text of a conversation with a call and its response."""
        try:
            return self.render([USER, self.call(query), self.response(response)], start=start)
        except (TemplateError, TypeError) as error:
            if self._arguments_as_text:
                raise ValueError(
                    f"`protocol='tool_call'` needs a chat template that renders tool calls, {self.label} fails: {error!r}. "
                    f"{ADVICE}"
                ) from error
        self._arguments_as_text = True
        return self.render_call(query, response, start=start)

    def call(self, query: str) -> dict[str, Any]:
        """A message with a call, in the form that the template takes once [`Chat.render_call`] has found it out."""
        arguments = {"query": query}
        written = json.dumps(arguments) if self._arguments_as_text else arguments
        call = {"type": "function", "function": {"name": self.name, "arguments": written}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    def user_hint(self) -> tuple[str, str] | None:
        """The texts around a message of the user, if the template cannot write a response after one without a call."""
        try:
            if QUERY in self.render([USER, _ANSWERED, self.response(QUERY)], start=True):
                return None
        except (TemplateError, TypeError):
            pass
        before, _, after = self.render([USER, _ANSWERED, {**USER, "content": QUERY}], start=True).rpartition(QUERY)
        return before.rpartition(ANSWER)[2], after

    def response(self, content: str) -> dict[str, str]:
        """A message with the response of the tool."""
        return {"role": "tool", "name": self.name, "content": content}


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    number: Any = tokenizer.convert_tokens_to_ids(token)
    return int(number)


def _check_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Raise an error if control tokens of the template are not in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    unknown = dict.fromkeys(mark for mark in _MARKUP.findall(text) if "|" in mark and mark not in vocabulary)
    if unknown:
        raise ValueError(
            f"`protocol='tool_call'`: this chat template writes {list(unknown)}, but the tokenizer has no such tokens. The "
            "template is that of another family than the tokenizer: take the tokenizer of the instruction-tuned model, set "
            "`tokenizer.chat_template` to a template of the model's own family, or set `protocol='tags'`."
        )


def _find_end(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Collection[int], kind: str, texts: list[str]) -> str:
    """The token that ends a message: the first one in the text after it."""
    tokens: Any = tokenizer.convert_ids_to_tokens(list(eos_token_ids))
    for text in texts:
        if ends := [token for token in tokens if token in text]:
            return str(min(ends, key=text.find))
    raise ValueError(
        f"`protocol='tool_call'`: after {'a call' if kind == 'call' else 'an answer'}, this chat template writes "
        f"{texts[-1]!r}, but generation ends only at {tokens}. Set `tokenizer.eos_token` to the token that ends a message of "
        "the template, or add it to `model.generation_config.eos_token_id`."
    )


def _find_starts(chat: Chat, response_template: Mapping[str, Any], closing: str) -> tuple[str, str]:
    """The beginning of the model's message after a message of the user, and after a response."""
    first = chat.render([USER], start=True).removeprefix(chat.render([USER]))
    # If the model's message continues after a response, the template does not begin it again
    without = chat.render_call(QUERY, _RESPONSE, start=False)
    text = chat.render_call(QUERY, _RESPONSE)
    following = text.removeprefix(without) if text.startswith(without) else closing
    anchor = response_template.get("start_anchor_pattern") or re.escape(response_template["start_anchor"])
    return first, following if re.search(anchor, following) else first + following


def _find_thought(response_template: Mapping[str, Any]) -> Thought | None:
    """The marks of a thought in a response template."""
    for name, field in response_template["fields"].items():
        if name not in ("role", "content", "tool_calls") and ("open" in field or "open_pattern" in field):
            close = field.get("close") or field.get("close_pattern", "").removesuffix(r"\s*")
            close = close[0] if isinstance(close, list) else re.sub(r"\\(.)", r"\1", close)
            return Thought(name, close, has_opening=not field.get("open_pattern", "").startswith("(?="))
    return None


def _find_call_marks(before: str, after: str, answer: str, name: str) -> tuple[str, ...]:
    """The markup found in calls but not in answers; without any, the text of a call before the name of the tool."""
    marks = dict.fromkeys(mark for mark in _MARKUP.findall(before + after) if mark not in answer)
    if marks:
        return tuple(marks)
    same = next((n for n, (a, b) in enumerate(zip(before, answer, strict=False)) if a != b), 0)
    call = before[same:]
    return (call[: call.find(name)].lstrip("{"),)


def _find_tags(text: str) -> tuple[str, ...]:
    """The names of the tags in a text. Control tokens with a bar are not among them: they are tokens of the vocabulary."""
    return tuple(sorted({mark.strip("</>") for mark in _MARKUP.findall(text) if "|" not in mark} - {""}))


def _check_calls(chat: Chat, found: ChatFormat) -> None:
    """Raise an error if the calls of the template are not read as they were written."""
    tokenizer = chat.tokenizer
    for query in (QUERY, *_HARD_QUERIES):
        call = chat.render_call(query, "").rpartition(QUESTION)[2]
        if query == QUERY:  # a message is read from its tokens
            call = str(tokenizer.decode(tokenizer(call, add_special_tokens=False)["input_ids"]))
        try:
            message = tokenizer.parse_response(call, found.response_template, prefix="", tools=[chat.tool])
            read = first_query(message, chat.name)
        except ValueError as error:
            read = str(error)
        if read != query:
            raise ValueError(
                f"`protocol='tool_call'` needs a chat template whose calls are read as they are written, but with {chat.label} "
                f"a search for {query!r} is read as {read!r}. The response template of this family is wrong, or the tokenizer "
                f"does not decode a call as it was encoded. {ADVICE}"
            )
