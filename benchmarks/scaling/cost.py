"""Measure the cost of training steps: their time by stage, and the memory of their rollouts."""

import gc
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback

from tspo_trl import BM25Retriever, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_model, make_tokenizer, make_world

from ..drawn_turns import FREE, DrawnTurns, drawing
from .stages import STAGES, StepTimer, Stopwatch, timed_stages

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "recipes" / "configs" / "demo.yaml"
PARTS = ("generate", "retrieval", "loss and optimizer", "rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """
    The settings of a measurement.

    Args:
        questions (`int`, *optional*, defaults to `8`):
            Number of questions per step.
        group (`int`, *optional*, defaults to `8`):
            Number of rollouts per question.
        searches (`int`, *optional*, defaults to `2`):
            Number of searches per rollout. A rollout has one more turn, the answer.
        turn_tokens (`int`, *optional*, defaults to `16`):
            Number of tokens per turn, at least 4.
        steps (`int`, *optional*, defaults to `3`):
            Number of measured steps. One warm-up step comes before them.
    """

    questions: int = 8
    group: int = 8
    searches: int = 2
    turn_tokens: int = 16
    steps: int = 3

    @property
    def rollouts(self) -> int:
        """Number of rollouts per step, over all processes."""
        return self.questions * self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """
    The cost of training steps, measured on one process.

    Args:
        processes (`int`):
            Number of processes.
        step_seconds (`float`):
            Mean time of a step, in seconds.
        stages (`dict[str, float]`):
            Mean time of a step in each of `STAGES`, in seconds.
        completion_tokens (`float`):
            Mean number of tokens in a completion, including observations.
        trajectory_bytes (`float`):
            Python memory of a trajectory, in bytes.
        record_bytes (`float`):
            Size of a trajectory's line in the log of rollouts, in bytes.
        peak_bytes (`int`):
            Peak resident memory of the process, in bytes.
    """

    processes: int
    step_seconds: float
    stages: dict[str, float]
    completion_tokens: float
    trajectory_bytes: float
    record_bytes: float
    peak_bytes: int

    def part(self, name: str) -> float:
        """Return the seconds of a step that belong to one of `PARTS`."""
        return sum(seconds for stage, seconds in self.stages.items() if STAGES[stage] == name)


class TimedTurns(DrawnTurns):
    """Drawn turns that time the forcing of tokens as a separate stage, because it is not part of training."""

    def __init__(self, watch: Stopwatch, **options: Any):
        super().__init__(**options)
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Compute the scores of the next token, see [`DrawnTurns`]."""
        with self.watch.stage("forcing"):
            return super().__call__(input_ids, scores)


def make_turns(setting: Setting, tokenizer: PreTrainedTokenizerBase, watch: Stopwatch) -> TimedTurns:
    """Plan turns of `turn_tokens` tokens that end with an action of two sampled words."""
    tag = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in tokenizer.get_added_vocab()}

    def plan(rollout: int, turn: int) -> list[int]:
        name = "answer" if turn == setting.searches else "search"
        action = [tag[f"<{name}>"], FREE, FREE, tag[f"</{name}>"]]
        return [FREE] * (setting.turn_tokens - len(action)) + action

    banned = torch.zeros(len(tokenizer), dtype=torch.bool)
    banned[[*tag.values(), *tokenizer.all_special_ids]] = True
    return TimedTurns(watch, plan=plan, rollouts=1, banned=banned, eos_token_id=int(tokenizer.eos_token_id))


