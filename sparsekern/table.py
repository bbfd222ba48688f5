"""Rows of words as a plain aligned table."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """Align the columns, those of text to the left and those with numbers to the right."""
    texts = [[_text(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in texts
    )


def _text(cell: str | int | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4f}"
