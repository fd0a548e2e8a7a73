"""The configuration of the cold start."""

from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from ..rollout.limits import SearchLimits, limit_option
from ..rollout.protocols import ProtocolName
from ..training.config import fit_to_machine
from ..training.values import check_values


@dataclass
class ColdStartConfig(SFTConfig):
    r"""
    Configuration of the [`ColdStartTrainer`].

    Only the parameters that are specific to the cold start are listed here; all of [`~trl.SFTConfig`] and
    [`~transformers.TrainingArguments`] apply too.

    Parameters:
        protocol (`str`, *optional*, defaults to `"tags"`):
            How the model writes its actions: `"tags"` or `"tool_call"`, see [`TSPOConfig`]. Set it, the limits and
            `chat_template_kwargs` as in the training that follows.
        max_searches, num_passages, max_turn_tokens, max_query_tokens, max_observation_tokens, max_completion_length:
            The limits of the search loop, see [`SearchLimits`].
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments of the chat template, for instance `{"enable_thinking": False}`.
        num_demonstrations (`int`, *optional*, defaults to `256`):
            Maximum number of demonstrations.
        failed_share (`float`, *optional*, defaults to `0.0`):
            Share of the demonstrations that begin with a search that finds no evidence. Its query is not learned, but the
            better query after it is.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`: no demonstration is cut. A longer demonstration is left out.
    > - `num_train_epochs`: Defaults to `1.0` instead of `3.0`.
    > - `logging_steps`: Defaults to `1` instead of `10`.
    > - `save_strategy`: Defaults to `"no"` instead of `"steps"`.
    > - `bf16`: Defaults to `False` instead of `True` if no device supports it, so that a run also starts on a CPU.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "chat_template_kwargs"]

    protocol: ProtocolName = field(
        default="tags", metadata={"help": "How the model writes its actions: 'tags' or 'tool_call'."}
    )
    max_searches: int = limit_option("max_searches")
    num_passages: int = limit_option("num_passages")
    max_turn_tokens: int = limit_option("max_turn_tokens")
    max_query_tokens: int = limit_option("max_query_tokens")
    max_observation_tokens: int = limit_option("max_observation_tokens")
    max_completion_length: int | None = limit_option("max_completion_length")
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Further arguments of the chat template, for instance '{\"enable_thinking\": false}'."},
    )
    num_demonstrations: int = field(default=256, metadata={"help": "Maximum number of demonstrations."})
    failed_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the demonstrations that begin with a search that finds no evidence. Its query is not "
            "learned, but the better query after it is."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens of a demonstration; longer ones are left out."},
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of passes over the demonstrations."})
    logging_steps: float = field(default=1, metadata={"help": "Log every X updates steps."})
    save_strategy: str = field(default="no", metadata={"help": "When checkpoints are saved: 'no', 'steps' or 'epoch'."})

    def __post_init__(self) -> None:
        check_values(self, {"loss_type": ("nll", "dft")})
        limits = SearchLimits.of(self)
        limits.check_room()
        if limits.max_searches < 1:
            raise ValueError(f"`max_searches` must be at least 1 to demonstrate a search, got {limits.max_searches}.")
        fit_to_machine(self)
        super().__post_init__()
