"""Training, validation and test rows."""

from __future__ import annotations

from collections.abc import Iterable

import polars as pl
import torch
from torch import Tensor

from amtl.errors import UserError

_NAMES = (
    ("train", "training", "trn", "tr"),
    ("valid", "validation", "val", "dev", "va"),
    ("test", "testing", "tst", "te"),
)
"""What parts are called in a column that says where each row belongs, in any case."""


def split_column(how: str) -> str | None:
    """The column that a split goes by, which is no field."""
    kind, colon, column = how.partition(":")
    return column if colon and kind in ("order", "column") else None


def part_of(value: object) -> int | None:
    """0, 1 or 2 for a name of the training, validation or test part; None for anything else."""
    name = str(value).strip().lower()
    return next((part for part, names in enumerate(_NAMES) if name in names), None)


def names_parts(values: Iterable[object]) -> bool:
    """Whether these name parts, training and test among them, and nothing else."""
    parts = set(map(part_of, values))
    return None not in parts and {0, 2} <= parts


def split_rows(frame: pl.DataFrame, how: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the training, validation and test parts.

    Args:
        frame: the data.
        how: `"random"` (80, 10 and 10 %, shuffled by `seed`), `"order:COLUMN"` (the first 80 % in
            ascending order of that column train, the last 10 % test; ties stay in file order) or
            `"column:COLUMN"` (it names the part of each row: train, valid, test; without valid a
            tenth of the training rows, drawn by `seed`, validates).
        seed: of what is drawn.

    Returns:
        Three int64 tensors.

    Raises:
        UserError: for another `how`, an unknown column or part, or fewer than ten rows.
    """
    n = frame.height
    if n < 10:
        raise UserError(f"the data has {n} rows; a train/validation/test split needs at least 10")
    column = split_column(how)
    if column is not None and column not in frame.columns:
        raise UserError(
            f"--split {how}: there is no column {column!r}; columns are {', '.join(frame.columns)}"
        )
    if how == "random":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    elif column is None:
        raise UserError(f"--split must be 'random', 'order:COLUMN' or 'column:COLUMN', not {how!r}")
    elif how.startswith("column:"):
        return _named_parts(frame[column], how, seed)
    else:
        keys = frame[column].to_frame().with_row_index("row")
        ordered = keys.sort(column, maintain_order=True)["row"]
        order = torch.from_numpy(ordered.to_numpy().astype("int64"))
    first, second = n * 8 // 10, n * 9 // 10
    return order[:first], order[first:second], order[second:]


def _named_parts(column: pl.Series, how: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    values = column.unique(maintain_order=True).to_list()
    if not names_parts(values):
        shown = ", ".join(map(repr, values[:5])) + (", ..." if len(values) > 5 else "")
        raise UserError(
            f"--split {how}: it has to say train, valid or test of each row (valid may be missing, "
            f"then a tenth of train validates), and holds {shown}"
        )
    parts = {value: part_of(value) for value in values}
    part = column.replace_strict(parts, return_dtype=pl.Int8).to_numpy()
    train, val, test = (torch.from_numpy((part == p).nonzero()[0]) for p in range(3))
    if not len(val):
        drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        tenth = max(1, len(train) // 10)
        val, train = train[drawn[:tenth]].sort().values, train[drawn[tenth:]].sort().values
    return train, val, test
