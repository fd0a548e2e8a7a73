"""The stages of a run: convert the model, evaluate it, make the cold start, train. Each is done once, and can be resumed."""

import ctypes
import gc
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from tspo_trl import Retriever, SearchAgent, evaluate, load_questions
from tspo_trl.audit import first_rank
from tspo_trl.commands import cold_start as cold_start_command
from tspo_trl.commands import train as train_command
from tspo_trl.evaluation.folder import model_fingerprint
from tspo_trl.rollout.limits import SearchLimits
from tspo_trl.rollout.search_config import SearchConfig
from tspo_trl.support.files import replace_file
from tspo_trl.training.checkpoints import last_checkpoint

from .model import DONE, MEMORY_GIB, check_header, check_memory, find_gguf, get_model
from .report import BASE, COLD_START, GRPO

HERE = Path(__file__).parent
CONFIGS = {"cold_start": HERE / "cold_start.yaml", "train": HERE / "train.yaml"}
HELDOUT = HERE / "hotpotqa" / "heldout.jsonl"
#: The options of each credit. "tspo" is TSPO as published, and "default" has the library's options.
CREDITS: dict[str, dict[str, Any]] = {
    GRPO: {"advantage_level": "trajectory"},
    "tspo": {
        "advantage_level": "stage",
        "folr_placement": "first",
        "folr_guard": "degenerate",
        "turn_baseline": "turn",
    },
    "default": {},
}
TRAINING_GIB = 12.0  # of the cold start too
SAMPLES = 2  # of each held-out question, beside the greedy rollout
BATCH_SIZE = 32  # rollouts of the evaluation at a time
#: Estimates for two cores, from which the time that is left is printed: minutes of a stage, and seconds of a step.
MINUTES = {"base": 0.5, "cold_start": 15.0, "evaluate": 8.0}
STEP_SECONDS = 40.0
#: With `--quick`
QUICK_STEPS, QUICK_QUESTIONS, QUICK_SAMPLES = 2, 8, 2
QUICK = {
    "cold_start": {"num_demonstrations": 8, "num_train_epochs": 1, "check_questions": 0},
    "train": {"num_generations": 4, "gradient_accumulation_steps": 2, "save_steps": 1},
}


@dataclass(frozen=True)
class Run:
    """
    A training run, and where its files are.

    Args:
        folder (`Path`):
            The folder of all runs from one cold start.
        credit (`str`):
            Key of `CREDITS`.
        seed (`int`):
            The seed of the training: of the order of its questions and of its rollouts.
        steps (`int`):
            The number of steps.
        quick (`bool`):
            Whether everything is small.
    """

    folder: Path
    credit: str
    seed: int
    steps: int
    quick: bool

    @property
    def name(self) -> str:
        """The name of its folder and of its results."""
        return f"{self.credit}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that the runs of a folder share."""
        configs = {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in CONFIGS.items()}
        return {**configs, "steps": self.steps, "quick": self.quick}


@dataclass(frozen=True)
class Stage:
    """
    A part of a run that is done once.

    Args:
        name (`str`):
            The name of the file that marks it as finished.
        title (`str`):
            What it does, in the output.
        minutes (`float`):
            About how long it takes.
        work (`Callable[[], None]`):
            Does it. What it has done before it was killed may be there already.
    """

    name: str
    title: str
    minutes: float
    work: Callable[[], None]

    def mark(self, folder: Path) -> Path:
        """The file that marks it as finished."""
        return folder / "finished" / f"{self.name}.json"


def stages_of(run: Run, retriever: Retriever) -> list[Stage]:
    """
    The stages of a run, in their order.

    Args:
        run ([`Run`]):
            The run.
        retriever ([`Retriever`]):
            Executes the searches of the evaluations.
    """

    def evaluation(model: str, title: str) -> Stage:
        name = f"evaluation-{model}"
        return Stage(name, f"evaluate {title}", evaluating, lambda: evaluate_model(run, model, retriever))

    training = run.steps * STEP_SECONDS / 60
    evaluating = MINUTES["evaluate"] / (20 if run.quick else 1)
    return [
        Stage(BASE, "convert the model", MINUTES[BASE], lambda: convert_model(run)),
        evaluation(BASE, "the model as it is"),
        Stage(COLD_START, "cold start", MINUTES[COLD_START], lambda: make_cold_start(run)),
        evaluation(COLD_START, "the cold start"),
        Stage(run.name, f"train {run.steps} steps", training, lambda: train(run)),
        evaluation(run.name, "the trained model"),
    ]


def do_stages(stages: Sequence[Stage], folder: Path) -> None:
    """
    Do the stages that are not finished, and print the time that is left.

    Args:
        stages (`Sequence[Stage]`):
            The stages, in their order.
        folder (`Path`):
            The folder of the run.
    """
    for number, stage in enumerate(stages, 1):
        label = f"[{number}/{len(stages)}] {stage.title}"
        if stage.mark(folder).is_file():
            print(f"{label}: finished before", flush=True)
            continue
        left = sum(later.minutes for later in stages[number - 1 :] if not later.mark(folder).is_file())
        print(f"{label}; about {left:.0f} minutes left in all", flush=True)
        start = time.perf_counter()
        reset_peak()
        stage.work()
        gc.collect()  # the next stage needs the memory
        done = {"minutes": round((time.perf_counter() - start) / 60, 2), "peak_gib": round(peak_gib(), 2)}
        stage.mark(folder).parent.mkdir(parents=True, exist_ok=True)
        replace_file(stage.mark(folder), json.dumps(done) + "\n")
        print(f"{label}: {done['minutes']:.1f} minutes, peak memory {done['peak_gib']:.1f} GiB", flush=True)


