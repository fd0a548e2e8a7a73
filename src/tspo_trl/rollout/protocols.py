"""The protocols by name, and the function that makes one."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .protocol import SearchProtocol
from .tags import TagProtocol
from .tool_call import ToolCallProtocol

ProtocolName = Literal["tags", "tool_call"]
PROTOCOLS: dict[str, type[SearchProtocol]] = {"tags": TagProtocol, "tool_call": ToolCallProtocol}


def make_protocol(
    name: ProtocolName,
    tokenizer: PreTrainedTokenizerBase,
    max_searches: int,
    *,
    eos_token_ids: Collection[int],
    prompt_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> SearchProtocol:
    """
    Make a protocol by its name.

    Args:
        name (`str`):
            `"tags"` or `"tool_call"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of the model.
        max_searches (`int`):
            Maximum number of searches, as stated in the prompt.
        eos_token_ids (`Collection[int]`):
            The tokens that end a message of the model.
        prompt_template (`str`, *optional*):
            Template of the prompts, with `{question}` in it. Defaults to the template of the protocol.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Additional arguments of the chat template, for instance `{"enable_thinking": False}`.

    Raises:
        `ValueError`: If the tokenizer does not support the protocol; the message says why.
    """
    prompts: dict[str, Any] = {"prompt_template": prompt_template, "chat_template_kwargs": chat_template_kwargs}
    if name == "tool_call":
        return ToolCallProtocol(tokenizer, max_searches, eos_token_ids=eos_token_ids, **prompts)
    return TagProtocol(tokenizer, max_searches, **prompts)
