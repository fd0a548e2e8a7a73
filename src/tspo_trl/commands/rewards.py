"""The reward functions that a command line names."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..rewards import exact_match_reward, f1_reward, format_reward

REWARDS = {function.__name__: function for function in (exact_match_reward, f1_reward, format_reward)}


def find_rewards(
    names: Sequence[str] | None, weights: Sequence[float] | None = None
) -> list[Callable[..., Any]] | None:
    """
    Find reward functions by name, as TRL's own script does.

    Args:
        names (`Sequence[str]`, *optional*):
            Names of the functions in [`~tspo_trl.rewards`], or import paths such as `"my_module.my_reward"`, also of modules in
            the current folder.
        weights (`Sequence[float]`, *optional*):
            `reward_weights`: one for each function.

    Returns:
        `list[Callable]` or `None`: The functions, `None` without names.

    Raises:
        `ValueError`: If there is no such function, two have the same name, or the number of weights differs.
    """
    count = 1 if names is None else len(names)  # `exact_match_reward`, without names
    if weights is not None and len(weights) != count:
        functions = "the exact match alone, because `reward_funcs` is not given" if names is None else list(names)
        raise ValueError(
            f"`reward_weights` must have one weight for each reward function, got {list(weights)} for {functions}."
        )
    if names is None:
        return None
    if not names:
        raise ValueError(f"`reward_funcs` must name at least one function, for instance one of {list(REWARDS)}.")
    found = [REWARDS[name] if name in REWARDS else _import(name) for name in names]
    titles = [getattr(function, "__name__", "") for function in found]
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        raise ValueError(
            f"`reward_funcs`: two functions have the name {twice!r}, but metrics are logged under this name. Rename one."
        )
    return found


def _import(path: str) -> Callable[..., Any]:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(
            f"`reward_funcs`: {path!r} is neither one of {list(REWARDS)} nor an import path such as 'my_module.my_reward'."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not search the current folder
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports one that is not
        raise ValueError(
            f"`reward_funcs`: there is no module {module_name!r} for {path!r}, in the current folder or installed."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        what = "does not exist" if function is None else f"has the type {type(function).__name__}"
        raise ValueError(f"`reward_funcs`: {path!r} must be a function, but {name!r} {what} in {module.__file__}.")
    return function
