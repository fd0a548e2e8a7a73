"""What does a rollout cost, and how does it scale? Prints Markdown tables. Needs no network and no data.

    python benchmarks/scaling.py                     # five minutes of CPU time
    python benchmarks/scaling.py --groups 8 32 --searches 2 --turn_tokens 16 64 --processes 1 2 --json results.json

Training steps of `TSPOTrainer` on the fictional encyclopedia, with the model and the settings of the demo
(`recipes/configs/demo.yaml`), on a CPU and in a single thread. Its weights are random and where turns end is fixed, so that every rollout
has the same number of turns and of tokens: all but the last turn are searches whose queries the model samples, the last one
answers. One thing at a time is varied: rollouts of a question, searches of a rollout, tokens of a turn, processes.

"generate" is the time in `generate` of the model; of it, "prefill" and "decode" are its forward passes over several tokens and
over one, "sampling" is the rest. "retrieval" is the time in the retriever. "loss and optimizer" is forward and backward of
the loss and the step of the optimizer. "rest" is everything else: parsing, rewards, credit, logs, and the trainer.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import platform
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
from datasets import Dataset, disable_progress_bars
from drawn_turns import FREE, DrawnTurns, drawing
from stages import STAGES, StepTimer, Stopwatch, timed_stages
from transformers import PreTrainedTokenizerBase, PrinterCallback
from transformers.utils.logging import disable_progress_bar

from tspo_trl import BM25Retriever, TSPOConfig, TSPOTrainer
from tspo_trl.demo import make_model, make_tokenizer, make_world

DEMO = Path(__file__).parent.parent / "recipes" / "configs" / "demo.yaml"
PARTS = ("generate", "retrieval", "loss and optimizer", "rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """
    What is measured.

    Args:
        questions (`int`, *optional*, defaults to `8`):
            Questions of a step.
        group (`int`, *optional*, defaults to `8`):
            Rollouts of each.
        searches (`int`, *optional*, defaults to `2`):
            Searches of each rollout; it has one turn more.
        turn_tokens (`int`, *optional*, defaults to `16`):
            Tokens of each turn, at least 4.
        steps (`int`, *optional*, defaults to `3`):
            Steps that are measured, after one that warms up.
    """

    questions: int = 8
    group: int = 8
    searches: int = 2
    turn_tokens: int = 16
    steps: int = 3

    @property
    def rollouts(self) -> int:
        """Rollouts of a step, of all processes together."""
        return self.questions * self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """
    What steps cost, on one process.

    Args:
        processes (`int`):
            How many there are.
        step_seconds (`float`):
            Mean time of a step.
        stages (`dict[str, float]`):
            What of it is spent in each of `STAGES`.
        completion_tokens (`float`):
            Mean tokens of a completion, observations included.
        trajectory_bytes (`float`):
            Memory of Python that a trajectory holds.
        record_bytes (`float`):
            Size of its line in the log of rollouts.
        peak_bytes (`int`):
            Largest resident memory of the process so far.
    """

    processes: int
    step_seconds: float
    stages: dict[str, float]
    completion_tokens: float
    trajectory_bytes: float
    record_bytes: float
    peak_bytes: int

    def part(self, name: str) -> float:
        """Seconds of a step in one of `PARTS`."""
        return sum(seconds for stage, seconds in self.stages.items() if STAGES[stage] == name)


class TimedTurns(DrawnTurns):
    """Turns whose forcing is a stage of its own, because it is no part of training."""

    def __init__(self, watch: Stopwatch, **options: Any):
        super().__init__(**options)
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """See [`DrawnTurns`]."""
        with self.watch.stage("forcing"):
            return super().__call__(input_ids, scores)


def draw_turns(setting: Setting, tokenizer: PreTrainedTokenizerBase, watch: Stopwatch) -> TimedTurns:
    """Turns of `turn_tokens` tokens that end with an action of two sampled words."""
    tag = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in tokenizer.get_added_vocab()}

    def plan(rollout: int, turn: int) -> list[int]:
        name = "answer" if turn == setting.searches else "search"
        action = [tag[f"<{name}>"], FREE, FREE, tag[f"</{name}>"]]
        return [FREE] * (setting.turn_tokens - len(action)) + action

    banned = torch.zeros(len(tokenizer), dtype=torch.bool)
    banned[[*tag.values(), *tokenizer.all_special_ids]] = True
    return TimedTurns(watch, plan=plan, rollouts=1, banned=banned, eos_token_id=int(tokenizer.eos_token_id))


def make_trainer(setting: Setting, folder: Path) -> TSPOTrainer:
    """A trainer with the settings of the demo, and budgets that the turns fit into."""
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
    """Train a few steps, and measure what they cost on this process."""
    with TemporaryDirectory() as folder:
        trainer = make_trainer(setting, Path(folder))
        watch = Stopwatch()
        timer = StepTimer(watch, warmup=1)
        trainer.add_callback(timer)
        turns = draw_turns(setting, trainer.processing_class, watch)
        run = trainer.search_loop.run
        completions: list[list[int]] = []

        def run_from_first_turn(prompt_ids: Sequence[list[int]]) -> Any:
            turns.begin_rollouts()
            trajectories, stats = run(prompt_ids)
            completions[:] = [t.completion_ids for t in trajectories]
            if any(len(t.turns) != setting.searches + 1 for t in trajectories):
                raise RuntimeError(f"A rollout has not {setting.searches + 1} turns.")
            return trajectories, stats

        trainer.search_loop.run = run_from_first_turn
        with drawing(trainer.model, turns):
            with timed_stages(trainer, watch):
                trainer.train()
            spent = watch.seconds.copy()
            unit = 1024 if sys.platform == "linux" else 1
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            held = _bytes_held(trainer)
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


def _bytes_held(trainer: TSPOTrainer) -> float:
    """Memory that a trajectory holds, of as many rollouts as a step has on this process."""
    questions = trainer.train_dataset[: trainer.args.per_device_train_batch_size]["prompt"]
    prompt_ids = trainer.search_loop.protocol.encode_prompts(questions)
    trainer.search_loop.run(prompt_ids)  # what is cached is no part of them
    gc.collect()
    tracemalloc.start()
    trajectories, _ = trainer.search_loop.run(prompt_ids)
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return held / len(trajectories)


def measure_apart(setting: Setting, processes: int = 1) -> Cost:
    """The same in processes of its own, each with one thread; the cost on the slowest of them."""
    if setting.rollouts % processes or (setting.rollouts // processes) < 2:
        raise ValueError(f"{setting.rollouts} rollouts cannot be split over {processes} processes.")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, __file__, "--worker", json.dumps(asdict(setting)), folder]
        result = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"A process failed:\n{result.stderr[-4000:]}")
        costs = [Cost(**json.loads(file.read_text())) for file in sorted(Path(folder).glob("*.json"))]
    if [cost.processes for cost in costs] != [processes] * processes:
        raise RuntimeError(f"{processes} processes were started, but they found {[c.processes for c in costs]}.")
    return max(costs, key=lambda cost: cost.step_seconds)


# The tables


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def sweep_table(name: str, costs: Sequence[tuple[int, Setting, Cost]]) -> str:
    """What a rollout costs, by one thing that varies."""
    header = [name, "rollouts", "completion tokens", "ms a rollout", "µs a token", *(f"{part} %" for part in PARTS)]
    rows = []
    for value, setting, cost in costs:
        seconds = cost.step_seconds / setting.rollouts
        shares = [f"{100 * cost.part(part) / cost.step_seconds:.1f}" for part in PARTS]
        tokens = f"{cost.completion_tokens:.0f}"
        per_token = f"{1e6 * seconds / cost.completion_tokens:.0f}"
        rows.append([str(value), str(setting.rollouts), tokens, f"{1e3 * seconds:.2f}", per_token, *shares])
    return table(header, rows)


def stage_table(setting: Setting, cost: Cost) -> str:
    """What a step consists of."""
    rows = [
        [stage, part, f"{1e3 * cost.stages[stage]:.1f}", f"{100 * cost.stages[stage] / cost.step_seconds:.1f}"]
        for stage, part in STAGES.items()
    ]
    rows.append(["step", "", f"{1e3 * cost.step_seconds:.1f}", "100.0"])
    return table(["stage", "part", "ms a step", "%"], rows)


def process_table(costs: Sequence[tuple[Setting, Cost]]) -> str:
    """The same step on several processes."""
    rates = [setting.rollouts / cost.step_seconds for setting, cost in costs]
    rows = []
    for (setting, cost), rate in zip(costs, rates, strict=True):
        each, speed = setting.rollouts // cost.processes, f"{rate / rates[0]:.2f}"
        rows.append([str(cost.processes), str(each), f"{1e3 * cost.step_seconds:.0f}", f"{rate:.1f}", speed])
    return table(["processes", "rollouts of each", "ms a step", "rollouts/s", "× the first"], rows)


def memory_table(costs: Sequence[tuple[Setting, Cost]]) -> str:
    """What a rollout occupies."""
    rows = []
    first_setting, first = costs[0]
    for setting, cost in costs:
        more = setting.rollouts - first_setting.rollouts
        rows.append(
            [
                str(setting.rollouts),
                f"{cost.completion_tokens:.0f}",
                f"{cost.trajectory_bytes / 1024:.1f}",
                f"{cost.record_bytes / 1024:.1f}",
                f"{cost.peak_bytes / 2**20:.0f}",
                f"{(cost.peak_bytes - first.peak_bytes) / more / 2**20:.2f}" if more else "–",
            ]
        )
    header = ["rollouts", "completion tokens", "KiB of a trajectory", "KiB of its record", "peak MiB"]
    return table([*header, "MiB a further rollout"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Setting()
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="rollouts of a question")
    parser.add_argument("--searches", type=int, nargs="+", default=[0, 1, 2, 4, 6], help="searches of a rollout")
    parser.add_argument("--turn_tokens", type=int, nargs="+", default=[8, 16, 32, 64], help="tokens of a turn")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="processes, each with one thread")
    parser.add_argument("--memory", type=int, nargs="+", default=[8, 16, 32], help="rollouts of a question")
    parser.add_argument("--questions", type=int, default=default.questions, help="questions of a step")
    parser.add_argument("--steps", type=int, default=default.steps, help="steps of each measurement")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    disable_progress_bar()
    if arguments.worker:
        text, folder = arguments.worker
        cost = measure(Setting(**json.loads(text)))
        (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(asdict(cost)))
        return
    if min(arguments.turn_tokens) < 4:
        parser.error(f"`--turn_tokens` must be at least 4, got {min(arguments.turn_tokens)}: an action has 4 tokens")

    results: list[dict[str, Any]] = []

    def keep(name: str, setting: Setting, cost: Cost) -> Cost:
        results.append({"table": name, **asdict(setting), **asdict(cost)})
        return cost

    common = {"questions": arguments.questions, "steps": arguments.steps}
    base = Setting(**common)
    print(
        f"{make_model(make_tokenizer()).num_parameters() / 1e6:.2f} M parameters; unless it varies: {base.questions} questions "
        f"a step, groups of {base.group}, {base.searches} searches, {base.turn_tokens} tokens a turn; means of {base.steps} "
        f"steps; on {os.cpu_count()} cores ({platform.machine()}), one thread.\n"
    )
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed says there what it found
        measure(Setting(questions=base.questions, steps=1))  # warms up the process
    print("## Stages of a step\n")
    print(stage_table(base, keep("stages", base, measure(base))), flush=True)
    for title, name, values in (
        ("Group size", "group", arguments.groups),
        ("Searches", "searches", arguments.searches),
        ("Tokens of a turn", "turn_tokens", arguments.turn_tokens),
    ):
        costs = []
        for value in values:
            setting = Setting(**{**common, name: value})
            costs.append((value, setting, keep(name, setting, measure(setting))))
        print(f"## {title}\n")
        print(sweep_table(title.lower(), costs), flush=True)
    print("## Processes\n")
    of_processes = [(base, keep("processes", base, measure_apart(base, n))) for n in arguments.processes]
    print(process_table(of_processes), flush=True)
    print("## Memory\n")
    settings = [Setting(**common, group=group) for group in arguments.memory]
    print(memory_table([(s, keep("memory", s, measure_apart(s))) for s in settings]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
