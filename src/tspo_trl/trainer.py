"""The trainer. The only file that knows TRL's private methods, and only the overrides."""

import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from .checkpoints import ExactResumeMixin, get_rng_state, set_rng_state
from .collapse import CollapseCallback
from .config import TSPOConfig
from .credit import Scale, first_occurrence, folr_rewards, token_advantages, turn_advantages, uses_turn_level
from .data import check_best_metric, check_columns, map_datasets, prepare_dataset
from .engines import ContinuousBatchingEngine, Engine, TransformersEngine
from .metrics import (
    EVAL_ALIASES,
    FACTS,
    mean_logprob,
    retrieval_facts,
    retrieval_metrics,
    rollout_facts,
    rollout_metrics,
)
from .retrieval import CachedRetriever, LoggedRetriever, RetrievalError, Retriever
from .rewards import exact_match_reward
from .rollout import RolloutStats
from .search_config import SMALLEST, SearchConfig, find_prompt_template
from .sharding import check_processes, gathered_fsdp2
from .sharing import SharingMixin
from .trajectory import Trajectory
from .trajectory_log import append_rollouts, log_files, rollout_record, write_settings
from .vllm_engines import check_vllm, vllm_engine

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig

RewardFunc = str | PreTrainedModel | Callable[..., list[float | None]] | Callable[..., list[float]]


