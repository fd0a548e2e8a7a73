"""Time the stages of a training step, with a stopwatch around the methods of a trainer."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from transformers import TrainerCallback

import tspo_trl.training.trainer
from tspo_trl import TSPOTrainer

#: Stage -> the part of the tables that it belongs to, in the order of a step.
STAGES = {
    "prefill": "generate",
    "decode": "generate",
    "sampling": "generate",
    "retrieval": "retrieval",
    "parsing, observations": "rest",
    "search loop": "rest",
    "reward": "rest",
    "credit, metrics, packing": "rest",
    "writing rollouts": "rest",
    "logging": "rest",
    "loss": "loss and optimizer",
    "backward": "loss and optimizer",
    "optimizer": "loss and optimizer",
    "trainer": "rest",
}


class Stopwatch:
    """Measures time by stage. A nested stage does not count in the outer stage, so the stages sum to the total."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, stage: str) -> None:
        """Start a stage."""
        self._count()
        self._open.append(stage)

    def leave(self) -> None:
        """End the stage that was started last."""
        self._count()
        self._open.pop()

    def is_open(self, stage: str) -> bool:
        """Return whether a stage has been started and not ended."""
        return stage in self._open

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a `with` statement as a stage."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, function: Callable[..., Any], stage: str | Callable[..., str]) -> Callable[..., Any]:
        """Wrap a function to time its calls as a stage. The stage may depend on the arguments."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.stage(stage if isinstance(stage, str) else stage(*args, **kwargs)):
                return function(*args, **kwargs)

        return call

    def _count(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class StepTimer(TrainerCallback):
    """
    Starts a stopwatch after the warm-up steps, and counts the steps that follow.

    Args:
        watch ([`Stopwatch`]):
            The stopwatch.
        warmup (`int`):
            Number of steps that are not counted.
    """

    def __init__(self, watch: Stopwatch, warmup: int):
        self.watch, self.warmup, self.steps = watch, warmup, 0
        self.start = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset the stopwatch at the first counted step."""
        if state.global_step == self.warmup:
            self.watch.seconds.clear()
            self.watch.enter("trainer")
            self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the optimizer's stage, after gradients are computed and clipped."""
        self.watch.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the optimizer's stage."""
        self.watch.leave()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the stopwatch after the last step and its log."""
        self.steps = state.global_step - self.warmup
        self.seconds = time.perf_counter() - self.start
        self.watch.leave()


@contextmanager
def timed_stages(trainer: TSPOTrainer, watch: Stopwatch) -> Iterator[None]:
    """
    Time the stages of a trainer's steps, by wrapping the methods that it calls.

    Args:
        trainer ([`TSPOTrainer`]):
            The trainer.
        watch ([`Stopwatch`]):
            Receives the times of `STAGES`.
    """
    loop, module = trainer.search_loop, tspo_trl.training.trainer

    def forward_stage(input_ids: Any = None, *args: Any, **kwargs: Any) -> str:
        if not watch.is_open("sampling"):
            return "loss"
        return "decode" if input_ids is not None and input_ids.shape[1] == 1 else "prefill"

    stages: list[tuple[Any, str, str | Callable[..., str]]] = [
        (trainer.model, "generate", "sampling"),
        (trainer.model, "forward", forward_stage),
        (loop, "run", "search loop"),
        (loop.retriever, "search", "retrieval"),
        (loop.protocol, "parse", "parsing, observations"),
        (loop.protocol, "observe", "parsing, observations"),
        (loop.protocol, "cut_query", "parsing, observations"),
        (trainer, "_calculate_rewards", "reward"),
        (trainer, "_generate_and_score_completions", "credit, metrics, packing"),
        (module, "batch_records", "writing rollouts"),
        (module, "append_rollouts", "writing rollouts"),
        (trainer, "log", "logging"),
        (trainer, "compute_loss", "loss"),
        (trainer.accelerator, "backward", "backward"),
    ]
    with ExitStack() as stack:
        for owner, name, stage in stages:
            stack.enter_context(patch.object(owner, name, watch.timed(getattr(owner, name), stage)))
        yield
