"""The trainer of the cold start: TRL's `SFTTrainer` on demonstrations that it makes from questions and a retriever."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import IntervalStrategy
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from ..agent import end_token_ids
from ..retrieval import Retriever
from ..retrieval.probe import try_retriever
from ..rollout.limits import SearchLimits
from ..rollout.protocols import make_protocol
from ..rollout.search_config import SearchConfig
from ..sharing.load import ModelPlace, load_model
from ..support.paths import check_model_path
from ..training.checks import check_end_token, load_tokenizer
from ..training.datasets import find_prompt_template
from ..training.multimodal import load_options
from .config import ColdStartConfig
from .demonstrations import make_demonstrations

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = logging.getLogger(__name__)


class ColdStartTrainer(SFTTrainer):
    """
    Trainer for the cold start of a model that does not search yet. It makes demonstrations, see [`make_demonstrations`], and
    trains on them by supervision, as [`~trl.SFTTrainer`] does. Only the tokens that the model writes are learned, not the
    prompts and the passages. The model that it saves is the `model` of a [`TSPOTrainer`].

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, see [`~trl.SFTTrainer`].
        args ([`ColdStartConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `question` (a string), `golden_answers` (a non-empty list of strings) and optionally
            `supporting_titles` (a list of strings).
        retriever ([`Retriever`]):
            Retriever that executes the searches, for instance a [`BM25Retriever`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks that customise the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            The optimizer and the scheduler to use, see [`~trl.SFTTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. If `None`, the model is not wrapped. [`merge_adapter`] makes a full
            model of a saved adapter.

    Attributes:
        demonstrations ([`Demonstrations`]): The demonstrations, and how many questions had evidence.

    Raises:
        `TypeError`, `ValueError` or `FileNotFoundError`: If an argument cannot be used, the tokenizer does not support the
            protocol, or there are too few demonstrations. The demonstrations are made before the model is loaded.

    Example:

    ```python
    >>> from tspo_trl import BM25Retriever, ColdStartConfig, ColdStartTrainer, load_questions

    >>> trainer = ColdStartTrainer(
    ...     model="Qwen/Qwen2.5-0.5B",
    ...     args=ColdStartConfig("cold-start", max_searches=2),
    ...     train_dataset=load_questions("questions.jsonl"),
    ...     retriever=BM25Retriever.from_jsonl("passages.jsonl"),
    ... )
    >>> trainer.train()
    >>> trainer.save_model()
    ```
    """

    args: ColdStartConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: ColdStartConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        retriever: Retriever | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        model = str(model) if isinstance(model, Path) else model
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = ColdStartConfig(f"{name.split('/')[-1]}-cold-start")
        _check_arguments(args, train_dataset)
        check_model_path(model)
        try_retriever(retriever, args.num_passages)
        assert train_dataset is not None
        assert retriever is not None
        tokenizer = load_tokenizer(name, args) if processing_class is None else processing_class
        check_end_token(tokenizer)
        ends, longest = _limits_of_model(model, tokenizer, load_options(args))
        given: Any = args.chat_template_kwargs or {}
        kwargs = dict(given)
        protocol = make_protocol(
            args.protocol, tokenizer, args.max_searches, eos_token_ids=ends, chat_template_kwargs=kwargs
        )
        limits = SearchLimits.of(args)
        self.search_config = SearchConfig(
            protocol=args.protocol,
            prompt_template=find_prompt_template(train_dataset, protocol),
            chat_template_kwargs=kwargs,
            **asdict(limits),
        )
        self.demonstrations = make_demonstrations(
            train_dataset,
            retriever,
            protocol,
            eos_token_ids=ends,
            limits=limits,
            num_demonstrations=args.num_demonstrations,
            failed_share=args.failed_share,
            max_length=min((length for length in (args.max_length, longest) if length is not None), default=None),
            seed=args.seed,
        )
        self.protocol = protocol
        self.is_adapter = peft_config is not None or hasattr(model, "peft_config")
        _check_number(args, len(self.demonstrations.items), self.demonstrations.questions)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.demonstrations.to_dataset(),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the model, its tokenizer and `search_config.json`, see [`~transformers.Trainer.save_model`].

        Args:
            output_dir (`str`, *optional*):
                The folder. Defaults to `output_dir` of the configuration.
        """
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.search_config.save(folder)
        super().save_model(output_dir, _internal_call)


def merge_adapter(
    adapter: str | Path, output_dir: str | Path, *, model_init_kwargs: dict[str, Any] | None = None
) -> None:
    """
    Merge an adapter into its base model, and save the full model with its tokenizer and `search_config.json`, so that it can
    be the `model` of a [`TSPOTrainer`]. The model is loaded on the CPU.

    Args:
        adapter (`str` or `Path`):
            The folder of the adapter.
        output_dir (`str` or `Path`):
            The folder of the full model.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of `from_pretrained` for the base model.
    """
    model, tokenizer = load_model(ModelPlace(str(adapter)), device="cpu", model_init_kwargs=model_init_kwargs)
    model.merge_and_unload().save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    SearchConfig.load(adapter).save(output_dir)


def _check_arguments(args: Any, train_dataset: Any) -> None:
    """Refuse what TRL would refuse later, or not at all."""
    if not isinstance(args, ColdStartConfig):
        raise TypeError(f"`args` must be a `ColdStartConfig`, got `{type(args).__name__}`.")
    if train_dataset is None:
        raise ValueError("`train_dataset` is required: rows with 'question' and 'golden_answers'.")
    if args.eval_strategy != "no":
        raise ValueError(
            f"`eval_strategy` must be 'no', got '{IntervalStrategy(args.eval_strategy).value}': the cold start has no evaluation set."
        )
    if args.packing:
        raise ValueError("`packing` would let demonstrations be cut, got True. Set `packing=False`.")


def _check_number(args: ColdStartConfig, count: int, questions: int) -> None:
    """Refuse a run whose demonstrations do not fill a step, and warn of fewer than were asked for."""
    size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if count < size:
        raise ValueError(
            f"There are too few demonstrations: {questions} questions gave {count}, but a step takes {size} "
            "(`per_device_train_batch_size` × `gradient_accumulation_steps` × processes). Use more questions, or smaller steps."
        )
    if count < args.num_demonstrations:
        logger.warning(
            "There are %d demonstrations instead of `num_demonstrations` (%d): the %d questions gave no more.",
            count,
            args.num_demonstrations,
            questions,
        )


def _limits_of_model(model: Any, tokenizer: Any, options: dict[str, Any]) -> tuple[list[int], int | None]:
    """The tokens that end a message of the model, and the maximum number of tokens of its context."""
    if isinstance(model, str):
        config = AutoConfig.from_pretrained(model, **options)
        try:
            generation = GenerationConfig.from_pretrained(model, revision=options.get("revision") or "main")
        except OSError:  # then transformers makes it of the model's configuration
            generation = GenerationConfig.from_model_config(config)
    else:
        config, generation = model.config, model.generation_config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return end_token_ids(tokenizer, generation.eos_token_id), longest
