"""A table of the page as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table: text, small print below it, and the class of the text."""

    text: str = ""
    small: str = ""
    style: str = ""


class Line(NamedTuple):
    """A row of a table; without cells, its title spans the table."""

    title: Cell
    cells: Sequence[Cell] = ()
    style: str = ""


class Table(NamedTuple):
    """A table: its class, its headings (the first one over the titles), and lines by group."""

    kind: str
    heads: Sequence[Cell]
    groups: Sequence[Sequence[Line]]
