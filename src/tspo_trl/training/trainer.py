"""The trainer: its construction and its rollouts. Only this class and its five mixins override methods of TRL."""

import textwrap
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from ..retrieval import Retriever
from ..retrieval.probe import try_retriever
from ..rewards import exact_match_reward
from ..rollout.limits import SearchLimits
from ..rollout.log import append_rollouts, batch_records, log_files, write_settings
from ..rollout.loop import SearchLoop
from ..rollout.protocol import SearchProtocol
from ..rollout.protocols import make_protocol
from ..rollout.search_config import SearchConfig
from ..rollout.trajectory import Trajectory
from ..sharing.mixin import SharingMixin
from .checkpoints import ExactResumeMixin
from .checks import check_loaded, check_setup, check_tokenizer
from .collapse import CollapseCallback
from .config import TSPOConfig
from .datasets import find_prompt_template, map_datasets, prepare_dataset
from .evaluations import EvaluationMixin
from .forward import CompactForwardMixin
from .generation import RetrieverStack, SearchRollouts, as_messages, make_engine
from .multimodal import text_part
from .progress import ignore_harmless_warnings, shorten_output
from .sharding import check_processes
from .turn_credit import TurnCreditMixin
from .unsupported import check_keywords

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

RewardFunc = str | PreTrainedModel | Callable[..., list[float | None]] | Callable[..., list[float]]


