"""Frequency groups: the rows of one field that share a training count share one size.

The size of row `i` depends on its frequency vector `s_i` only, and `s_i` on the count `q_i` and the
field only. So the twins are evaluated once per distinct (field, count), `G` times, instead of once
per row, `N` times. This is exact: the grouped evaluation equals the per-row one. Where sizes are
learned, counts are first rounded (`rounded_counts`), so that `G` grows with the logarithm of the
largest count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIGNIFICANT_BITS = 6
"""Of the counts that learned sizes depend on."""

_COUNTS_HELP = (
    "counts must hold one training count per row: "
    "torch.bincount(training_indices.flatten(), minlength=num_embeddings)"
)


@dataclass(frozen=True)
class FrequencyGroups:
    """Groups of rows with equal (field, count), ordered by field, then by falling count.

    Attributes:
        row_group: int32 [N], group of each row.
        counts: int64 [G], training count shared by the rows of a group.
        fields: int64 [G], field of a group.
        num_fields: number of fields F.
        extra: float32 [G, E], further features of a group, or None.
    """

    row_group: Tensor
    counts: Tensor
    fields: Tensor
    num_fields: int
    extra: Tensor | None = None

    @property
    def num_groups(self) -> int:
        """Number of groups G."""
        return self.counts.numel()

    def rows_per_group(self) -> Tensor:
        """Number of rows of each group, int64 [G]. O(N)."""
        return torch.bincount(self.row_group, minlength=self.num_groups)


def check_counts(counts: object, num_rows: int | None = None, grows: bool = False) -> Tensor:
    """Return `counts` as an int64 [N] tensor, or say what is wrong with it.

    Args:
        counts: [N], integers (or floats that hold integers), not negative. Or what says which row
            each is of, in any order: a mapping of row numbers to counts, a pandas Series with row
            numbers for an index, as by `value_counts()`. Rows left out count 0.
        num_rows: the N expected, if known.
        grows: there may be more than those.

    Raises:
        ValueError: missing, of another shape, negative or not whole numbers; rows that are none.
    """
    if counts is None:
        raise ValueError(_COUNTS_HELP)
    rows, values = _rows_of(counts)
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"counts cannot be read as numbers ({error}). {_COUNTS_HELP}") from error
    if grows and num_rows is not None:
        last = [row for row in rows or () if isinstance(row, int)]
        num_rows = max(num_rows, 1 + max(last, default=-1), len(tensor) if tensor.ndim else 0)
    if rows is not None:
        tensor = _by_row(tensor, rows, num_rows)
    if tensor.ndim != 1 or (num_rows is not None and tensor.numel() != num_rows):
        expected = "[N]" if num_rows is None else f"[{num_rows}]"
        raise ValueError(
            f"counts must have shape {expected}, got {list(tensor.shape)}. {_COUNTS_HELP}"
        )
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"counts must be integers, got {tensor.dtype}. {_COUNTS_HELP}")
    whole = not tensor.is_floating_point() or bool(
        (torch.isfinite(tensor) & (tensor == tensor.round())).all()
    )
    if not whole:
        raise ValueError(f"counts must be whole numbers. {_COUNTS_HELP}")
    tensor = tensor.to(torch.int64)
    if tensor.numel() and int(tensor.min()) < 0:
        raise ValueError(f"counts must not be negative, got {int(tensor.min())}. {_COUNTS_HELP}")
    return tensor


def _rows_of(counts: Any) -> tuple[list[Any] | None, Any]:
    """The rows that counts name, None if they do not, and their values."""
    if isinstance(counts, Mapping):
        return list(counts), list(counts.values())
    index = getattr(counts, "index", None)
    # A list has a method of that name.
    if index is None or callable(index) or not hasattr(counts, "tolist"):
        return None, counts
    # One that only counts from 0 on names nothing.
    plain = getattr(index, "start", None) == 0 and getattr(index, "step", None) == 1
    return None if plain else index.tolist(), counts.tolist()


def _by_row(values: Tensor, rows: list[Any], num_rows: int | None) -> Tensor:
    """Counts of these rows as those of all."""
    try:
        named = torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        named = torch.tensor(False)
    total = len(rows) if num_rows is None else num_rows
    numbers = named.dim() == 1 and named.dtype != torch.bool and not named.is_complex()
    if not numbers or bool(((named != named.round()) | (named < 0) | (named >= total)).any()):
        raise ValueError(
            f"counts go by the row numbers 0..{total - 1} of the table, these by other keys, such "
            f"as {rows[:3]!r:.60}: give them without these (list(counts.values()), Series.tolist())"
            f" if they are in the order of the rows. {_COUNTS_HELP}"
        )
    where = named.to(torch.int64)
    if len(where.unique()) < len(where):
        raise ValueError(f"counts name a row more than once. {_COUNTS_HELP}")
    return values.new_zeros(total).index_copy_(0, where, values)


def check_field_sizes(field_sizes: Sequence[int] | None, num_rows: int) -> list[int]:
    """Return the rows per field as a list that sums to `num_rows`; one field when None.

    Raises:
        ValueError: an entry is not a positive integer, or the sum is not `num_rows`.
    """
    if field_sizes is None:
        return [num_rows]
    sizes = [int(size) for size in field_sizes]
    if num_rows and any(size < 1 for size in sizes):
        raise ValueError(f"every field needs at least one row, got field_sizes={sizes}")
    if sum(sizes) != num_rows:
        raise ValueError(
            f"field_sizes sum to {sum(sizes)} rows, but the table has {num_rows}: {sizes}"
        )
    return sizes


def rounded_counts(counts: Tensor) -> Tensor:
    """Counts to `SIGNIFICANT_BITS`: below 64 as they are, above to 1.6 %.

    What twins read, logarithms and ranks, hardly tells 1,000 from 1,010, and masks, gradients and
    noise of a head are made for each group: 2M rows by Zipf's law have 4,978 counts, and 468 so.

    Args:
        counts: int64, >= 0.
    """
    bits = torch.frexp(counts.to(torch.float64)).exponent.to(torch.int64)
    dropped = (bits - SIGNIFICANT_BITS).clamp_(min=0)
    return (counts + ((1 << dropped) >> 1)) >> dropped << dropped


def frequency_groups(
    counts: Tensor,
    field_sizes: Sequence[int] | None = None,
    row_features: Tensor | None = None,
) -> FrequencyGroups:
    """Group the rows of each field by their training count.

    Rows may come in any order. In frequency order (falling count) the groups are contiguous runs,
    which is found in O(N) without sorting; otherwise it costs a sort per field.

    Args:
        counts: int64 [N], counts from the training split only.
        field_sizes: rows per field; field f holds rows [off_f, off_f + size_f). None: one field.
        row_features: [N, E], further features that sizes may depend on. Rows then differ even at
            equal counts, so every row is a group of its own, G = N, in the order of the rows, and
            the head costs O(N) a step.

    Returns:
        The groups; `row_group` is on the device of `counts`.

    Raises:
        ValueError: see `check_counts` and `check_field_sizes`; row_features of another shape or
            not finite.
    """
    counts = check_counts(counts)
    sizes = check_field_sizes(field_sizes, counts.numel())
    if row_features is not None:
        extra = torch.as_tensor(row_features).to(counts.device, torch.float32)
        if extra.dim() != 2 or len(extra) != len(counts) or not bool(extra.isfinite().all()):
            raise ValueError(
                f"row_features must be finite, of shape [{len(counts)}, E], got shape "
                f"{list(extra.shape)}"
            )
        fields = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        rows = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
        return FrequencyGroups(rows, counts, fields.to(counts.device), len(sizes), extra)
    row_parts, count_parts, field_parts = [], [], []
    first = 0
    for field, part in enumerate(counts.split(sizes)):
        if bool((part[1:] <= part[:-1]).all()):
            values, inverse = torch.unique_consecutive(part, return_inverse=True)
        else:
            values, inverse = torch.unique(-part, return_inverse=True)
            values = -values
        row_parts.append((inverse + first).to(torch.int32))
        count_parts.append(values)
        field_parts.append(torch.full_like(values, field))
        first += values.numel()
    return FrequencyGroups(
        torch.cat(row_parts), torch.cat(count_parts), torch.cat(field_parts), len(sizes)
    )


def log_count_zscores(counts: Tensor, rows: Tensor, fields: Tensor, num_fields: int) -> Tensor:
    """`norm(q)` of the gate: z-score of log1p(count) within each field, over its rows.

    Args:
        counts: int64 [G] count of each group.
        rows: int64 [G] rows of each group.
        fields: int64 [G] field of each group.
        num_fields: F.

    Returns:
        float64 [G]; zero in a field whose rows all have one count.
    """
    weight = rows.to(torch.float64)
    value = torch.log1p(counts.to(torch.float64))

    def field_sum(x: Tensor) -> Tensor:
        return x.new_zeros(num_fields).index_add_(0, fields, x)

    total = field_sum(weight).clamp(min=1)
    mean = field_sum(weight * value) / total
    centred = value - mean[fields]
    deviation = (field_sum(weight * centred.square()) / total).sqrt()[fields]
    # A field with one distinct count has a deviation of rounding error only.
    flat = deviation <= 1e-9 * (1 + value.abs())
    return torch.where(flat, torch.zeros_like(value), centred / deviation.clamp(min=1e-12))


def mid_ranks(counts: Tensor, rows: Tensor, fields: Tensor, num_fields: int) -> Tensor:
    """Rank of a row by count within its field, scaled to [0, 1]; equal counts share a rank.

    `rank = (rows with a smaller count + (rows with this count - 1) / 2) / (rows of the field - 1)`:
    0 for the rarest value, 1 for the most frequent one, 1/2 in a field of one row.

    Args:
        counts: int64 [G], count of each group.
        rows: int64 [G], rows of each group.
        fields: int64 [G], field of each group.
        num_fields: F.

    Returns:
        float64 [G].
    """
    rank = torch.empty(counts.numel(), dtype=torch.float64, device=counts.device)
    for field in range(num_fields):
        member = (fields == field).nonzero().flatten()
        values, inverse = torch.unique(counts[member], return_inverse=True)
        n = rank.new_zeros(values.numel()).index_add_(0, inverse, rows[member].to(rank.dtype))
        total = float(n.sum())
        below = n.cumsum(0) - n
        middle = (below + (n - 1) / 2) / (total - 1) if total > 1 else below + 0.5
        rank[member] = middle[inverse]
    return rank


def frequency_features(counts: Tensor, rows: Tensor, fields: Tensor, num_fields: int) -> Tensor:
    """The frequency vector `s` of each group.

    Args:
        counts: int64 [G], count of each group.
        rows: int64 [G], rows of each group.
        fields: int64 [G], field of each group.
        num_fields: F.

    Returns:
        float32 [G, 2 + F]: z-score of log1p(count), rank scaled to [0, 1], one-hot of the field.
    """
    zscore = log_count_zscores(counts, rows, fields, num_fields)
    rank = mid_ranks(counts, rows, fields, num_fields)
    one_hot = torch.nn.functional.one_hot(fields, num_fields)
    return torch.cat([zscore[:, None], rank[:, None], one_hot], dim=1).to(torch.float32)


def encode_row_map(row_group: Tensor) -> Tensor:
    """`row_group` as runs, int32 [2, R] (first row, group), if shorter than the plain int32 [N]."""
    n = row_group.numel()
    if n == 0:
        return row_group
    change = torch.ones(n, dtype=torch.bool, device=row_group.device)
    change[1:] = row_group[1:] != row_group[:-1]
    first = change.nonzero().flatten()
    if 2 * first.numel() >= n or n > 2**31 - 1:
        return row_group
    return torch.stack([first.to(torch.int32), row_group[first]])


def decode_row_map(row_map: Tensor, num_rows: int) -> Tensor:
    """Inverse of `encode_row_map`: int32 [N]."""
    if row_map.ndim == 1:
        return row_map.to(torch.int32)
    ends = torch.cat([row_map[0, 1:], row_map.new_tensor([num_rows])])
    return torch.repeat_interleave(row_map[1], (ends - row_map[0]).to(torch.int64))
