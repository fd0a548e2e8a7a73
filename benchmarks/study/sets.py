"""The sets of cells that are run and published together. Arms are compared within a set only."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from .arms import ARMS, DEFAULT, GRPO, TSPO
from .cells import Cell, Scale, write_result
from .regimes import ALL_REGIMES, REGIMES, SWEEP

RESULTS = Path(__file__).parent / "results"
FIRST_REGIMES = tuple(REGIMES)[:5]  # those of the published variants, and of the small study
MAIN_ARMS = (GRPO, TSPO, DEFAULT)
OPTIONS = ("merged", "turn", "up_to_first", "group", "strict", "no_guard")  # arms that are made with options
OTHER_CREDITS = ("modulated", "utility", "graded", "igpo", "evidence", "two_segment")
#: One regime for each case: turn rewards help, help little, mislead.
CASES = ("weak", "weak_answers", "misleading")


@dataclass(frozen=True)
class StudySet:
    """
    What is run for a set, unless the command line says otherwise.

    Args:
        title (`str`):
            What the set shows.
        seeds (`dict[str, int]`):
            Keys of `ALL_REGIMES`, and the number of seeds of each.
        arms (`tuple[str, ...]`):
            Keys of `ARMS`.
        steps (`float`, *optional*, defaults to `1.0`):
            Fraction of each regime's steps.
        published (`bool`, *optional*, defaults to `True`):
            Whether the repository has its results.
    """

    title: str
    seeds: dict[str, int]
    arms: tuple[str, ...]
    steps: float = 1.0
    published: bool = True


SETS = {
    "small": StudySet("a small study", dict.fromkeys(FIRST_REGIMES, 2), MAIN_ARMS, 0.5, published=False),
    # More seeds where ten do not decide whether the default is behind GRPO
    "defaults": StudySet(
        "the default against GRPO and TSPO as published",
        dict.fromkeys(REGIMES, 10) | {"weak_answers": 20, "misleading": 20},
        MAIN_ARMS,
    ),
    "credits": StudySet("the default against other credits", dict.fromkeys(CASES, 5), (*MAIN_ARMS, *OTHER_CREDITS)),
    "variants": StudySet("options of the credit", dict.fromkeys(FIRST_REGIMES, 5), (*MAIN_ARMS, *OPTIONS)),
    "sweep": StudySet("the sweep of chance", dict.fromkeys(SWEEP, 10), MAIN_ARMS),
}
PUBLISHED = tuple(name for name, of_set in SETS.items() if of_set.published)


def plan(seeds: Mapping[str, int], arms: Iterable[str]) -> list[Cell]:
    """
    Return the cells to run, sorted by seed, so that a stopped study is a study with fewer seeds.

    Args:
        seeds (`Mapping[str, int]`):
            Number of seeds, by regime.
        arms (`Iterable[str]`):
            Keys of `ARMS`.
    """
    arms = list(arms)
    return [
        Cell(regime, arm, seed)
        for seed in range(max(seeds.values(), default=0))
        for regime in seeds
        if seed < seeds[regime]
        for arm in arms
        if ARMS[arm].regimes is None or regime in ARMS[arm].regimes
    ]


def complete(cells: Sequence[dict[str, Any]], planned: Sequence[Cell]) -> list[dict[str, Any]]:
    """
    Return the results of a plan that may not be finished: of each regime, the seeds that all planned arms have.

    Args:
        cells (`Sequence[dict]`):
            Results. Those of other cells are left out.
        planned (`Sequence[Cell]`):
            The plan, see [`plan`].
    """
    by_cell = {key_of(cell): cell for cell in cells}
    kept: list[dict[str, Any]] = []
    for _, group in groupby(planned, key=lambda cell: (cell.regime, cell.seed)):
        found = [by_cell.get(key_of(asdict(cell))) for cell in group]
        if None not in found:
            kept += [cell for cell in found if cell]
    return kept


def key_of(cell: dict[str, Any]) -> tuple[str, str, int]:
    """Return the regime, the arm and the seed of a cell."""
    return cell["regime"], cell["arm"], cell["seed"]


def check_pairs(cells: Iterable[dict[str, Any]]) -> None:
    """Raise an error unless all arms of a regime and a seed ran on one kind of machine with one version of the packages."""
    first: dict[tuple[str, int], dict[str, Any]] = {}
    for cell in cells:
        other = first.setdefault((cell["regime"], cell["seed"]), cell)
        mine, theirs = _origin(cell), _origin(other)
        different = [name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name]]
        if different:
            raise SystemExit(
                f"{cell['regime']}, seed {cell['seed']}: the arm {cell['arm']} ran with {mine}, but {other['arm']} with "
                f"{theirs}. Arms are compared seed by seed, on one machine: remove the results of one and run them again."
            )


def _origin(cell: dict[str, Any]) -> dict[str, Any]:
    """The machine and the versions of a cell. The digest of the source is left out, because it changes with every comment."""
    facts = cell["machine"] | cell["versions"]
    return {name: value for name, value in facts.items() if name not in ("threads", "source")}


def read_set(name: str) -> list[dict[str, Any]]:
    """Read the published results of a set: one file per regime, with one line per cell. There may be none."""
    return [
        json.loads(line)
        for path in sorted((RESULTS / name).glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def write_set(name: str, cells: Sequence[dict[str, Any]]) -> None:
    """Replace the published results of a set."""
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for regime in ALL_REGIMES:
        lines = [json.dumps(cell) + "\n" for cell in cells if cell["regime"] == regime]
        path = folder / f"{regime}.jsonl"
        if lines:
            path.write_text("".join(lines), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)


def read_folder(folder: Path) -> list[dict[str, Any]]:
    """Read the results of all cells in a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("cells/*/*.json"))]


def is_done(cell: Cell, scale: Scale, folder: Path) -> bool:
    """Return whether a cell has results. Raise an error if they were made with another scale."""
    path = cell.path(folder)
    if not path.exists():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))["scale"]
    if found != asdict(scale):
        raise SystemExit(f"{path} was made with {found}, but this study uses {asdict(scale)}. Use another `--folder`.")
    return True


def take_published(cells: Sequence[dict[str, Any]], planned: Sequence[Cell], scale: Scale, folder: Path) -> int:
    """
    Fill a folder with published results, so that a study goes on where another machine stopped. A regime and a seed are taken
    only if all planned arms are published and the folder has none of them: arms are compared on one machine.

    Args:
        cells (`Sequence[dict]`):
            The published results.
        planned (`Sequence[Cell]`):
            The cells of the study.
        scale ([`Scale`]):
            The size of the cells. Published results of another size are an error.
        folder (`Path`):
            The folder of the study.

    Returns:
        `int`: Number of cells that were taken.
    """
    if other := [cell["scale"] for cell in cells if cell["scale"] != asdict(scale)]:
        raise SystemExit(f"The published results were made with {other[0]}, but this study uses {asdict(scale)}.")
    published = {key_of(cell): cell for cell in cells}
    taken = 0
    for regime, seed in dict.fromkeys((cell.regime, cell.seed) for cell in planned):
        arms = [cell for cell in planned if (cell.regime, cell.seed) == (regime, seed)]
        results = [published.get(key_of(asdict(cell))) for cell in arms]
        if all(results) and not any(cell.path(folder).exists() for cell in arms):
            for cell, result in zip(arms, results, strict=True):
                write_result(result, cell.path(folder))
            taken += len(arms)
    return taken