# The ignored error: `create_model_card` is as in TRL, which differs from transformers
class TSPOTrainer(TurnCreditMixin, ExactResumeMixin, EvaluationMixin, SharingMixin, CompactForwardMixin, GRPOTrainer):  # type: ignore[misc]
    """
    Trainer for Turn-level Stage-aware Policy Optimization (TSPO), proposed in [TSPO: Breaking the Double Homogenization
    Dilemma in Multi-turn Search Policy Optimization](https://huggingface.co/papers/2601.22776).

    The only changes with respect to [`~trl.GRPOTrainer`] are that a completion is a search rollout (the model writes
    queries, reads passages, writes an answer) and that every token gets the advantage of its turn: in groups without
    any correct rollout, the turn whose passages first contain a golden answer earns a partial reward.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained, see [`~trl.GRPOTrainer`]. Only causal language models for text are supported.
        reward_funcs (`RewardFunc | list[RewardFunc]`, *optional*):
            Outcome rewards, see [`~trl.GRPOTrainer`] and `tspo_trl.rewards`. They get the rollouts as `trajectories`.
            Defaults to the exact match of the answer.
        args ([`TSPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows with `golden_answers` (a non-empty list of strings) and `question` (a string) or `prompt` (a text or a
            conversation, used unchanged; a conversation with `protocol="tool_call"`).
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Evaluation sets, in the same format. With a `dict`, every metric is logged for each data set with its name,
            for instance `eval_nq_reward`, and also as the short `eval_nq_em` and `eval_nq_hit`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list`, *optional*):
            Tokenizers of the reward models, see [`~trl.GRPOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks that customise the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            The optimizer and the scheduler to use, see [`~trl.GRPOTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization of a model that is loaded by name, see [`~trl.GRPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. If `None`, the model is not wrapped.
        retriever ([`Retriever`], *optional*):
            Retriever that executes the searches, for instance a [`BM25Retriever`]. One query is searched when the trainer
            is created, so that mistakes are reported before training. It can be `None` only if the run is repeated from
            its `retrieval_log`.
        unsupported:
            Arguments of [`~trl.GRPOTrainer`] and [`~transformers.Trainer`] that have no meaning here, for instance
            `tools`. They are refused, and the message says what to use instead.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from tspo_trl import BM25Retriever, TSPOConfig, TSPOTrainer

    >>> trainer = TSPOTrainer(
    ...     model="Qwen/Qwen2.5-0.5B-Instruct",
    ...     args=TSPOConfig(output_dir="my-search-agent"),
    ...     train_dataset=Dataset.from_list([{"question": "Who wrote Emma?", "golden_answers": ["Jane Austen"]}]),
    ...     retriever=BM25Retriever.from_jsonl("corpus.jsonl"),
    ... )
    >>> trainer.train()
    ```
    """

    # Types that `Trainer` does not declare
    args: TSPOConfig
    rollout_func: Any
    chat_template_kwargs: Any
    model: Any
    _signature_columns: Any

    _tag_names = ["trl", "tspo"]
    _name = "TSPO"
    _paper = {
        "title": "TSPO: Breaking the Double Homogenization Dilemma in Multi-turn Search Policy Optimization",
        "id": "2601.22776",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{ma2026tspo,
                title        = {{TSPO: Breaking the Double Homogenization Dilemma in Multi-turn Search Policy Optimization}},
                author       = {Shichao Ma and Zhiyuan Ma and Ming Yang and Xiaofan Li and Xing Wu and Jintao Du and Yu Cheng and Weiqiang Wang and Qiliang Liu and Zhengyang Zhou and Yang Wang},
                year         = 2026,
                eprint       = {arXiv:2601.22776},
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: TSPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        retriever: Retriever | None = None,
        **unsupported: Any,
    ):
        check_keywords(unsupported, signature(TSPOTrainer).parameters)
        if model is None:
            raise ValueError("`model` is required: a name on the Hub, a folder, or a loaded model.")
        model = str(model) if isinstance(model, Path) else model
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TSPOConfig(f"{model_name.split('/')[-1]}-TSPO")
        # Check the arguments before anything large is loaded
        check_setup(args, retriever, train_dataset, eval_dataset, model, peft_config, reward_funcs)
        retrievers = RetrieverStack.build(retriever, args)
        try_retriever(retrievers.retriever, args.num_passages)
        processing_class = check_tokenizer(model, processing_class, args)

        with text_part(self, model, args):
            super().__init__(
                model=model,
                reward_funcs=exact_match_reward if reward_funcs is None else reward_funcs,  # type: ignore[arg-type]
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        tokenizer = check_loaded(self.model, self.processing_class, self.router_aux_loss_coef)
        ignore_harmless_warnings(self.model)
        shorten_output(self)
        check_processes(self.accelerator, args, self.train_dataset)

        # Search loop and data sets, which both use the protocol
        protocol = make_protocol(
            args.protocol,
            tokenizer,
            args.max_searches,
            eos_token_ids=self.eos_token_ids,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        self.search_config = SearchConfig(
            protocol=args.protocol,
            prompt_template=find_prompt_template(train_dataset, protocol),
            chat_template_kwargs=self.chat_template_kwargs,
            **asdict(SearchLimits.of(args)),
        )
        # TRL's hook for custom rollouts. It is set here because TRL prints a warning if it is passed to the constructor
        self.rollout_func = SearchRollouts(self._make_search_loop(protocol, retrievers.retriever), retrievers)
        self.train_dataset, self.eval_dataset = map_datasets(self._prepare, train_dataset, eval_dataset)
        if args.warn_on_collapse:
            self.add_callback(CollapseCallback(stop_on=args.stop_on_collapse))

    def _make_search_loop(self, protocol: SearchProtocol, retriever: Retriever) -> SearchLoop:
        """Make the search loop of the configuration. TRL must have set up the model."""
        return SearchLoop(
            make_engine(self, protocol.stop_strings),
            retriever,
            protocol,
            eos_token_ids=self.eos_token_ids,
            limits=SearchLimits.of(self.args),
            max_context_length=self._max_context_length(),
        )

    def _prepare(self, dataset: Any, name: str) -> Any:
        """Check a data set and add its prompts."""
        longest, removed = self._max_context_length(), self.args.remove_unused_columns
        return prepare_dataset(dataset, self.search_loop.protocol, name, longest, unused_removed=removed)

    def _max_context_length(self) -> int | None:
        """The maximum number of tokens of a prompt and its completion together, if the model has one."""
        lengths = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        if self.args.use_vllm:
            lengths.append(self.args.vllm_max_model_length)
        return min((length for length in lengths if length is not None), default=None)

    @property
    def search_loop(self) -> SearchLoop:
        """The search loop that rolls out the prompts."""
        return self.rollout_func.search_loop

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "question", "golden_answers"]))

    def _generate(self, prompts):
        (prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images) = (
            super()._generate(prompts)
        )
        # TRL decodes whole completions, but reward functions must not read passages as text of the model
        trajectories: list[Trajectory] = extra_fields["trajectory"]
        if is_conversational({"prompt": prompts[0]}):
            completions = [as_messages(trajectory, self.search_loop.protocol) for trajectory in trajectories]
        else:
            completions = ["".join(turn.text for turn in trajectory.turns) for trajectory in trajectories]
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    def _log_rollouts(
        self, rows: list[dict[str, Any]], columns: list[torch.Tensor], num_generations: int, first: int
    ) -> None:
        """Append local rollouts to the log, the first of which has the number `first` in the step. `columns` hold a row for
        each, see [`batch_records`]."""
        file = self._log_file("train" if self.model.training else "eval")
        records = batch_records(
            rows,
            *(column.tolist() for column in columns),
            reward_names=self.reward_func_names,
            step=self.state.global_step,
            first=first,
            num_generations=num_generations,
        )
        if self.accelerator.is_main_process:
            write_settings(file.parent, self.args)
        max_gib = self.args.log_trajectories_max_gib
        share = None if max_gib is None else int(max_gib * 2**30 / (2 * self.accelerator.num_processes))
        append_rollouts(file, records, max_bytes=share)

    def _growing_files(self) -> list[Path]:
        return [*log_files(self._log_file("train")), *log_files(self._log_file("eval"))]

    def _log_file(self, mode: str) -> Path:
        name = f"{mode}-rank{self.accelerator.process_index:03d}.jsonl"
        return Path(str(self.args.output_dir)) / "trajectories" / name
