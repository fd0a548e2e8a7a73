"""Checks of the arguments, the model, its tokenizer and the batches, before anything large is loaded."""

import logging
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_liger_kernel_available

from .. import rewards
from ..engines.vllm import check_vllm
from ..retrieval.results import check_retriever
from ..support.paths import check_model_path, suggest_path
from .config import TSPOConfig
from .datasets import check_best_metric, check_dataset, map_datasets
from .multimodal import load_options, multimodal_config
from .unsupported import report_other_protocol, report_unused_options

logger = logging.getLogger(__name__)


def check_setup(
    args: Any,
    retriever: Any,
    train_dataset: Any,
    eval_dataset: Any,
    model: Any,
    peft_config: Any = None,
    reward_funcs: Any = None,
) -> None:
    """
    Check all arguments of a [`TSPOTrainer`] that can be checked before its model and its tokenizer are loaded, and log
    what has no effect or is left out.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
        retriever ([`Retriever`], *optional*):
            The retriever.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training set.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], a `dict` of them or `None`):
            The evaluation sets.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of a new adapter.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            The outcome rewards.

    Raises:
        `TypeError`, `ValueError`, `ImportError` or `FileNotFoundError`: As the functions below.
    """
    check_reward_names(reward_funcs)
    check_arguments(args, retriever, train_dataset, eval_dataset)
    check_model_path(model)
    check_adapter(model, peft_config)
    check_batches(args, train_dataset, eval_dataset)
    report_left_out(args, train_dataset)
    report_unused_options(args)
    report_other_protocol(args, model)


def check_arguments(args: Any, retriever: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """
    Check the arguments of a [`TSPOTrainer`] that can be checked without its model.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
        retriever ([`Retriever`], *optional*):
            The retriever.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training set.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], a `dict` of them or `None`):
            The evaluation sets.

    Raises:
        `TypeError`: If an argument has a wrong type.
        `ValueError`: If an argument is missing, a column is missing, or an option cannot be used.
        `ImportError`: If a package that an option needs cannot be used.
    """
    if not isinstance(args, TSPOConfig):
        raise TypeError(f"`args` must be a `TSPOConfig`, got `{type(args).__name__}`.")
    if retriever is not None:
        check_retriever(retriever)
    elif args.retrieval_log is None:
        raise ValueError(
            "`retriever` must be an object with a method `search(queries, k)`, for instance "
            "`BM25Retriever.from_jsonl('corpus.jsonl')`, got None. Only a run that is repeated from its `retrieval_log` "
            "needs none."
        )
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: rows with 'question' and 'golden_answers'.")
    check = partial(check_dataset, unused_removed=args.remove_unused_columns)
    map_datasets(check, train_dataset, eval_dataset)
    check_best_metric(args.metric_for_best_model, eval_dataset)
    check_packages(args)


def check_packages(args: Any) -> None:
    """
    Check that the packages which a configuration needs are installed.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration.

    Raises:
        `ImportError`: If one is not.
    """
    if getattr(args, "use_vllm", False):  # of TSPOConfig only
        check_vllm()
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("`use_liger_kernel=True` needs the package liger-kernel: pip install liger-kernel")


def check_reward_names(reward_funcs: Any) -> None:
    """
    Refuse the names of the reward functions of this package, which TRL would look for as reward models on the Hub.

    Args:
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            The outcome rewards.

    Raises:
        `TypeError`: If one of them is such a name.
    """
    for name in reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]:
        if isinstance(name, str) and callable(getattr(rewards, name, None)):
            raise TypeError(
                f"`reward_funcs` must hold functions, or names of reward models, got {name!r}. Pass the function: "
                f"`from tspo_trl.rewards import {name}`."
            )


def check_adapter(model: Any, peft_config: Any) -> None:
    """
    Check that an adapter does not add virtual tokens to the context. They come before the padding of a row, so their
    distance to the text, and with it the log-probabilities, would change from turn to turn and from batch to batch.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Configuration of a new adapter.

    Raises:
        `ValueError`: If it is prompt tuning, p-tuning, prefix tuning or another kind of prompt learning.
    """
    own = getattr(model, "peft_config", None)
    for config in (peft_config, *(own.values() if isinstance(own, dict) else ())):
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"`peft_config` cannot be `{type(config).__name__}`: its virtual tokens come before the padding of a batch, so "
                "sampling and training would see different positions. Use an adapter of the weights, for instance `LoraConfig`."
            )


