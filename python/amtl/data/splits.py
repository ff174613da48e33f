"""Training, validation and test rows."""

from __future__ import annotations

import polars as pl
import torch
from torch import Tensor

from amtl.errors import UserError


def split_rows(frame: pl.DataFrame, how: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of the training, validation and test parts: 80, 10 and 10 %.

    Args:
        frame: the data.
        how: `"random"` (shuffled by `seed`) or `"order:COLUMN"` (the first 80 % in ascending order
            of that column train, the last 10 % test; ties stay in file order).
        seed: of the random split.

    Returns:
        Three int64 tensors.

    Raises:
        UserError: for another `how`, an unknown column, or fewer than ten rows.
    """
    n = frame.height
    if n < 10:
        raise UserError(f"the data has {n} rows; a train/validation/test split needs at least 10")
    if how == "random":
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    elif how.startswith("order:"):
        column = how.removeprefix("order:")
        if column not in frame.columns:
            raise UserError(
                f"--split {how}: there is no column {column!r}; "
                f"columns are {', '.join(frame.columns)}"
            )
        keys = frame[column].to_frame().with_row_index("row")
        ordered = keys.sort(column, maintain_order=True)["row"]
        order = torch.from_numpy(ordered.to_numpy().astype("int64"))
    else:
        raise UserError(f"--split must be 'random' or 'order:COLUMN', not {how!r}")
    first, second = n * 8 // 10, n * 9 // 10
    return order[:first], order[first:second], order[second:]
