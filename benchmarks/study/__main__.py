"""Test whether turn-level credit learns faster than GRPO. Trains a tiny search agent with several arms (methods to convert
rollouts to advantages), in several regimes, with several seeds. Prints tables. Needs no network.

    python -m benchmarks.study                    # a small study: three arms, two seeds, half of the steps
    python -m benchmarks.study --report           # print the tables of all published sets
    python -m benchmarks.study --set defaults     # GRPO, TSPO as published and the default, ten seeds or more
    python -m benchmarks.study --set credits      # the default against six other credits, five seeds
    python -m benchmarks.study --set variants     # the options of the credit, five seeds
    python -m benchmarks.study --set sweep        # more and more passages name answers of other questions
    python -m benchmarks.study --set defaults --regimes weak --arms grpo tspo --seeds 3 --steps 2 --processes 4

A cell is one training run: an arm in a regime with a seed. Finished cells are not run again, so a stopped study resumes
where it was stopped, in the order of the seeds. `--continue` takes published cells as finished. Tables and pictures are
written to the folder. `--publish` also writes the results to the repository, and the tables and pictures to its
documentation. To do so with an unfinished study, add `--report --folder FOLDER`: then each regime has the seeds that all
arms have finished.
"""

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from .arms import ARMS
from .cells import Cell, Scale, prepare_regime, prepare_strong, run_cell
from .pages import CHOICE, publish, tables, write_report
from .regimes import ALL_REGIMES
from .report import arrange
from .schedule import Job, run_jobs
from .sets import (
    PUBLISHED,
    SETS,
    check_pairs,
    complete,
    is_done,
    plan,
    read_folder,
    read_set,
    take_published,
    write_set,
)


def run(cells: list[Cell], scale: Scale, folder: Path, processes: int) -> None:
    """Run the cells without results, in several processes and in the order of their seeds."""
    jobs = jobs_of([cell for cell in cells if not is_done(cell, scale, folder)], scale, folder)
    if not jobs:
        return
    start = time.perf_counter()
    numbers = itertools.count(1)

    def progress(name: str) -> None:
        print(f"{(time.perf_counter() - start) / 60:6.1f} min  {next(numbers)}/{len(jobs)} {name}", flush=True)

    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // processes)
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        run_jobs(pool, jobs, processes, progress)


def jobs_of(cells: Sequence[Cell], scale: Scale, folder: Path) -> list[Job]:
    """
    Return what must be done for some cells. The strong policy of a seed comes before the policies of its regimes, and a policy
    before the cells that start from it.

    Args:
        cells (`Sequence[Cell]`):
            The cells, in their order.
        scale ([`Scale`]):
            The size of the cells.
        folder (`Path`):
            The folder of the study.
    """
    jobs = {}
    for cell in cells:
        made, *mistakes = ALL_REGIMES[cell.regime].policy
        strong = f"seed {cell.seed}: strong policy"
        policy = f"seed {cell.seed}: policy of {made} {'/'.join(map(str, mistakes))}"
        named = f"seed {cell.seed}: {cell.regime}, {cell.arm}"
        jobs[strong] = Job(strong, prepare_strong, (cell.seed, folder))
        jobs.setdefault(policy, Job(policy, prepare_regime, (cell.regime, cell.seed, folder), needs=strong))
        jobs[named] = Job(named, run_cell, (cell, scale, folder), needs=policy)
    return list(jobs.values())


def report(names: Sequence[str], *, to_pages: bool) -> None:
    """Print the tables of published sets, and write them to the documentation if `to_pages`."""
    for name in names:
        cells = read_set(name)
        found = tables(arrange(cells), chosen=name == CHOICE) if cells else "No results.\n"
        print(f"## {name}: {SETS[name].title}\n\n{found}")
        if to_pages:
            publish(name)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line. What is not given has the value of the set."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS, default="small", help="what to run (default: small)")
    parser.add_argument(
        "--report",
        action="store_true",
        help="only print the tables: of the published sets, of `--set`, or of what is finished in `--folder`",
    )
    parser.add_argument(
        "--publish", action="store_true", help="also write the set to the repository: results, tables and pictures"
    )
    parser.add_argument(
        "--continue", dest="goes_on", action="store_true", help="take the published cells of the set as finished"
    )
    parser.add_argument("--regimes", nargs="+", choices=ALL_REGIMES)
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--seeds", type=int, help="number of seeds of every regime")
    parser.add_argument("--steps", type=float, help="fraction of each regime's steps")
    parser.add_argument("--heldout", type=int, default=256, help="number of held-out questions to evaluate")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of cells to run in parallel")
    parser.add_argument("--folder", type=Path, help="folder of policies, results and tables (default: runs/study_SET)")
    return parser


def main() -> None:
    parser = make_parser()
    arguments = parser.parse_args()
    name, of_set = arguments.set, SETS[arguments.set]
    of_repository = arguments.report and not arguments.folder
    if not of_set.published and not of_repository and (arguments.publish or arguments.goes_on):
        parser.error(f"`--publish` and `--continue` need `--set` with one of {', '.join(PUBLISHED)}; got {name!r}.")
    if of_repository:
        report([name] if of_set.published else PUBLISHED, to_pages=arguments.publish)
        return

    folder = arguments.folder or Path(f"runs/study_{name}")
    scale = Scale(steps=arguments.steps or of_set.steps, heldout=arguments.heldout)
    most = max(of_set.seeds.values())  # also for regimes that are not in the set
    seeds = {regime: arguments.seeds or of_set.seeds.get(regime, most) for regime in arguments.regimes or of_set.seeds}
    planned = plan(seeds, arguments.arms or of_set.arms)
    if arguments.goes_on:
        print(f"Published cells that are taken: {take_published(read_set(name), planned, scale, folder)}")
    if not arguments.report:
        run(planned, scale, folder, arguments.processes)

    cells = complete([cell for cell in read_folder(folder) if cell["scale"] == asdict(scale)], planned)
    if not cells:
        parser.error(f"{folder} has no seed that all arms of the set have finished. Run the study without `--report`.")
    check_pairs(cells)
    print(write_report(cells, folder))
    print(f"Written to {folder}: tables.md, the pictures and the results of every cell.")
    if arguments.publish:
        write_set(name, cells)
        publish(name)


if __name__ == "__main__":
    main()
