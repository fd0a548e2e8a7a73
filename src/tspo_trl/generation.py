"""How the trainer generates: its engine, rollouts in the form that TRL reads, and when their retrieval ends a run."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import gather
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation

from .checkpoints import get_rng_state, set_rng_state
from .config import TSPOConfig
from .engines import ContinuousBatchingEngine, Engine, TransformersEngine
from .metrics import retrieval_facts, retrieval_metrics
from .protocol import SearchProtocol
from .retrieval import CachedRetriever, LoggedRetriever, RetrievalError, Retriever
from .rollout import RolloutStats, SearchLoop
from .sharding import gathered_fsdp2
from .trajectory import Trajectory
from .vllm_engines import vllm_engine


class GenerationMixin:
    """
    For a [`~trl.GRPOTrainer`]: completions are search rollouts.

    The only changes with respect to its generation are that `rollout_func` is the search loop, that sharded parameters
    are gathered once for all turns, that what retrieval cost is logged, that a step with too many failed searches is not
    trained on but ends the run with a checkpoint, and that reward functions see passages as tool messages, or not at all.
    """

    args: TSPOConfig
    state: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    is_in_train: bool
    use_vllm: bool
    vllm_generation: Any
    continuous_batching_config: Any
    generation_config: Any
    generation_kwargs: Any
    eos_token_ids: list[int]
    search_loop: SearchLoop
    _tokenizer: Any
    _dist: Any
    _metrics: Any
    _step: int
    _step_rng_state: list[torch.Tensor]
    _cache: CachedRetriever | None
    _retrieval_log: LoggedRetriever | None

    def _keep_results(self, retriever: Retriever | None, args: TSPOConfig) -> Retriever:
        """The retriever, or none, with its cache and its log, as far as the configuration asks for them."""
        self._cache = self._retrieval_log = None
        if retriever is not None:
            retriever = self._cache = CachedRetriever(retriever, args.retrieval_cache_size, args.retrieval_cache_dir)
        if args.retrieval_log is not None:
            retriever = self._retrieval_log = LoggedRetriever(retriever, args.retrieval_log, rank=args.process_index)
        assert retriever is not None
        return retriever

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
        eos, ends = self._tokenizer.eos_token_id, self.eos_token_ids
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [with_end(t, t.completion_ids, eos, ends) for t in trajectories],
            "env_mask": [with_end(t, t.loss_mask, 0, ends) for t in trajectories],
            # What vLLM has sampled with is not quite the model that is trained: TRL corrects for the difference
            "logprobs": [with_end(t, t.logprobs or [], 0.0, ends) for t in trajectories] if self.use_vllm else None,
            "trajectories": trajectories,
        }

    def _retrieval_counters(self) -> tuple[int, int]:
        """Queries that the cache has answered, and requests that the retriever has sent again."""
        return (self._cache.hits, self._cache.retries) if self._cache else (0, 0)

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
                self._save_checkpoint(self.model, trial=None)  # type: ignore[attr-defined]
                advice = "When it works again, `trainer.train(resume_from_checkpoint=True)` goes on from here."
            raise RetrievalError(
                f"{failed:.0f} of the {searches:.0f} searches of step {self.state.global_step + 1} failed, more than "
                f"`max_retrieval_failure_rate` ({self.args.max_retrieval_failure_rate}) allows. The retriever is "
                f"{self.search_loop.retriever!r}; its last failure on this rank: {stats.error!r}. "
                f"Nothing was trained on these rollouts. {advice}"
            ) from stats.error

    def _generate(self, prompts: list):
        (prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images) = (
            super()._generate(prompts)  # type: ignore[misc]
        )
        # What reward functions see as written by the model must not hold passages
        trajectories: list[Trajectory] = extra_fields["trajectories"]
        if is_conversational({"prompt": prompts[0]}):
            completions = [as_messages(trajectory, self.search_loop.protocol) for trajectory in trajectories]
        else:
            completions = ["".join(turn.text for turn in trajectory.turns) for trajectory in trajectories]
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images


def with_end(trajectory: Trajectory, values: list[Any], end: float, eos_token_ids: Collection[int]) -> list[Any]:
    """
    End a rollout with an end-of-sequence token that is not trained on: a rollout that ends at a closing tag has none, and
    TRL takes completions without it for truncated (`mask_truncated_completions`, `clipped_ratio`).

    Args:
        trajectory ([`Trajectory`]):
            The rollout.
        values (`list`):
            One value for each of its completion tokens.
        end (`int` or `float`):
            The value of the token that ends it.
        eos_token_ids (`Collection[int]`):
            Tokens that end a completion.

    Returns:
        `list`: The values, with `end` unless the rollout was truncated or the model has ended it.
    """
    ended = trajectory.turns[-1].token_ids[-1] in eos_token_ids
    return values if ended or trajectory.status == "truncated" else [*values, end]


def as_messages(trajectory: Trajectory, protocol: SearchProtocol) -> list[dict[str, str]]:
    """A rollout as a conversation: the turns of the model, and the observations as messages of the tool `search`."""
    messages = []
    for turn in trajectory.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.observation_ids:
            content = protocol.observation_text(turn.observation_ids)
            messages.append({"role": "tool", "name": "search", "content": content})
    return messages