def check_batches(args: TSPOConfig, train_dataset: Any, eval_dataset: Any = None) -> None:
    """
    Check that the training questions fill a batch, that the length of the run is known, and that there are questions to
    evaluate on if they are needed, in batches that hold whole groups.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training set.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`], a `dict` of them or `None`):
            The evaluation sets.

    Raises:
        `ValueError`: If one of these does not hold.
    """
    needed = questions_per_batch(args)
    known = isinstance(train_dataset, Dataset)
    count = len(train_dataset) if known else sum(1 for _ in islice(train_dataset, needed))
    if count < needed:
        raise ValueError(
            f"Nothing would be trained: `train_dataset` has {_questions(count)}, but a batch of rollouts needs {needed} "
            f"(`generation_batch_size` {args.generation_batch_size} / `num_generations` {args.num_generations}). Use "
            "more questions, or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or "
            "`steps_per_generation`."
        )
    if args.dynamic_sampling and not known:
        raise ValueError(
            "`dynamic_sampling` needs a `train_dataset` with a length, from which it draws further questions, got "
            f"`{type(train_dataset).__name__}`. Load it without streaming, or set `dynamic_sampling=False`."
        )
    if args.max_steps < 1 and not known:
        raise ValueError(
            "`max_steps` must be at least 1 with a streamed `train_dataset`, whose length is unknown, got "
            f"{args.max_steps}."
        )
    if eval_dataset is not None:
        check_eval_batches(args)
    elif args.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy` is '{IntervalStrategy(args.eval_strategy).value}', but there is no `eval_dataset` (`--eval_dataset_name` "
            "of the command). Give one, or set `eval_strategy='no'`."
        )


def check_eval_batches(args: TSPOConfig) -> None:
    """
    Check that a batch of evaluation holds whole groups.

    Args:
        args ([`TSPOConfig`]):
            The configuration.

    Raises:
        `ValueError`: If it does not.
    """
    group = args.num_generations_eval or args.num_generations
    rollouts = args.per_device_eval_batch_size * args.world_size
    if rollouts % group:
        name = "num_generations_eval" if args.num_generations_eval else "num_generations"
        raise ValueError(
            f"`per_device_eval_batch_size` × processes must be a multiple of `{name}`, got "
            f"{args.per_device_eval_batch_size} × {args.world_size} = {rollouts} and {group}. Set "
            "`per_device_eval_batch_size` or `num_generations_eval`."
        )


def check_predicted(args: TSPOConfig, dataset: Any) -> None:
    """
    Check a data set for `predict`, and that a batch of it holds whole groups.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
        dataset ([`~datasets.Dataset`]):
            The data set.

    Raises:
        `TypeError`: If it is not a `Dataset`: TRL would not repeat the rows of a stream, so a group would mix questions.
        `ValueError`: If batches are of a wrong size.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`test_dataset` must be a `Dataset`, got `{type(dataset).__name__}`. `evaluate` accepts streams."
        )
    check_eval_batches(args)


def report_left_out(args: TSPOConfig, train_dataset: Any) -> None:
    """
    Log how many questions an incomplete last batch leaves out of each epoch, if the run is at least one epoch long.

    Args:
        args ([`TSPOConfig`]):
            The configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The training set. Nothing is logged for a stream, whose length is unknown.
    """
    if not isinstance(train_dataset, Dataset) or args.process_index > 0:
        return
    size = questions_per_batch(args)
    left, batches = len(train_dataset) % size, len(train_dataset) // size
    assert args.steps_per_generation is not None  # set by TRL
    steps = batches * args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    if left and (args.max_steps <= 0 or args.max_steps >= steps):
        logger.warning(
            "`train_dataset` has %s, and a batch of rollouts takes %d: the last %d do not fill a batch and are left out of "
            "each epoch.",
            _questions(len(train_dataset)),
            size,
            left,
        )


def questions_per_batch(args: TSPOConfig) -> int:
    """
    The number of questions whose rollouts are generated together. An epoch consists of whole batches of them.

    Args:
        args ([`TSPOConfig`]):
            The configuration.

    Returns:
        `int`: The number of questions.
    """
    # TRL has set both
    return args.generation_batch_size // args.num_generations  # type: ignore[operator]


def check_tokenizer(model: Any, processing_class: Any, args: TSPOConfig) -> Any:
    """
    Check the tokenizer of a model before the weights are loaded.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, the one that belongs to the name of the model.
        args ([`TSPOConfig`]):
            The configuration.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`] or `None`: The tokenizer that TRL must use, `None` for the one that it
        loads. For a multimodal model, TRL would load a processor.

    Raises:
        `ValueError`: If the tokenizer has no end-of-sequence token.
        `FileNotFoundError`: If there is none, for instance because there is no such model on the Hub.
    """
    tokenizer = processing_class
    if isinstance(model, str) and processing_class is None:
        tokenizer = load_tokenizer(model, args)
        processing_class = None if multimodal_config(model, args) is None else tokenizer
    check_end_token(tokenizer)
    return processing_class


def load_tokenizer(model: str, args: Any) -> PreTrainedTokenizerBase:
    """
    Load the tokenizer of a model.

    Args:
        model (`str`):
            A folder or a name on the Hub.
        args ([`TSPOConfig`] or [`~trl.SFTConfig`]):
            The configuration.

    Raises:
        `FileNotFoundError`: If there is none, for instance because there is no such model on the Hub.
    """
    sides = {"padding_side": "left", "truncation_side": "left"}  # as in TRL
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, **sides, **load_options(args))
    except OSError as error:
        raise FileNotFoundError(
            f"`model`: the tokenizer of {model!r} cannot be loaded. It must be a folder with a model and its "
            f"tokenizer, or a name on the Hub: {str(error).splitlines()[0]}{suggest_path(model)}"
        ) from error
    return tokenizer


def check_loaded(model: Any, processing_class: Any, router_aux_loss_coef: float) -> PreTrainedTokenizerBase:
    """
    Check the model and the tokenizer that TRL has set up.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, with its adapter.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        router_aux_loss_coef (`float`):
            The weight of the load-balancing loss that applies.

    Returns:
        [`~transformers.PreTrainedTokenizerBase`]: The tokenizer.

    Raises:
        `TypeError`: If `processing_class` is not a tokenizer.
        `ValueError`: If the tokenizer has no end-of-sequence token, or TRL cannot compute the load-balancing loss.
    """
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"`processing_class` must be a tokenizer, got `{type(processing_class).__name__}`: the search loop is for text "
            "only. Pass the tokenizer of the model as `processing_class`."
        )
    check_end_token(processing_class)
    check_experts(model, router_aux_loss_coef)
    warn_of_dropout(model)
    return processing_class


def check_end_token(tokenizer: Any) -> None:
    """
    Check that a tokenizer has a token that ends a completion.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. Other objects are not checked.

    Raises:
        `ValueError`: If it has none.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, which ends the last turn of a rollout. Set "
            "`tokenizer.eos_token` to the token that the model writes last, and pass it as `processing_class`."
        )