class TSPOTrainer(ExactResumeMixin, SharingMixin, GRPOTrainer):  # type: ignore[misc]  # as of TRL's create_model_card
    """
    Trainer for Turn-level Stage-aware Policy Optimization (TSPO), proposed in [TSPO: Breaking the Double Homogenization
    Dilemma in Multi-turn Search Policy Optimization](https://huggingface.co/papers/2601.22776).

    The only changes with respect to [`~trl.GRPOTrainer`] are that a completion is a search rollout (the model writes
    queries, reads passages, writes an answer) and that the advantage of a token is that of its turn: in groups without
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
            conversation, used as it is; a conversation with `protocol="tool_call"`).
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or a `dict` of them, *optional*):
            Data sets to use for evaluation, of the same form. With a `dict`, every metric is logged for each by its
            name, for instance `eval_nq_reward`, with `eval_nq_em` and `eval_nq_hit` for short.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The tokenizer. If `None`, it is loaded from the model's name.
        reward_processing_classes ([`~transformers.PreTrainedTokenizerBase`] or `list`, *optional*):
            Tokenizers of reward models, see [`~trl.GRPOTrainer`].
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Callbacks that customise the training loop.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            The optimizer and the scheduler to use, see [`~trl.GRPOTrainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantisation of a model that is loaded by its name, see [`~trl.GRPOTrainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. If `None`, the model is not wrapped.
        retriever ([`Retriever`], *optional*):
            Executes the searches, for instance a [`BM25Retriever`]. Only a run that is repeated from the `retrieval_log`
            of its configuration needs none.

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

    # What `Trainer` leaves open and this trainer knows
    args: TSPOConfig
    model: Any
    _signature_columns: Any
    num_generations: int
    scale_rewards: Scale
    num_generations_eval: int

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
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = TSPOConfig(f"{model_name.split('/')[-1]}-TSPO")
        elif not isinstance(args, TSPOConfig):
            raise TypeError(f"`args` must be a `TSPOConfig`, got `{type(args).__name__}`.")
        if not isinstance(retriever, Retriever) and (retriever is not None or args.retrieval_log is None):
            raise ValueError(
                "`retriever` must be an object with a method `search(queries, k)`, for instance "
                f"`BM25Retriever.from_jsonl('corpus.jsonl')`, got {retriever!r}. Only a run that is repeated from its "
                "`retrieval_log` needs none."
            )
        if reward_funcs is None:
            reward_funcs = exact_match_reward
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: rows with 'question' and 'golden_answers'.")
        # Columns, cache and log are checked before anything large is loaded
        map_datasets(check_columns, train_dataset, eval_dataset)
        check_best_metric(args.metric_for_best_model, eval_dataset)
        if args.use_vllm:
            check_vllm()
        self._cache = self._retrieval_log = None
        if retriever is not None:
            retriever = self._cache = CachedRetriever(retriever, args.retrieval_cache_size, args.retrieval_cache_dir)
        if args.retrieval_log is not None:
            retriever = self._retrieval_log = LoggedRetriever(retriever, args.retrieval_log, rank=args.process_index)
        assert retriever is not None

        super().__init__(
            model=model,
            reward_funcs=reward_funcs,  # type: ignore[arg-type]
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
        if not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise TypeError(
                f"`processing_class` must be a tokenizer, got `{type(self.processing_class).__name__}`: the search "
                "loop is for text only."
            )

        check_processes(self.accelerator, args, self.train_dataset)
        search_config = SearchConfig(
            chat_template_kwargs=self.chat_template_kwargs,  # type: ignore[arg-type]
            **{name: getattr(args, name) for name in ("protocol", *SMALLEST)},
        )
        protocol = search_config.make_protocol(self.processing_class, self.eos_token_ids)
        self.search_config = search_config.replace(prompt_template=find_prompt_template(train_dataset, protocol))
        self.train_dataset, self.eval_dataset = map_datasets(
            lambda dataset, name: prepare_dataset(dataset, protocol, name), train_dataset, eval_dataset
        )
        self.search_loop = search_config.make_search_loop(
            self._make_engine(protocol.stop_strings),
            retriever,
            protocol,
            eos_token_ids=self.eos_token_ids,
            max_context_length=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )
        if args.warn_on_collapse:
            self.add_callback(CollapseCallback(stop_on=args.stop_on_collapse))
        # TRL's own seam for custom rollouts. Set here and not passed, because TRL warns users who pass one.
        self.rollout_func = self._rollout

    def _make_engine(self, stop_strings: Collection[str]) -> Engine:
        if self.use_vllm:
            return vllm_engine(
                self.vllm_generation, stop_strings, self.eos_token_ids, self.accelerator.wait_for_everyone
            )
        tokenizer, config = self._tokenizer, self.generation_config
        if self.continuous_batching_config is not None:
            return ContinuousBatchingEngine(
                self._generation_model, tokenizer, config, self.continuous_batching_config, stop_strings
            )
        return TransformersEngine(self._generation_model, tokenizer, config, stop_strings)

    def _growing_files(self) -> list[Path]:
        return [*log_files(self._log_file("train")), *log_files(self._log_file("eval"))]

    def _log_file(self, mode: str) -> Path:
        name = f"{mode}-rank{self.accelerator.process_index:03d}.jsonl"
        return Path(str(self.args.output_dir)) / "trajectories" / name

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "question", "golden_answers"]))

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        if isinstance(eval_dataset, (Dataset, IterableDataset)):  # one that `evaluate` was given
            eval_dataset = prepare_dataset(eval_dataset, self.search_loop.protocol, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate, see [`~transformers.Trainer.evaluation_loop`]; with several data sets, each logs under its own name."""
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        # TRL would log every data set of a `dict` under the same keys
        if metric_key_prefix.startswith("eval_"):
            metrics = self._metrics["eval"]
            metrics.update({alias: metrics[name] for alias, name in EVAL_ALIASES.items() if name in metrics})
            for name in list(metrics):
                metrics[f"{metric_key_prefix.removeprefix('eval_')}_{name}"] = metrics.pop(name)
        return output

    @contextmanager
    def _generation_model(self) -> Iterator[PreTrainedModel]:
        """The model to generate with: sharded parameters are gathered once for all turns of a rollout."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
            gathered_fsdp2(self.model_wrapped, reshard_after_forward=getattr(fsdp, "reshard_after_forward", True)),
        ):
            yield model

    def _rollout(self, prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        """Roll out the local prompts, in the form of a TRL rollout function."""
        # The rollouts of a group have one prompt, which is rendered and encoded once
        groups = [(prompt, len(list(rows))) for prompt, rows in groupby(prompts)]
        encoded = self.search_loop.protocol.encode_prompts([prompt for prompt, _ in groups])
        prompt_ids = [list(ids) for ids, (_, size) in zip(encoded, groups, strict=True) for _ in range(size)]
        before = self._retrieval_counters()
        if not self.model.training or self._step % self.args.gradient_accumulation_steps == 0:
            self._step_rng_state = get_rng_state(self.accelerator.device)  # what a resumed run repeats begins here
        if self._retrieval_log is not None:
            self._retrieval_log.begin(f"{'train' if self.model.training else 'eval'} {self.state.global_step}")
        trajectories, stats = self.search_loop.run(prompt_ids)
        self._check_retrieval(stats, before, len(trajectories))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [self._close(t, t.completion_ids, self._tokenizer.eos_token_id) for t in trajectories],
            "env_mask": [self._close(t, t.loss_mask, 0) for t in trajectories],
            # What vLLM has sampled with is not quite the model that is trained: TRL corrects for the difference
            "logprobs": [self._close(t, t.logprobs or [], 0.0) for t in trajectories] if self.use_vllm else None,
            "trajectories": trajectories,
        }

    def _close(self, trajectory: Trajectory, values: list[Any], end: float) -> list[Any]:
        """
        End a rollout with an end-of-sequence token that is not trained on: a rollout that ends at a closing tag has
        none, and TRL takes completions without it for truncated (`mask_truncated_completions`, `clipped_ratio`).
        """
        ended = trajectory.turns[-1].token_ids[-1] in self.eos_token_ids
        return values if ended or trajectory.status == "truncated" else [*values, end]

    def _check_retrieval(self, stats: RolloutStats, before: tuple[int, int], num_rollouts: int) -> None:
        """Log what retrieval cost, and stop if too much of it failed."""
        mode = "train" if self.model.training else "eval"
        cached, retries = (now - then for now, then in zip(self._retrieval_counters(), before, strict=True))
        max_calls = num_rollouts * self.args.max_searches
        facts = retrieval_facts(stats, cached=cached, retries=retries, max_calls=max_calls)
        metrics = retrieval_metrics(gather(torch.tensor([facts], device=self.accelerator.device)))
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)
        searches = metrics["retrieval/searches"]
        failed = sum(value for name, value in metrics.items() if name.startswith("retrieval/failed_"))
        if failed > self.args.max_retrieval_failure_rate * searches:
            advice = "Start again when it works."  # nothing has been trained yet, or this is an evaluation
            if self.is_in_train and self.state.global_step > 0:
                # The resumed run samples again what this step has sampled
                set_rng_state(self.accelerator.device, self._step_rng_state)
                self._save_checkpoint(self.model, trial=None)
                advice = "When it works again, `trainer.train(resume_from_checkpoint=True)` goes on from here."
            raise RetrievalError(
                f"{failed:.0f} of the {searches:.0f} searches of step {self.state.global_step + 1} failed, more than "
                f"`max_retrieval_failure_rate` ({self.args.max_retrieval_failure_rate}) allows. The retriever is "
                f"{self.search_loop.retriever!r}; its last failure on this rank: {stats.error!r}. "
                f"Nothing was trained on these rollouts. {advice}"
            ) from stats.error

    def _retrieval_counters(self) -> tuple[int, int]:
        """Queries that the cache has answered, and requests that the retriever has sent again."""
        return (self._cache.hits, self._cache.retries) if self._cache else (0, 0)

    def _generate(self, prompts: list):
        (prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images) = (
            super()._generate(prompts)
        )
        # What reward functions see as written by the model must not hold passages
        trajectories: list[Trajectory] = extra_fields["trajectories"]
        if is_conversational({"prompt": prompts[0]}):
            completions = [self._as_messages(trajectory) for trajectory in trajectories]
        else:
            completions = ["".join(turn.text for turn in trajectory.turns) for trajectory in trajectories]
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images

    def _as_messages(self, trajectory: Trajectory) -> list[dict[str, str]]:
        messages = []
        for turn in trajectory.turns:
            messages.append({"role": "assistant", "content": turn.text})
            if turn.observation_ids:
                content = self.search_loop.protocol.observation_text(turn.observation_ids)
                messages.append({"role": "tool", "name": "search", "content": content})
        return messages

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        failed = [x["trajectories"].status == "retrieval_failed" for x in inputs]
        rewards_per_func[gather(torch.tensor(failed, device=rewards_per_func.device))] = torch.nan
        self._rewards_per_func = rewards_per_func
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
        The credit of every turn, by the options of the configuration. Override it to try another.

        Args:
            outcomes (`torch.Tensor`):
                Outcome rewards of the N rollouts of all ranks, shape (N,), NaN for unscorable ones. The G rollouts of a
                question are adjacent.
            first_occurrence (`torch.Tensor`):
                The 0-based turn whose passages first contain a golden answer that the guard lets pass, integers of shape
                (N,), -1 for none.
            num_turns (`torch.Tensor`):
                The number of turns of each rollout, integers of shape (N,).
            num_generations (`int`):
                The size of a group, G.
            success_threshold (`float`):
                A rollout is correct if its outcome is at least this.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Turn rewards of shape (N, K), NaN where a rollout has no
            k-th turn, which are logged; turn advantages of shape (N, K); and which rollouts are trained with them,
            booleans of shape (N,): the others are trained with TRL's own advantage of the whole rollout.
        """
        args = self.args
        rewards = folr_rewards(
            outcomes,
            first_occurrence,
            num_turns,
            alpha=args.folr_alpha,
            placement=args.folr_placement,
            success_threshold=success_threshold,
        )
        stage: Any = {
            "num_generations": num_generations,
            "level": args.advantage_level,
            "success_threshold": success_threshold,
        }
        advantages = turn_advantages(
            rewards, outcomes, baseline=args.turn_baseline, scale_rewards=self.scale_rewards, **stage
        )
        return rewards, advantages, uses_turn_level(outcomes, **stage)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        args = self.args
        mode = "train" if self.model.training else "eval"
        trajectories: list[Trajectory] = [x["trajectories"] for x in inputs]
        advantages = output["advantages"]
        start = self.accelerator.process_index * len(inputs)
        local = slice(start, start + len(inputs))
        groups: dict[str, Any] = {
            "num_generations": self.num_generations if mode == "train" else self.num_generations_eval,
            "success_threshold": args.success_threshold,
        }

        # Groups may span ranks: rewards come gathered from TRL, what else a group needs is gathered here
        outcomes = (self._rewards_per_func * self.reward_weights.to(advantages.device)).nansum(dim=1)
        outcomes[self._rewards_per_func.isnan().all(dim=1)] = torch.nan
        facts = gather(torch.tensor([self._facts(x) for x in inputs], device=advantages.device))
        turn_rewards, of_turns, by_turn = self.compute_turn_advantages(
            outcomes, facts[:, FACTS.index("credited")], facts[:, FACTS.index("turns")], **groups
        )
        logps = gather(torch.tensor([mean_logprob(t) for t in trajectories], device=advantages.device))
        for name, value in rollout_metrics(facts, outcomes, (of_turns != 0).any(dim=1), logps, **groups).items():
            self._metrics[mode][name].append(value)

        # Where the trajectory advantage applies it is TRL's own, so that every option about it keeps its meaning
        of_turns = torch.where(by_turn[local, None], of_turns[local], advantages[:, None])
        of_turns = of_turns.masked_fill(turn_rewards[local].isnan(), 0.0)
        if args.advantage_level != "trajectory" or by_turn.any():
            turn_index = torch.full(output["completion_ids"].shape, -1, device=advantages.device)
            for row, trajectory in enumerate(trajectories):
                index = trajectory.turn_index
                turn_index[row, : len(index)] = torch.tensor(index)
            output["advantages"] = token_advantages(of_turns, turn_index)

        if args.log_trajectories:
            columns = (self._rewards_per_func[local], outcomes[local], facts[local], turn_rewards[local], of_turns)
            records = [
                rollout_record(
                    row["trajectories"],
                    row,
                    *values,
                    reward_names=self.reward_func_names,
                    step=self.state.global_step,
                    group=i // groups["num_generations"],
                    rollout=i % groups["num_generations"],
                )
                for i, row, values in zip(
                    range(start, local.stop), inputs, zip(*(c.tolist() for c in columns), strict=True), strict=True
                )
            ]
            if self.accelerator.is_main_process:
                write_settings(self._log_file(mode).parent, args)
            max_gib = args.log_trajectories_max_gib
            share = None if max_gib is None else int(max_gib * 2**30 / (2 * self.accelerator.num_processes))
            append_rollouts(self._log_file(mode), records, max_bytes=share)
        return output

    def _facts(self, row: dict[str, Any]) -> list[int]:
        trajectory: Trajectory = row["trajectories"]
        # Metrics keep one meaning whatever the guard is, so that runs can be compared
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
