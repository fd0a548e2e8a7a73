"""The trainer: rollouts, evaluation and turn credit. Only this class and its four mixins override methods of TRL."""

import textwrap
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import get_config_model_id

from ..credit import (
    Scale,
    first_occurrence,
    folr_rewards,
    folr_turns,
    has_variance,
    summed_turn_advantages,
    token_advantages,
    turn_advantages,
    uses_turn_level,
)
from ..retrieval import Retriever
from ..retrieval.probe import try_retriever
from ..rewards import exact_match_reward
from ..rollout.facts import RolloutFacts, rollout_facts
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
from .forward import CompactForwardMixin, sampled_logps
from .generation import RetrieverStack, SearchRollouts, as_messages, make_engine, show_texts
from .masking import keep_ratios_finite, mean_trained_advantages, replace_last
from .metrics import add_metrics, mean_logprob, rollout_metrics
from .multimodal import text_part
from .progress import ignore_harmless_warnings, shorten_output
from .rounds import replace_without_signal
from .sharding import check_processes
from .unsupported import check_keywords

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

RewardFunc = str | PreTrainedModel | Callable[..., list[float | None]] | Callable[..., list[float]]


# The ignored error: `create_model_card` is as in TRL, which differs from transformers
class TSPOTrainer(ExactResumeMixin, EvaluationMixin, SharingMixin, CompactForwardMixin, GRPOTrainer):  # type: ignore[misc]
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
    num_generations: int
    scale_rewards: Scale
    num_generations_eval: int
    _further_rollouts = 0  # of all ranks that the step has sampled before this round, with `dynamic_sampling`

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
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TSPOConfig(f"{model_name.split('/')[-1]}-TSPO")
        # Check the arguments before anything large is loaded
        check_setup(args, retriever, train_dataset, eval_dataset, model, peft_config)
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

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL names the arguments of reward functions after columns; the plural is for a list, as in `prompts`
        renamed = [{"trajectories" if key == "trajectory" else key: row[key] for key in row} for row in inputs]
        rewards_per_func = super()._calculate_rewards(renamed, prompts, completions, completion_ids_list)
        failed = [row["trajectory"].status == "retrieval_failed" for row in inputs]
        rewards_per_func[gather(torch.tensor(failed, device=rewards_per_func.device))] = torch.nan
        self._rewards_per_func = rewards_per_func  # of all ranks, needed for the turn credit
        return rewards_per_func

    def compute_turn_advantages(
        self,
        outcomes: torch.Tensor,
        first_occurrence: torch.Tensor,
        num_turns: torch.Tensor,
        *,
        num_generations: int,
        success_threshold: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Compute the credit of every turn from the options of the configuration. Override this method to try another
        credit assignment.

        Args:
            outcomes (`torch.Tensor`):
                Outcome rewards of the N rollouts of all ranks, shape (N,), NaN for rollouts without an
                outcome. The G rollouts of a group are adjacent.
            first_occurrence (`torch.Tensor`):
                The 0-based turn whose passages first contain a golden answer accepted by `folr_guard`, integers of shape
                (N,), -1 if there is none.
            num_turns (`torch.Tensor`):
                Number of turns of each rollout, integers of shape (N,).
            num_generations (`int`):
                Number of rollouts in a group, G.
            success_threshold (`float`):
                A rollout is correct if its outcome is at least this.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Turn rewards of shape (N, K), NaN where a rollout has no
            k-th turn, which are logged; turn advantages of shape (N, K); and booleans of shape (N,), true for rollouts that are
            trained with turn advantages. The others are trained with the advantage that TRL computes for the rollout.
        """
        args = self.args
        placed: Any = {"placement": args.folr_placement, "success_threshold": success_threshold}
        rewards = folr_rewards(outcomes, first_occurrence, num_turns, alpha=args.folr_alpha, **placed)
        stage: Any = {
            "num_generations": num_generations,
            "level": args.advantage_level,
            "success_threshold": success_threshold,
        }
        if args.multi_objective_aggregation == "normalize_then_sum":
            paid = folr_turns(outcomes, first_occurrence, num_turns, **placed)
            advantages = summed_turn_advantages(
                paid,
                outcomes,
                self._trajectory_advantages,
                alpha=args.folr_alpha,
                baseline=args.turn_baseline,
                **stage,
            )
        else:
            advantages = turn_advantages(
                rewards, outcomes, baseline=args.turn_baseline, scale_rewards=self.scale_rewards, **stage
            )
        return rewards, advantages, uses_turn_level(outcomes, **stage)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # TRL generates, and computes rewards and trajectory advantages. Each row then holds its trajectory
        roll_out = super()._generate_and_score_completions
        output = self._assign_credit(inputs, roll_out(inputs))
        if self.args.dynamic_sampling and self.model.training:
            output = replace_without_signal(self, output, lambda rows: self._assign_credit(rows, roll_out(rows)))
        return output

    def _assign_credit(self, inputs: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Any]:
        """Replace the advantages of TRL in `output`, the inputs of the loss, by those of the turns, and log the rollouts."""
        trajectory_advantages = output["advantages"]
        mode = "train" if self.model.training else "eval"
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        groups: Any = {"num_generations": num_generations, "success_threshold": self.args.success_threshold}
        start = self.accelerator.process_index * len(inputs)
        local = slice(start, start + len(inputs))

        # Turn credit, over the rollouts of all ranks, because a group may span several ranks
        outcomes = self._outcomes()
        self._trajectory_advantages = self._without_residue(gather(trajectory_advantages), outcomes, num_generations)
        facts = gather(torch.tensor([self._facts(row) for row in inputs], device=outcomes.device))
        by_fact: Any = RolloutFacts(*facts.unbind(dim=1))
        turn_rewards, advantages, uses_turns = self.compute_turn_advantages(
            outcomes, by_fact.credited, by_fact.turns, **groups
        )

        # Metrics, over the rollouts of all ranks
        logps = [mean_logprob(row["trajectory"]) for row in inputs]
        logps = gather(torch.tensor(logps, device=outcomes.device))
        has_signal = torch.where(uses_turns, (advantages != 0).any(dim=1), self._trajectory_advantages != 0)
        add_metrics(self._metrics[mode], rollout_metrics(facts, outcomes, has_signal, logps, **groups))

        # Token advantages: those of the turn, or TRL's advantage of the rollout, to which all options of TRL apply
        local_advantages = torch.where(uses_turns[local, None], advantages[local], trajectory_advantages[:, None])
        local_advantages = local_advantages.masked_fill(turn_rewards[local].isnan(), 0.0)
        if self.args.advantage_level != "trajectory" or uses_turns.any():
            turn_index = self._turn_index(inputs, output["completion_ids"])
            output["advantages"] = token_advantages(local_advantages, turn_index)

        keep_ratios_finite(output)
        if self._compact:
            output["sampled_logps"] = sampled_logps([row["trajectory"] for row in inputs], output["completion_ids"])

        # `log_completions` shows the advantages of training, and rollouts as texts. TRL has appended its own
        replace_last(self._logs["advantages"], gather(mean_trained_advantages(output)).tolist())
        if self.log_completions:
            show_texts(self._logs, inputs, self.search_loop.protocol)

        # Log of the rollouts. An evaluation counts and logs every rollout once
        before, kept = self._count_once(facts, outcomes, has_signal, logps, self._rewards_per_func)
        if self.args.log_trajectories:
            columns = [x[local] for x in (self._rewards_per_func, outcomes, facts, turn_rewards)]
            rows = inputs[: max(kept - start, 0)]
            self._log_rollouts(
                rows, [*columns, local_advantages], num_generations, before + self._further_rollouts + start
            )
        return output

    def _outcomes(self) -> torch.Tensor:
        """The outcome rewards of the N rollouts of all ranks, shape (N,), NaN if no reward function returned a value."""
        rewards = self._rewards_per_func
        outcomes = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        return outcomes.masked_fill(rewards.isnan().all(dim=1), torch.nan)

    def _without_residue(self, advantages: torch.Tensor, outcomes: torch.Tensor, num_generations: int) -> torch.Tensor:
        """TRL's advantages, exactly 0 in groups without variance, where TRL may leave the rounding error of a mean."""
        one_by_one = self.args.multi_objective_aggregation == "normalize_then_sum"
        values = self._rewards_per_func * self.reward_weights.to(outcomes.device) if one_by_one else outcomes[:, None]
        return advantages.masked_fill(~has_variance(values, num_generations), 0.0)

    def _facts(self, row: dict[str, Any]) -> RolloutFacts:
        trajectory: Trajectory = row["trajectory"]
        # Metrics always use the default guard, so that runs with different guards can be compared
        occurrence, credited = (
            first_occurrence(
                trajectory.passage_texts,
                row["golden_answers"],
                question=row["question"],
                queries=trajectory.queries,
                guard=guard,
            )
            for guard in ("degenerate", self.args.folr_guard)
        )
        return rollout_facts(trajectory, occurrence, credited)

    def _turn_index(self, rows: list[dict[str, Any]], completion_ids: torch.Tensor) -> torch.Tensor:
        """The 0-based turn of each completion token of the local rollouts, shape (B, L), -1 on observations and padding."""
        turn_index = torch.full(completion_ids.shape, -1, device=completion_ids.device)
        for i, row in enumerate(rows):
            index = row["trajectory"].turn_index
            turn_index[i, : len(index)] = torch.tensor(index)
        return turn_index

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
