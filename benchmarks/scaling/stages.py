"""Where the time of a training step goes: a stopwatch around the methods of a trainer."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from transformers import TrainerCallback

import tspo_trl.training.trainer
from tspo_trl import TSPOTrainer

#: Stages in the order of a step, by what they belong to.
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
    """Time by stage. A stage within another takes its time from it, so that all of them make up the whole."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, stage: str) -> None:
        """Begin a stage."""
        self._count()
        self._open.append(stage)

    def leave(self) -> None:
        """End the stage that was begun last."""
        self._count()
        self._open.pop()

    def is_open(self, stage: str) -> bool:
        """Whether a stage has begun and not ended."""
        return stage in self._open

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage, for as long as the context is open."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, function: Callable[..., Any], stage: str | Callable[..., str]) -> Callable[..., Any]:
        """The function as a stage; which one may depend on its arguments."""

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
    Starts a stopwatch after the steps that warm up, and counts the steps after them.

    Args:
        watch ([`Stopwatch`]):
            The stopwatch.
        warmup (`int`):
            Steps that are not counted.
    """

    def __init__(self, watch: Stopwatch, warmup: int):
        self.watch, self.warmup, self.steps = watch, warmup, 0
        self.start = self.seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what was before, where the first step that counts begins."""
        if state.global_step == self.warmup:
            self.watch.seconds.clear()
            self.watch.enter("trainer")
            self.start = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are there, and clipped."""
        self.watch.enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights have changed."""
        self.watch.leave()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the last step and its log."""
        self.steps = state.global_step - self.warmup
        self.seconds = time.perf_counter() - self.start
        self.watch.leave()


@contextmanager
def timed_stages(trainer: TSPOTrainer, watch: Stopwatch) -> Iterator[None]:
    """
    Time the stages of a trainer's steps, by wrapping what it calls.

    Args:
        trainer ([`TSPOTrainer`]):
            The trainer.
        watch ([`Stopwatch`]):
            Gets the times of [`STAGES`].
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
        (module, "rollout_record", "writing rollouts"),
        (module, "append_rollouts", "writing rollouts"),
        (trainer, "log", "logging"),
        (trainer, "compute_loss", "loss"),
        (trainer.accelerator, "backward", "backward"),
    ]
    with ExitStack() as stack:
        for owner, name, stage in stages:
            stack.enter_context(patch.object(owner, name, watch.timed(getattr(owner, name), stage)))
        yield
