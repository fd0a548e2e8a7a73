"""How long does it take to find golden answers in the passages of a training step? Prints a Markdown table. Needs no network.

    python -m benchmarks.occurrence
    python -m benchmarks.occurrence --rollouts 1024 --turns 4 --golds 8
    python -m benchmarks.occurrence --audited 1000

The passages are made of real sentences (the HotpotQA sample of the tests), and all of them differ. `first_occurrence` is called
once per rollout, as in training. Answers are drawn from the same sample: in a hit, the last turn contains one of them. "chance" is
the time to look for the answers of every question, with 8 rollouts each, in the passages of other questions. With --audited, it prints instead how long an audit of so many
questions takes to estimate the same, at every number of passages up to 20.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from tspo_trl.audit import SampledSearches
from tspo_trl.chance import POOL_SEARCHES, PooledRollout, SearchPool
from tspo_trl.credit import first_occurrence
from tspo_trl.retrieval.base import Passage
from tspo_trl.retrieval.corpus import iter_corpus

GROUP = 8  # rollouts of a question
TOP_K = 20  # passages of a search of an audit
DATA = Path(__file__).parents[1] / "tests" / "data" / "hotpotqa"


def make_rollouts(
    rollouts: int, turns: int, passages: int, words: int, golds: int, hits: float, seed: int
) -> list[tuple[list[str], list[str]]]:
    """The passage texts of the turns of each rollout, and its golden answers."""
    rng = random.Random(seed)
    vocabulary = " ".join(passage.text for passage in iter_corpus(DATA / "passages.jsonl")).split()
    lines = (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    answers = sorted({answer for line in lines for answer in json.loads(line)["golden_answers"] if len(answer) > 3})

    def text() -> str:
        starts = [rng.randrange(len(vocabulary) - words) for _ in range(passages)]
        return "\n".join(" ".join(vocabulary[start : start + words]) for start in starts)

    made = []
    for _ in range(rollouts):
        texts, gold = [text() for _ in range(turns)], rng.sample(answers, golds)
        if rng.random() < hits:
            texts[-1] = f"{texts[-1]} {gold[-1]}."
        made.append((texts, gold))
    return made


def count_by_chance(rollouts: list[tuple[list[str], list[str]]]) -> None:
    """What a step does to find out how often its answers are found by chance."""
    pool = SearchPool()
    pool.add([PooledRollout(str(i // GROUP), golds, texts) for i, (texts, golds) in enumerate(rollouts)])
    for i in range(0, len(rollouts), GROUP):
        pool.count(str(i // GROUP), rollouts[i][1], rollouts[i][1])


def time_audit(questions: int, words: int, golds: int, seed: int) -> tuple[float, float]:
    """Seconds that an audit takes to estimate chance, and the mean of its estimates at the largest number of passages."""
    made = make_rollouts(questions, TOP_K, 1, words, golds, 0.0, seed)
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
    print("| rollouts with a hit | found | seconds per step | chance, seconds per step |")
    print("|---|---|---|---|")
    for hits in (0.0, 0.5, 1.0):
        seconds, by_chance, found = [], [], 0
        for repeat in range(args.repeats + 1):
            rollouts = make_rollouts(
                args.rollouts, args.turns, args.passages, args.words, args.golds, hits, args.seed + repeat
            )
            start = time.perf_counter()
            found = sum(first_occurrence(texts, golds) is not None for texts, golds in rollouts)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
            count_by_chance(rollouts)
            by_chance.append(time.perf_counter() - start)
        times = " | ".join(f"{statistics.median(values[1:]):.3f}" for values in (seconds, by_chance))
        print(f"| {hits:.0%} | {found / args.rollouts:.0%} | {times} |")


if __name__ == "__main__":
    main()
