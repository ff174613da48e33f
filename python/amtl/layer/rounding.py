"""Numbers of few bits: training that rounds, and tables of integers.

Rows of one field whose counts are alike, and which are equally wide, share a step size s. A number
of b bits is a code u in 0..2^b - 1 and stands for `(u - (2^b - 1) / 2) * s`: levels lie evenly on
both sides of zero, which is none of them. In training the table stays as it is and the operators
round what is looked up; gradients pass straight through (as in LSQ, arXiv 1902.08153, where step
sizes are learned; here they follow the mean square of the numbers, which needs no learning rate).

Without masters (ALPT, arXiv 2212.05735) the table is codes in training, too. A fused optimizer
decodes a row, updates it as one of floats, and encodes it again, each number `x` as one of the two
codes around it: with `p = x / s + (2^b - 1) / 2`, in the range of codes, as `floor(p) + 1` with
probability `p - floor(p)`, else as `floor(p)`. So the mean is kept, and updates far below a step
size add up. A step size that should be another by more than an eighth makes way for it: the codes
of its part are decoded and encoded anew, at random again. Beyond the range of codes nothing is
kept, but numbers at its ends have a mean square above that of a normal distribution (5.9, 3.9, 2.5
and 1.5 standard deviations at 16, 8, 4 and 2 bits), so the range grows until it holds them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import amtl_kernels
from amtl.layer.replicas import leads
from amtl.layer.tiers import TierPlan, split_rows
from amtl_kernels.rounding import (
    code_stochastically,
    code_type,
    decode_codes,
    pack_codes,
    rounding_bits,
)

_STEP = {2: 0.9957, 4: 0.3352, 8: 0.0308, 16: 1.812e-4}
"""Step sizes that lose least of a normal distribution, in standard deviations."""

_LEAST_STEP = 1e-30
_LEAST_HALF = 2.0**-24
"""The same of float16: what its smallest numbers are apart, so that none of them is lost."""
_EVERY = 8
"""Training steps of which step sizes follow one, and lookups in a step at most."""
_SAMPLE = 2048
"""Most of its lookups that they follow then."""
_WINDOW = 32
"""Lookups of a part that its step size remembers."""
_LEEWAY = 1.125
"""A step size of codes that train is another one from this ratio on."""
_CHUNK = 1 << 20
"""Numbers that are encoded anew at once."""
_GOLDEN = 0x9E3779B1
"""Odd, and of no simple ratio to 2^32: its multiples modulo that are spread evenly."""

PART_BYTES = 8
"""A step size and where its rows end."""
_SHORTER = 0.6
"""Share of the rows that may be shorter than the rest, by a byte, where rows keep their order."""
_FEWER = 0.125
"""The same where they would keep it anyway, and of rows that store nothing."""
_RANGES = 64
_LEAST_RANGE = 64
"""Ranges of rows at most, and rows in each at least, that are looked at for their size."""
_APART = 2.0
"""Ratio of mean squares from which on rows get a step size of their own."""
_WIDER = (1.3, 1.7, 2.2, 2.8, 3.6, 4.7, 6.0)
"""Times the step size of a normal distribution that are tried: others reach farther."""
_GAIN = 0.95
"""Of its error: what another has to come below."""


class Parts(NamedTuple):
    """Places of the tiers with one width and one step size, one after the other.

    Attributes:
        ends: first place after each part.
        widths: stored width of each part.
    """

    ends: list[int]
    widths: list[int]


def unit(bits: int) -> int:
    """Numbers that fill a byte, at least 1; rows are stored in multiples of it."""
    return max(1, 8 // bits)


def numbers_in(block: Tensor, bits: int | None) -> int:
    """Numbers in a row of a block: of one of codes (uint8), which have so many bits."""
    columns = block.shape[1]
    return columns * 8 // (bits or 8) if block.dtype == torch.uint8 else columns


def step_groups(counts: Tensor, fields: Tensor) -> Tensor:
    """What shares a step size at equal width: field and binary order of magnitude of the count.

    Args:
        counts: integer [G] >= 0.
        fields: int64 [G].

    Returns:
        int64 [G], below 64 times the number of fields.
    """
    magnitude = torch.log2(counts.to(torch.float64) + 1).floor().to(torch.int64)
    return fields * 64 + magnitude


def step_of(mean_square: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Step size of numbers of this mean square, elementwise; not zero as a number of the type."""
    least = _LEAST_HALF if dtype == torch.float16 else _LEAST_STEP
    return (_STEP[bits] * mean_square.sqrt()).clamp(min=least)


