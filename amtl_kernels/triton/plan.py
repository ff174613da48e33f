"""The work of a backward: lookups sorted by row, and cut into pieces of bounded length.

One row may own a tenth of all lookups while most own one. So the sorted lookups are cut wherever a
new row starts and at every multiple of ``chunk``; a lane sums one piece, and a row of several
pieces ("hot") is put together in a second pass. Where mask gradients are wanted the order is by
group first and by row within it, so that one sort serves both gradients.

Two launches before the sort's end and two after it, and no wait: how many rows and pieces there are
stays on the device, and grids are as large as they could get. What fits this is that cuts depend on
nothing but a lookup's own position and its neighbour's key.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtl_kernels.reference import MEAN
from amtl_kernels.triton import launch

_INT32_MAX = torch.iinfo(torch.int32).max


@triton.jit
def lower_bound(ptr, count, wanted, steps, stride):
    """First position of ``ptr[0 : count * stride : stride]`` that holds ``wanted`` or more.

    ``wanted`` (int64) has any shape, the result (int32) too; ``steps`` is at least the bit length
    of ``count``. Stays inside the array also where it is not sorted.
    """
    low = (wanted - wanted).to(tl.int32)
    high = low + count
    for _ in range(steps):
        middle = low + (high - low) // 2
        open_ = low < high
        value = tl.load(ptr + middle * stride, mask=open_, other=0).to(tl.int64)
        right = open_ & (value < wanted)
        high = tl.where(right, high, middle)
        low = tl.where(right, middle + 1, low)
    return low


@triton.jit
def bag_of(at, offset_ptr, num_offsets, steps):
    """Bag of the lookups ``at`` (int64): the last one that starts there or before, or -1."""
    return lower_bound(offset_ptr, num_offsets, at + 1, steps, 1).to(tl.int64) - 1


@triton.jit
def mean_scale(bag, live, offset_ptr, counted_ptr, num_offsets, num_lookups, HAS_PADDING):
    """fp32, one over the number of lookups of ``bag`` that count."""
    first = tl.load(offset_ptr + bag, mask=live, other=0).to(tl.int64)
    end = tl.load(offset_ptr + bag + 1, mask=live & (bag + 1 < num_offsets), other=num_lookups)
    first = tl.minimum(tl.maximum(first, 0), num_lookups)
    end = tl.minimum(tl.maximum(end.to(tl.int64), 0), num_lookups)
    if HAS_PADDING:
        first = tl.load(counted_ptr + first - 1, mask=live & (first > 0), other=0)
        end = tl.load(counted_ptr + end - 1, mask=live & (end > 0), other=0)
    return 1.0 / tl.maximum(end - first, 1).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "num_lookups",
        "num_rows",
        "num_offsets",
        "num_bags",
        "padding_idx",
        "limit",
        "steps",
    ]
)
def keys_kernel(
    index_ptr,
    offset_ptr,
    row_group_ptr,
    key_ptr,
    bag_ptr,
    num_lookups,
    num_rows,
    num_offsets,
    num_bags,
    padding_idx,
    limit,
    steps,
    HAS_BAGS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each lookup is sorted by: its row, or ``group * num_rows + row``.

    What gets no gradient (padding, no bag, no such row) has ``limit`` and goes last.
    Grid (ceil(L / BLOCK)). index [L], offset [num_offsets] -> key [L], bag [L].
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    row = tl.load(index_ptr + at, mask=valid, other=0).to(tl.int64)
    live = valid & (row >= 0) & (row < num_rows) & (row != padding_idx)
    if HAS_BAGS:
        bag = bag_of(at, offset_ptr, num_offsets, steps)
        live = live & (bag >= 0) & (bag < num_bags)
        tl.store(bag_ptr + at, bag.to(tl.int32), mask=valid)
    key = row
    if GROUPED:
        key += tl.load(row_group_ptr + row, mask=live, other=0).to(tl.int64) * num_rows
    key = tl.where(live, key, limit)
    tl.store(key_ptr + at, key.to(key_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_lookups", "num_offsets", "limit", "chunk"])
def cut_kernel(
    key_ptr,
    order_ptr,
    bag_ptr,
    offset_ptr,
    counted_ptr,
    weight_ptr,
    flag_ptr,
    source_ptr,
    scale_ptr,
    num_lookups,
    num_offsets,
    limit,
    chunk,
    HAS_BAGS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IS_MEAN: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Marks where rows (bit 32) and pieces (bit 0) start, and takes sources and scales along.

    Grid (ceil((L + 1) / BLOCK)). key (sorted), order, bag, weight [L] -> flag [L + 1] int64, one
    place late so that their cumulative sum starts at 0; source [L] int32, scale [L] fp32.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) - 1
    valid = (at >= 0) & (at < num_lookups)
    key = tl.load(key_ptr + at, mask=valid, other=0).to(tl.int64)
    before = tl.load(key_ptr + at - 1, mask=valid & (at > 0), other=-1).to(tl.int64)
    live = valid & (key < limit)
    row_starts = live & (key != before)
    piece_starts = live & ((key != before) | (at % chunk == 0))
    flag = (row_starts.to(tl.int64) << 32) | piece_starts.to(tl.int64)
    tl.store(flag_ptr + at + 1, flag, mask=at < num_lookups)
    if HAS_BAGS or HAS_WEIGHTS:
        origin = tl.load(order_ptr + at, mask=live, other=0)
    if HAS_BAGS:
        bag = tl.load(bag_ptr + origin, mask=live, other=0)
        tl.store(source_ptr + at, bag, mask=live)
    if HAS_WEIGHTS:
        scale = tl.load(weight_ptr + origin, mask=live, other=0.0).to(tl.float32)
    if IS_MEAN:
        inverse = mean_scale(
            bag, live, offset_ptr, counted_ptr, num_offsets, num_lookups, HAS_PADDING
        )
        scale = scale * inverse if HAS_WEIGHTS else inverse
    if HAS_WEIGHTS or IS_MEAN:
        tl.store(scale_ptr + at, scale, mask=live)


@triton.jit(do_not_specialize=["num_lookups", "num_rows", "num_groups", "limit", "steps"])
def pieces_kernel(
    key_ptr,
    count_ptr,
    piece_ptr,
    row_ptr,
    group_ptr,
    num_lookups,
    num_rows,
    num_groups,
    limit,
    steps,
    GROUPED: tl.constexpr,
    LIST_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where each piece starts, and behind the last one where it ends; more where asked for.

    Grid (ceil(max(L, G + 1) / BLOCK)). key [L], count [L + 1] -> piece [P + 1] int32, distinct row
    [U] int64, first piece of each group [G + 1] int32.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < num_lookups
    count = tl.load(count_ptr + at, mask=valid, other=0)
    after = tl.load(count_ptr + at + 1, mask=valid, other=0)
    starts = valid & (piece_number(after) != piece_number(count))
    tl.store(piece_ptr + piece_number(count), at.to(tl.int32), mask=starts)
    key = tl.load(key_ptr + at, mask=valid, other=limit).to(tl.int64)
    following = tl.load(key_ptr + at + 1, mask=valid & (at + 1 < num_lookups), other=limit)
    ends = (key < limit) & (following.to(tl.int64) >= limit)
    tl.store(piece_ptr + piece_number(after), (at + 1).to(tl.int32), mask=ends)
    if LIST_ROWS:
        row_starts = valid & ((after >> 32) != (count >> 32))
        tl.store(row_ptr + (count >> 32), key % num_rows, mask=row_starts)
    if GROUPED:  # noqa: SIM102 - compile-time and run-time conditions can't be joined
        if tl.program_id(0) * BLOCK <= num_groups:
            first = lower_bound(key_ptr, num_lookups, at * num_rows, steps, 1)
            first = piece_number(tl.load(count_ptr + first, mask=at <= num_groups, other=0))
            tl.store(group_ptr + at, first.to(tl.int32), mask=at <= num_groups)


@triton.jit
def piece_number(count):
    """Pieces that start before a position, of its entry in ``counts``."""
    return count & 0xFFFFFFFF


@triton.jit(do_not_specialize=["num_lookups", "steps"])
def tier_counts_kernel(
    key_ptr, count_ptr, tiers_ptr, out_ptr, num_lookups, steps, TIERS: tl.constexpr
):
    """Distinct rows looked up before the end of each tier. One program. -> out [TIERS] int64."""
    tier = tl.arange(0, TIERS)
    end = tl.load(tiers_ptr + tier)
    position = lower_bound(key_ptr, num_lookups, end, steps, 1)
    tl.store(out_ptr + tier, tl.load(count_ptr + position) >> 32)


@dataclass(frozen=True)
class Bags:
    """Which bag each lookup belongs to.

    Attributes:
        offsets: [number] or [number + 1] start of each bag.
        number: Number of bags.
        is_mean: Whether a bag's gradient is divided by the lookups that count.
        counted: int64 [L], lookups up to here that are not padding; None where all count.
    """

    offsets: Tensor
    number: int
    is_mean: bool
    counted: Tensor | None

    @property
    def steps(self) -> int:
        """Steps of the search for a lookup's bag."""
        return self.offsets.numel().bit_length()


