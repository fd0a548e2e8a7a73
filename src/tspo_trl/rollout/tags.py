"""Actions as tags: `<search>query</search>` and `<answer>…</answer>`."""

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from .limits import SearchLimits
from .protocol import SearchProtocol
from .tokens import with_plain_tokens
from .trajectory import Action

_ACTION = re.compile(r"<(search|answer)>((?:(?!</?(?:search|answer|information)>).)*)</\1>", re.DOTALL)
_ATTEMPT = re.compile(r"</?(?:search|answer)>")
_TAGS = ("search", "answer", "information", "think")

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


class TagProtocol(SearchProtocol):
    """
    Actions as tags: `<search>query</search>` and `<answer>…</answer>`, passages between `<information>` and
    `</information>`, as in Search-R1 (arXiv 2503.09516).

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        max_searches (`int`, *optional*, defaults to `4`):
            Maximum number of searches, named in the prompt.
        prompt_template (`str`, *optional*):
            Template of the prompts, with `{question}` and optionally `{max_searches}` in it. Defaults to `PROMPT`.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Further arguments of the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        `ValueError`: If the tokenizer does not decode the tags of a turn as they were written.
    """

    stop_strings = ("</search>", "</answer>")
    default_prompt_template = PROMPT

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_searches: int = SearchLimits.max_searches,
        *,
        prompt_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        # Turns are decoded without special tokens. Tags that are special tokens must be kept.
        tokenizer = with_plain_tokens(tokenizer, [f"<{slash}{tag}>" for tag in _TAGS for slash in ("", "/")])
        _check_tags(tokenizer)
        super().__init__(
            tokenizer,
            max_searches,
            opening="\n\n<information>",
            closing="</information>\n\n",
            before=self.stop_strings[0],
            tags=_TAGS,
            prompt_template=prompt_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        self._hint = self._encode(f"\n\n{HINT}\n\n", self.stop_strings[0])

    def prompt(self, question: str) -> str | list[dict[str, str]]:
        """
        The prompt for a question: a conversation of one user message if the tokenizer has a chat template, else a text.

        Args:
            question (`str`):
                The question.
        """
        text = self._write_prompt(question)
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
            turn that was cut before an action; `"none"` if the model ended its message without any tag of an action.
        """
        match = _ACTION.search(text)
        if match is None:
            return ("none" if ended and not _ATTEMPT.search(text) else "invalid"), ""
        content = match.group(2).strip()
        if match.group(1) == "search":
            return ("search", content) if content else ("invalid", "")
        return "answer", content

    def write(self, action: Action, content: str, *, after_response: bool) -> list[int]:
        """
        Write a turn as the prompt asks for it, without a thought: `<search> query </search>` or `<answer> answer </answer>`. See
        [`SearchProtocol.write`].

        Args:
            action (`str`):
                `"search"` or `"answer"`.
            content (`str`):
                The query or the answer.
            after_response (`bool`):
                Whether the turn follows the passages of a search. It is written in the same way.
        """
        return self._encode(f"<{action}> {content} </{action}>", "\n")  # prompts and observations end with a line feed

    @property
    def hint_ids(self) -> list[int]:
        """The observation after an invalid action."""
        return list(self._hint)


def _check_tags(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise an error if a turn with tags cannot be read after it was encoded and decoded."""
    for written in ("<search>a</search>", "<answer>a</answer>"):
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        decoded = str(tokenizer.decode(ids, skip_special_tokens=True))
        opening, closing = written[: written.index(">") + 1], written[written.index("</") :]
        if opening not in decoded or closing not in decoded:
            raise ValueError(
                f"`protocol='tags'` reads actions as {written!r}, but the tokenizer decodes this text as {decoded!r}. "
                "Add the tags to its vocabulary with `tokenizer.add_tokens([...], special_tokens=False)`, or take a "
                "tokenizer that keeps text as it is."
            )
