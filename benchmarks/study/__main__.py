"""Does turn-level credit learn faster than GRPO? Trains a tiny search agent with every arm, in every regime, with several
seeds, and prints tables. Needs no network.

    python -m benchmarks.study                    # a small study: three arms, two seeds, half of the steps
    python -m benchmarks.study --full             # every arm, five seeds
    python -m benchmarks.study --report           # the tables and pictures again, from the results that are committed
    python -m benchmarks.study --full --regimes weak misleading --seeds 8 --folder runs/study --processes 4

Cells (an arm in a regime with a seed) that are there are not run again, so a study that was stopped goes on where it was.
Tables and pictures are written to the folder; `--publish` puts them and the results where the documentation has them.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .arms import ARMS
from .cells import Cell, Scale, prepare, run_cell, teach
from .regimes import REGIMES
from .report import arrange, draw_curves, draw_differences, markdown

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- begin: python -m benchmarks.study --report -->\n", "<!-- end -->\n"
SMALL_ARMS = ("grpo", "merged", "tspo")


def plan(regimes: Iterable[str], arms: Iterable[str], seeds: int) -> list[Cell]:
    """The cells to run, one seed after the other, so that a study that is stopped is one with fewer seeds."""
    arms = list(arms)
    return [
        Cell(regime, arm, seed)
        for seed in range(seeds)
        for regime in regimes
        for arm in arms
        if ARMS[arm].regimes is None or regime in ARMS[arm].regimes
    ]


def run(cells: list[Cell], scale: Scale, folder: Path, processes: int) -> None:
    """Run what is missing, in several processes."""
    missing = [cell for cell in cells if not is_done(cell, scale, folder)]
    if not missing:
        return
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        # Policies first: all arms start from the same
        seeds = {cell.seed: cell for cell in reversed(missing)}
        wait_for({pool.submit(teach, cell.seed, folder): cell for cell in seeds.values()}, "warm starts", start)
        firsts = {(cell.regime, cell.seed): cell for cell in missing}
        wait_for({pool.submit(prepare, *key, folder): cell for key, cell in firsts.items()}, "policies", start)
        wait_for({pool.submit(run_cell, cell, scale, folder): cell for cell in missing}, "cells", start)


def wait_for(jobs: dict[Future, Any], name: str, start: float) -> None:
    """Wait for jobs and say how far they are; the first error ends the study, and what is done stays."""
    for count, job in enumerate(as_completed(jobs), 1):
        cell = jobs[job]
        try:
            job.result()
        except Exception:
            for other in jobs:
                other.cancel()
            print(f"{cell} failed.", file=sys.stderr)
            raise
        minutes = (time.perf_counter() - start) / 60
        print(
            f"{minutes:6.1f} min  {count}/{len(jobs)} {name}: {cell.regime}, {cell.arm}, seed {cell.seed}", flush=True
        )


def is_done(cell: Cell, scale: Scale, folder: Path) -> bool:
    """Whether the results of a cell are there; those of another scale are an error, not a result."""
    path = cell.path(folder)
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["scale"]
    if found != asdict(scale):
        raise SystemExit(
            f"{path} was made with {found}, and this study is made with {asdict(scale)}. Use another `--folder`."
        )
    return True


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The committed results, a line for each cell in a file for each regime."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def write_results(cells: list[dict[str, Any]], folder: Path) -> None:
    """Write results to be committed, see [`read_results`]."""
    folder.mkdir(parents=True, exist_ok=True)
    for regime in REGIMES:
        lines = [json.dumps(cell) + "\n" for cell in cells if cell["regime"] == regime]
        if lines:
            (folder / f"{regime}.jsonl").write_text("".join(lines), encoding="utf-8")


def insert(page: str, tables: str) -> str:
    """A page of the documentation with other tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def publish(cells: list[dict[str, Any]]) -> None:
    """Tables and pictures where the documentation has them."""
    results = arrange(cells)
    page = DOCS / "study.md"
    page.write_text(insert(page.read_text(encoding="utf-8"), markdown(results)), encoding="utf-8")
    draw_curves(results, DOCS / "images" / "study_curves.png")
    draw_differences(results, DOCS / "images" / "study_differences.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every arm, five seeds, all steps")
    parser.add_argument("--report", action="store_true", help="only show the committed results")
    parser.add_argument("--publish", action="store_true", help="write results, tables and pictures to the repository")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="all with --full, else " + ", ".join(SMALL_ARMS))
    parser.add_argument("--seeds", type=int, help="how many; 5 with --full, else 2")
    parser.add_argument("--steps", type=float, help="the part of the steps of each regime; 1 with --full, else 0.5")
    parser.add_argument("--heldout", type=int, default=256, help="held-out questions that are answered")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cells at once")
    parser.add_argument("--folder", type=Path, help="runs/study with --full, else runs/study_small")
    arguments = parser.parse_args()
    full = arguments.full

    if arguments.report:
        cells = read_results(RESULTS)
        print(markdown(arrange(cells)))
        if arguments.publish:
            publish(cells)
        return

    folder = arguments.folder or Path("runs/study" if full else "runs/study_small")
    scale = Scale(steps=arguments.steps or (1.0 if full else 0.5), heldout=arguments.heldout)
    planned = plan(
        arguments.regimes, arguments.arms or (ARMS if full else SMALL_ARMS), arguments.seeds or (5 if full else 2)
    )
    run(planned, scale, folder, arguments.processes)
    cells = [json.loads(cell.path(folder).read_text(encoding="utf-8")) for cell in planned]
    results = arrange(cells)
    tables = markdown(results)
    print(tables)
    (folder / "tables.md").write_text(tables, encoding="utf-8")
    draw_curves(results, folder / "curves.png")
    draw_differences(results, folder / "differences.png")
    print(f"Also in {folder}: tables.md, curves.png, differences.png, and every cell.")
    if arguments.publish:
        write_results(cells, RESULTS)
        publish(cells)


if __name__ == "__main__":
    main()
