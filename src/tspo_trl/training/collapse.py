"""Warnings before a run collapses: a callback that compares current metrics with those at the start of the run."""

import logging
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Watch:
    """
    A way in which a run can collapse, and how to detect it.

    Args:
        kind (`str`):
            Name of the warning.
        metric (`str`):
            Name of the logged metric.
        lost (`Callable[[float, float], bool]`):
            Whether the run has collapsed, given the means of the metric at the start of the run and now.
        meaning (`str`):
            Description of the collapse.
        advice (`str`):
            Advice to the user.
    """

    kind: str
    metric: str
    lost: Callable[[float, float], bool]
    meaning: str
    advice: str


#: The warnings. The thresholds are rules of thumb: far from the values of healthy runs, and reached before a run is lost.
WATCHES = (
    Watch(
        "searches",
        "search/none",
        lambda begin, now: now > max(0.5, begin + 0.3),
        "the model has stopped searching",
        "Rewards that can be earned without searching cause this. Reward turns that find evidence "
        '(`advantage_level="stage"`, `folr_alpha` > 0), lower `learning_rate`, or set `beta` > 0.',
    ),
    Watch(
        "answers",
        "answers/none",
        lambda begin, now: now > max(0.5, begin + 0.3),
        "the model has stopped answering",
        "While all answers of a group are wrong, a turn that finds evidence is rewarded and an answer is not. Add `format_reward` "
        "with a small weight (`reward_weights`), so that a wrong answer is better than none.",
    ),
    Watch(
        "duplicates",
        "search/duplicate",
        lambda begin, now: now > max(0.3, 2 * begin),
        "the model repeats its own queries",
        "A repeated query finds nothing new. Lower `max_searches`, reward fewer searches, or check with `tspo audit` whether "
        "the retriever finds the evidence.",
    ),
    Watch(
        "invalid",
        "search/invalid",
        lambda begin, now: now > max(0.3, 2 * begin),
        "the model writes malformed actions",
        "Add `format_reward`, lower `learning_rate`, or check that `max_turn_tokens` leaves room for an action.",
    ),
    Watch(
        "length",
        "completions/mean_length",
        lambda begin, now: not begin / 2.5 <= now <= 2.5 * begin,
        "the length of completions has drifted",
        'Longer: `mask_truncated_completions=True`, `loss_type="dr_grpo"`, a smaller `max_turn_tokens`. Shorter: check whether '
        "rollouts still search and reason.",
    ),
    Watch(
        "entropy",
        "entropy",
        lambda begin, now: now < min(0.02, 0.1 * begin),
        "the model has become certain of every token, and its rollouts are nearly identical",
        "Set `entropy_coef` > 0, raise `temperature` or `epsilon_high`, or lower `learning_rate`.",
    ),
    Watch(
        "signal",
        "groups/no_signal",
        lambda begin, now: now > 0.9,
        "almost no group has an advantage to learn from",
        "If groups are all wrong (`groups/all_wrong`), the questions are too hard or the retriever does not find the "
        "evidence: run `tspo audit`, start from a better model, or raise `num_generations`. If they are all correct, use harder "
        "questions.",
    ),
    Watch(
        "likelihood",
        "logps/correct",
        lambda begin, now: now < 2 * begin and now < begin - 0.2,
        "correct rollouts become less likely although they are rewarded",
        "Negative advantages lower the probability of text that correct and wrong rollouts share. Lower `learning_rate`, set "
        '`beta` > 0, or use `advantage_level="stage"`, which punishes turns and not whole rollouts.',
    ),
)


_LARGEST = "reward_max"
#: The names of all warnings.
KINDS = (*(watch.kind for watch in WATCHES), "threshold")


class CollapseCallback(TrainerCallback):
    """
    Warns, once for each kind, when a run is about to collapse: `"searches"`, `"answers"`, `"duplicates"`, `"invalid"`, `"length"`,
    `"entropy"`, `"signal"` and `"likelihood"`, see `collapse.WATCHES`.

    Each warning compares the mean of one logged metric over the first `window` logged steps of the run with its mean over
    the last `window` ones. A resumed run uses the first steps of the run that it resumes.

    The kind `"threshold"` warns after the first `window` logged steps, if no outcome has reached `success_threshold`.

    Args:
        window (`int`, *optional*, defaults to `10`):
            Number of logged steps in a mean.
        stop_on (`Collection[str]`, *optional*):
            Kinds of warnings that stop training, with a checkpoint.

    Attributes:
        warned (`dict[str, str]`): The warnings so far, by kind.

    Raises:
        `ValueError`: If `window` is less than 1.
    """

    def __init__(self, window: int = 10, stop_on: Collection[str] = ()):
        if window < 1:
            raise ValueError(f"`window` must be at least 1, got {window}.")
        self.window = window
        self.stop_on = frozenset(stop_on)
        self.warned: dict[str, str] = {}
        self._values: dict[str, list[float]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._values = {metric: [] for metric in (*(watch.metric for watch in WATCHES), _LARGEST)}
        for logs in state.log_history:
            self._record(logs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Compare the logged metrics with the start of the run, warn, and stop training for the kinds in `stop_on`."""
        before = len(self._values.get(_LARGEST, ()))
        self._record(logs or {})
        # Only at this log, so that a run that is resumed later does not warn again
        if before < len(self._values.get(_LARGEST, ())) == self.window:
            self._check_threshold(args, state, control)
        for watch in WATCHES:
            values = self._values.get(watch.metric, [])
            if watch.kind in self.warned or watch.metric not in (logs or {}) or len(values) < 2 * self.window:
                continue
            begin, now = (sum(part) / self.window for part in (values[: self.window], values[-self.window :]))
            if not watch.lost(begin, now):
                continue
            evidence = (
                f"`{watch.metric}` was {begin:.3g} in the first {self.window} logged steps and is {now:.3g} in the last "
                f"{self.window}."
            )
            self._warn(watch.kind, f"{watch.meaning}. {evidence} {watch.advice}", state, control)

    def _check_threshold(self, args: Any, state: Any, control: Any) -> None:
        threshold = getattr(args, "success_threshold", None)
        largest = max(self._values[_LARGEST])
        if threshold is not None and largest < threshold:
            self._warn(
                "threshold",
                f"no outcome has reached `success_threshold`. The largest of the first {self.window} logged steps is "
                f"{largest:.3g}, and `success_threshold` is {threshold:.3g}. So every group counts as all wrong. If the "
                "reward functions have another scale, set `success_threshold` to the outcome of a correct rollout. If not, "
                "the questions are too hard for the model: see `search/hit`, and run `tspo audit`.",
                state,
                control,
            )

    def _warn(self, kind: str, message: str, state: Any, control: Any) -> None:
        self.warned[kind] = f"Step {state.global_step}: {message}"
        if state.is_world_process_zero:
            logger.warning("%s", self.warned[kind])
        if kind in self.stop_on:
            control.should_save = control.should_training_stop = True

    def _record(self, logs: dict[str, Any]) -> None:
        for metric, values in self._values.items():
            value = logs.get(metric)
            if isinstance(value, (int, float)) and not math.isnan(value):
                values.append(float(value))