def plan_parts(stored: Tensor, steps: Tensor) -> Parts:
    """Parts of places, from the stored width and the step group of each, in their order.

    Args:
        stored: integer [P].
        steps: int64 [P].
    """
    key = steps * (int(stored.max()) + 1 if len(stored) else 1) + stored
    _, counts = torch.unique_consecutive(key, return_counts=True)
    ends = counts.cumsum(0)
    return Parts(ends.tolist(), stored[ends - 1].tolist())


def where_they_are(
    stored: Tensor,
    fields: Tensor,
    padding: int | None,
    bits: int,
    allowed: float,
    dim: int,
    moved: bool = True,
) -> Tensor | None:
    """Widths of rows that keep their order, if that takes no more bytes.

    A row of few bits is short, and to say where each lies takes 4 bytes more. So where order is for
    little but step sizes, all rows get the width of the widest, and a field one step size. So they
    do where the rarest rows would each lose much to pay for step sizes by the count: in many
    widths, each of them a parameter.

    Args:
        stored: integer [N], widths of rows that are put in order.
        fields: int64 [N], ascending.
        padding: a row that stores nothing in either case.
        bits: of a number.
        allowed: bytes of all rows and step sizes.
        dim: D, the width of all where that is allowed.
        moved: whether rows of these widths would be put in order.

    Returns:
        Integer [N]; None where they would take more than is allowed or than rows in order do, or
        where many rows store nothing: no code is zero, so they would count for the step sizes.
    """
    widest = int(stored.max())
    ordered = int(stored.sum(dtype=torch.int64)) * bits // 8 + 4 * len(stored)
    shape = torch.ones_like(stored)
    if padding is not None:
        shape[padding] = 0
    full = bytes_of(shape * dim, fields, bits)
    if moved and 2 * full <= ordered:
        # A number or two: whatever is allowed, to leave some out takes more.
        return shape * dim
    if 2 * full <= 4 * len(stored) and full <= allowed < math.inf:
        # Those that pay for step sizes would be left nothing.
        return shape * dim
    if int((stored == 0).sum()) > int(_FEWER * len(stored)):
        return None
    if math.isinf(allowed):
        allowed = ordered
    if full <= allowed:
        return shape * dim
    wide = shape * widest
    taken = bytes_of(wide, fields, bits)
    if taken > allowed:
        # What step sizes cost, some rows save, if they keep something: the last ones of the part
        # that has most rows, where counts fall within parts those that are asked for least.
        saved = unit(bits) * bits // 8
        short = -int(-(taken + PART_BYTES - allowed) // saved)
        if widest <= unit(bits) or short > int((_SHORTER if moved else _FEWER) * len(wide)):
            return None
        _, sizes = fields.unique_consecutive(return_counts=True)
        most = int(sizes.argmax())
        end = int(sizes[: most + 1].sum()) if int(sizes[most]) >= short else len(wide)
        wide[end - short : end].clamp_(max=widest - unit(bits))
        taken = bytes_of(wide, fields, bits)
    return wide if taken <= (min(allowed, ordered) if moved else allowed) else None


def spared_bytes(num_rows: int, bits: int) -> int:
    """What `where_they_are` may take from rows, beside the step size of those that are shorter."""
    return max(0, int(_SHORTER * num_rows) * unit(bits) * bits // 8 - PART_BYTES)


def bytes_of(stored: Tensor, steps: Tensor, bits: int) -> int:
    """Bytes of places in their order, step sizes included.

    Args:
        stored: integer [P], widths.
        steps: int64 [P], step groups.
        bits: of a number.
    """
    parts = sum(width > 0 for width in plan_parts(stored, steps).widths)
    return int(stored.sum(dtype=torch.int64)) * bits // 8 + parts * PART_BYTES


def encode(values: Tensor, step: float | Tensor, bits: int) -> Tensor:
    """Codes of numbers, as `pack_codes` takes them; those out of range get the nearest code.

    As the operators round: in float32.
    """
    half = (2**bits - 1) / 2
    codes = torch.round(values.to(torch.float32) / step + half)
    return codes.clamp_(0, 2 * half).to(code_type(bits))


def decode(packed: Tensor, step: Tensor, bits: int) -> Tensor:
    """Numbers [n, w] of a block of bytes [n, w * bits / 8] with one step size, of its type."""
    return decode_codes(packed, step.to(torch.float32), bits).to(step.dtype)


def is_drawn(turn: int) -> bool:
    """Whether step sizes follow in the step of this number: one in `_EVERY`, drawn anew each time.

    Counting would never come to some of the lookups of a table that takes turns itself.
    """
    block, place = divmod(turn, _EVERY)
    mixed = (block + 1) * _GOLDEN & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * 0x85EBCA77 & 0xFFFFFFFF
    return (mixed ^ mixed >> 13) % _EVERY == place


def trains() -> bool:
    """Whether gradients are wanted of what is looked up now.

    So they are where a function of autograd's has turned them off to repeat its forward later, as
    checkpointing does.
    """
    if torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    frame, context = sys._getframe(1), torch.autograd.function.FunctionCtx
    while frame.f_back is not None:
        if frame.f_code.co_name == "forward" and isinstance(frame.f_locals.get("ctx"), context):
            return True
        frame = frame.f_back
    return False


class _InStep(NamedTuple):
    """Lookups of a table in one training step.

    Attributes:
        number: of the step.
        calls: so far.
        follows: whether step sizes follow them.
        sums: mean squares before the first of them, and sums and counts since.
    """

    number: int
    calls: int
    follows: bool
    sums: tuple[Tensor, Tensor, Tensor] | None


class Rounding(nn.Module):
    """The step sizes of tiers of few bits, which follow the mean square of each part.

    Args:
        bits: 2, 4, 8 or 16.
        parts: see `Parts`.
        mean_square: float32 [C].

    Attributes:
        turn: training steps, or calls of `follow` where steps are not told.
        changes: how often `recode` has changed step sizes.
    """

    ends: Tensor
    widths: Tensor
    mean_square: Tensor
    spread: Tensor

    def __init__(self, bits: int, parts: Parts, mean_square: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.turn = 0
        self.changes = 0
        self._in_step: _InStep | None = None
        self._ends, self._widths = tuple(parts.ends), tuple(parts.widths)
        device = mean_square.device
        self.register_buffer("ends", torch.tensor(parts.ends, device=device))
        self.register_buffer("widths", torch.tensor(parts.widths, device=device))
        self.register_buffer("mean_square", mean_square.to(torch.float32))
        # Positions in a batch, as shares of 2^32, that do not fall in step with fields that take
        # turns.
        spread = torch.arange(_SAMPLE, device=device) * _GOLDEN & 0xFFFFFFFF
        self.register_buffer("spread", spread, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Rounding:
        kept = self.mean_square
        super()._apply(fn, recurse)
        self.mean_square = kept.to(self.mean_square.device)
        return self

    def parts(self) -> Parts:
        """The parts, whatever an average over buffers has made of theirs."""
        return Parts(list(self._ends), list(self._widths))

    def steps(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Step size of each part, [C], a number of this type."""
        return step_of(self.mean_square, self.bits, dtype).to(dtype)

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """What rounds a lookup in tiers of this type, for `amtl_kernels.tiered_embedding`."""
        steps = self.steps(dtype).to(torch.float32)
        return {"steps": steps, "bits": self.bits, "step_ends": self._ends}

    @torch.no_grad()
    def follow(
        self,
        blocks: Sequence[Tensor],
        tier_ends: Sequence[int],
        rows: Tensor,
        dim: int,
        step: int | None = None,
        **few: Any,
    ) -> bool:
        """Move mean squares towards those of what is looked up: in some steps, by samples.

        A part's mean square becomes about that of its last `_WINDOW` lookups in the samples, so it
        changes as fast as the part's rows do. Where calls are traced it is all of them, for a graph
        is the same each time. A forward that checkpointing repeats does not count. Under
        DistributedDataParallel the first process follows, and the next pass gives it to the others.

        Args:
            blocks: the tiers.
            tier_ends: first place after each.
            rows: places that are looked up, integer of any shape, maybe out of range.
            dim: D.
            step: a number that changes with training steps, so that the lookups of one are one
                sample: of users and items in one table each would else set step sizes of its own.
            **few: of codes, what decodes them.

        Returns:
            Whether mean squares have changed.

        Raises:
            RuntimeError: processes would follow each on its own.
        """
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() != -1:
                return False
            # Past nn.Module, whose assignment takes as long as half the rest of a call.
            # A replica of nn.DataParallel lives for one pass: of its state only buffers last.
            if not (self._takes_turn(step) or "_is_replica" in self.__dict__):
                return False
            if not leads(self.mean_square):
                return False
        rows = self._sample(rows, tier_ends)
        values = amtl_kernels.tiered_embedding(
            blocks, tier_ends, rows, embedding_dim=dim, bounds_check="off", **few
        )
        squares = torch.linalg.vector_norm(values.to(torch.float32), dim=1).square_()
        part = torch.bucketize(rows, self.ends, right=True)
        # What is no number, or too large for one, passes; a part that has taken it in never would.
        finite = squares.isfinite()
        squares = squares.where(finite, 0)
        total = torch.zeros_like(self.mean_square).index_add_(0, part, squares)
        count = torch.zeros_like(total).index_add_(0, part, finite.to(total.dtype))
        total /= self.widths.clamp(min=1)
        before = self.mean_square
        if self._in_step is not None:
            if self._in_step.sums is not None:
                before, more, number = self._in_step.sums
                total, count = total + more, count + number
            else:
                before = before.clone()
            self.__dict__["_in_step"] = self._in_step._replace(sums=(before, total, count))
        self.mean_square.copy_(before + (total - count * before) / (count + _WINDOW))
        return True

    @torch.no_grad()
    def cut_off(self, blocks: Sequence[Tensor], tier_ends: Sequence[int], rows: Tensor) -> float:
        """Share of the numbers in a sample of these rows that no code comes near.

        Of trained numbers hardly any are, unless something wrote them that left the step sizes
        behind.

        Args:
            blocks: the tiers.
            tier_ends: first place after each.
            rows: places that are looked up, integer of any shape, maybe out of range.
        """
        rows = self._sample(rows, tier_ends)
        beyond, count = self.mean_square.new_zeros(2)
        reach = self.steps() * 2 ** (self.bits - 1)
        pieces = cut([block.detach() for block in blocks], tier_ends, self.parts())
        for start, end, piece, most in zip(
            (0, *self._ends), self._ends, pieces, reach, strict=False
        ):
            numbers = piece[rows[(rows >= start) & (rows < end)] - start].abs()
            beyond, count = beyond + (numbers > most).sum(), count + numbers.count_nonzero()
        return float(beyond / count.clamp(min=1))

    def _sample(self, rows: Tensor, tier_ends: Sequence[int]) -> Tensor:
        """Some of these places, [n], all of them in range."""
        rows = rows.reshape(-1)
        if len(rows) > _SAMPLE:
            rows = rows.index_select(0, self.spread * len(rows) >> 32)
        return rows.clamp(0, max(0, tier_ends[-1] - 1))

    def _takes_turn(self, step: int | None) -> bool:
        """Whether this lookup is followed: with all others of its training step, or none."""
        last = self._in_step
        if step is not None and last is not None and step == last.number and last.calls < _EVERY:
            self.__dict__["_in_step"] = last._replace(calls=last.calls + 1)
            return last.follows
        turn = self.__dict__["turn"] = self.turn + 1
        follows = is_drawn(turn)
        self.__dict__["_in_step"] = None if step is None else _InStep(step, 1, follows, None)
        return follows

    @torch.no_grad()
    def recode(self, blocks: Sequence[Tensor], steps: Tensor) -> None:
        """Give parts whose step size should be another one that, and codes of it, in place.

        Args:
            blocks: the codes, a block a part.
            steps: present step sizes, float32 [C].
        """
        wanted = self.steps()
        ratio = wanted / steps
        moved = ((ratio > _LEEWAY) | (ratio * _LEEWAY < 1)).nonzero().flatten().tolist()
        if not moved:
            return
        # Seeds of optimizer steps are positive.
        self.__dict__["changes"] = self.changes + 1
        for part in moved:
            block, step = blocks[part].detach(), steps[part]
            width = numbers_in(block, self.bits)
            count = max(1, _CHUNK // max(1, width))
            for first in range(0, len(block), count):
                codes = block[first : first + count]
                places = torch.arange(first, first + len(codes), device=block.device)
                random = rounding_bits(places, width, -self.changes)
                numbers = decode_codes(codes, step, self.bits)
                found = code_stochastically(numbers, wanted[part], self.bits, random)
                codes.copy_(pack_codes(found, self.bits))
        steps[moved] = wanted[moved]


def encode_parts(
    weight: Tensor, plan: TierPlan, row_dims: Tensor, bits: int, name: str, least: float = 0.0
) -> tuple[Tensor, list[Tensor]]:
    """A table as codes, the nearest ones, with step sizes for its mean squares.

    Args:
        weight: [N, D].
        plan: a tier a part.
        row_dims: integer [N], sizes beyond which numbers are zeros.
        bits: 2, 4, 8 or 16.
        name: of the table.
        least: root of the least mean square to begin with.

    Returns:
        Mean square of each part, float32 [C], and its codes. One part after the other: never is the
        whole table there a second time.

    Raises:
        ValueError: a number is not finite, or too large.
    """
    squares, codes = [], []
    for part in range(len(plan.ends)):
        (block,) = split_rows(weight.detach(), plan, row_dims, [part])
        _require_finite(block, name)
        squares.append(_mean_square(block, bits, name).clamp(min=least**2))
        codes.append(pack_codes(encode(block, step_of(squares[-1], bits), bits), bits))
    return torch.stack(squares), codes


def mean_squares(
    blocks: Sequence[Tensor], tier_ends: Sequence[int], parts: Parts, bits: int, name: str
) -> Tensor:
    """Mean square of the numbers in each part, float32 [C].

    Args:
        blocks: the tiers.
        tier_ends: first place after each.
        parts: each within one tier.
        bits: 2, 4, 8 or 16.
        name: of the table.

    Raises:
        ValueError: a number is not finite, or so large that the table's type cannot show what
            rounding makes of it.
    """
    pieces = cut(blocks, tier_ends, parts)
    return torch.stack([_mean_square(piece.detach(), bits, name) for piece in pieces])


def ranges_of(weight: Tensor, fields: Tensor) -> Tensor:
    """What shares a step size in a table whose rows stay where they are: a field, or a part of it.

    A table of users and items may hold numbers of several sizes; rows that lie together are looked
    at. Of a table that has not been trained it is the field.

    Args:
        weight: [N, D].
        fields: int64 [N], ascending.

    Returns:
        int64 [N], ascending. O(N * D).
    """
    if not len(weight):
        return fields
    rows = torch.arange(len(weight), device=weight.device)
    size = max(_LEAST_RANGE, -(-len(weight) // _RANGES))
    pieces = fields * (len(weight) // size + 1) + rows // size
    _, piece, counts = pieces.unique_consecutive(return_inverse=True, return_counts=True)
    squares = torch.linalg.vector_norm(weight.detach().float(), dim=1).square_()
    totals = torch.zeros(len(counts), device=weight.device).index_add_(0, piece, squares)
    of_fields = fields[counts.cumsum(0) - 1].tolist()
    groups: list[int] = []
    before, total, count = -1, 0.0, 0
    for field, more, number in zip(of_fields, totals.tolist(), counts.tolist(), strict=True):
        mine, theirs = more * count, total * number
        near = max(mine, theirs) <= _APART * min(mine, theirs)
        if field == before and near:
            total, count = total + more, count + number
        else:
            total, count = more, number
            groups.append(0)
        groups[-1] += 1
        before = field
    repeats = torch.tensor(groups, device=weight.device)
    return torch.arange(len(groups), device=weight.device).repeat_interleave(repeats)[piece]


def _require_finite(values: Tensor, name: str) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"table {name!r} holds numbers that are not finite, which have no code, and no step "
            "size fits them and the others. (~layer.weight.isfinite()).any(1).nonzero() before "
            "freezing are their rows: give these other numbers, or take bits=None"
        )


def _mean_square(values: Tensor, bits: int, name: str) -> Tensor:
    """Of numbers whose step size will do; of none, 0."""
    square = values.float().square().mean() * _reach(values, bits) ** 2
    if not bool(square.isfinite()):
        _require_finite(values, name)
    largest = step_of(square, bits) * (2**bits - 1) / 2
    if bool(largest > torch.finfo(values.dtype).max):
        raise ValueError(
            f"table {name!r} holds numbers of up to {float(values.abs().max()):.3g}, too large to "
            f"be rounded to {bits} bits: {values.dtype} has no step size for them"
        )
    return square.nan_to_num()


def _reach(values: Tensor, bits: int) -> float:
    """How much farther than those of a normal distribution numbers reach, by what rounding loses.

    Where some rows are much larger than others, all of these would be cut off.
    """
    rows = max(1, _CHUNK // max(1, values.shape[1]))
    sample = values.detach()[:: -(-len(values) // rows) or 1].float()
    square = sample.square().mean()
    if not sample.numel() or not bool(square.isfinite()) or not bool(square > 0):
        return 1.0

    half, most = (2**bits - 1) / 2, torch.finfo(values.dtype).max

    def error(wider: float) -> float:
        step = step_of(square, bits) * wider
        if wider > 1 and bool(step * half > most):
            return math.inf
        return float(((encode(sample, step, bits).float() - half) * step - sample).square().mean())

    errors = {wider: error(wider) for wider in (1.0, *_WIDER)}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < _GAIN * errors[1.0] else 1.0


def cut(blocks: Sequence[Tensor], tier_ends: Sequence[int], parts: Parts) -> list[Tensor]:
    """The tiers cut into parts, as views."""
    pieces, tier, start = [], 0, 0
    for end in parts.ends:
        while start >= tier_ends[tier]:
            tier += 1
        base = tier_ends[tier - 1] if tier else 0
        pieces.append(blocks[tier][start - base : end - base])
        start = end
    return pieces
