"""How long does it take to find golden answers in the passages of a training step? Prints a Markdown table. Needs no network.

    python -m benchmarks.occurrence
    python -m benchmarks.occurrence --rollouts 1024 --turns 4 --golds 8
    python -m benchmarks.occurrence --audited 1000

The passages are made of real sentences (the HotpotQA sample of the tests), and all of them differ. The answers of a question, with
8 rollouts each, are drawn from the same sample, or made of two of its words: in a hit, the last turn contains one of them. "facts"
is the time to find the first occurrence and the number of turns with an answer, of every rollout. "chance" is the time to look for
the answers of every question in the passages of other questions. Both are CPU time. Every repeat has other passages and answers.
With --audited, it prints instead how long an audit of so many questions takes to estimate the same, at every number of passages up
to 20.
"""

import argparse
import json
import random
import re
import statistics
import time
from itertools import pairwise
from pathlib import Path

from tspo_trl.audit import SampledSearches
from tspo_trl.chance import POOL_SEARCHES, PooledRollout, SearchPool
from tspo_trl.credit import eligible_golds, first_occurrence
from tspo_trl.retrieval.base import Passage
from tspo_trl.retrieval.corpus import iter_corpus
from tspo_trl.scoring import contains_answer

GROUP = 8  # rollouts of a question
TOP_K = 20  # passages of a search of an audit
DATA = Path(__file__).parents[1] / "tests" / "data" / "hotpotqa"


def make_rollouts(
    rollouts: int, turns: int, passages: int, words: int, golds: int, hits: float, seed: int, group: int = GROUP
) -> list[tuple[list[str], list[str]]]:
    """The passage texts of the turns of each rollout, and the golden answers of its question."""
    rng = random.Random(seed)
    vocabulary = " ".join(passage.text for passage in iter_corpus(DATA / "passages.jsonl")).split()
    lines = (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = sorted({answer for line in lines for answer in json.loads(line)["golden_answers"] if len(answer) > 3})

    def text() -> str:
        starts = [rng.randrange(len(vocabulary) - words) for _ in range(passages)]
        return "\n".join(" ".join(vocabulary[start : start + words]) for start in starts)

    pairs = [" ".join(pair) for pair in pairwise(vocabulary)]
    names = [pair for pair in pairs if re.fullmatch("[A-Z][a-z]{3,} [A-Z][a-z]{3,}", pair)]

    made = []
    for i in range(rollouts):
        if i % group == 0:
            gold = [*rng.sample(answers, 1), *rng.sample(names, golds - 1)]
        texts = [text() for _ in range(turns)]
        if rng.random() < hits:
            texts[-1] = f"{texts[-1]} {gold[-1]}."
        made.append((texts, gold))
    return made


def find_facts(rollouts: list[tuple[list[str], list[str]]]) -> list[int | None]:
    """What a step does to find out where its answers occur: the first turn of each rollout with an answer, and the later ones."""
    found = []
    for texts, golds in rollouts:
        found.append(first_occurrence(texts, golds))
        usable = eligible_golds(golds)
        if found[-1] is not None:
            sum(contains_answer(text, usable) for text in texts[found[-1] :])
    return found


def count_by_chance(rollouts: list[tuple[list[str], list[str]]]) -> None:
    """What a step does to find out how often its answers are found by chance."""
    pool = SearchPool()
    pool.add([PooledRollout(str(i // GROUP), golds, texts) for i, (texts, golds) in enumerate(rollouts)])
    for i in range(0, len(rollouts), GROUP):
        pool.count(str(i // GROUP), rollouts[i][1], rollouts[i][1])


def time_audit(questions: int, words: int, golds: int, seed: int) -> tuple[float, float]:
    """Seconds that an audit takes to estimate chance, and the mean of its estimates at the largest number of passages."""
    made = make_rollouts(questions, TOP_K, 1, words, golds, 0.0, seed, group=1)
    rows = [{"question": str(i), "golden_answers": answers} for i, (_, answers) in enumerate(made)]
    found = [[Passage("0", "", text) for text in texts] for texts, _ in made]
    start = time.perf_counter()
    searches = SampledSearches(list(zip(rows, found, strict=True))[:POOL_SEARCHES])
    estimates = [chance for row in rows if (chance := searches.chance(row, TOP_K)) is not None]
    seconds = time.perf_counter() - start
    return seconds, statistics.mean(chance.rates[-1] for chance in estimates)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.occurrence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rollouts", type=int, default=512, help="rollouts of a step (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="turns with passages (default: %(default)s)")
    parser.add_argument("--passages", type=int, default=3, help="passages of a turn (default: %(default)s)")
    parser.add_argument("--words", type=int, default=100, help="words of a passage (default: %(default)s)")
    parser.add_argument("--golds", type=int, default=5, help="golden answers of a question (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--audited", type=int, metavar="N", help="time the audit of N questions instead")
    args = parser.parse_args()
    if args.audited:
        print(f"| questions of the audit | seconds | found by chance in {TOP_K} passages |\n|---|---|---|")
        seconds, rate = time_audit(args.audited, args.words, args.golds, args.seed)
        print(f"| {args.audited} | {seconds:.2f} | {rate:.1%} |")
        return
    print("| rollouts with a hit | found | facts, seconds per step | chance, seconds per step | together |")
    print("|---|---|---|---|---|")
    for hits in (0.0, 0.5, 1.0):
        seconds, by_chance, found = [], [], 0.0
        for repeat in range(args.repeats + 1):
            rollouts = make_rollouts(
                args.rollouts, args.turns, args.passages, args.words, args.golds, hits, args.seed + repeat
            )
            start = time.process_time()
            found = statistics.mean(turn is not None for turn in find_facts(rollouts))
            seconds.append(time.process_time() - start)
            start = time.process_time()
            count_by_chance(rollouts)
            by_chance.append(time.process_time() - start)
        both = [sum(pair) for pair in zip(seconds, by_chance, strict=True)]
        times = " | ".join(f"{statistics.median(values[1:]):.3f}" for values in (seconds, by_chance, both))
        print(f"| {hits:.0%} | {found:.0%} | {times} |")


if __name__ == "__main__":
    main()
