"""Test whether turn-level credit learns faster than GRPO. Trains a tiny search agent with every arm, in every regime,
with several seeds. Prints tables. Needs no network.

    python -m benchmarks.study                    # a small study: three arms, two seeds, half of the steps
    python -m benchmarks.study --full             # every arm, five seeds
    python -m benchmarks.study --report           # print the tables of the committed results
    python -m benchmarks.study --full --regimes weak misleading --seeds 8 --folder runs/study --processes 4

A cell is one training run: an arm in a regime with a seed. Finished cells are not run again, so a stopped study resumes
where it was stopped. Tables and pictures are written to the folder. `--publish` also writes the results to the
repository, and the tables and pictures to its documentation.
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
from .cells import Cell, Scale, prepare_regime, prepare_strong, run_cell
from .regimes import REGIMES
from .report import arrange, draw_curves, draw_differences, markdown

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- begin: python -m benchmarks.study --report -->\n", "<!-- end -->\n"
SMALL_ARMS = ("grpo", "merged", "tspo")


def plan(regimes: Iterable[str], arms: Iterable[str], seeds: int) -> list[Cell]:
    """Return the cells to run, sorted by seed, so that a stopped study is a study with fewer seeds."""
    arms = list(arms)
    return [
        Cell(regime, arm, seed)
        for seed in range(seeds)
        for regime in regimes
        for arm in arms
        if ARMS[arm].regimes is None or regime in ARMS[arm].regimes
    ]


def run(cells: list[Cell], scale: Scale, folder: Path, processes: int) -> None:
    """Run the cells without results, in several processes."""
    missing = [cell for cell in cells if not is_done(cell, scale, folder)]
    if not missing:
        return
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        # Policies come first, because all arms of a regime start from the same policy
        seeds = {cell.seed: cell for cell in reversed(missing)}
        wait_for(
            {pool.submit(prepare_strong, cell.seed, folder): cell for cell in seeds.values()}, "warm starts", start
        )
        firsts = {(cell.regime, cell.seed): cell for cell in missing}
        wait_for({pool.submit(prepare_regime, *key, folder): cell for key, cell in firsts.items()}, "policies", start)
        wait_for({pool.submit(run_cell, cell, scale, folder): cell for cell in missing}, "cells", start)


def wait_for(jobs: dict[Future, Any], name: str, start: float) -> None:
    """Wait for jobs and print their progress. The first error ends the study. Finished cells keep their results."""
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
    """Return whether a cell has results. Raise an error if they were made with another scale."""
    path = cell.path(folder)
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["scale"]
    if found != asdict(scale):
        raise SystemExit(f"{path} was made with {found}, but this study uses {asdict(scale)}. Use another `--folder`.")
    return True


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read the committed results: one file per regime, with one line per cell."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def write_results(cells: list[dict[str, Any]], folder: Path) -> None:
    """Write results in the format of [`read_results`], to be committed."""
    folder.mkdir(parents=True, exist_ok=True)
    for regime in REGIMES:
        lines = [json.dumps(cell) + "\n" for cell in cells if cell["regime"] == regime]
        if lines:
            (folder / f"{regime}.jsonl").write_text("".join(lines), encoding="utf-8")


def insert(page: str, tables: str) -> str:
    """Replace the tables between the marks of a documentation page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def publish(cells: list[dict[str, Any]]) -> None:
    """Write tables and pictures to the documentation."""
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
    parser.add_argument("--report", action="store_true", help="only print the tables of the committed results")
    parser.add_argument(
        "--publish", action="store_true", help="also write results, tables and pictures to the repository"
    )
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, help="(default: all with --full, else " + ", ".join(SMALL_ARMS) + ")"
    )
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 5 with --full, else 2)")
    parser.add_argument(
        "--steps", type=float, help="fraction of each regime's steps (default: 1 with --full, else 0.5)"
    )
    parser.add_argument("--heldout", type=int, default=256, help="number of held-out questions to evaluate")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of cells to run in parallel")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder of policies, results and tables (default: runs/study with --full, else runs/study_small)",
    )
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
    print(f"Written to {folder}: tables.md, curves.png, differences.png and the results of every cell.")
    if arguments.publish:
        write_results(cells, RESULTS)
        publish(cells)


if __name__ == "__main__":
    main()
