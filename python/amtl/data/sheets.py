"""Sheets of Excel and its like, by `fastexcel`, which is an extra."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from amtl.data.text import contents_of, titles, with_gaps, without_titles
from amtl.errors import UserError, brief, listed

_ROWS = 20
"""What tells the names of the columns from titles above them."""

SUFFIXES = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")


def read(
    source: Path | io.BytesIO, where: str
) -> tuple[pl.DataFrame, tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The first visible sheet that holds anything; its first row but for titles names the columns.

    All rows say what a column holds, the first thousand alone would lose what comes later. A sheet
    knows no integers and no dates: these are numbers that are whole and times that are midnights.
    What stands for missing numbers is as in files of text. Rows without anything are none.

    Args:
        source: the file, or its contents.
        where: its name, for messages.

    Returns:
        The table, notes on what was guessed (which sheet was taken, where others hold something
        too, and columns without a name, which are `c` and their position, from 0), and column to
        the unusual texts that were taken as missing numbers in it.

    Raises:
        UserError: `fastexcel` is not there, the file is none that it reads, no sheet holds
            anything, or two columns have one name; the message says what to do.
    """
    try:
        import fastexcel
    except ImportError as error:
        raise UserError(
            f"{where!r} is a spreadsheet, which needs fastexcel: pip install fastexcel; or save "
            "the sheet as CSV"
        ) from error
    try:
        book = fastexcel.read_excel(contents_of(source))
        tops = {name: rows for name in book.sheet_names if (rows := _first_rows(book, name))}
        visible = [name for name in tops if book.load_sheet(name, n_rows=0).visible == "visible"]
        if not tops:
            raise UserError(f"{where!r} is empty")
        taken = (visible or list(tops))[0]
        above = titles(tops[taken])
        before, head = tops[taken][:above], tops[taken][above]
        # Names of its own: where two are alike, it would number them.
        names = [str(i) for i in range(len(head))]
        sheet = book.load_sheet(
            taken, header_row=None, skip_rows=above + 1, column_names=names, schema_sample_rows=None
        )
        frame = sheet.to_polars()
    except fastexcel.FastExcelError as error:
        raise UserError(f"cannot read {where!r}: {brief(str(error).splitlines()[0])}") from error
    notes: list[str] = []
    if others := [name for name in visible if name != taken]:
        notes.append(
            f"the sheet {brief(repr(taken))} is read; save another as a file of its own: "
            f"{listed(others)}"
        )
    if above:
        notes.append(without_titles(before))
    named = [name or f"c{i}" for i, name in enumerate(head)]
    if twice := [name for name, times in Counter(named).items() if times > 1]:
        shown = ", ".join(map(repr, twice))
        raise UserError(f"the first row of {where!r} names {shown} more than once; rename one")
    frame.columns = named
    if unnamed := [name for name, said in zip(named, head, strict=True) if not said]:
        notes.append(f"columns without a name: {listed(unnamed)}")
    frame = frame.filter(~pl.all_horizontal(pl.all().is_null()))
    frame, marks = with_gaps(frame.with_columns(map(_whole, frame.get_columns())), False, notes)
    return frame, tuple(notes), marks


def _first_rows(book: Any, name: str) -> list[list[str]]:
    """The first rows of a sheet as text, empty where a cell is; none of an empty sheet."""
    frame = book.load_sheet(name, header_row=None, n_rows=_ROWS, dtypes="string").to_polars()
    return [[cell or "" for cell in row] for row in frame.rows()]


def _whole(column: pl.Series) -> pl.Series:
    """Integers for whole numbers that floats hold exactly, dates for midnights."""
    if column.null_count() == len(column):
        return column
    if column.dtype == pl.Datetime:
        return column.dt.date() if (column.dt.date() == column).all() else column
    if column.dtype != pl.Float64:
        return column
    exact = (column == column.floor()) & (column.abs() < 2**53)
    return column.cast(pl.Int64) if exact.all() else column
