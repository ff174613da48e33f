"""Tables of results on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from amtl.run import comparison
from amtl.run.report import Result, table_rows


def print_results(console: Console, results: Sequence[Result]) -> None:
    """Runs side by side, seeds averaged."""
    header, rows = table_rows(results)
    table = _table(header)
    for result, row in zip(results, rows, strict=True):
        table.add_row(*map(escape, row), style="bold" if result.method == "amtl" else "")
    console.print(table)


def print_comparison(console: Console, metrics: dict[str, Any]) -> None:
    """A run beside a table of full size and one of fixed width in the same bytes."""
    header, rows = comparison.table(metrics)
    if len(rows) > 1:
        table = _table(header)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == comparison.THIS else "")
        console.print(table)
    for told in comparison.verdict(metrics):
        console.print(f"  {told}", style="yellow", highlight=False)


def _table(header: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for i, name in enumerate(header):
        # In two lines, and names in two where need be, for all numbers to fit into 80 characters.
        title = name.replace(", ", "\n").replace("log loss", "log\nloss")
        table.add_column(title, justify="right" if i else "left", no_wrap=i > 0)
    return table
