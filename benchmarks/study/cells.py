"""Train and measure one cell of the study: an arm in a regime with a seed."""

import hashlib
import json
import logging
import os
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback

import tspo_trl
from tspo_trl import BM25Retriever, TSPOConfig
from tspo_trl.demo.warmup import LIMITS
from tspo_trl.demo.world import Question

from .arms import ARMS, TSPO_SETTINGS
from .regimes import ALL_REGIMES, Regime, make_policy, make_strong

#: Short name -> the logged metric that is stored for every step.
CURVES = {
    "em": "rewards/exact_match_reward/mean",
    "hit": "search/hit",
    "near_miss": "search/near_miss",
    "all_wrong": "groups/all_wrong",
    "rescued": "groups/rescued",
    "no_signal": "groups/no_signal",
    "searches": "search/calls",
    "chance": "search/chance",
    "entropy": "entropy",
}
HELDOUT = ("em", "hit", "near_miss")


@dataclass(frozen=True)
class Scale:
    """
    The size of a cell.

    Args:
        steps (`float`, *optional*, defaults to `1.0`):
            Fraction of the regime's steps.
        questions (`int`, *optional*, defaults to `4`):
            Number of questions per step.
        group_size (`int`, *optional*, defaults to `8`):
            Number of rollouts per question.
        heldout (`int`, *optional*, defaults to `256`):
            Number of held-out questions to evaluate before and after training, with one rollout each.
    """

    steps: float = 1.0
    questions: int = 4
    group_size: int = 8
    heldout: int = 256

    def steps_of(self, regime: Regime) -> int:
        """Number of training steps in a regime."""
        return max(2, round(regime.steps * self.steps))


@dataclass(frozen=True)
class Cell:
    """
    An arm in a regime with a seed.

    Args:
        regime (`str`):
            Key of `ALL_REGIMES`.
        arm (`str`):
            Key of `ARMS`.
        seed (`int`):
            Seed of the world, the policy and the rollouts.
    """

    regime: str
    arm: str
    seed: int

    def path(self, folder: Path) -> Path:
        """Return the path of the cell's results."""
        return folder / "cells" / self.regime / f"{self.arm}-{self.seed}.json"


def quiet() -> None:
    """Silence everything except errors, because many cells run in parallel."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def make_row(question: Question) -> dict[str, Any]:
    """Make a row of the data set. The searches of a question are the titles of the passages that it needs."""
    return {**question.row(), "supporting_titles": list(question.queries)}


def processor() -> str:
    """Return the name of the processor: on another one, the same seed gives other rollouts."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def source_digest() -> str:
    """Return a short digest of the code of the library, which does not depend on a commit."""
    folder = Path(tspo_trl.__file__).parent
    code = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return code.hexdigest()[:12]


def prepare_strong(seed: int, folder: Path) -> None:
    """Make the strong policy from which the initial policies of all regimes are made."""
    quiet()
    make_strong(seed, folder / "policies")


def prepare_regime(regime: str, seed: int, folder: Path) -> None:
    """Make the initial policy of a regime, which is the same for all arms."""
    quiet()
    make_policy(ALL_REGIMES[regime], seed, folder / "policies")


def run_cell(cell: Cell, scale: Scale, folder: Path) -> dict[str, Any]:
    """
    Train and measure a cell, and write its results.

    Args:
        cell ([`Cell`]):
            The cell to run.
        scale ([`Scale`]):
            The size of the cell.
        folder (`Path`):
            Folder of the policies and the results.

    Returns:
        `dict[str, Any]`: The results, as written to the file.
    """
    quiet()
    regime, arm = ALL_REGIMES[cell.regime], ARMS[cell.arm]
    world = regime.make_world(cell.seed)
    policy = make_policy(regime, cell.seed, folder / "policies")
    rollouts = scale.questions * scale.group_size
    with TemporaryDirectory() as output:
        trainer = arm.trainer(
            model=str(policy),
            reward_funcs=list(arm.rewards),
            args=TSPOConfig(
                output_dir=output,
                # No question needs more than 3 searches
                **(asdict(LIMITS) | {"max_searches": 3, "max_completion_length": 512}),
                **(TSPO_SETTINGS | arm.settings),
                per_device_train_batch_size=rollouts,
                per_device_eval_batch_size=128,
                num_generations=scale.group_size,
                num_generations_eval=1,
                max_steps=scale.steps_of(regime),
                learning_rate=5e-4,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=not torch.cuda.is_available(),
                seed=cell.seed,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                log_trajectories=False,
                warn_on_collapse=False,
            ),
            train_dataset=Dataset.from_list([make_row(question) for question in world.train_questions]),
            eval_dataset=Dataset.from_list(
                [make_row(question) for question in world.heldout_questions[: scale.heldout]]
            ),
            retriever=BM25Retriever(world.passages),
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        after = trainer.evaluate()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    result = {
        **asdict(cell),
        "scale": asdict(scale),
        "steps": len(steps),
        "seconds": round(seconds, 1),
        "before": {name: round(before[f"eval_{CURVES[name]}"], 4) for name in HELDOUT},
        "after": {name: round(after[f"eval_{CURVES[name]}"], 4) for name in HELDOUT},
        "curves": {name: [round(entry[key], 4) for entry in steps] for name, key in CURVES.items()},
        "machine": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": str(trainer.model.device),
            "cpu": processor(),
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tspo_trl": tspo_trl.__version__,
            "source": source_digest(),
        },
    }
    write_result(result, cell.path(folder))
    return result


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the results of a cell atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(result) + "\n", encoding="utf-8")
    unfinished.rename(path)
