"""Check whether a retriever and its corpus support training on given questions, and which golden answers FOLR can use.

Run it before you spend GPU hours. It prints tables and a verdict, and writes OUT/audit.json and OUT/audit.png.

    tspo audit --dataset_name questions.jsonl --corpus passages.jsonl
    tspo audit --dataset_name questions.jsonl --retriever_url http://localhost:8000/retrieve --max_questions 1000
    tspo audit --dataset_name questions.jsonl --corpus passages.jsonl --retriever_encoder intfloat/e5-base-v2 \\
        --retriever_backend bm25 dense hybrid
    tspo audit --dataset_name demo

Several values of --retriever_backend or --retriever_url are compared side by side. The rest of the audit is about the first.

Each row has a `question` and its `golden_answers` (a list of strings). With `supporting_titles` (a list of strings), the
audit also searches for the titles as ideal queries; with `supporting_ids` (a list of strings), it measures the recall of
the supporting passages.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ..audit import COMMON, REASONS, Audit, Ranks, SampledSearches, compare, find_ranks, summarize, verdict
from ..chance import POOL_SEARCHES
from ..questions import BENCHMARKS, load_benchmark, load_questions
from ..questions.check import check_columns, check_row, read_texts
from ..questions.hints import hints_in_flags
from ..questions.mix import draw
from ..retrieval import HybridRetriever, Passage, Retriever
from ..retrieval.open import BM25_FOLDER, DENSE_FOLDER, open_retriever
from ..rollout.limits import SearchLimits
from ..support.files import replace_file, replacing
from .demo import DEMO, demo_retriever
from .options import (
    DATA_FLAGS,
    RETRIEVER_OPTIONS,
    add_columns_option,
    add_output_option,
    add_retriever_options,
    check_at_least_one,
    check_input_files,
    check_output_dir,
    check_question_files,
    make_parser,
    read_columns,
)

matplotlib.use("Agg")
QUERIES = 256  # maximum number of queries in a call of the retriever
SEED = 0  # of the random order of questions, the first of which give the chance level
OTHER_COLORS = ("#e08214", "#4d4d4d", "#b2abd2")  # of the other retrievers
CURVES = {  # field of the audit -> its name, its colour
    "ideal": ("ideal queries", "#3a9d5d"),
    "supporting": ("supporting recall", "#8d80c4"),
    "plain": ("plain question", "#1b6ca8"),
    "chance": ("chance", "#c0504d"),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the audit."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add(
        "--dataset_name",
        "--dataset",
        dest="dataset",
        required=True,
        help="a file or folder, a name on the Hub, a benchmark (nq, ...), or 'demo'",
    )
    add("--dataset_config", help="configuration of a data set on the Hub")
    add_columns_option(parser)
    add("--split", default="train", help="split of the data set; a local file is 'train' (default: %(default)s)")
    add("--max_questions", type=int, metavar="N", help="draw N questions (default: all)")
    add("--seed", type=int, default=0, help="seed of the questions drawn (default: %(default)s)")
    add("--demo_seed", type=int, default=0, help="seed of the demo's encyclopedia (default: %(default)s)")
    add_retriever_options(parser, compared=True)
    add(
        "--max_passages",
        "--top_k",
        dest="top_k",
        type=int,
        default=20,
        metavar="N",
        help="number of passages up to which ranks are counted (default: %(default)s)",
    )
    add(
        "--num_passages",
        type=int,
        default=SearchLimits.num_passages,
        metavar="N",
        help="number of passages for each search in training (default: %(default)s)",
    )
    add(
        "--max_searches",
        type=int,
        default=SearchLimits.max_searches,
        metavar="N",
        help="maximum number of searches of a rollout in training (default: %(default)s)",
    )
    add_output_option(parser, "runs/audit")
    args = parser.parse_args(arguments)
    check_at_least_one(parser, args, "max_questions", "max_searches")
    read_columns(parser, args)
    if not 1 <= args.num_passages <= args.top_k:
        parser.error(f"--num_passages must be from 1 to --max_passages ({args.top_k}), got {args.num_passages}")
    sources = [f"--{name}" for name in RETRIEVER_OPTIONS if getattr(args, name) is not None]
    if args.dataset == DEMO and sources:
        parser.error(f"--dataset_name demo brings its own passages, got {' and '.join(sources)} too")
    if args.dataset != DEMO and not sources:
        parser.error("nothing to search in: give --corpus, --index or --retriever_url")
    for name in ("retriever_backend", "retriever_url"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name} repeats a value: {' '.join(values)}")
    if args.retriever_url is not None and len(args.retriever_backend) > 1:
        parser.error("several values of --retriever_backend need --corpus or --index: a server has its own backend")
    return args


@hints_in_flags(DATA_FLAGS)
def load_rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[Passage]]:
    """The questions, and the passages that a data set brings along."""
    passages: list[Passage] = []
    if args.dataset == DEMO:
        from ..demo import make_world

        world = make_world(args.demo_seed)
        passages, splits = world.passages, {"train": world.train_questions, "heldout": world.heldout_questions}
        if args.split not in splits:
            raise ValueError(f"--split: the demo has no split {args.split!r}, only {sorted(splits)}.")
        dataset = Dataset.from_list(
            [question.row() | {"supporting_titles": list(question.queries)} for question in splits[args.split]]
        )
    elif args.dataset in BENCHMARKS:
        dataset = load_benchmark(args.dataset)
    else:
        dataset = load_questions(args.dataset, name=args.dataset_config, split=args.split, columns=args.columns)
    check_columns(dataset, args.dataset)
    if args.max_questions is not None:
        dataset = draw(dataset, args.max_questions, args.seed)
    return [read_row(row, f"`{args.dataset}`, row {i}") for i, row in enumerate(dataset)], passages


def read_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns of a row that the audit reads, checked as the trainer checks them."""
    check_row(row, where)
    checked: dict[str, Any] = {"question": row["question"], "golden_answers": list(row["golden_answers"])}
    for column in ("supporting_titles", "supporting_ids"):
        texts = read_texts(row, column, where)
        checked[column] = list(dict.fromkeys(text for text in texts if text.strip()))
    return checked