def reset_peak() -> None:
    """Give freed memory back, and forget the largest memory until now, where Linux allows it."""
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """The largest memory of this process since [`reset_peak`], or since it started, in GiB."""
    with suppress(OSError, IndexError):  # not every Linux tells it
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def convert_model(run: Run) -> None:
    """Convert the model, and save the search settings of the runs with it."""
    config = run.settings["train"]
    limits = {limit.name: config[limit.name] for limit in fields(SearchLimits) if limit.name in config}
    SearchConfig(**limits).save(get_model(run.folder / BASE))


def make_cold_start(run: Run) -> None:
    """Train the model on demonstrations, see `recipes/cold_start.py`."""
    output = run.folder / COLD_START
    shutil.rmtree(output, ignore_errors=True)
    options = {"model_name_or_path": run.folder / BASE, "output_dir": output}
    arguments = flags(options | (QUICK["cold_start"] if run.quick else {}))
    cold_start_command.main(["--config", str(CONFIGS["cold_start"]), *arguments])


def train(run: Run) -> None:
    """Train the model by its rollouts, see `recipes/train.py`. It resumes from the last checkpoint if there is one."""
    output = run.folder / run.name
    options = {
        "model_name_or_path": run.folder / COLD_START,
        "output_dir": output,
        "max_steps": run.steps,
        "seed": run.seed,
        **CREDITS[run.credit],
        **(QUICK["train"] if run.quick else {}),
    }
    checkpoint = None
    with suppress(ValueError):  # there is none
        checkpoint = last_checkpoint(output)
    if checkpoint is None:
        shutil.rmtree(output, ignore_errors=True)  # rollouts of a run that was killed before its first checkpoint
    else:
        print(f"Resuming from {checkpoint}", flush=True)
        options["resume_from_checkpoint"] = checkpoint
    train_command.main(["--config", str(CONFIGS["train"]), *flags(options)])


def flags(options: Mapping[str, Any]) -> list[str]:
    """
    Options as the arguments of a command.

    Args:
        options (`Mapping[str, Any]`):
            Values by name.
    """
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def evaluate_model(run: Run, model: str, retriever: Retriever) -> None:
    """Evaluate a model on the held-out questions: greedily, and with several samples of each question."""
    where = run.folder / model
    for kind, samples in (("greedy", 1), ("sampled", QUICK_SAMPLES if run.quick else SAMPLES)):
        agent = SearchAgent.from_pretrained(
            where,
            retriever=retriever,
            do_sample=samples > 1,
            batch_size=BATCH_SIZE,
            dtype="bfloat16",  # as the training computes, and faster
            device="cpu",
        )
        evaluate(
            agent,
            {"heldout": heldout(run.quick)},
            run.folder / "evaluation" / model / kind,
            num_samples=samples,
            about={"model": model, "fingerprint": model_fingerprint(where)},
        )


def heldout(quick: bool) -> Dataset:
    """The held-out questions."""
    questions = load_questions(HELDOUT)
    assert isinstance(questions, Dataset)
    return questions.select(range(QUICK_QUESTIONS)) if quick else questions


def single_hop(rows: Sequence[Mapping[str, Any]], retriever: Retriever, num_passages: int) -> list[bool]:
    """
    Find the questions that one search answers: a golden answer is in the first passages for the question itself, as the
    audit finds it.

    Args:
        rows (`Sequence[Mapping]`):
            Questions with `golden_answers`.
        retriever ([`Retriever`]):
            The retriever.
        num_passages (`int`):
            Number of passages of a search.

    Returns:
        `list[bool]`: One for each question.

    Raises:
        `ValueError`: If there is no such question: then the passages are not those of the questions.
    """
    found = retriever.search([row["question"] for row in rows], num_passages)
    single = [
        first_rank(passages, row["golden_answers"]) is not None for row, passages in zip(rows, found, strict=True)
    ]
    if not any(single):
        raise ValueError(
            f"The retriever finds a golden answer for none of the {len(rows)} held-out questions in its first {num_passages} "
            f"passages. For instance, {rows[0]['question']!r} with {rows[0]['golden_answers']!r} finds "
            f"{[passage.title for passage in found[0]]!r}. The `corpus` of {CONFIGS['train'].name} must have the passages of "
            "the questions."
        )
    return single


def check_folder(run: Run) -> None:
    """
    Keep the settings of a folder, or compare them with those that are there.

    Args:
        run ([`Run`]):
            The run.

    Raises:
        `ValueError`: If the folder was made with other settings; the message lists them.
    """
    file = run.folder / "settings.json"
    if not file.is_file():
        run.folder.mkdir(parents=True, exist_ok=True)
        replace_file(file, json.dumps(run.settings, indent=2) + "\n")
        return
    before, now = (_flat(settings) for settings in (json.loads(file.read_text(encoding="utf-8")), run.settings))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise ValueError(
            f"--folder: {run.folder} was made with other settings: {listed}. Remove it, or give another folder."
        )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name: value if isinstance(value, dict) else {"": value} for name, value in settings.items()}
    return {f"{name}.{key}".rstrip("."): value for name, values in parts.items() for key, value in values.items()}


def check_machine(run: Run) -> None:
    """
    Check the packages and the memory that the unfinished stages need, before anything is trained.

    Args:
        run ([`Run`]):
            The run.

    Raises:
        `ImportError`, `ValueError` or `MemoryError`: If a package is missing, it holds another model, or there is too little
            memory.
    """
    if not (run.folder / BASE / DONE).is_file():
        check_header(find_gguf())
        check_memory(MEMORY_GIB)
    if not (run.folder / "finished" / f"{run.name}.json").is_file():
        check_memory(TRAINING_GIB, "The training")
