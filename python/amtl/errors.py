"""The error a user can do something about."""

from __future__ import annotations

from collections.abc import Sequence

INTO_ONE = (
    "write several files into one, of CSV by python -c 'import polars as pl; "
    'pl.read_csv("FOLDER/*.csv").write_parquet("all.parquet")\''
)
"""What to do with several files, of which commands take one."""


class UserError(ValueError):
    """A mistake in what the user asked for; the message says what to do next.

    The command line prints the message without a traceback.
    """


def brief(value: object, most: int = 60) -> str:
    """A value as text for a message, cut short."""
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def together(names: Sequence[str]) -> str:
    """Tables by name, for one message however many they are: the first three, and how many more."""
    return f"table{'s' if len(names) > 1 else ''} {listed(list(map(repr, names)), 3)}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first of these names in a line, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
