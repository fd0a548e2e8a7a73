"""Arguments and options of TRL that have no meaning in a search loop, and options that do not fit a model."""

import logging
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten
from typing import Any

from ..rollout.search_config import SEARCH_CONFIG_NAME, SearchConfig
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


def report_other_protocol(args: TSPOConfig, model: Any) -> None:
    """
    Log that a model was saved with another protocol, for instance by a cold start: it then has to learn a new format.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model. Only folders are read.
    """
    file = Path(model) / SEARCH_CONFIG_NAME if isinstance(model, str) else None
    if file is None or not file.is_file() or args.process_index > 0:
        return
    saved = SearchConfig.load(file)
    if saved.protocol != args.protocol:
        logger.warning(
            "The model %r was trained with `protocol=%r`, and this run has `protocol=%r`: the model does not know its format.",
            model,
            saved.protocol,
            args.protocol,
        )
