"""Every option of the library, in one place."""

from dataclasses import dataclass, field
from typing import Any, get_args

from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from ..credit import Baseline, Guard, Level, Placement, Scale
from ..rollout.limits import SearchLimits
from ..rollout.protocols import ProtocolName
from .collapse import WATCHES

_CHOICES = {
    "protocol": ProtocolName,
    "folr_placement": Placement,
    "folr_guard": Guard,
    "advantage_level": Level,
    "turn_baseline": Baseline,
}
_SMALLEST = {"num_generations": 2, "retrieval_cache_size": 0}


def _limit(name: str) -> Any:
    """An option with the default and the help text of the limit of the same name."""
    limit = SearchLimits.__dataclass_fields__[name]
    return field(default=limit.default, metadata={"help": limit.metadata["help"]})


@dataclass
class TSPOConfig(GRPOConfig):
    r"""
    Configuration of the [`TSPOTrainer`].

    Only the parameters that are specific to TSPO and its search loop are listed here; all of [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`] apply too.

    Parameters:
        > Parameters that control the search loop

        protocol (`str`, *optional*, defaults to `"tags"`):
            How the model writes its actions. `"tags"`: `<search>query</search>` and `<answer>…</answer>`, passages come
            back between `<information>` and `</information>`. `"tool_call"`: the chat template's own tool calls (Qwen2.5,
            Qwen3 and others that write `<tool_call>{…}</tool_call>`); passages come back as the response of the tool
            `search`, and a message without a call is the answer.
        max_searches, num_passages, max_turn_tokens, max_query_tokens, max_observation_tokens, max_completion_length:
            The limits of the search loop, see [`SearchLimits`].

        > Parameters that control retrieval

        max_retrieval_failure_rate (`float`, *optional*, defaults to `0.5`):
            If more than this share of the searches of a step fail, training saves a checkpoint and stops with an error.
        retrieval_cache_size (`int`, *optional*, defaults to `10000`):
            How many queries to keep in memory with their passages, in each process. 0 keeps none. With a retriever whose
            answers change, for instance a search engine on the web, the kept ones go on being used.
        retrieval_cache_dir (`str`, *optional*):
            A folder to keep all queries with their passages in, for this run and others. Runs, processes and retrievers
            may share it.
        retrieval_log (`str`, *optional*):
            A folder to write down what is retrieved. With `retriever=None` a run is repeated from it bit for bit; with a
            retriever, what the log knows is not asked again.

        > Parameters that control the turn rewards and advantages

        folr_alpha (`float`, *optional*, defaults to `0.5`):
            The partial reward α of the turn whose passages first contain a golden answer, in a rollout that is not
            correct.
        folr_placement (`str`, *optional*, defaults to `"first"`):
            `"first"` pays the turn of the first occurrence, `"up_to_first"` every turn up to and including it.
        folr_guard (`str`, *optional*, defaults to `"degenerate"`):
            Which golden answers may earn it. `"none"`: all, as published. `"degenerate"`: not those that normalise to
            nothing, yes, no, noanswer or a single character. `"strict"`: also not those that the question contains,
            nor an occurrence in a turn whose own query names the gold.
        advantage_level (`str`, *optional*, defaults to `"stage"`):
            `"stage"`: turn advantages in groups without a correct rollout, trajectory advantages in the others.
            `"turn"`: turn advantages always. `"trajectory"`: GRPO.
        turn_baseline (`str`, *optional*, defaults to `"turn"`):
            What a turn reward is compared with: `"turn"`, the same turn of the other rollouts of the group, or
            `"group"`, all turns of the group.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout is correct if its outcome reward (the weighted sum of the reward functions) is at least this.

        > Parameters that control the logging

        log_trajectories (`bool`, *optional*, defaults to `True`):
            Whether to write every rollout, with the rewards and advantages of its turns, to
            `output_dir/trajectories/*.jsonl`, one line a rollout, in files for each process. `tspo inspect` shows
            them.
        log_trajectories_max_gib (`float`, *optional*, defaults to `10.0`):
            The most disk, in GiB, that these files take. Every process has an equal share, half of it for training and
            half for evaluation. When a share is used up its recent half stays complete, and before that every 2nd file
            is dropped, then every 2nd of those that are left, and so on: the beginning of the run stays. `None` keeps
            everything.
        warn_on_collapse (`bool`, *optional*, defaults to `True`):
            Whether to warn, with the evidence and what to try, when a run is about to be lost: when it stops searching,
            repeats itself, writes malformed actions and more, see [`CollapseCallback`].
        stop_on_collapse (`list[str]`, *optional*):
            Kinds of these warnings that end the training, with a checkpoint: `"searches"`, `"duplicates"`, `"invalid"`,
            `"length"`, `"entropy"`, `"signal"`, `"likelihood"`. Needs `warn_on_collapse=True`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `max_completion_length`: Defaults to `4096` instead of `256`.
    > - `bf16`: Defaults to `False` instead of `True` where no device supports it, so that a run also starts on a CPU.
    """

    # Parameters that control the search loop
    protocol: ProtocolName = field(
        default="tags",
        metadata={
            "help": "How the model writes its actions: 'tags' (<search>query</search>, <answer>…</answer>) or 'tool_call' "
            "(the chat template's own tool calls; a message without a call is the answer)."
        },
    )
    max_searches: int = _limit("max_searches")
    num_passages: int = _limit("num_passages")
    max_turn_tokens: int = _limit("max_turn_tokens")
    max_query_tokens: int = _limit("max_query_tokens")
    max_observation_tokens: int = _limit("max_observation_tokens")
    max_completion_length: int = _limit("max_completion_length")

    # Parameters that control retrieval
    max_retrieval_failure_rate: float = field(
        default=0.5,
        metadata={
            "help": "If more than this share of the searches of a step fail, training saves a checkpoint and stops "
            "with an error."
        },
    )
    retrieval_cache_size: int = field(
        default=10_000,
        metadata={"help": "How many queries to keep in memory with their passages, in each process. 0 keeps none."},
    )
    retrieval_cache_dir: str | None = field(
        default=None,
        metadata={"help": "A folder to keep all queries with their passages in, for this run and others."},
    )
    retrieval_log: str | None = field(
        default=None,
        metadata={
            "help": "A folder to write down what is retrieved. With `retriever=None` a run is repeated from it bit for "
            "bit; with a retriever, what the log knows is not asked again."
        },
    )

    # Parameters that control the turn rewards and advantages
    folr_alpha: float = field(
        default=0.5,
        metadata={
            "help": "The partial reward of the turn whose passages first contain a golden answer, in a rollout that is "
            "not correct."
        },
    )
    folr_placement: Placement = field(
        default="first",
        metadata={
            "help": "'first' pays the turn of the first occurrence, 'up_to_first' every turn up to and including it.",
        },
    )
    folr_guard: Guard = field(
        default="degenerate",
        metadata={
            "help": "Which golden answers may earn the partial reward. 'none': all, as published. 'degenerate': not "
            "those that normalise to nothing, yes, no, noanswer or a single character. 'strict': also not those that "
            "the question contains, nor an occurrence in a turn whose own query names the gold.",
        },
    )
    advantage_level: Level = field(
        default="stage",
        metadata={
            "help": "'stage': turn advantages in groups without a correct rollout, trajectory advantages in the "
            "others. 'turn': turn advantages always. 'trajectory': GRPO.",
        },
    )
    turn_baseline: Baseline = field(
        default="turn",
        metadata={
            "help": "What a turn reward is compared with: 'turn', the same turn of the other rollouts of the group, or "
            "'group', all turns of the group.",
        },
    )
    success_threshold: float = field(
        default=1.0,
        metadata={
            "help": "A rollout is correct if its outcome reward (the weighted sum of the reward functions) is at least "
            "this."
        },
    )

    # Parameters that control the logging
    log_trajectories: bool = field(
        default=True,
        metadata={
            "help": "Whether to write every rollout, with the rewards and advantages of its turns, to "
            "`output_dir/trajectories/*.jsonl`, one line a rollout, in files for each process."
        },
    )
    log_trajectories_max_gib: float | None = field(
        default=10.0,
        metadata={
            "help": "The most disk, in GiB, that these files take. What is recent stays complete, what is older is "
            "thinned evenly, so that the beginning of the run stays. None keeps everything."
        },
    )

    warn_on_collapse: bool = field(
        default=True,
        metadata={"help": "Whether to warn, with the evidence and what to try, when a run is about to be lost."},
    )
    stop_on_collapse: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Kinds of these warnings that end the training, with a checkpoint: 'searches', 'duplicates', "
            "'invalid', 'length', 'entropy', 'signal', 'likelihood'."
        },
    )

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}` must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")
        for name, smallest in _SMALLEST.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"`{name}` must be at least {smallest}, got {getattr(self, name)}.")
        SearchLimits.of(self).check_room()
        if not self.folr_alpha >= 0:
            raise ValueError(f"`folr_alpha` must not be negative, got {self.folr_alpha}.")
        if self.success_threshold != self.success_threshold:
            raise ValueError("`success_threshold` must be a number, got nan.")
        if not 0 <= self.max_retrieval_failure_rate <= 1:
            raise ValueError(
                f"`max_retrieval_failure_rate` must be between 0 and 1, got {self.max_retrieval_failure_rate}."
            )
        kinds = [watch.kind for watch in WATCHES]
        if unknown := sorted(set(self.stop_on_collapse) - set(kinds)):
            raise ValueError(f"`stop_on_collapse` must hold some of {kinds}, got {unknown}.")
        if self.stop_on_collapse and not self.warn_on_collapse:
            raise ValueError(
                f"`stop_on_collapse` is {self.stop_on_collapse}, but with `warn_on_collapse=False` nothing is watched. Set "
                "`warn_on_collapse=True`, or leave `stop_on_collapse` empty."
            )
        if self.log_trajectories_max_gib is not None and not self.log_trajectories_max_gib > 0:
            raise ValueError(
                f"`log_trajectories_max_gib` must be above 0, or None for no bound, got {self.log_trajectories_max_gib}. "
                "To write no rollouts set `log_trajectories=False`."
            )
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_vllm=True` and `use_transformers_continuous_batching=True` are two engines. Set one of them to False."
            )
        if self.vllm_structured_outputs_regex is not None:
            raise ValueError(
                "`vllm_structured_outputs_regex` would hold every turn of a search to one pattern, got "
                f"{self.vllm_structured_outputs_regex!r}. Set it to None and reward the format instead, see "
                "`tspo_trl.rewards`."
            )
        if self.bf16 is None and not is_torch_bf16_gpu_available():
            self.bf16 = False
        super().__post_init__()
        if self.scale_rewards not in get_args(Scale):
            raise ValueError(f"`scale_rewards` must be one of {list(get_args(Scale))}, got {self.scale_rewards!r}.")
