"""Evaluation by the trainer: every question of a set counts once, whatever the batches and the number of processes."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from .checks import check_eval_batches, check_predicted
from .config import TSPOConfig
from .metrics import EVAL_ALIASES, evaluation_metrics


class EvaluatedRollouts:
    """
    The rollouts of an evaluation set, collected batch by batch. Accelerate repeats rows at the end, so that all processes
    get whole batches; these are left out.

    Args:
        size (`int`, *optional*):
            Number of rollouts of the set. If `None`, no row is repeated.
    """

    def __init__(self, size: int | None):
        self.size = size
        self.count = 0
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def add(self, *columns: torch.Tensor) -> int:
        """
        Add a batch.

        Args:
            columns (`torch.Tensor`):
                Values of the B rollouts of all processes, in the order of the set, of shape (B, …).

        Returns:
            `int`: Number of rollouts that belong to the set. The others come last.
        """
        batch = len(columns[0])
        kept = batch if self.size is None else min(batch, max(self.size - self.count, 0))
        self.count += kept
        self._parts.append(tuple(column[:kept] for column in columns))
        return kept

    def columns(self) -> list[torch.Tensor]:
        """The values of all rollouts, in the order of the arguments of `add`; empty without a batch."""
        return [torch.cat(parts) for parts in zip(*self._parts, strict=True)]


class EvaluationMixin:
    """
    Evaluation of a [`~trl.GRPOTrainer`] by questions.

    The changes with respect to [`~trl.GRPOTrainer`], which logs the mean of the means of batches, are:

    - Metrics of rollouts are computed over all rollouts of the set, each of which counts once.
    - Every set of a `dict` logs its metrics under its own name.
    - A set that is passed to `evaluate` or `predict` is checked and gets its prompts.
    """

    args: TSPOConfig
    accelerator: Any
    state: Any
    num_generations_eval: int
    reward_func_names: list[str]
    _prepare: Any  # method of the trainer: check a data set and add its prompts
    _metrics: Any
    _logs: Any
    _evaluated: EvaluatedRollouts | None = None
    _logged_at: tuple[int, int] = (-1, 0)  # a step, and the number of its evaluated rollouts before this evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """Make the batches of an evaluation set, see [`~transformers.Trainer.get_eval_dataloader`]."""
        if isinstance(eval_dataset, (Dataset, IterableDataset)):  # passed to `evaluate`
            check_eval_batches(self.args)
            eval_dataset = self._prepare(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Make the batches of a set for `predict`, see [`~transformers.Trainer.get_test_dataloader`]."""
        check_predicted(self.args, test_dataset)
        return super().get_test_dataloader(self._prepare(test_dataset, "test_dataset"))  # type: ignore[misc]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Evaluate, see [`~transformers.Trainer.evaluation_loop`]. The metrics of rollouts are over all rollouts of the set.
        Several data sets log metrics under their own names.
        """
        metrics = self._metrics["eval"]
        metrics.clear()  # those of an evaluation that failed, or of `predict`, which does not log
        self._evaluated = evaluated = EvaluatedRollouts(count_rollouts(dataloader, self.num_generations_eval))
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
            )
        finally:
            self._logged_at = (self.state.global_step, self._rollouts_before())
            self._evaluated = None
        if columns := evaluated.columns():
            values = evaluation_metrics(
                *columns,
                reward_names=self.reward_func_names,
                num_generations=self.num_generations_eval,
                success_threshold=self.args.success_threshold,
            )
            metrics.update({name: [value] for name, value in values.items()})
        # TRL would log every data set of a `dict` under the same keys
        if metric_key_prefix.startswith("eval_"):
            metrics.update({alias: metrics[name] for alias, name in EVAL_ALIASES.items() if name in metrics})
            for name in list(metrics):
                metrics[f"{metric_key_prefix.removeprefix('eval_')}_{name}"] = metrics.pop(name)
        return output

    def _rollouts_before(self) -> int:
        """Number of rollouts that were evaluated at this step before, so that groups of all its sets have other numbers."""
        step, count = self._logged_at
        return (count if step == self.state.global_step else 0) + (self._evaluated.count if self._evaluated else 0)

    def _count_once(self, *columns: torch.Tensor) -> tuple[int, int]:
        """Add a batch to the running evaluation, if any: how many rollouts were before it, how many of its first ones count."""
        batch = len(columns[0])
        if self._evaluated is None:
            return 0, batch
        before = self._rollouts_before()
        kept = self._evaluated.add(*columns)
        # The others only fill the batch: they are not shown in the table of completions
        logs = self._logs
        tables = [logs["prompt"], logs["completion"], logs["advantages"], *logs["rewards"].values()]
        drop_last([*tables, *logs["extra"].values()], batch - kept)
        return before, kept


def count_rollouts(dataloader: DataLoader, num_generations: int) -> int | None:
    """
    Count the rollouts of an evaluation set, without the rows that Accelerate repeats to fill the last batch.

    Args:
        dataloader (`DataLoader`):
            The batches of the set. A stream is read to its end if its last batch is filled.
        num_generations (`int`):
            Number of rollouts of a question.

    Returns:
        `int` or `None`: The number; `None` for a stream without repeated rows.
    """
    dataset: Any = dataloader.dataset
    if isinstance(dataset, IterableDatasetShard):
        return sum(1 for _ in dataset.dataset)  # TRL has repeated the questions
    return len(dataset) * num_generations if hasattr(dataset, "__len__") else None


def drop_last(logs: Iterable[Any], count: int) -> None:
    """
    Remove the last values of logs.

    Args:
        logs (`Iterable[collections.deque]`):
            The logs, which may hold fewer values.
        count (`int`):
            Number of values to remove from each.
    """
    for log in logs:
        for _ in range(min(len(log), count)):
            log.pop()
