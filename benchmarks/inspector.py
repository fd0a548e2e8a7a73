"""How large is the inspector's page, and how soon is it drawn? Needs Chromium and the Python package playwright.

    python -m benchmarks.inspector runs/demo                      # made up to 10,000 rollouts
    python -m benchmarks.inspector runs/demo --corpus passages.jsonl
    python -m benchmarks.inspector runs/demo --screenshot docs/images/inspector.png --place train/20/2/3

The rollouts of the run are repeated until they are enough. In each copy the words of the passages are shuffled, so that
the copies do not compress away; with --corpus the passages are others instead, drawn from a corpus for each group.
With --screenshot the page of the run itself is opened at a place (mode, step, group,
rollout: what the address of the page ends with) and a picture is taken.
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
    """The training rollouts of a run, repeated at later steps with other passages."""
    groups = run.modes["train"]
    num_steps = groups[-1].step + 1
    grown: list[Group] = []
    for copy in count():
        for number, group in enumerate(groups):
            records = deepcopy(group.rollouts)
            for turn in (turn for record in records for turn in record["trajectory"].turns):
                turn.passages = [other(passage, f"{copy} {number}", corpus) for passage in turn.passages]
            grown.append(Group(group.step + copy * num_steps, records))
            rollouts -= len(records)
            if rollouts <= 0:
                return replace(run, modes={"train": grown})
    raise AssertionError


def other(passage: Passage, seed: str, corpus: Sequence[Passage]) -> Passage:
    draw = random.Random(f"{seed} {passage.text}")
    if corpus:
        return replace(draw.choice(corpus), score=passage.score)
    words = passage.text.split()
    return replace(passage, text=" ".join(draw.sample(words, len(words))))


def opened(page: Page, path: Path, place: str = "") -> dict[str, float]:
    """Open a page; seconds until the overview is drawn, and until the texts are unpacked."""
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
    parser.add_argument("run_dir", type=Path, help="the folder of a run")
    parser.add_argument("--rollouts", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="a JSONL file of passages to show instead of the run's")
    parser.add_argument("--screenshot", type=Path, help="take a picture instead")
    parser.add_argument("--place", default="", help="where to, for instance train/20/2/3 (default: the last step)")
    parser.add_argument("--size", default="1440x1200", help="of the picture (default: %(default)s)")
    parser.add_argument("--scheme", default="light", choices=("light", "dark"), help="(default: %(default)s)")
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
            opened(page, path, args.place)
            page.screenshot(path=args.screenshot)
            print(args.screenshot)
            return
        run = grow(run, args.rollouts, load_corpus(args.corpus) if args.corpus else [])
        begin = time.perf_counter()
        size = write_page(run, path)
        print(f"rollouts                   {sum(len(group.rollouts) for group in run.modes['train']):,}")
        print(f"write the page             {time.perf_counter() - begin:.1f} s")
        print(f"size                       {size / 1e6:.1f} MB")
        times = [opened(browser.new_page(), path) for _ in range(5)]
        for name, label in (
            ("first-contentful-paint", "first paint"),
            ("drawn", "curves and groups drawn"),
            ("complete", "texts unpacked"),
        ):
            print(f"{label:26} {sorted(one[name] for one in times)[2]:.2f} s (median of 5)")


if __name__ == "__main__":
    main()