def search_all(rows: Sequence[Mapping[str, Any]], retriever: Retriever, top_k: int) -> list[Ranks]:
    """Search for every question once, and keep only the ranks, and the passages of a sample of the questions."""
    order = random.Random(SEED).sample(range(len(rows)), len(rows))
    queries = [[row["question"], *row["supporting_titles"]] for row in rows]
    size = max(1, QUERIES // max(map(len, queries)))
    ranks: dict[int, Ranks] = {}
    sample: list[tuple[Mapping[str, Any], Sequence[Passage]]] = []
    console = Console(stderr=True)
    for start in track(range(0, len(rows), size), "Searching", console=console, transient=True):
        batch = order[start : start + size]
        unique = list(dict.fromkeys(query for i in batch for query in queries[i]))
        found = dict(zip(unique, retriever.search(unique, top_k), strict=True))
        for i in batch:
            results = [found[query][:top_k] for query in queries[i]]
            ranks[i] = find_ranks(rows[i], results)
            if len(sample) < POOL_SEARCHES:
                sample.append((rows[i], results[0]))
    others = SampledSearches(sample)
    return [
        ranks[i]._replace(chance=others.chance(rows[i], top_k))
        for i in track(range(len(rows)), "Comparing", console=console, transient=True)
    ]


def open_all(args: argparse.Namespace, passages: list[Passage]) -> dict[str, Retriever]:
    """The retrievers of the options, by the names that tell them apart."""
    backends = args.retriever_backend
    if args.dataset == DEMO:
        return {name: demo_retriever(passages, name) for name in backends}
    if args.retriever_url is not None:
        return {url: open_retriever(url=url, backend=backends[0]) for url in args.retriever_url}
    if len(backends) == 1:
        options = {"language": args.retriever_language, "encoder": args.retriever_encoder}
        return {backends[0]: open_retriever(corpus=args.corpus, index=args.index, backend=backends[0], **options)}
    opened: dict[str, Retriever] = {}
    parts = ["bm25", "dense"] if "hybrid" in backends else []
    for name in dict.fromkeys([*parts, *(name for name in backends if name != "hybrid")]):
        opened[name] = open_retriever(
            corpus=args.corpus,
            index=None if args.index is None else Path(args.index) / (DENSE_FOLDER if name == "dense" else BM25_FOLDER),
            backend=name,
            language=args.retriever_language if name in ("bm25", "bm25s") else None,
            encoder=args.retriever_encoder if name == "dense" else None,
        )
    if parts:  # of the same two retrievers: the corpus is encoded once
        opened["hybrid"] = HybridRetriever([opened[name] for name in parts])
    return {name: opened[name] for name in backends}


def side_by_side(audits: Mapping[str, Audit]) -> Table:
    """A table of what several retrievers find."""
    (first, *_) = audits.values()
    shown = shown_counts(first)
    table = Table("", "retriever", "questions", *(f"k={k}" for k in shown), title="Retrievers side by side")
    for field in ("plain", "supporting", "ideal"):
        for name, audit in audits.items():
            curve = getattr(audit, field)
            if curve is not None:
                rates = (f"{curve.rates[k - 1]:.3f}" for k in shown)
                table.add_row(CURVES[field][0], escape(name), str(curve.questions), *rates)
        table.add_section()
    return table


def shown_counts(audit: Audit) -> list[int]:
    """The numbers of passages for which rates are printed."""
    last = max((len(curve.rates) for name in CURVES if (curve := getattr(audit, name)) is not None), default=0)
    return sorted({k for k in (1, 2, 3, 5, 10, 20, audit.num_passages, last) if k <= last})


def report(audit: Audit, audits: Mapping[str, Audit] | None = None) -> None:
    """Print the audit, and the rates of all retrievers if there are several."""
    console = Console()
    if audits and len(audits) > 1:
        console.print(side_by_side(audits))
    curves = {name: curve for name in CURVES if (curve := getattr(audit, name)) is not None}
    if curves:
        shown = shown_counts(audit)
        table = Table("", "questions", *(f"k={k}" for k in shown), title="Found in the first k passages")
        for name, curve in curves.items():
            table.add_row(CURVES[name][0], str(curve.questions), *(f"{curve.rates[k - 1]:.3f}" for k in shown))
        console.print(table)
    table = Table(
        "",
        "questions",
        "share",
        "examples",
        title="Golden answers that cannot earn a turn reward, or that carry little information",
    )
    by_others = f"found by over {COMMON:.0%} of other searches"
    for reason, name in {**REASONS, "chance": by_others}.items():
        entry = audit.unusable[reason]
        examples = " | ".join(escape(short(example["gold"], 30)) for example in entry["examples"])
        table.add_row(name, str(entry["questions"]), f"{entry['share']:.1%}", examples)
    console.print(table)
    table = Table("always answering", "exact match", title="Constant answers")
    for answer, score in audit.constant_answers.items():
        table.add_row(escape(short(answer, 60)), f"{score:.3f}")
    console.print(table)
    for line in [*compare(audits or {}), *verdict(audit)]:
        console.print(Text(f"- {line}", style="yellow" if line.startswith("Warning") else ""))


def plot(audit: Audit, path: Path, title: str, others: Mapping[str, Audit] | None = None) -> None:
    """
    Draw the curves, those of the plain question for other retrievers, the golden answers that FOLR cannot use, and the constant
    answers.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.8), layout="constrained", width_ratios=(1, 0.85))
    k = audit.num_passages
    present = [(name, curve) for name in reversed(CURVES) if (curve := getattr(audit, name)) is not None]
    curves = [(*CURVES[name], curve.rates) for name, curve in present]
    for color, (name, other) in zip(cycle(OTHER_COLORS), (others or {}).items(), strict=False):
        if other.plain is not None:
            curves.append((f"plain question, {short(name, 28)}", color, other.plain.rates))
    height = -1.0
    for i, (name, color, rates) in enumerate(sorted(curves, key=lambda curve: curve[2][-1])):
        left.plot(range(1, len(rates) + 1), rates, color=color, linewidth=2.2, clip_on=False)
        left.plot(k, rates[k - 1], "o", color=color, markersize=7, markeredgecolor="white", clip_on=False)
        # Labels at the ends of the lines, pushed apart
        height = min(max(rates[-1], height + 0.06), 1 - 0.06 * (len(curves) - 1 - i))
        label = f"  {name} ({rates[k - 1]:.2f})"
        left.text(len(rates), height, label, color=color, va="center", parse_math=False)
        left.set_xlim(0, len(rates))
    left.set(title=f"Found in k passages (dots, numbers: k = {k})", ylim=(0, 1))
    left.set(xlabel="k: passages of a search", ylabel="share of questions (recall: of passages)")
    left.xaxis.get_major_locator().set_params(integer=True)

    constant = dict(list(audit.constant_answers.items())[:5])
    names = [*REASONS.values(), *(f"“{short(answer, 28)}”" for answer in constant)]
    rows = [*range(len(REASONS)), *(i + 0.5 for i in range(len(REASONS), len(names)))]
    shares = [*(audit.unusable[reason]["share"] for reason in REASONS), *constant.values()]
    bars = right.barh(rows, [100 * s for s in shares], color=["#e0a030"] * len(REASONS) + ["#8a8a8a"] * len(constant))
    right.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4)
    right.set_yticks(rows, names, parse_math=False)
    right.invert_yaxis()
    right.set(
        title="Golden answers that cannot earn a turn reward, and constant answers", xlabel="share of questions (%)"
    )
    right.set_xlim(0, max(5.0, 115 * max(shares)))
    labels = ("questions with such a golden answer", "exact match of this answer to all")
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "ncol": 2, "frameon": False, "fontsize": 9}
    right.legend([bars[0], bars[-1]], labels, **place)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, axis="y" if axis is left else "x")
        axis.set_axisbelow(True)
    figure.suptitle(title, fontsize=11, parse_math=False)
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])
    plt.close(figure)


def short(text: str, width: int) -> str:
    """The text in one line, cut to a maximum width."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def main(arguments: Sequence[str] | None = None) -> None:
    """Audit the questions and the retriever of a command line."""
    args = parse_arguments(arguments)
    check_output_dir(args.output_dir)
    for backend in args.retriever_backend:
        check_input_files(corpus=args.corpus, index=args.index, url=args.retriever_url, backend=backend)
    if args.dataset not in (DEMO, *BENCHMARKS):
        check_question_files([args.dataset])
    rows, passages = load_rows(args)
    sizes = {"top_k": args.top_k, "num_passages": args.num_passages, "max_searches": args.max_searches}
    audits = {
        name: summarize(rows, search_all(rows, found, args.top_k), **sizes)
        for name, found in open_all(args, passages).items()
    }
    name, *names = audits
    about = vars(args) | {"retriever_backend": " ".join(args.retriever_backend)}
    about["retriever_url"] = None if args.retriever_url is None else " ".join(args.retriever_url)
    audit = replace(audits[name], about=about)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = audit.to_dict()
    if names:
        content["retrievers"] = {
            name: {field: asdict(curve) for field in CURVES if (curve := getattr(found, field)) is not None}
            for name, found in audits.items()
        }
        content["comparison"] = compare(audits)
    replace_file(folder / "audit.json", json.dumps(content, indent=2, ensure_ascii=False))
    plot(
        audit,
        folder / "audit.png",
        f"Audit of {len(rows)} questions: {Path(args.dataset).name}",
        {name: audits[name] for name in names},
    )
    report(audit, audits)
    print(f"Written: {folder / 'audit.json'}, {folder / 'audit.png'}")
