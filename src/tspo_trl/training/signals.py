"""Stopping a run in time: a signal ends it after the step, with a checkpoint."""

import logging
import signal
import sys
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """
    Ends a run in time: after a SIGTERM or SIGUSR1 (a preempted job, the end of its time), the step under way is
    finished, a checkpoint is saved, and the process exits with 143. All processes stop at the same step, whichever got
    the signal.

    The launchers of PyTorch and Accelerate pass a SIGTERM on, but kill their processes 30 seconds later. A SIGUSR1 that
    the launcher ignores (see `recipes/slurm/train.sbatch`) leaves a step as long as it takes.
    """

    _SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )  # not all systems

    def __init__(self) -> None:
        self._asked = False
        self._previous: list[Any] = []

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._previous = [signal.signal(number, self._ask) for number in self._SIGNALS]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if gather(torch.tensor([self._asked], device=args.device)).any():
            self._asked = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in zip(self._SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)
        if self._asked:
            logger.warning("Stopped by a signal after step %d, with a checkpoint.", state.global_step)
            sys.exit(128 + signal.SIGTERM)
