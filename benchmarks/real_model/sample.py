"""Make the sample of HotpotQA: three sets of questions that share no entity, and the passages of their contexts.

    python -m benchmarks.real_model.sample --questions QUESTIONS.jsonl --passages PASSAGES.jsonl

QUESTIONS has `id`, `question`, `golden_answers`, `supporting_titles`, `supporting_ids`, `context_ids`, `type` and `level` (HotpotQA
in the distractor setting), PASSAGES has `id`, `title` and `text`. The sample is written to `hotpotqa/` beside this file.

Two questions share an entity if they have a supporting title or a golden answer in common, the words in brackets of a title left
out. Yes and no are no entities. Questions that are connected by shared entities are always in the same set.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tspo_trl.credit import eligible_golds
from tspo_trl.scoring import normalize_answer

FOLDER = Path(__file__).parent / "hotpotqa"
SIZES = {"cold_start": 240, "train": 240, "heldout": 300}
COLUMNS = ("id", "question", "golden_answers", "supporting_titles", "supporting_ids", "type", "level")
PASSAGES = "passages.jsonl.gz"
_IN_BRACKETS = re.compile(r"\s*\([^()]*\)$")


def entities(row: Mapping[str, Any]) -> set[str]:
    """
    The entities of a question: its supporting titles and its golden answers, normalised.

    Args:
        row (`Mapping`):
            A row with `supporting_titles` and `golden_answers`.
    """
    titles = [_IN_BRACKETS.sub("", title) for title in row["supporting_titles"]]
    names = {normalize_answer(name) for name in (*titles, *eligible_golds(row["golden_answers"]))}
    return names - {""}


def components(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """
    Group questions so that no two groups share an entity.

    Args:
        rows (`Sequence[Mapping]`):
            N rows.

    Returns:
        `list[list[int]]`: Numbers of rows, each in one group, in the order of their first rows.
    """
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        for name in sorted(entities(row)):
            low, high = sorted((root(i), root(first.setdefault(name, i))))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def split(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[int]]:
    """
    Draw sets of questions that share no entity.

    Args:
        rows (`Sequence[Mapping]`):
            N rows.
        sizes (`Mapping[str, int]`):
            The size of each set.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Returns:
        `dict[str, list[int]]`: The sorted numbers of the rows of each set.

    Raises:
        `ValueError`: If there are too few questions for these sizes.
    """
    groups = components(rows)
    random.Random(seed).shuffle(groups)
    sets: dict[str, list[int]] = {name: [] for name in sizes}
    for group in sorted(groups, key=len, reverse=True):  # large groups first, because small ones fill any gap
        room = {name: sizes[name] - len(chosen) for name, chosen in sets.items()}
        name = max(room, key=lambda name: room[name])
        if len(group) <= room[name]:
            sets[name] += group
    if missing := {name: sizes[name] - len(chosen) for name, chosen in sets.items() if len(chosen) < sizes[name]}:
        raise ValueError(f"{len(rows)} questions do not fill the sets {dict(sizes)}: {missing} are missing.")
    return {name: sorted(chosen) for name, chosen in sets.items()}


def write(
    folder: Path, rows: Sequence[Mapping[str, Any]], passages: Sequence[Mapping[str, Any]], seed: int = 0
) -> None:
    """
    Write the sets of questions, and the passages of their contexts.

    Args:
        folder (`Path`):
            The folder.
        rows (`Sequence[Mapping]`):
            Questions, with `context_ids`.
        passages (`Sequence[Mapping]`):
            Passages with `id`, `title` and `text`.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sets = split(rows, SIZES, seed)
    for name, chosen in sets.items():
        text = _lines({column: rows[i][column] for column in COLUMNS} for i in chosen)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    wanted = {key for chosen in sets.values() for i in chosen for key in rows[i]["context_ids"]}
    kept = [{key: passage[key] for key in ("id", "title", "text")} for passage in passages if passage["id"] in wanted]
    if missing := wanted - {passage["id"] for passage in kept}:
        raise ValueError(f"{len(missing)} passages of the contexts are missing, for instance {sorted(missing)[0]!r}.")
    with (folder / PASSAGES).open("wb") as file, gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
        packed.write(_lines(kept).encode())  # without a time, so that the same sample has the same bytes


def read(file: str | Path) -> list[dict[str, Any]]:
    """
    Read a JSONL file.

    Args:
        file (`str` or `Path`):
            The file.
    """
    with Path(file).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the sample from the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, nargs="+", metavar="FILE", help="JSONL files of questions")
    parser.add_argument("--passages", required=True, nargs="+", metavar="FILE", help="JSONL files of passages")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder to write (default: beside this file)")
    args = parser.parse_args(arguments)
    rows = [row for file in args.questions for row in read(file)]
    passages = {passage["id"]: passage for file in args.passages for passage in read(file)}
    write(args.folder, rows, list(passages.values()))
    for name, size in SIZES.items():
        print(f"{name}: {size} questions")


if __name__ == "__main__":
    main()