def find_bags(
    flat: Tensor, offsets: Tensor, mode: int, padding_idx: int, include_last_offset: bool
) -> Bags:
    """The bags of lookups ``flat`` [L]."""
    number = max(offsets.numel() - int(include_last_offset), 0)
    counted = None
    if mode == MEAN and padding_idx >= 0:
        counted = (flat != padding_idx).cumsum(0)
    return Bags(offsets.contiguous(), number, mode == MEAN, counted)


@dataclass(frozen=True)
class Plan:
    """Sorted lookups and how they are cut; all tensors stay on the device.

    Attributes:
        keys: [L] sorted; those from ``limit`` on get no gradient.
        source: [L] integers, the row of the incoming gradient that each lookup takes.
        scale: fp32 [L], what it is multiplied by, or None.
        counts: int64 [L + 1], rows (upper 32 bits) and pieces (lower) that start before a position.
        pieces: int32 [most_pieces + 1], where each piece starts.
        row_of: int64 [most_rows], the distinct rows in the order of their keys, or None.
        group_piece: int32 [G + 1], first piece of each group of grouped keys.
        lookups: L.
        rows: Number of rows of the table.
        limit: The smallest key that stands for no row.
        grouped: Whether a key is ``group * rows + row``, or the row alone.
        chunk: Lookups per piece at most.
        lanes: Pieces per program.
        most_rows: Distinct rows at most.
        most_pieces: Pieces at most.
    """

    keys: Tensor
    source: Tensor
    scale: Tensor | None
    counts: Tensor
    pieces: Tensor
    row_of: Tensor | None
    group_piece: Tensor
    lookups: int
    rows: int
    limit: int
    grouped: bool
    chunk: int
    lanes: int
    most_rows: int
    most_pieces: int

    @property
    def windows(self) -> int:
        """Stretches of ``chunk`` sorted lookups, in each of which two pieces may be partial."""
        return launch.cdiv(self.lookups, self.chunk)

    @property
    def programs(self) -> int:
        """Programs of a pass over all pieces, at most."""
        return launch.cdiv(self.most_pieces, self.lanes)

    @staticmethod
    def split_count(count: int) -> tuple[int, int]:
        """The number of rows and of pieces in an entry of ``counts``."""
        return count >> 32, count & 0xFFFFFFFF

    def ascending_places(self, distinct: int) -> Tensor:
        """The rank of each of the ``distinct`` rows, which are in the order of their keys."""
        assert self.row_of is not None
        order = torch.argsort(self.row_of[:distinct])
        return torch.empty_like(order).scatter_(
            0, order, torch.arange(distinct, device=order.device)
        )

    def count_rows_of_tiers(self, tiers: Tensor | None) -> Tensor:
        """int64 [TIERS], distinct rows before the end of each tier of ``Table.tiers``."""
        assert tiers is not None
        below = torch.empty(tiers.shape[1], dtype=torch.int64, device=tiers.device)
        with launch.device_guard(self.keys):
            launch.launch(
                tier_counts_kernel,
                (1,),
                self.keys,
                self.counts,
                tiers,
                below,
                self.lookups,
                self.lookups.bit_length(),
                TIERS=tiers.shape[1],
            )
        return below


