"""The work of a backward: lookups sorted by row, and cut into pieces of bounded length.

One row may own a tenth of all lookups while most own one. So a row's lookups are cut into pieces of
at most ``chunk``; a lane sums one piece, and rows of more than one piece ("hot") are put together
in a second pass. When mask gradients are wanted, pieces are taken in the order of their rows'
groups and no program serves two groups, so that one sort and one pass over the gradient give both.
Everything here is a few PyTorch calls on ``L``, ``U`` or ``G`` integers, and two synchronisations:
the number of distinct rows, and the sizes of the work lists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amtl_kernels.reference import MEAN
from amtl_kernels.triton import launch


@dataclass(frozen=True)
class Bags:
    """Which bag each lookup belongs to.

    Attributes:
        of_lookup: int64 [L]; ``number`` for a lookup in no bag.
        number: Number of bags.
        inverse_count: fp32 [B], one over the lookups that count, for a mean; else None.
    """

    of_lookup: Tensor
    number: int
    inverse_count: Tensor | None


def find_bags(
    flat: Tensor, offsets: Tensor, mode: int, padding_idx: int, include_last_offset: bool
) -> Bags:
    """The bags of lookups ``flat`` [L]. O(L log B)."""
    lookups = flat.numel()
    number = max(offsets.numel() - int(include_last_offset), 0)
    offsets = offsets.to(torch.int64)
    positions = torch.arange(lookups, device=flat.device)
    of_lookup = torch.searchsorted(offsets, positions, right=True) - 1
    of_lookup = of_lookup.masked_fill(of_lookup < 0, number)
    inverse = None
    if mode == MEAN:
        ends = offsets
        if not include_last_offset:
            ends = torch.cat([offsets, offsets.new_full((1,), lookups)])
        if padding_idx >= 0:
            counted = torch.zeros(lookups + 1, dtype=torch.int64, device=flat.device)
            torch.cumsum(flat != padding_idx, 0, out=counted[1:])
            ends = counted[ends]
        inverse = 1.0 / (ends[1:] - ends[:-1]).clamp(min=1).to(torch.float32)
    return Bags(of_lookup, number, inverse)


@dataclass(frozen=True)
class SortedLookups:
    """Lookups in ascending order of their rows, equal rows in the order of the input.

    Attributes:
        rows: int64 [U], strictly ascending.
        starts: int64 [U + 1], where each row's lookups start in the order of ``source``.
        source: [L] integers, the row of the incoming gradient that each lookup takes.
        scale: fp32 [L], what it is multiplied by, or None.
    """

    rows: Tensor
    starts: Tensor
    source: Tensor
    scale: Tensor | None


def sort_lookups(
    flat: Tensor, num_rows: int, padding_idx: int, bags: Bags | None, weights: Tensor | None
) -> SortedLookups:
    """Sorts lookups by row; what gets no gradient (padding, no bag, no such row) goes last."""
    if bags is not None and bags.number == 0:
        flat, bags, weights = flat[:0], None, None
    dropped = (flat < 0) | (flat >= num_rows)
    if padding_idx >= 0:
        dropped |= flat == padding_idx
    if bags is not None:
        dropped |= bags.of_lookup >= bags.number
    # A radix sort of 32-bit keys moves half the bytes.
    narrow = num_rows < torch.iinfo(torch.int32).max
    keys = flat.to(torch.int32 if narrow else torch.int64).masked_fill(dropped, num_rows)
    keys, order = torch.sort(keys, stable=True)
    is_first = keys < num_rows
    is_first[1:] &= keys[1:] != keys[:-1]
    starts = is_first.nonzero().squeeze(1)
    rows = keys[starts].to(torch.int64)
    end = torch.searchsorted(keys, torch.full_like(keys[:1], num_rows).reshape(-1))
    if end.numel() == 0:
        end = starts.new_zeros(1)
    starts = torch.cat([starts, end])
    scale = None
    if weights is not None:
        scale = weights.reshape(-1).to(torch.float32)[order]
    source = order
    if bags is not None:
        source = bags.of_lookup[order]
        if bags.inverse_count is not None:
            inverse = bags.inverse_count[source.clamp(max=bags.number - 1)]
            scale = inverse if scale is None else scale * inverse
    return SortedLookups(rows, starts, source, scale)


@dataclass(frozen=True)
class Work:
    """Who sums what. A block is a program: it takes pieces ``[block_first, block_end)``.

    Attributes:
        lanes: Pieces per program at most.
        chunk: Lookups per piece at most.
        piece_row: [P] position of each piece's row in ``SortedLookups.rows``.
        row_piece: [U] first piece of each row.
        row_slot: [U] first partial sum of each hot row.
        hot: [H] positions of hot rows.
        hot_slots: [H, 2] their first and last + 1 partial sum.
        slots: Number of partial sums.
        block_first: [NB] first piece.
        block_end: [NB] last piece + 1.
        block_group: [NB] group of a block's rows, or None without groups.
        group_block: [G + 1] first block of each group, or None.
    """

    lanes: int
    chunk: int
    piece_row: Tensor
    row_piece: Tensor
    row_slot: Tensor
    hot: Tensor
    hot_slots: Tensor
    slots: int
    block_first: Tensor
    block_end: Tensor
    block_group: Tensor | None
    group_block: Tensor | None


def chunk_length(lookups: int) -> int:
    """Lookups per piece: as long as needed for the second pass to stay as short as the first.

    A row owning most of the lookups is a loop of ``chunk`` steps, then one over its pieces, some
    tens of which are in flight at once: about the square root of the lookups balances the two.
    """
    return min(max(launch.next_power_of_two(math.isqrt(lookups) // 4), 64), 1024)


def _from_zero(counts: Tensor) -> Tensor:
    """Cumulative sum with a zero in front: [n] -> [n + 1]."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def plan_work(
    lookups: SortedLookups, dim: int, row_group: Tensor | None, groups: int, chunk: int = 0
) -> Work:
    """Cuts sorted lookups into pieces and hands them to programs. O(L + U + G).

    Args:
        lookups: At least one row.
        dim: Columns of the gradient.
        row_group: int32 [N] for mask gradients, else None.
        groups: Number of groups.
        chunk: Lookups per piece at most; 0 chooses.
    """
    lanes = launch.tile_rows(dim, most=32)
    chunk = chunk or chunk_length(lookups.source.numel())
    pieces = (lookups.starts[1:] - lookups.starts[:-1] + (chunk - 1)) // chunk
    slots = torch.where(pieces > 1, pieces, 0)
    row_slot = _from_zero(slots)
    order: Tensor | None = None
    group_block: Tensor | None = None
    if row_group is None:
        first = _from_zero(pieces)
        row_piece = first[:-1]
        blocks = (first[-1:] + (lanes - 1)) // lanes
    else:
        group, order = torch.sort(row_group[lookups.rows], stable=True)
        first = _from_zero(pieces[order])
        row_piece = torch.empty_like(pieces)
        row_piece[order] = first[:-1]
        numbers = torch.arange(groups + 1, device=group.device, dtype=group.dtype)
        group_piece = first[torch.searchsorted(group, numbers)]
        group_block = _from_zero((group_piece[1:] - group_piece[:-1] + (lanes - 1)) // lanes)
        blocks = group_block[-1:]
    is_hot = slots > 0
    counts = torch.cat([first[-1:], row_slot[-1:], is_hot.sum().reshape(1), blocks]).tolist()
    num_pieces, num_slots, num_hot, num_blocks = counts
    positions = torch.arange(pieces.numel(), device=pieces.device) if order is None else order
    piece_row = torch.repeat_interleave(
        positions, pieces if order is None else pieces[order], output_size=num_pieces
    )
    hot = is_hot.nonzero().squeeze(1) if num_hot else positions[:0]
    block = torch.arange(num_blocks, device=pieces.device)
    block_group: Tensor | None = None
    if group_block is None:
        block_first, limit = block * lanes, first[-1:]
    else:
        block_group = torch.repeat_interleave(
            numbers[:-1].to(torch.int64),
            group_block[1:] - group_block[:-1],
            output_size=num_blocks,
        )
        block_first = group_piece[block_group] + (block - group_block[block_group]) * lanes
        limit = group_piece[block_group + 1]
    return Work(
        lanes=lanes,
        chunk=chunk,
        piece_row=piece_row,
        row_piece=row_piece,
        row_slot=row_slot[:-1],
        hot=hot,
        hot_slots=torch.stack([row_slot[hot], row_slot[hot + 1]], 1),
        slots=num_slots,
        block_first=block_first,
        block_end=torch.minimum(block_first + lanes, limit),
        block_group=block_group,
        group_block=group_block,
    )