def warn_of_dropout(model: torch.nn.Module) -> None:
    """
    Warn if a model has dropout, because it is on in the training forward only: the log-probabilities of sampling and
    training then differ.

    Args:
        model (`torch.nn.Module`):
            The model, with its adapter.
    """
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0}
    if rates:
        logger.warning(
            "The model has dropout (%s), which is on in training and off in sampling, so the log-probabilities of the two "
            "differ. Set `lora_dropout` to 0 for an adapter, or `disable_dropout=True`.",
            ", ".join(f"{rate:g}" for rate in sorted(rates)),
        )
    # Dropout within the code of attention and layers has no module that `disable_dropout` could change
    fields = {
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("dropout") and isinstance(value, float) and value > 0
    }
    if fields:
        logger.warning(
            "The configuration of the model has dropout (%s), which is on in training and off in sampling, so the "
            "log-probabilities of the two differ. Set `model_init_kwargs=%r`.",
            ", ".join(f"{name} {value:g}" for name, value in sorted(fields)),
            {name: 0.0 for name, _ in sorted(fields)},
        )


def check_experts(model: Any, coefficient: float) -> None:
    """
    Check that TRL can compute the load-balancing loss of a mixture of experts.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        coefficient (`float`):
            The weight of this loss that applies.

    Raises:
        `ValueError`: If TRL would fail in the first step, because it does not find the number of experts.
    """
    config = model.config.get_text_config()
    needed = coefficient != 0.0 and hasattr(config, "output_router_logits")
    if needed and not all(hasattr(config, name) for name in ("num_experts", "num_experts_per_tok")):
        raise ValueError(
            f"TRL cannot compute the load-balancing loss of `{type(config).__name__}`, because it has no `num_experts`. Set "
            f"`router_aux_loss_coef=0.0` to train without this loss, got {coefficient}."
        )


def _questions(count: int) -> str:
    return "1 question" if count == 1 else f"{count} questions"