def chunk_length(lookups: int) -> int:
    """Lookups per piece: as long as needed for the second pass to stay as short as the first.

    A row owning most of the lookups is a loop of ``chunk`` steps, then one over its pieces, some
    tens of which are in flight at once: about the square root of the lookups balances the two.
    """
    return min(max(launch.next_power_of_two(math.isqrt(lookups) // 4), 64), 1024)


def make_plan(
    flat: Tensor,
    num_rows: int,
    dim: int,
    padding_idx: int,
    bags: Bags | None,
    weights: Tensor | None,
    row_group: Tensor | None,
    groups: int,
    list_rows: bool = False,
    chunk: int = 0,
) -> Plan:
    """Sorts lookups by row, or by group and row, and cuts them into pieces. No wait.

    Args:
        flat: Indices [L], at least one.
        num_rows: Rows of the table.
        dim: Columns of the gradient.
        padding_idx: A row that gets no gradient, or -1.
        bags: Bags of a pooled lookup, else None.
        weights: Per-sample weights [L], or None.
        row_group: int32 [num_rows] for mask gradients, else None.
        groups: Number of groups.
        list_rows: Whether ``row_of`` is wanted.
        chunk: Lookups per piece at most; 0 chooses.
    """
    lookups, device = flat.numel(), flat.device
    chunk = chunk or chunk_length(lookups)
    limit = num_rows if row_group is None else num_rows * groups
    # A radix sort of 32-bit keys moves half the bytes.
    keys = torch.empty(
        lookups, dtype=torch.int32 if limit < _INT32_MAX else torch.int64, device=device
    )
    bag = torch.empty(0 if bags is None else lookups, dtype=torch.int32, device=device)
    block = launch.flat_block()
    offsets = None if bags is None else bags.offsets
    is_mean = bags is not None and bags.is_mean
    counted = None if bags is None else bags.counted
    has_scale = is_mean or weights is not None
    with launch.device_guard(flat):
        launch.launch(
            keys_kernel,
            (launch.cdiv(lookups, block),),
            flat,
            offsets,
            row_group,
            keys,
            None if bags is None else bag,
            lookups,
            num_rows,
            0 if bags is None else bags.offsets.numel(),
            0 if bags is None else bags.number,
            padding_idx,
            limit,
            0 if bags is None else bags.steps,
            HAS_BAGS=bags is not None,
            GROUPED=row_group is not None,
            BLOCK=block,
        )
        keys, order = torch.sort(keys, stable=True)
        source = order if bags is None else torch.empty_like(bag)
        scale = torch.empty(lookups if has_scale else 0, dtype=torch.float32, device=device)
        flags = torch.empty(lookups + 1, dtype=torch.int64, device=device)
        launch.launch(
            cut_kernel,
            (launch.cdiv(lookups + 1, block),),
            keys,
            order,
            None if bags is None else bag,
            offsets,
            counted,
            None if weights is None else weights.reshape(-1).contiguous(),
            flags,
            None if bags is None else source,
            scale if has_scale else None,
            lookups,
            0 if bags is None else bags.offsets.numel(),
            limit,
            chunk,
            HAS_BAGS=bags is not None,
            HAS_WEIGHTS=weights is not None,
            IS_MEAN=is_mean,
            HAS_PADDING=counted is not None,
            BLOCK=block,
        )
        counts = flags.cumsum(0)
        most_rows = min(lookups, num_rows)
        most_pieces = min(lookups, most_rows + launch.cdiv(lookups, chunk))
        pieces = torch.empty(most_pieces + 1, dtype=torch.int32, device=device)
        groups = 0 if row_group is None else groups
        group_piece = torch.empty(groups + 1, dtype=torch.int32, device=device)
        row_of = torch.empty(most_rows if list_rows else 0, dtype=torch.int64, device=device)
        launch.launch(
            pieces_kernel,
            (launch.cdiv(max(lookups, groups + 1), block),),
            keys,
            counts,
            pieces,
            row_of,
            group_piece,
            lookups,
            num_rows,
            groups,
            limit,
            lookups.bit_length(),
            GROUPED=row_group is not None,
            LIST_ROWS=list_rows,
            BLOCK=block,
        )
    return Plan(
        keys=keys,
        source=source,
        scale=scale if has_scale else None,
        counts=counts,
        pieces=pieces,
        row_of=row_of if list_rows else None,
        group_piece=group_piece,
        lookups=lookups,
        rows=num_rows,
        limit=limit,
        grouped=row_group is not None,
        chunk=chunk,
        lanes=launch.tile_rows(dim, most=32),
        most_rows=most_rows,
        most_pieces=most_pieces,
    )
