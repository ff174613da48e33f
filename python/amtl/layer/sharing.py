"""Shared rows: rows of size 0 store nothing and are looked up as one row of their field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from amtl.layer.budget import SizeGrid
from amtl.layer.frequency import FrequencyGroups
from amtl.layer.options import SearchOptions

SharedRows = Sequence[int] | str | None


def resolve_shared_rows(
    shared_rows: SharedRows, counts: Tensor, field_sizes: Sequence[int], padding: Sequence[int]
) -> list[int] | None:
    """The shared row of each field, or None if rows of size 0 are to give zeros.

    Args:
        shared_rows: a row number for each field; "rarest" for the row of least count, ties to the
            last one; None or "zero" for zeros.
        counts: int64 [N].
        field_sizes: rows per field.
        padding: rows that are never shared.

    Raises:
        ValueError: anything else.
    """
    if shared_rows is None or shared_rows == "zero" or not len(counts):
        return None
    starts = torch.tensor([0, *field_sizes]).cumsum(0).tolist()
    if shared_rows == "rarest":
        if padding:
            counts = counts.clone()
            counts[list(padding)] = torch.iinfo(torch.int64).max
        parts = zip(starts[1:], counts.split(list(field_sizes)), strict=True)
        return [end - 1 - int(part.flip(0).argmin()) for end, part in parts]
    if isinstance(shared_rows, str) or len(shared_rows) != len(field_sizes):
        raise ValueError(
            f"shared_rows must be a row for each of {len(field_sizes)} fields, 'rarest', 'zero' or "
            f"None, got {shared_rows!r}"
        )
    rows = [int(row) for row in shared_rows]
    for field, row in enumerate(rows):
        if not starts[field] <= row < starts[field + 1] or row in padding:
            raise ValueError(
                f"shared_rows[{field}]={row} must be a row of its field, "
                f"{starts[field]}..{starts[field + 1] - 1}, and not the padding row"
            )
    return rows


def groups_that_share(
    counts: Tensor,
    field_sizes: Sequence[int],
    row_features: Tensor | None,
    shared_rows: Sequence[int] | None,
    padding: Sequence[int],
    options: SearchOptions,
    grid: SizeGrid,
) -> FrequencyGroups:
    """Frequency groups in which a shared row counts the lookups that land on it.

    Rows that the rule gives nothing send their lookups to the shared row, which deserves a size for
    them; `padding` rows do not. So the rule is asked twice: who gets nothing, and then with the
    counts of those added.
    """
    groups = options.groups(counts, field_sizes, row_features)
    if shared_rows is None or grid.sizes[0] > 0 or options.parametrization == "free":
        return groups
    rule = replace(options, parametrization="rule").head(groups, grid)
    nothing = rule.sizes()[groups.row_group] == 0
    shared = torch.tensor(shared_rows, device=counts.device)
    nothing[shared] = False
    nothing[list(padding)] = False
    fields = torch.arange(len(field_sizes)).repeat_interleave(torch.tensor(field_sizes))
    landing = counts.clone()
    landing.index_add_(0, shared[fields.to(counts.device)[nothing]], counts[nothing])
    return options.groups(landing, field_sizes, row_features)


def implied_order(num_rows: int, padding: int, others: Sequence[int]) -> Tensor:
    """The place of each row where rows stay as they are, but padding rows are one, int32 [N].

    Args:
        num_rows: N.
        padding: the padding row that has a place.
        others: those that are looked up there.
    """
    own = torch.ones(num_rows, dtype=torch.int32)
    own[list(others)] = 0
    places = own.cumsum(0, dtype=torch.int32) - 1
    places[list(others)] = places[padding].clone()
    return places


def own_rows(row_order: Tensor, shared_rows: Tensor | None, places: int) -> Tensor:
    """The row that each place holds, int64 [places]: of the rows sent there, the one that owns it.

    Args:
        row_order: int32 [N], place of each row; rows of size 0 have that of their shared row.
        shared_rows: int64 [F], or None if every row has a place of its own.
        places: number of places.
    """
    rows = torch.arange(len(row_order), device=row_order.device)
    order = torch.empty(places, dtype=torch.int64, device=row_order.device)
    order[row_order] = rows
    if shared_rows is not None:
        order[row_order[shared_rows]] = shared_rows
    return order


def version_of(tensor: Tensor | None) -> int:
    """Counts writes to a tensor in place; 0 of none, and of one that inference mode has made."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def require_places(row_order: Tensor, places: int, name: str) -> None:
    """Raises RuntimeError unless rows are sent to all the places there are, and to no others. O(N).

    Args:
        row_order: int32 [N], place of each row.
        places: number of places.
        name: of the table.
    """
    if not len(row_order):
        return
    hit = torch.zeros(places, dtype=torch.bool, device=row_order.device)
    hit[row_order.clamp(0, places - 1)] = True
    outside = int(row_order.min()) < 0 or int(row_order.max()) >= places
    if outside or not bool(hit.all()):
        raise RuntimeError(
            f"the places of rows in table {name!r} are no longer what freeze() made them: "
            "something averaged integer buffers, as AveragedModel(use_buffers=True) does. Without "
            "use_buffers it averages parameters, and buffers follow the model"
        )
