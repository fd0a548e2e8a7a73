"""Write a set to files: its tables, its pictures, and its blocks in the documentation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import sweep
from .pictures import draw_curves, draw_differences
from .report import Results, arrange, claims, markdown, origin
from .sets import read_set

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "study.md"
END = "<!-- end -->\n"
CHOICE = "defaults"  # the set by which the default is chosen
EMPTY = "The repository has no results of this set.\n"


def begin(name: str, program: str = "study") -> str:
    """Return the mark before a block. It names the command that prints the block."""
    return f"<!-- begin: {name}, printed by python -m benchmarks.{program} --report -->\n"


def pictures(results: Results) -> dict[str, tuple[str, Callable[[Results, Path], None]]]:
    """Return the pictures of some results: for the name of each file, its description and the function that draws it."""
    if sweep.is_sweep(results):
        return {"sweep": ("Minus GRPO, against the share of passages that name other answers", sweep.draw_sweep)}
    return {
        "curves": ("Exact match and found answers against steps, in every regime", draw_curves),
        "differences": ("Every arm minus GRPO, in every regime", draw_differences),
    }


def tables(results: Results, *, chosen: bool = True) -> str:
    """Format the tables of some results; with the answer about the default if `chosen`, and if it was run."""
    return sweep.markdown(results) if sweep.is_sweep(results) else markdown(results, chosen=chosen)


def image(name: str, picture: str) -> str:
    """Return the path of a picture of a set, relative to the documentation."""
    return f"images/study_{name}_{picture}.png"


def blocks(name: str, cells: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Format the blocks of a set: its pictures and its tables, and of the defaults the answer."""
    results = arrange(cells)
    shown = [f"![{text}]({image(name, picture)})" for picture, (text, _) in pictures(results).items()]
    found = {name: "\n\n".join([*shown, tables(results, chosen=name == CHOICE)]) if cells else EMPTY}
    if name == CHOICE:
        answer = claims(results)
        found["answer"] = f"{answer}\n\n{origin(results)}\n" if answer else EMPTY
    return found


def insert(page: str, name: str, text: str, program: str = "study") -> str:
    """Replace a block of a documentation page, which a program of the benchmarks prints."""
    before, mark, rest = page.partition(begin(name, program))
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"The page has no block between {begin(name, program)!r} and {END!r}.")
    return f"{before}{mark}\n{text}\n{end}{after}"


def publish(name: str) -> None:
    """Write the published results of a set to the documentation: its blocks, and its pictures."""
    cells = read_set(name)
    page = PAGE.read_text(encoding="utf-8")
    for mark, text in blocks(name, cells).items():
        page = insert(page, mark, text)
    PAGE.write_text(page, encoding="utf-8")
    if cells:
        results = arrange(cells)
        for picture, (_, draw) in pictures(results).items():
            draw(results, DOCS / image(name, picture))


def write_report(cells: Sequence[dict[str, Any]], folder: Path) -> str:
    """Write tables and pictures of some results to a folder, and return the tables."""
    results = arrange(cells)
    text = tables(results)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    for picture, (_, draw) in pictures(results).items():
        draw(results, folder / f"{picture}.png")
    return text
