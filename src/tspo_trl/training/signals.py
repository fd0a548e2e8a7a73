"""Stopping a run by a signal, after the current step and with a checkpoint."""

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
    Stops a run after a SIGTERM or SIGUSR1, for instance when a job is preempted or its time is over. The current step is
    finished, a checkpoint is saved, and the process exits with 143. All processes stop at the same step, even if only one
    got the signal.

    The launchers of PyTorch and Accelerate forward a SIGTERM, but kill their processes 30 seconds later. A SIGUSR1 that
    the launcher ignores (see `recipes/slurm/train.sbatch`) gives the step the time that it needs.
    """

    _SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )  # not all systems

    def __init__(self) -> None:
        self._received = False
        self._previous: list[Any] = []

    def _on_signal(self, *_: Any) -> None:
        self._received = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._previous = [signal.signal(number, self._on_signal) for number in self._SIGNALS]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if gather(torch.tensor([self._received], device=args.device)).any():
            self._received = control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in zip(self._SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)
        if self._received:
            logger.warning("Stopped by a signal after step %d, with a checkpoint.", state.global_step)
            sys.exit(128 + signal.SIGTERM)
