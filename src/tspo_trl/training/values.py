"""Checks of the values of options: against the annotations of their dataclass, and against the range they can have."""

import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

_TYPES: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list[str]: "a list of strings",
    list[float]: "a list of numbers",
    dict[str, str]: "a mapping of strings",
    NoneType: "None",
}
#: Options that take more than their annotation in TRL, transformers or our commands says.
_MORE: dict[str, tuple[Any, ...]] = {
    "resume_from_checkpoint": (bool,),
    "scale_rewards": (bool,),
    "fsdp": (bool, list),
    "fsdp_config": (bool,),
    "debug": (list, NoneType),
    "dataset_columns": (list[str],),
}
#: Options of all commands with their smallest and their largest value.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("steps_per_generation", "generation_batch_size", "num_iterations", "num_generations_eval"),
            *("max_sampling_rounds", "num_demonstrations", "max_length", "lora_r", "lora_alpha"),
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(
        (
            *("retrieval_cache_size", "folr_alpha", "learning_rate", "beta", "epsilon", "epsilon_high", "delta"),
            *("weight_decay", "warm_start_steps"),
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(
        ("max_retrieval_failure_rate", "failed_share", "top_p", "min_p", "top_entropy_quantile", "lora_dropout"),
        (0, 1),
    ),
    "num_generations": (2, math.inf),
    "seed": (0, 2**32 - 1),
}
_ABOVE_ZERO = ("temperature", "repetition_penalty", "top_p", "sapo_temperature_neg", "sapo_temperature_pos")
_FINITE = ("folr_alpha", "success_threshold", "learning_rate", "beta", "temperature", "num_train_epochs")
#: Options that are a mapping or the path of a file with one.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


def check_values(config: Any, choices: Mapping[str, Sequence[str]], **narrower: Any) -> None:
    """
    Check the values of a configuration, before TRL uses them.

    Args:
        config ([`~transformers.TrainingArguments`]):
            The configuration.
        choices (`Mapping[str, Sequence[str]]`):
            The values of options which TRL would check only in the first step.
        **narrower (`Any`):
            Annotations that replace those of the dataclass.

    Raises:
        `ValueError`: For the first value of a wrong type, outside its range or unknown.
    """
    check_types(config, **narrower)
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise ValueError(f"`{name}` must be one of {list(known)}, got {getattr(config, name)!r}.")
    check_ranges(config)
    check_length(config)
    check_mappings(config)
    check_reporters(config.report_to)


def check_types(config: Any, **narrower: Any) -> None:
    """
    Refuse values of a wrong type, which would fail later or be misread: `"0.5"`, or a string for a list.

    Args:
        config (`Any`):
            An object of a dataclass.
        **narrower (`Any`):
            Annotations that replace those of the dataclass.

    Raises:
        `ValueError`: For the first such value. The message names the option, the value and what is expected.
    """
    for name, kind in (get_type_hints(type(config)) | narrower).items():
        if name in config.__dataclass_fields__:
            check_type(name, getattr(config, name), kind)


def check_type(name: str, value: Any, kind: Any) -> None:
    """
    Refuse a value that does not fit the annotation of its option.

    Args:
        name (`str`):
            The name of the option.
        value (`Any`):
            Its value. Objects that no file or command line can hold are left to TRL, for instance a `torch.dtype`.
        kind (`Any`):
            The annotation.

    Raises:
        `ValueError`: If it does not fit.
    """
    if not isinstance(value, (str, bool, Real, list, tuple, dict, NoneType)):
        return
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    if any(isinstance(one, type) and issubclass(one, Enum) for one in kinds):  # a string is one of its values
        kinds = tuple(one for one in kinds if one is not str)
    if not any(_is_a(value, one) for one in (*kinds, *_MORE.get(name, ()))):
        expected = " or ".join(dict.fromkeys(map(_name, kinds)))
        raise ValueError(f"`{name}` must be {expected}, got {value!r}.")


def check_ranges(config: Any) -> None:
    """
    Refuse numbers outside the range of their option.

    Args:
        config (`Any`):
            An object with options as attributes, whose types are checked.

    Raises:
        `ValueError`: For the first such number. The message names the option, the value and the range.
    """
    for name, (smallest, largest) in _RANGES.items():
        value = getattr(config, name, None)
        if value is None or smallest <= value <= largest:
            continue
        expected = f"at least {smallest}" if largest == math.inf else f"between {smallest} and {largest}"
        raise ValueError(f"`{name}` must be {expected}, got {value}.")
    for name in _ABOVE_ZERO:
        if (value := getattr(config, name, None)) is not None and not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
    for name in _FINITE:
        if (value := getattr(config, name, None)) is not None and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")


def check_mappings(config: Any) -> None:
    """
    Refuse strings that do not hold the mapping which an option expects.

    Args:
        config ([`~transformers.TrainingArguments`]):
            The configuration.

    Raises:
        `ValueError`: For the first such string.
    """
    for name in config._VALID_DICT_FIELDS:
        value = getattr(config, name)
        if not isinstance(value, str) or (name in _FILES and not value.startswith("{")):
            continue
        try:
            reason = "" if isinstance(json.loads(value), dict) else "it is no object"
        except json.JSONDecodeError as error:
            reason = str(error)
        if reason:
            raise ValueError(f"`{name}` must be a JSON object such as '{{\"name\": 1}}', got {value!r}: {reason}.")
    if config.optim_args and any(part.count("=") != 1 for part in config.optim_args.split(",")):
        raise ValueError(f"`optim_args` must be like 'name=1,other=2', got {config.optim_args!r}.")


def check_reporters(report_to: str | Sequence[str] | None) -> None:
    """
    Refuse unknown tools of `report_to`, which transformers would report only after the model is loaded.

    Args:
        report_to (`str` or `Sequence[str]`, *optional*):
            The tools, `"all"` or `"none"`.

    Raises:
        `ValueError`: If there is no such tool.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            raise ValueError(
                f"`report_to` must be 'none', 'all' or some of {list(INTEGRATION_TO_CALLBACK)}, got {name!r}. Installed are "
                f"{get_available_reporting_integrations()}."
            )


def check_length(config: Any) -> None:
    """
    Refuse a configuration with which nothing would be trained.

    Args:
        config ([`~transformers.TrainingArguments`]):
            The configuration.

    Raises:
        `ValueError`: If it has neither steps nor epochs.
    """
    if config.max_steps != -1 and config.max_steps < 1:
        raise ValueError(
            f"`max_steps` must be at least 1, or -1 for the number of steps of `num_train_epochs`, got {config.max_steps}."
        )
    if config.max_steps == -1 and not config.num_train_epochs > 0:
        raise ValueError(
            f"Nothing would be trained: `num_train_epochs` must be above 0 without `max_steps`, got {config.num_train_epochs}."
        )


def _choices(kind: Any) -> list[Any]:
    """The values of an enumeration or of a `Literal`."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value can be used where a type is expected: a whole number as a `float`, but no boolean as a number."""
    if choices := _choices(kind):
        return value in choices
    if kind in (int, float):
        is_number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return is_number and not math.isnan(value)
    if get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_is_a(item, *get_args(kind)) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is_a(item, get_args(kind)[1]) for item in value.values())
    return kind is Any or isinstance(value, (str, PathLike) if kind is str else kind)


def _name(kind: Any) -> str:
    """What a type is called in an error."""
    if choices := _choices(kind):
        return f"one of {choices}"
    if get_origin(kind) is dict or kind is dict:
        return _TYPES.get(kind, "a mapping")
    return _TYPES.get(kind) or str(getattr(kind, "__name__", kind))
