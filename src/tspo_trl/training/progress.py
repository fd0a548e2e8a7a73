"""What a run prints: a progress bar or a table with the main metrics, and no warnings that a user can do nothing about."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

#: Name in the output -> name of the metric.
SHOWN = {
    "reward": "reward",
    "hit": "search/hit",
    "near miss": "search/near_miss",
    "all wrong": "groups/all_wrong",
    "searches": "search/calls",
}
_IN_BAR = ("reward", "hit", "all wrong")
_ROWS = 20  # of the table below each line of titles


class ShortProgress(ProgressCallback):
    """A progress bar that shows the main metrics, and a line for each evaluation, instead of all metrics."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the main metrics of a step beside the bar, and those of an evaluation on a line above it."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        if "reward" in logs:
            self.training_bar.set_postfix({name: show(logs.get(SHOWN[name]), 2) for name in _IN_BAR})
        for name, metrics in evaluations(logs):
            if args.eval_strategy == "no":  # the caller asked for this evaluation, and gets its metrics
                return
            values = ", ".join(f"{title} {show(metrics.get(key))}" for title, key in SHOWN.items())
            self.training_bar.write(f"step {state.global_step}, {name}: {values}")


class ShortTable(PrinterCallback):
    """A table of the main metrics, a row for each logged step and each evaluation, instead of all metrics."""

    def __init__(self) -> None:
        self.rows = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print the main metrics of a step and of each evaluation set as rows."""
        if not state.is_local_process_zero or not logs:
            return
        # The last log of a run has metrics only if they were not logged before
        trained = [("train", logs)] if "reward" in logs else []
        for name, metrics in [*trained, *evaluations(logs)]:
            if self.rows % _ROWS == 0:
                print("  step ", *(f"{title:>9}" for title in SHOWN))
            self.rows += 1
            values = (f"{show(metrics.get(key)):>9}" for key in SHOWN.values())
            print(f"{state.global_step:>6} ", *values, *([] if name == "train" else [f"  {name}"]), flush=True)


def evaluations(logs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The evaluation sets in a log: their names, and their metrics under the names of training."""
    for key in logs:
        if found := re.fullmatch(r"(eval(?:_.+)?)_reward", key):
            prefix = f"{found[1]}_"
            yield found[1], {name.removeprefix(prefix): logs[name] for name in logs if name.startswith(prefix)}


def show(value: float | None, digits: int = 3) -> str:
    """A metric as text; TRL logs `None` if there was nothing to average, for instance no scored rollout."""
    return "-" if value is None else f"{value:.{digits}f}"


def shorten_output(trainer: Trainer) -> None:
    """
    Replace the callbacks of `transformers` that print all metrics of a log in one line. Others are not changed: those of
    notebooks, and those that the user has removed or written.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
    """
    for long, short in ((ProgressCallback, ShortProgress), (PrinterCallback, ShortTable)):
        # The last one is that of `transformers`; callbacks of the user come before it
        found = [callback for callback in trainer.callback_handler.callbacks if type(callback) is long]
        if found:
            trainer.remove_callback(found[-1])
            trainer.add_callback(short)


class _TiedWeights(logging.Filter):
    """Drops the warning that a checkpoint lacks weights which are tied to others, and are therefore never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.match(r"There were missing keys in the checkpoint model loaded: \[(.*)\]", record.getMessage())
        return found is None or not set(re.findall(r"'([^']+)'", found[1])) <= self.keys


_tied_weights = _TiedWeights()


def ignore_harmless_warnings(model: Any = None) -> None:
    """
    Ignore warnings about what TRL and `transformers` do by themselves: deprecated names of gradient checkpointing, pinned
    memory without an accelerator, and weights that a checkpoint does not need.

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model that is trained.
    """
    warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing\w*` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"'pin_memory' argument is set as true but no accelerator", UserWarning)
    if model is not None:
        _tied_weights.keys |= set(getattr(model, "all_tied_weights_keys", None) or ())
    logging.getLogger("transformers.trainer").addFilter(_tied_weights)
