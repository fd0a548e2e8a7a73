"""Arguments and options of TRL that have no meaning in a search loop, and what to use instead."""

import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from textwrap import shorten
from typing import Any

from .config import TSPOConfig

logger = logging.getLogger(__name__)

_OWN_METRIC = (
    "an evaluation logs the metrics of its rollouts. Compute another one in a function of `reward_funcs`: it calls "
    "`log_metric`, or has the weight 0 in `reward_weights`"
)
_ARGUMENTS = {  # of `GRPOTrainer` or `Trainer` -> what applies instead
    "tools": "the only tool is the search. Pass its `retriever`, and set `protocol='tool_call'` for the tool calls of the "
    "chat template",
    "rollout_func": "rollouts are written by the search loop. Pass its `retriever`, and set its limits in `TSPOConfig`",
    "environment_factory": "the environment is the `retriever`. Pass it, and the rewards as `reward_funcs`",
    "compute_metrics": _OWN_METRIC,
    "preprocess_logits_for_metrics": _OWN_METRIC,
    "compute_loss_func": "set `loss_type` in `TSPOConfig`, or override `compute_turn_advantages`",
    "data_collator": "rows are not collated, and rollouts are padded by the trainer. Leave it out",
    "model_init": "pass the `model` itself",
    "ref_model": "the reference is a copy of `model`. Set `beta` in `TSPOConfig` to use it",
    "tokenizer": "pass it as `processing_class`",
    "optimizer_cls_and_kwargs": "pass `optimizers`, or set `optim` in `TSPOConfig`",
}


def check_keywords(given: Mapping[str, Any], known: Collection[str]) -> None:
    """
    Refuse arguments that a [`TSPOTrainer`] does not have. Those of other trainers may be `None`.

    Args:
        given (`Mapping[str, Any]`):
            The arguments, by name.
        known (`Collection[str]`):
            Names of arguments that it has, for suggestions.

    Raises:
        `TypeError`: If there is one; the message says what to use instead.
    """
    for name, value in given.items():
        if name not in _ARGUMENTS:
            close = get_close_matches(name, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise TypeError(f"`TSPOTrainer` got an unexpected keyword argument {name!r}.{hint}")
        if value is not None:
            found = shorten(repr(value), 100, placeholder=" …")
            raise TypeError(f"`TSPOTrainer` has no argument `{name}`, got {found}: {_ARGUMENTS[name]}.")


def report_unused_options(args: TSPOConfig) -> None:
    """
    Log a warning for an option of TRL that is set and has no effect.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
    """
    if args.max_tool_calling_iterations is not None and args.process_index == 0:
        logger.warning(
            "`max_tool_calling_iterations` (%s) has no effect: `max_searches` (%d) limits the searches of a rollout.",
            args.max_tool_calling_iterations,
            args.max_searches,
        )
