"""Markdown tables, in one place: whatever a cell holds stays in one line and within its cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table of a header and its rows."""
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(in_cell(cell) for cell in line)} |" for line in lines)


def in_cell(text: Any) -> str:
    """In one line, and within its cell."""
    return " ".join(str(text).split()).replace("|", "\\|")