def make_trainer(setting: Setting, folder: Path) -> TSPOTrainer:
    """Make a trainer with the settings of the demo, and with limits large enough for the turns."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    known = {field.name for field in fields(TSPOConfig)}
    observation = demo["max_observation_tokens"]
    options = {
        **{name: value for name, value in demo.items() if name in known},
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "per_device_train_batch_size": setting.rollouts // processes,
        "num_generations": setting.group,
        "max_steps": setting.steps + 1,
        "max_searches": setting.searches,
        "max_turn_tokens": setting.turn_tokens,
        "max_completion_length": (setting.searches + 1) * (setting.turn_tokens + observation),
        "disable_tqdm": True,
    }
    world = make_world(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model_folder = folder / f"model-{os.environ.get('RANK', 0)}"
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    trainer = TSPOTrainer(
        model=str(model_folder),
        args=TSPOConfig(**options),
        train_dataset=Dataset.from_list([question.row() for question in world.train_questions]),
        retriever=BM25Retriever(world.passages),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(setting: Setting) -> Cost:
    """Train for a few steps and measure their cost on this process."""
    with TemporaryDirectory() as folder:
        trainer = make_trainer(setting, Path(folder))
        watch = Stopwatch()
        timer = StepTimer(watch, warmup=1)
        trainer.add_callback(timer)
        turns = make_turns(setting, trainer.processing_class, watch)
        run = trainer.search_loop.run
        completions: list[list[int]] = []

        def run_from_first_turn(prompt_ids: Sequence[list[int]]) -> Any:
            turns.begin_rollouts()
            trajectories, stats = run(prompt_ids)
            completions[:] = [t.completion_ids for t in trajectories]
            if any(len(t.turns) != setting.searches + 1 for t in trajectories):
                raise RuntimeError(f"A rollout does not have {setting.searches + 1} turns.")
            return trajectories, stats

        trainer.search_loop.run = run_from_first_turn
        with drawing(trainer.model, turns):
            with timed_stages(trainer, watch):
                trainer.train()
            spent = watch.seconds.copy()
            unit = 1024 if sys.platform == "linux" else 1
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            held = _measure_trajectory_bytes(trainer)
        seconds = {stage: spent[stage] / timer.steps for stage in STAGES}
        rank = trainer.accelerator.process_index
        records = (Path(folder) / "run" / "trajectories" / f"train-rank{rank:03d}.jsonl").read_bytes()
        return Cost(
            processes=trainer.accelerator.num_processes,
            step_seconds=(timer.seconds - spent["forcing"]) / timer.steps,
            stages=seconds,
            completion_tokens=sum(map(len, completions)) / len(completions),
            trajectory_bytes=held,
            record_bytes=len(records) / records.count(b"\n"),
            peak_bytes=peak,
        )


def _measure_trajectory_bytes(trainer: TSPOTrainer) -> float:
    """Measure the mean memory of a trajectory, over this process's rollouts of one step."""
    questions = trainer.train_dataset[: trainer.args.per_device_train_batch_size]["prompt"]
    prompt_ids = trainer.search_loop.protocol.encode_prompts(questions)
    trainer.search_loop.run(prompt_ids)  # fills the caches, which must not count as trajectories
    gc.collect()
    tracemalloc.start()
    trajectories, _ = trainer.search_loop.run(prompt_ids)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / len(trajectories)


def measure_in_processes(setting: Setting, processes: int = 1) -> Cost:
    """Measure in new processes with one thread each, and return the cost on the slowest of them."""
    if setting.rollouts % processes or (setting.rollouts // processes) < 2:
        raise ValueError(f"{setting.rollouts} rollouts cannot be split over {processes} processes.")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with TemporaryDirectory() as folder:
        worker = ["-m", "benchmarks.scaling", "--worker", json.dumps(asdict(setting)), folder]
        result = subprocess.run(
            [sys.executable, *launcher, *worker],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"A process failed:\n{result.stderr[-4000:]}")
        costs = [Cost(**json.loads(file.read_text())) for file in sorted(Path(folder).glob("*.json"))]
    if [cost.processes for cost in costs] != [processes] * processes:
        raise RuntimeError(f"{processes} processes were started, but they report {[c.processes for c in costs]}.")
    return max(costs, key=lambda cost: cost.step_seconds)
