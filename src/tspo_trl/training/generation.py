"""Generation in training: the engine, and rollouts in the format of TRL."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

import torch
from accelerate.utils import gather, gather_object
from transformers import GenerationConfig, PreTrainedModel
from trl.models import unwrap_model_for_generation

from ..engines.base import Engine
from ..engines.continuous import ContinuousBatchingEngine
from ..engines.sampling import sampling_by
from ..engines.static import TransformersEngine
from ..engines.vllm import vllm_engine
from ..retrieval import CachedRetriever, LoggedRetriever, RetrievalError, Retriever
from ..rollout.loop import SearchLoop
from ..rollout.protocol import SearchProtocol
from ..rollout.stats import RolloutStats
from ..rollout.trajectory import Trajectory
from ..support.devices import get_rng_state, set_rng_state
from .config import TSPOConfig
from .masking import replace_last
from .metrics import retrieval_facts, retrieval_metrics
from .sharding import gathered_fsdp2


@dataclass(frozen=True, slots=True)
class RetrieverStack:
    """
    A retriever with its cache and its log.

    Args:
        retriever ([`Retriever`]):
            The outermost retriever, which the search loop calls.
        cache ([`CachedRetriever`], *optional*):
            The cache, if there is one.
        log ([`LoggedRetriever`], *optional*):
            The log, if there is one.
    """

    retriever: Retriever
    cache: CachedRetriever | None = None
    log: LoggedRetriever | None = None

    @classmethod
    def build(cls, retriever: Retriever | None, args: TSPOConfig) -> "RetrieverStack":
        """
        Wrap a retriever in the cache and the log of a configuration.

        Args:
            retriever ([`Retriever`], *optional*):
                The retriever. It can be `None` only if the run is repeated from its `retrieval_log`.
            args ([`TSPOConfig`]):
                The configuration.
        """
        stack, cache, log = retriever, None, None
        if stack is not None:
            stack = cache = CachedRetriever(stack, args.retrieval_cache_size, args.retrieval_cache_dir)
        if args.retrieval_log is not None:
            stack = log = LoggedRetriever(stack, args.retrieval_log, rank=args.process_index)
        assert stack is not None
        return cls(stack, cache, log)

    def counters(self) -> tuple[int, int]:
        """Numbers of queries answered by the cache and of repeated requests so far."""
        return (self.cache.hits, self.cache.retries) if self.cache else (0, 0)


class SearchRollouts:
    """
    The rollout function of a [`TSPOTrainer`], in the format of TRL: it gets the local prompts and the trainer, runs the
    search loop, and returns the tokens to train on. It also logs the metrics of retrieval. If too many searches of a step
    fail, it saves a checkpoint and stops the run, and the step is not trained on.

    Args:
        search_loop ([`SearchLoop`]):
            The search loop.
        retrievers ([`RetrieverStack`]):
            The retriever of the loop, with its cache and its log.
    """

    def __init__(self, search_loop: SearchLoop, retrievers: RetrieverStack):
        self.search_loop = search_loop
        self.retrievers = retrievers
        self._rng_state: list[torch.Tensor] = []  # before the first rollout of the step

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """
        Roll out the local prompts.

        Args:
            prompts (`list`):
                B prompts, texts or conversations. Those of a group are adjacent.
            trainer ([`TSPOTrainer`]):
                The trainer.

        Returns:
            `dict[str, Any]`: For each of the B rollouts `prompt_ids`, `completion_ids`, `env_mask` (1 on tokens that the
            model sampled, 0 on observations), `logprobs` if the engine's differ from the model's (vLLM), and the
            `trajectory`, which becomes a column of the rows.

        Raises:
            [`RetrievalError`]: If more than `max_retrieval_failure_rate` of the searches failed.
        """
        mode = "train" if trainer.model.training else "eval"
        starts = trainer._step % trainer.args.gradient_accumulation_steps == 0 and not trainer._further_rollouts
        if mode == "eval" or starts:
            self._rng_state = get_rng_state(trainer.accelerator.device)
        if self.retrievers.log is not None:
            self.retrievers.log.begin(f"{mode} {trainer.state.global_step}")

        prompt_ids = self._encode(prompts)
        counters = self.retrievers.counters()
        trajectories, stats = self.search_loop.run(prompt_ids)
        self._check_retrieval(trainer, stats, counters, len(trajectories))

        eos, ends = trainer._tokenizer.eos_token_id, trainer.eos_token_ids
        other = next(token for token in count() if token not in {*ends, trainer._tokenizer.pad_token_id})
        logprobs = None
        if trainer.use_vllm:  # vLLM's probabilities differ slightly from the model's: TRL corrects for it
            logprobs = [with_end(t, t.logprobs or [], 0.0, ends, cut=0.0) for t in trajectories]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [with_end(t, t.completion_ids, eos, ends, cut=other) for t in trajectories],
            "env_mask": [with_end(t, t.loss_mask, 0, ends, cut=0) for t in trajectories],
            "logprobs": logprobs,
            "trajectory": trajectories,
        }

    def _encode(self, prompts: list[Any]) -> list[list[int]]:
        """Encode the prompts. The rollouts of a group share one prompt, which is encoded once."""
        groups = [(prompt, len(list(rows))) for prompt, rows in groupby(prompts)]
        encoded = self.search_loop.protocol.encode_prompts([prompt for prompt, _ in groups])
        return [list(ids) for ids, (_, size) in zip(encoded, groups, strict=True) for _ in range(size)]

    def _check_retrieval(self, trainer: Any, stats: RolloutStats, counters: tuple[int, int], num_rollouts: int) -> None:
        """Log the metrics of retrieval, and stop the run if too many searches failed."""
        args, state, accelerator = trainer.args, trainer.state, trainer.accelerator
        cached, retries = (now - then for now, then in zip(self.retrievers.counters(), counters, strict=True))
        max_calls = num_rollouts * args.max_searches
        facts = retrieval_facts(stats, cached=cached, retries=retries, max_calls=max_calls)
        metrics = retrieval_metrics(gather(torch.tensor([facts], device=accelerator.device)))
        for name, value in metrics.items():
            trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)

        searches = metrics["retrieval/searches"]
        failed = sum(value for name, value in metrics.items() if name.startswith("retrieval/failed_"))
        if failed <= args.max_retrieval_failure_rate * searches:
            return
        advice = "Start again when it works."  # nothing has been trained yet, or this is an evaluation
        if trainer.is_in_train and state.global_step > 0:
            # The resumed run samples the same rollouts as this step
            set_rng_state(accelerator.device, self._rng_state)
            trainer._save_checkpoint(trainer.model, trial=None)
            advice = "When it works again, `trainer.train(resume_from_checkpoint=True)` continues from here."
        raise RetrievalError(
            f"{failed:.0f} of the {searches:.0f} searches of step {state.global_step + 1} failed, more than "
            f"`max_retrieval_failure_rate` ({args.max_retrieval_failure_rate}) allows. The retriever is "
            f"{self.search_loop.retriever!r}; its last failure in this process: {stats.error!r}. "
            f"Nothing was trained on these rollouts. {advice}"
        ) from stats.error


def make_engine(trainer: Any, stop_strings: Collection[str]) -> Engine:
    """
    Make the engine that the configuration of a trainer selects.

    Args:
        trainer ([`TSPOTrainer`]):
            The trainer, after TRL has set it up.
        stop_strings (`Collection[str]`):
            Strings that end a turn. The token that completes one is its last.
    """
    if trainer.use_vllm:
        barrier = trainer.accelerator.wait_for_everyone
        return vllm_engine(trainer.vllm_generation, stop_strings, trainer.eos_token_ids, barrier)
    tokenizer, config = trainer._tokenizer, trainer.generation_config
    batching_config = trainer.continuous_batching_config
    if batching_config is not None:
        return ContinuousBatchingEngine(
            lambda: generation_model(trainer, config), tokenizer, config, batching_config, stop_strings
        )
    autocast = trainer.accelerator.autocast
    return TransformersEngine(lambda: generation_model(trainer, config), tokenizer, config, stop_strings, autocast)


@contextmanager
def generation_model(trainer: Any, generation_config: GenerationConfig) -> Iterator[PreTrainedModel]:
    """
    The model of a trainer, prepared for generation. Sharded parameters are gathered once for all turns of a rollout.

    Args:
        trainer ([`TSPOTrainer`]):
            The trainer.
        generation_config ([`~transformers.GenerationConfig`]):
            The only configuration that applies. The model's own `generation_config.json` does not.
    """
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model_wrapped
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    with (
        unwrap_model_for_generation(
            model,
            accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as unwrapped,
        trainer._dist.summon_full_params(model, recurse=False),
        gathered_fsdp2(model, reshard_after_forward=getattr(fsdp, "reshard_after_forward", True)),
        sampling_by(unwrapped, generation_config),
    ):
        yield unwrapped


def with_end(
    trajectory: Trajectory, values: list[Any], end: float, eos_token_ids: Collection[int], *, cut: float | None = None
) -> list[Any]:
    """
    Append a token that is not trained on, so that TRL treats the truncated rollouts as truncated, and no others
    (`mask_truncated_completions`, `clipped_ratio`). TRL looks only at the last token: a rollout that ends at a closing tag
    gets an end-of-sequence token, and a truncated rollout whose last turn has one gets another token after it.

    Args:
        trajectory ([`Trajectory`]):
            The rollout.
        values (`list`):
            One value for each of its completion tokens.
        end (`int` or `float`):
            Value for the end-of-sequence token.
        eos_token_ids (`Collection[int]`):
            Tokens that end a completion.
        cut (`int` or `float`, *optional*):
            Value for the token after the end of a truncated rollout. By default nothing is appended to it.

    Returns:
        `list`: The values, and the value of the appended token if there is one.
    """
    ended = trajectory.turns[-1].token_ids[-1] in eos_token_ids
    if trajectory.status == "truncated":
        return [*values, cut] if ended and cut is not None else values
    return values if ended else [*values, end]


def as_messages(trajectory: Trajectory, protocol: SearchProtocol) -> list[dict[str, str]]:
    """
    Convert a rollout to a conversation: turns become messages of the assistant, observations messages of the tool `search`.

    Args:
        trajectory ([`Trajectory`]):
            The rollout.
        protocol ([`SearchProtocol`]):
            The protocol of the rollout, which reads observations.
    """
    messages = []
    for turn in trajectory.turns:
        messages.append({"role": "assistant", "content": turn.text})
        if turn.observation_ids:
            content = protocol.observation_text(turn.observation_ids)
            messages.append({"role": "tool", "name": "search", "content": content})
    return messages


def show_texts(logs: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], protocol: SearchProtocol) -> None:
    """
    Replace the last prompts and completions in TRL's table of completions by texts, see [`as_texts`].

    Args:
        logs (`Mapping[str, deque]`):
            The columns of the table, which hold the rollouts of all processes.
        rows (`Sequence[Mapping]`):
            The local rows, with `prompt` and `trajectory`.
        protocol ([`SearchProtocol`]):
            The protocol of the rollouts, which reads observations.
    """
    texts = gather_object([as_texts(row["prompt"], row["trajectory"], protocol) for row in rows])
    replace_last(logs["prompt"], [prompt for prompt, _ in texts])
    replace_last(logs["completion"], [completion for _, completion in texts])


def as_texts(prompt: str | list[dict[str, Any]], trajectory: Trajectory, protocol: SearchProtocol) -> tuple[str, str]:
    """
    Convert a prompt and its rollout to texts for a table, observations included. In a conversation, every message begins
    with its role. Texts are easier to read than messages, and wandb refuses messages of which only some have a name.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, a text or a conversation.
        trajectory ([`Trajectory`]):
            The rollout.
        protocol ([`SearchProtocol`]):
            The protocol of the rollout, which reads observations.
    """
    if isinstance(prompt, str):
        return prompt, str(protocol.tokenizer.decode(trajectory.completion_ids))
    return _as_text(prompt), _as_text(as_messages(trajectory, protocol))


def _as_text(messages: list[dict[str, Any]]) -> str:
    parts = ("reasoning_content", "content", "tool_calls")
    return "\n\n".join(
        "\n".join([m["role"].upper(), *(str(m[part]) for part in parts if m.get(part))]) for m in messages
    )
