"""A Markdown table: what scorecards, comparisons and study reports are made of."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], num_left: int | None = None) -> str:
    """Lines of a table; bars and line breaks in cells are made harmless.

    Args:
        head: names of the columns.
        rows: cells, as many in each row as there are columns.
        num_left: columns at the left that are text; those after them are aligned to the right. None: all are text.
    """

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    num_text = len(head) if num_left is None else num_left
    rule = ["---"] * num_text + ["---:"] * (len(head) - num_text)
    return "\n".join([line(head), line(rule), *map(line, rows)])
