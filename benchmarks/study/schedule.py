"""Run jobs that need each other's results in several processes."""

import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """
    A part of a study.

    Args:
        name (`str`):
            What it does. No other job has this name.
        work (`Callable`):
            Does it.
        arguments (`tuple`):
            The arguments of `work`.
        needs (`str`, *optional*):
            The name of the job that must be finished before.
    """

    name: str
    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: str | None = None


def run_jobs(pool: Executor, jobs: Sequence[Job], processes: int, report: Callable[[str], None]) -> None:
    """
    Run jobs in their order, as far as the jobs that they need are finished. A job that fails stops only the jobs that need it.

    Args:
        pool ([`~concurrent.futures.Executor`]):
            Executes the jobs.
        jobs (`Sequence[Job]`):
            The jobs, the most urgent one first.
        processes (`int`):
            Number of jobs at a time.
        report (`Callable[[str], None]`):
            Is called with the name of every job that has finished.

    Raises:
        `RuntimeError`: At the end, if jobs have failed, with their names.
    """
    waiting, running = list(jobs), dict[Future[Any], Job]()
    known, done, failed = {job.name for job in jobs}, set[str](), dict[str, BaseException]()
    skipped = set[str]()
    while waiting or running:
        skipped |= {job.name for job in waiting if job.needs in failed.keys() | skipped}
        waiting = [job for job in waiting if job.name not in skipped]
        ready = [job for job in waiting if job.needs not in known or job.needs in done]
        for job in ready[: processes - len(running)]:
            waiting.remove(job)
            running[pool.submit(job.work, *job.arguments)] = job
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            job = running.pop(future)
            if error := future.exception():
                failed[job.name] = error
                print(f"Failed: {job.name}", *traceback.format_exception(error), sep="\n", file=sys.stderr, flush=True)
            else:
                done.add(job.name)
                report(job.name)
    if failed:
        raise RuntimeError(f"These jobs failed: {'; '.join(failed)}.") from next(iter(failed.values()))
