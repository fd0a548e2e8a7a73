"""Measure the size and the drawing time of the inspector's page. Needs Chromium and the Python package playwright.

    python -m benchmarks.inspector runs/demo                      # repeat its rollouts up to 10,000
    python -m benchmarks.inspector runs/demo --corpus passages.jsonl
    python -m benchmarks.inspector runs/demo --screenshot docs/images/inspector.png --place train/20/3/0

The rollouts of the run are repeated until `--rollouts` is reached. Each copy has other passages, because equal passages
would be compressed: the words of its passages are shuffled, or, with `--corpus`, its passages are drawn at random from
the corpus. `--screenshot` takes a picture of the page of the run instead. `--place` is the last part of the page's
address: mode, step, group and rollout.
"""

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Page, sync_playwright

from tspo_trl import Passage, load_corpus
from tspo_trl.inspect import Group, Run, load_run, write_page


def grow(run: Run, rollouts: int, corpus: Sequence[Passage]) -> Run:
    """Repeat the training rollouts of a run at later steps, with other passages."""
    groups = run.modes["train"]
    num_steps = groups[-1].step + 1
    grown: list[Group] = []
    for copy in count():
        for number, group in enumerate(groups):
            records = deepcopy(group.rollouts)
            for turn in (turn for record in records for turn in record["trajectory"].turns):
                turn.passages = [replace_passage(passage, f"{copy} {number}", corpus) for passage in turn.passages]
            grown.append(Group(group.step + copy * num_steps, records))
            rollouts -= len(records)
            if rollouts <= 0:
                return replace(run, modes={"train": grown})
    raise AssertionError


def replace_passage(passage: Passage, seed: str, corpus: Sequence[Passage]) -> Passage:
    """Draw a passage from the corpus, or shuffle the words of the passage if there is no corpus."""
    rng = random.Random(f"{seed} {passage.text}")
    if corpus:
        return replace(rng.choice(corpus), score=passage.score)
    words = passage.text.split()
    return replace(passage, text=" ".join(rng.sample(words, len(words))))


def time_page(page: Page, path: Path, place: str = "") -> dict[str, float]:
    """Open a page, and return the seconds until its first paint, its overview and its unpacked texts."""
    page.goto(f"{path.resolve().as_uri()}#{place}")
    page.wait_for_selector("html[data-ready]")
    return {
        name: page.evaluate(f"performance.getEntriesByName('{name}')[0].startTime") / 1000
        for name in ("first-contentful-paint", "drawn", "complete")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inspector", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="folder of a run")
    parser.add_argument("--rollouts", type=int, default=10_000, help="number of rollouts (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="JSONL file of passages to show instead of the run's passages")
    parser.add_argument("--screenshot", type=Path, help="write a picture to this file instead")
    parser.add_argument(
        "--place", default="", help="place to open for the picture, for example train/20/3/0 (default: the last step)"
    )
    parser.add_argument("--size", default="1440x1200", help="width and height of the picture (default: %(default)s)")
    parser.add_argument(
        "--scheme",
        default="light",
        choices=("light", "dark"),
        help="color scheme of the picture (default: %(default)s)",
    )
    args = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    run = load_run(args.run_dir)
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "page.html"
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if args.screenshot:
            write_page(run, path)
            width, height = map(int, args.size.split("x"))
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=args.scheme)
            time_page(page, path, args.place)
            page.screenshot(path=args.screenshot)
            print(args.screenshot)
            return
        run = grow(run, args.rollouts, load_corpus(args.corpus) if args.corpus else [])
        begin = time.perf_counter()
        size = write_page(run, path)
        print(f"rollouts                   {sum(len(group.rollouts) for group in run.modes['train']):,}")
        print(f"write the page             {time.perf_counter() - begin:.1f} s")
        print(f"size                       {size / 1e6:.1f} MB")
        times = [time_page(browser.new_page(), path) for _ in range(5)]
        for name, label in (
            ("first-contentful-paint", "first paint"),
            ("drawn", "curves and groups drawn"),
            ("complete", "texts unpacked"),
        ):
            print(f"{label:26} {sorted(one[name] for one in times)[2]:.2f} s (median of 5)")


if __name__ == "__main__":
    main()
