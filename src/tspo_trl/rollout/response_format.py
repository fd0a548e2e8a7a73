"""The response template of a chat template, with which a tokenizer parses messages. Only this module of the package needs TRL.

TRL knows its chat templates by their exact text. Its training versions have other texts and are mapped to their originals.
"""

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

_ADVICE = (
    'set `tokenizer.response_template` (see "Response parsing" in the documentation of transformers), or set '
    "`protocol='tags'`."
)

_HARMONY_CALL = (
    r"(?:<\|channel\|>commentary\s+)?to=functions\.(?P<name>[^\s<]+)\s*(?:<\|channel\|>commentary)?\s*"
    r"(?:(?:<\|constrain\|>)?json)?<\|message\|>"
)


def find_response_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> dict[str, Any]:
    """
    The response template of a tokenizer: its own, or else TRL's for its chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. It is not changed.
        chat_template (`str`):
            The chat template that renders its conversations.

    Raises:
        `ValueError`: If the tokenizer has no response template and TRL has none for the chat template.
    """
    from trl.chat_template_utils import gptoss_template

    own: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
    if own is not None:
        return own
    name = template_name(chat_template)
    found = _of_trl(tokenizer, _original(chat_template))
    if found is None:
        raise ValueError(_unknown(tokenizer, name, chat_template))
    return _with_harmony_calls(found) if found is gptoss_template else found


def template_name(chat_template: str) -> str | None:
    """
    The name that TRL has for a chat template, for instance `"qwen3"` or `"qwen3_training"`.

    Args:
        chat_template (`str`):
            The chat template.
    """
    return _names().get(chat_template)


def _names() -> dict[str, str]:
    """The names of TRL's chat templates by their texts."""
    from trl import chat_template_utils

    suffix = "_chat_template"
    templates = {name: text for name, text in vars(chat_template_utils).items() if name.endswith(suffix)}
    return {text: name.removesuffix(suffix) for name, text in templates.items() if isinstance(text, str)}


def _original(chat_template: str) -> str:
    """The template that a training template of TRL was made from; other templates as they are."""
    names = _names()
    texts = {name: text for text, name in names.items()}
    return texts.get(names.get(chat_template, "").removesuffix("_training"), chat_template)


def _of_trl(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> dict[str, Any] | None:
    """TRL's response template for a chat template, if it has one."""
    from trl.chat_template_utils import add_response_schema

    reader: Any = copy.copy(tokenizer)
    reader.chat_template = chat_template
    try:
        add_response_schema(reader)
    except ValueError:
        return None
    found: dict[str, Any] = reader.response_template
    return found


def _with_harmony_calls(template: dict[str, Any]) -> dict[str, Any]:
    """
    A response template that also reads calls as gpt-oss writes them, with the channel before the recipient (the "harmony"
    format, https://cookbook.openai.com/articles/openai-harmony). The chat template, and TRL, write the recipient first.
    """
    template = copy.deepcopy(template)
    template["fields"]["tool_calls"]["open_pattern"] = _HARMONY_CALL
    return template


def _unknown(tokenizer: PreTrainedTokenizerBase, name: str | None, chat_template: str) -> str:
    """Why a chat template cannot be read, and what to do."""
    from trl import chat_template_utils

    if name is not None:
        return (
            f"`protocol='tool_call'` cannot read the messages of this chat template: it is TRL's {name!r}, for which TRL has "
            f"no response template. Take a model of another family, {_ADVICE}"
        )
    names, lines = _names(), set(chat_template.split("\n"))
    shared = {text: len(lines & set(text.split("\n"))) / len(lines | set(text.split("\n"))) for text in names}
    nearest = max(shared, key=lambda text: shared[text])
    ways = f"set `tokenizer.chat_template = trl.chat_template_utils.{names[nearest]}_chat_template`"
    template = _of_trl(tokenizer, _original(nearest))
    if template is not None:
        (variable,) = {key for key, value in vars(chat_template_utils).items() if value is template}
        ways += f", or keep it and set `tokenizer.response_template = trl.chat_template_utils.{variable}`"
    return (
        "`protocol='tool_call'` cannot read the messages of this chat template: the tokenizer has no "
        "`response_template`, and TRL does not know the template. "
        f"TRL's {names[nearest]!r} is the most similar: it shares {shared[nearest]:.0%} of the lines. If this template is a "
        f"changed version of it, {ways}. Otherwise {_ADVICE}"
    )
