"""Preparing question-answer data sets for the trainer."""

from collections.abc import Callable, Mapping
from itertools import islice
from textwrap import shorten
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset

from ..questions.check import check_columns, check_row
from ..rollout.protocol import SearchProtocol

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)

#: Names under which TRL or this trainer passes something else to reward functions. `completion` is not passed, as in TRL.
RESERVED = (
    *("prompts", "completions", "completion_ids", "trajectory", "trajectories"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)
_IMAGES = ("image", "images")  # TRL trains on images if there is such a column


def check_dataset(dataset: AnyDataset, name: str = "train_dataset", *, unused_removed: bool | None = False) -> None:
    """
    Check the columns of a data set for training, and that its first row has no images.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data set.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the data set in error messages.
        unused_removed (`bool`, *optional*, defaults to `False`):
            Whether columns are removed that training does not need, so that reward functions do not get them.

    Raises:
        `TypeError`: If it is not a data set.
        `ValueError`: If it is empty, a column is missing, the name of a column is that of another argument of reward
            functions, or there is an image.
    """
    check_columns(dataset, name)
    first: Mapping[str, Any] = next(iter(dataset))
    found = [] if unused_removed else [column for column in dataset.column_names or first if column in RESERVED]
    if found:
        raise ValueError(
            f"`{name}` has columns with names of other arguments of reward functions: {found}. Rename them, for instance "
            f"`dataset.rename_column({found[0]!r}, {'my_' + found[0]!r})`, or remove them with "
            f"`dataset.remove_columns({found})`."
        )
    _check_no_image(first, f"`{name}`, row 0")


def prepare_dataset(
    dataset: AnyDataset,
    protocol: SearchProtocol,
    name: str = "train_dataset",
    max_context_length: int | None = None,
    *,
    unused_removed: bool | None = False,
) -> AnyDataset:
    """
    Check a data set and add a `prompt` column.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `golden_answers` (a non-empty list of strings) and `question` (a string) or `prompt` (a string or
            a conversation). A `prompt` is used unchanged; without one, the protocol writes it from the `question`.
            Other columns are kept and passed to the reward functions; only `image` and `images`, which must be empty, are
            left out.
        protocol ([`SearchProtocol`]):
            Protocol that writes the prompts.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            Name of the data set in error messages.
        max_context_length (`int`, *optional*):
            Maximum number of tokens of a prompt and its completion together. A prompt must leave room for a token.
        unused_removed (`bool`, *optional*, defaults to `False`):
            Whether the trainer removes columns that training does not need, see [`check_dataset`].

    Returns:
        The same kind of data set, with the columns `prompt`, `question` and `golden_answers`.

    Raises:
        `ValueError`: If the data set is empty, a column is missing or has a reserved name, a value is not as described, or a
            prompt is too long; the message names the row, the column and the value found. The chat template is tried with
            the first row. Rows of an [`~datasets.IterableDataset`] are checked when they are read.
    """
    check_dataset(dataset, name, unused_removed=unused_removed)

    def prepare(row: dict[str, Any], index: int) -> dict[str, Any]:
        where = f"`{name}`, row {index}"
        _check_no_image(row, where)
        _check_prompt(row, where, protocol)
        prompt = row["prompt"] if row.get("prompt") is not None else protocol.prompt(row["question"])
        if index == 0 and not isinstance(prompt, str):
            _check_template(prompt, where, protocol)
        if max_context_length is not None:
            check_length(prompt, where, protocol, max_context_length)
        return {
            "prompt": prompt,
            "question": row["question"] if row.get("question") is not None else _last_user_text(row["prompt"]),
        }

    images = [column for column in _IMAGES if column in (dataset.column_names or _IMAGES)]
    if isinstance(dataset, Dataset):
        return dataset.map(prepare, with_indices=True, remove_columns=images, desc=f"Preparing {name}")
    return dataset.map(prepare, with_indices=True, remove_columns=images)


def map_datasets(function: Callable[[Any, str], Any], train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """
    Apply a function to the training set and each evaluation set.

    Args:
        function (`Callable[[Any, str], Any]`):
            Function that gets a data set and its name in error messages.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training set.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], a `dict` of them or `None`):
            The evaluation sets.

    Returns:
        `tuple`: The results for the training set and the evaluation sets, in the same form.
    """
    if isinstance(eval_dataset, dict):
        evaluated: Any = {k: function(v, f"eval_dataset[{k!r}]") for k, v in eval_dataset.items()}
    else:
        evaluated = None if eval_dataset is None else function(eval_dataset, "eval_dataset")
    return function(train_dataset, "train_dataset"), evaluated


def check_best_metric(metric: str | None, eval_dataset: Any) -> None:
    """
    Check that the metric for the best model belongs to one of the evaluation sets, if there are several.

    Args:
        metric (`str`, *optional*):
            `metric_for_best_model`, with or without `eval_`.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], a `dict` of them or `None`):
            The evaluation sets.

    Raises:
        `ValueError`: If it belongs to none of them.
    """
    if metric is None or not isinstance(eval_dataset, dict):
        return
    prefixes = [f"eval_{name}_" for name in eval_dataset]
    if not f"eval_{metric.removeprefix('eval_')}".startswith(tuple(prefixes)):
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but with a `dict` of evaluation data sets the metrics begin with "
            f"one of {prefixes}: for instance {prefixes[0] + 'reward'!r}."
        )


def _check_no_image(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row with images. Empty columns occur in data sets that have images elsewhere."""
    for column in _IMAGES:
        value = row.get(column)
        if value is not None and not (
            isinstance(value, (str, list, tuple)) and not any(item is not None for item in value)
        ):
            raise ValueError(
                f"{where}: {column!r} must be empty, found {shorten(repr(value), 80, placeholder=' …')}: the search loop is "
                f"for text only. Remove the column with `dataset.remove_columns({column!r})`, or rename it."
            )


def _check_prompt(row: Mapping[str, Any], where: str, protocol: SearchProtocol) -> None:
    """Check a row, and that the protocol can use its prompt."""
    prompt = row.get("prompt")
    check_row(row, where, needs_question=prompt is None)
    if prompt is None:
        return
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in prompt):
            raise ValueError(
                f"{where}: a conversational 'prompt' must be a list of messages with 'role' and 'content', found "
                f"{prompt!r}."
            )
        kinds = {block.get("type") for m in prompt if isinstance(m["content"], list) for block in m["content"]}
        if kinds - {"text"}:
            raise ValueError(
                f"{where}: 'prompt' has content of the type {sorted(map(str, kinds - {'text'}))}, but the search loop is for "
                "text only. Leave out the row."
            )
        if protocol.tokenizer.chat_template is None:
            raise ValueError(
                f"{where}: 'prompt' is conversational, but the tokenizer has no chat template. Set "
                "`tokenizer.chat_template`, pass prompts as plain text, or give a 'question' column without 'prompt'."
            )
    elif not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: 'prompt' must be a non-empty string or a conversation, found {prompt!r}.")
    elif protocol.tools:
        raise ValueError(
            f"{where}: with `protocol='tool_call'`, 'prompt' must be a conversation (a list of messages with 'role' and "
            f"'content'), found {prompt!r}."
        )


def _check_template(prompt: list[dict[str, Any]], where: str, protocol: SearchProtocol) -> None:
    """Check that the chat template accepts a conversation: some raise an error for a system message or a list of texts."""
    try:
        protocol.encode_prompts([prompt])
    except Exception as error:  # whatever a template raises
        raise ValueError(
            f"{where}: the chat template of the tokenizer cannot write 'prompt' {shorten(repr(prompt), 200, placeholder=' …')}: "
            f"{error}."
        ) from error


def check_length(prompt: str | list[dict[str, Any]], where: str, protocol: SearchProtocol, longest: int) -> None:
    """
    Check that a prompt leaves room for a token.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, a text or a conversation.
        where (`str`):
            Name of the data set and number of the row in error messages.
        protocol ([`SearchProtocol`]):
            Protocol that encodes the prompt. Prompts with fewer bytes than `longest` are not encoded.
        longest (`int`):
            Maximum number of tokens of a prompt and its completion together.

    Raises:
        `ValueError`: If it does not; the message names the row.
    """
    others = 64 if isinstance(prompt, str) else 4096  # more than the special tokens, or the words of a chat template
    if len(str(prompt).encode("utf-8", errors="replace")) + others < longest:
        return
    count = len(protocol.encode_prompts([prompt])[0])
    if count >= longest:
        raise ValueError(
            f"{where}: the prompt has {count} tokens, but the model takes at most {longest} tokens of prompt and completion "
            "together. Shorten the question, or leave out the row."
        )


def _last_user_text(prompt: str | list[dict[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    contents = [m["content"] for m in prompt if m["role"] == "user" and isinstance(m["content"], str)]
    return contents[-1] if contents else ""


def find_prompt_template(dataset: Any, protocol: SearchProtocol) -> str | None:
    """
    Find the template of the prompts of a data set, so that prompts can be written for other questions.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `question`, `prompt`, or both.
        protocol ([`SearchProtocol`]):
            Protocol that writes the prompts of rows without one.

    Returns:
        `str` or `None`: The template; `None` if the first 1000 prompts do not have a common template.
    """
    conversational = not isinstance(protocol.prompt("?"), str)
    template = None
    for row in islice(dataset, 1000):
        prompt, question = row.get("prompt"), row.get("question")
        if prompt is None:
            found: str | None = protocol.prompt_template
            if "prompt" not in row:
                return found
        elif question and conversational and isinstance(prompt, list) and [m["role"] for m in prompt] == ["user"]:
            found = _template(str(prompt[0]["content"]), question, template)
        elif question and not conversational and isinstance(prompt, str):
            found = _template(prompt, question, template)
        else:
            return None
        if found is None or template not in (None, found):
            return None
        template = found
    return template


def _template(text: str, question: str, known: str | None) -> str | None:
    if known is not None and known.replace("{question}", question) == text:
        return known
    return text.replace(question, "{question}", 1) if question in text else None
