"""The configuration of the trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from ..credit import Aggregation, Baseline, Guard, Level, Placement, Scale
from ..rollout.limits import SearchLimits, limit_option
from ..rollout.protocols import ProtocolName
from .collapse import KINDS
from .progress import ignore_harmless_warnings
from .values import check_values

#: Values of options that TRL would check only in the first step.
_CHOICES = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "vllm_mode": ("server", "colocate"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}


_TURN_LIMIT = "set `max_turn_tokens`, the limit of a turn, or `max_completion_length`"
_ONE_SAMPLE = "every turn is sampled token by token, so that its log-probabilities are those of the policy"
_NOT_FOR_GENERATION = {  # option of `generate` or vLLM -> what applies instead
    **dict.fromkeys(("max_new_tokens", "max_length", "max_tokens", "max_time"), _TURN_LIMIT),
    **dict.fromkeys(("num_return_sequences", "n", "best_of"), "set `num_generations`, the rollouts of a group"),
    **dict.fromkeys(("num_beams", "num_beam_groups", "penalty_alpha", "constraints", "force_words_ids"), _ONE_SAMPLE),
    **dict.fromkeys(
        ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers"), _ONE_SAMPLE
    ),
    **dict.fromkeys(
        ("stop_strings", "stop", "stopping_criteria", "ignore_eos"), "the protocol decides where a turn ends"
    ),
    **dict.fromkeys(("eos_token_id", "stop_token_ids"), "set `model.generation_config.eos_token_id`"),
    **dict.fromkeys(("structured_outputs", "guided_decoding"), "reward the format instead, see `tspo_trl.rewards`"),
    "token_healing": "the tokens of a context are never encoded again",
}


@dataclass
class TSPOConfig(GRPOConfig):
    r"""
    Configuration of the [`TSPOTrainer`].

    Only the parameters that are specific to TSPO and its search loop are listed here; all of [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`] apply too.

    Parameters:
        > Parameters that control the search loop

        protocol (`str`, *optional*, defaults to `"tags"`):
            How the model writes its actions. `"tags"`: `<search>query</search>` and `<answer>…</answer>`; passages are
            shown between `<information>` and `</information>`. `"tool_call"`: the chat template's own tool calls, in
            every chat template that TRL can read; passages are shown as the response of the tool `search`, and a message
            without a call is the answer.
        max_searches, num_passages, max_turn_tokens, max_query_tokens, max_observation_tokens, max_completion_length:
            The limits of the search loop, see [`SearchLimits`].

        > Parameters that control retrieval

        max_retrieval_failure_rate (`float`, *optional*, defaults to `0.5`):
            If more than this share of the searches of a step fail, training saves a checkpoint and stops with an error.
        retrieval_cache_size (`int`, *optional*, defaults to `10000`):
            Number of queries that each process keeps in memory with their passages. 0 disables this cache. Cached results
            are reused even if the answers of the retriever change, as those of a web search engine do.
        retrieval_cache_dir (`str`, *optional*):
            Folder of a cache on disk for all queries and their passages. Runs, processes and retrievers can share it.
        retrieval_log (`str`, *optional*):
            Folder of a log of all retrieved passages. With `retriever=None`, a run is repeated from the log bit for bit;
            with a retriever, queries in the log are answered from it.

        > Parameters that control the turn rewards and advantages

        folr_alpha (`float`, *optional*, defaults to `0.5`):
            Partial reward α of the turn whose passages first contain a golden answer, in a rollout that is not
            correct.
        folr_placement (`str`, *optional*, defaults to `"first"`):
            `"first"` pays the turn of the first occurrence, `"up_to_first"` every turn up to and including it.
        folr_guard (`str`, *optional*, defaults to `"chance"`):
            Which occurrences of golden answers earn the partial reward, and how much they count. `"none"`: all. `"degenerate"`:
            all but answers that normalise to the empty string, yes, no, noanswer or a single character; otherwise TSPO as
            published. `"chance"`: the same, and the turn advantages of a group are scaled down by the share of its finds that
            chance explains. `"strict"`: as `"degenerate"`, but also excludes golden answers that the question contains, and
            occurrences in a turn whose own query contains the answer.
        advantage_level (`str`, *optional*, defaults to `"stage"`):
            `"stage"`: turn advantages in groups without a correct rollout, trajectory advantages in the others.
            `"turn"`: turn advantages always. `"trajectory"`: GRPO.
        turn_baseline (`str`, *optional*, defaults to `"turn"`):
            Turn rewards that a turn reward is compared with. `"turn"`: those of the same turn in the group. `"group"`:
            those of all turns in the group.
        success_threshold (`float`, *optional*, defaults to `1.0`):
            A rollout is correct if its outcome reward (the weighted sum of the reward functions) is at least this.

        > Parameters that control dynamic sampling

        dynamic_sampling (`bool`, *optional*, defaults to `False`):
            Whether to replace groups in which every advantage is zero by groups of further questions of the training set, as
            in [DAPO](https://huggingface.co/papers/2503.14476). A filter of outcomes would also drop the all-wrong groups
            that turn rewards rescue; they are kept. `train_dataset` must have a length.
        max_sampling_rounds (`int`, *optional*, defaults to `3`):
            Maximum number of further rounds of a step with `dynamic_sampling`. A round samples as many groups as are
            missing. Groups that are still missing after the last round stay without a signal.

        > Parameters that control the loss

        compact_forward (`bool`, *optional*):
            Whether the training forward leaves out what adds nothing to the gradient: rollouts whose advantages are all
            zero, padding, and the language model head on passages. Loss and gradients stay the same up to rounding. `None`
            is `True`, but `False` with `advantage_level="trajectory"`, which is GRPO to the last bit.

        > Parameters that control the logging

        log_trajectories (`bool`, *optional*, defaults to `True`):
            Whether to write every rollout, with the rewards and advantages of its turns, to
            `output_dir/trajectories/*.jsonl`, one line for each rollout, in separate files for each process. `tspo inspect`
            shows them.
        log_trajectories_max_gib (`float`, *optional*, defaults to `10.0`):
            Maximum size of these files on disk, in GiB. Every process has an equal share, half of it for training and
            half for evaluation. When a share is used up, its recent half stays complete. Of the older files, every 2nd is
            deleted, then every 2nd of the remaining ones, and so on, so that the start of the run stays visible. `None`
            keeps all files.
        warn_on_collapse (`bool`, *optional*, defaults to `True`):
            Whether to warn when a run is about to collapse, for instance because the model stops searching, repeats its
            queries or writes malformed actions. The warning gives the evidence and advice, see [`CollapseCallback`].
        stop_on_collapse (`list[str]`, *optional*):
            Kinds of these warnings that stop training, with a checkpoint: `"searches"`, `"answers"`, `"duplicates"`,
            `"invalid"`, `"length"`, `"entropy"`, `"signal"`, `"likelihood"`, `"threshold"`. Needs `warn_on_collapse=True`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.GRPOConfig`]:
    > - `max_completion_length`: Defaults to `4096` instead of `256`.
    > - `bf16`: Defaults to `False` instead of `True` if no device supports it, so that a run also starts on a CPU.
    """

    # Parameters that control the search loop
    protocol: ProtocolName = field(
        default="tags",
        metadata={
            "help": "How the model writes its actions: 'tags' (<search>query</search>, <answer>…</answer>) or 'tool_call' "
            "(the chat template's own tool calls; a message without a call is the answer)."
        },
    )
    max_searches: int = limit_option("max_searches")
    num_passages: int = limit_option("num_passages")
    max_turn_tokens: int = limit_option("max_turn_tokens")
    max_query_tokens: int = limit_option("max_query_tokens")
    max_observation_tokens: int = limit_option("max_observation_tokens")
    max_completion_length: int | None = limit_option("max_completion_length")

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
        metadata={
            "help": "Number of queries that each process keeps in memory with their passages. 0 disables this cache."
        },
    )
    retrieval_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of a cache on disk for all queries and their passages."},
    )
    retrieval_log: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a log of all retrieved passages. With `retriever=None`, a run is repeated from the log bit "
            "for bit; with a retriever, queries in the log are answered from it."
        },
    )

    # Parameters that control the turn rewards and advantages
    folr_alpha: float = field(
        default=0.5,
        metadata={
            "help": "Partial reward of the turn whose passages first contain a golden answer, in a rollout that is "
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
        default="chance",
        metadata={
            "help": "Which occurrences of golden answers earn the partial reward, and how much they count. 'none': all. "
            "'degenerate': all but answers that normalise to the empty string, yes, no, noanswer or a single character; "
            "otherwise TSPO as published. 'chance': the same, and the turn advantages of a group are scaled down by the share "
            "of its finds that chance explains. 'strict': as 'degenerate', but also excludes golden answers that the question "
            "contains, and occurrences in a turn whose own query contains the answer.",
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
            "help": "Turn rewards that a turn reward is compared with. 'turn': those of the same turn in the group. "
            "'group': those of all turns in the group.",
        },
    )
    success_threshold: float = field(
        default=1.0,
        metadata={
            "help": "A rollout is correct if its outcome reward (the weighted sum of the reward functions) is at least "
            "this."
        },
    )

    # Parameters that control dynamic sampling
    dynamic_sampling: bool = field(
        default=False,
        metadata={
            "help": "Whether to replace groups in which every advantage is zero by groups of further questions. Groups that "
            "turn rewards rescue are kept."
        },
    )
    max_sampling_rounds: int = field(
        default=3,
        metadata={"help": "Maximum number of further rounds of a step with `dynamic_sampling`."},
    )

    # Parameters that control the loss
    compact_forward: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the training forward leaves out what adds nothing to the gradient: rollouts whose advantages "
            "are all zero, padding, and the language model head on passages. Loss and gradients stay the same up to "
            "rounding. None: True, but False with `advantage_level='trajectory'`, which is GRPO to the last bit."
        },
    )

    # Parameters that control the logging
    log_trajectories: bool = field(
        default=True,
        metadata={
            "help": "Whether to write every rollout, with the rewards and advantages of its turns, to "
            "`output_dir/trajectories/*.jsonl`, one line for each rollout, in separate files for each process."
        },
    )
    log_trajectories_max_gib: float | None = field(
        default=10.0,
        metadata={
            "help": "Maximum size of these files on disk, in GiB. Recent files stay complete, older files are deleted "
            "evenly. None keeps all files."
        },
    )

    warn_on_collapse: bool = field(
        default=True,
        metadata={"help": "Whether to warn, with evidence and advice, when a run is about to collapse."},
    )
    stop_on_collapse: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Kinds of these warnings that stop training, with a checkpoint: 'searches', 'answers', 'duplicates', "
            "'invalid', 'length', 'entropy', 'signal', 'likelihood', 'threshold'."
        },
    )

    def __post_init__(self) -> None:
        check_values(self, _CHOICES, num_generations=int)
        SearchLimits.of(self).check_room()
        if unknown := sorted(set(self.stop_on_collapse) - set(KINDS)):
            raise ValueError(f"`stop_on_collapse` must hold some of {list(KINDS)}, got {unknown}.")
        if self.stop_on_collapse and not self.warn_on_collapse:
            raise ValueError(
                f"`stop_on_collapse` is {self.stop_on_collapse}, but `warn_on_collapse=False` disables the warnings. Set "
                "`warn_on_collapse=True`, or leave `stop_on_collapse` empty."
            )
        if self.log_trajectories_max_gib is not None and not self.log_trajectories_max_gib > 0:
            raise ValueError(
                f"`log_trajectories_max_gib` must be above 0, or None for no limit, got {self.log_trajectories_max_gib}. "
                "To write no rollouts set `log_trajectories=False`."
            )
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError(
                "`use_vllm=True` and `use_transformers_continuous_batching=True` are two engines. Set one of them to False."
            )
        if self.vllm_structured_outputs_regex is not None:
            raise ValueError(
                "`vllm_structured_outputs_regex` would force every turn to match one pattern, got "
                f"{self.vllm_structured_outputs_regex!r}. Set it to None and reward the format instead, see "
                "`tspo_trl.rewards`."
            )
        for name, instead in _NOT_FOR_GENERATION.items():
            if name in (self.generation_kwargs or {}):
                raise ValueError(f"`generation_kwargs` cannot have {name!r}: {instead}.")
        fit_to_machine(self)
        super().__post_init__()
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError(
                "`loss_type='dr_grpo'` divides by `max_completion_length`, which must be a number, got None."
            )
        # After TRL has replaced booleans. TRL itself would check these options after the first rollouts
        for name, kind in (("scale_rewards", Scale), ("multi_objective_aggregation", Aggregation)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"`{name}` must be one of {list(get_args(kind))}, got {getattr(self, name)!r}.")


def fit_to_machine(args: TrainingArguments) -> None:
    """
    Check the folders of a configuration, and let a run start where no device supports bfloat16.

    Args:
        args ([`~transformers.TrainingArguments`]):
            The configuration, before its `__post_init__`. A `bf16` that is not set becomes `False` without such a device.

    Raises:
        `ValueError`: If `output_dir` or the folder of a cache or a log is a file, or lies in one.
    """
    for name in ("output_dir", "retrieval_cache_dir", "retrieval_log"):
        for part in (folder := Path(getattr(args, name, None) or "."), *folder.parents):
            if part.exists() and not part.is_dir():
                raise ValueError(f"`{name}` must be a folder, but {str(part)!r} is a file.")
    if args.bf16 is None and not is_torch_bf16_gpu_available():
        args.bf16 = False
    ignore_harmless_warnings()  # `__post_init__` raises one
