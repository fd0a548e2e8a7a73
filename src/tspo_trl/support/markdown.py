"""Markdown tables whose columns are also aligned in plain text."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1) -> str:
    """
    Write a Markdown table.

    Args:
        header (`Sequence[str]`):
            C column titles.
        rows (`Iterable[Sequence[object]]`):
            Rows of C cells.
        left (`int`, *optional*, defaults to `1`):
            Number of left-aligned columns; the others are right-aligned.

    Returns:
        `str`: The table, without a newline at its end.
    """
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in aligned)
