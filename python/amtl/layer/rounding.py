"""Numbers of few bits: training that rounds, and tables of integers.

Rows of one field whose counts are alike, and which are equally wide, share a step size s. A number
of b bits is a code u in 0..2^b - 1 and stands for `(u - (2^b - 1) / 2) * s`: levels lie evenly on
both sides of zero, which is none of them. In training the table stays as it is and what is looked
up is rounded; gradients pass straight through (as in LSQ, arXiv 1902.08153, where step sizes are
learned; here they follow the mean square of the numbers, which needs no learning rate).
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import amtl_kernels

_BOUNDS = {
    "raise": amtl_kernels.reference.RAISE,
    "clamp": amtl_kernels.reference.CLAMP,
    "off": amtl_kernels.reference.OFF,
}

_MOST_BLOCKS = 1024
"""Of a table in the operators."""

BITS = (2, 4, 8)

_STEP = {2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Step sizes that lose least of a normal distribution, in standard deviations."""

_LEAST_STEP = 1e-30
_MOMENTUM = 0.1

PART_BYTES = 8
"""A step size and where its rows end."""


class Parts(NamedTuple):
    """Places of the tiers with one width and one step size, one after the other.

    Attributes:
        ends: first place after each part.
        widths: stored width of each part.
    """

    ends: list[int]
    widths: list[int]


def unit(bits: int) -> int:
    """Numbers that fill a byte; rows are stored in multiples of it."""
    return max(1, 8 // bits)


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


def encode(values: Tensor, step: float | Tensor, bits: int) -> Tensor:
    """Codes of numbers, uint8 of their shape; numbers out of range get the nearest code."""
    half = (2**bits - 1) / 2
    return torch.round(values / step + half).clamp_(0, 2 * half).to(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, w] as bytes [n, w * bits / 8], the first code in the lowest bits.

    Args:
        codes: uint8, w a multiple of `unit(bits)`.
        bits: 2, 4 or 8.
    """
    count = unit(bits)
    parts = codes.reshape(len(codes), codes.shape[1] // count, count)
    packed = parts[..., 0].clone()
    for position in range(1, count):
        packed |= parts[..., position] << (bits * position)
    return packed.contiguous()


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_codes`."""
    mask = 2**bits - 1
    parts = [(packed >> (bits * position)) & mask for position in range(unit(bits))]
    return torch.stack(parts, dim=-1).flatten(-2)


def decode(packed: Tensor, step: Tensor, bits: int) -> Tensor:
    """Numbers [n, w] of a block of bytes [n, w * bits / 8] with one step size, or one a row."""
    half = (2**bits - 1) / 2
    return (unpack_codes(packed, bits).to(step.dtype) - half) * step


def in_operators(blocks: Sized, steps: Tensor, per_sample_weights: Tensor | None = None) -> bool:
    """Whether the operators look up in such tiers of integers; they decode to float32 only."""
    if steps.dtype != torch.float32 or len(blocks) > _MOST_BLOCKS:
        return False
    weights = per_sample_weights
    learns = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    return not learns and (weights is None or weights.dtype == torch.float32)


def lookup(
    blocks: Sequence[Tensor],
    ends: Sequence[int],
    steps: Tensor,
    bits: int,
    rows: Tensor,
    dim: int,
    bounds_check: str = "off",
) -> Tensor:
    """Rows of tiers of integers.

    Args:
        blocks: uint8, part `c` as [rows, width * bits / 8].
        ends: first place after each part.
        steps: [C], step size of each part.
        bits: 2, 4 or 8.
        rows: places, integer of any shape.
        dim: D.
        bounds_check: what to do about places out of range, see `amtl_kernels.ops`.

    Returns:
        `rows.shape + [dim]`, of the type of `steps`, zeros beyond a row's width.
    """
    if in_operators(blocks, steps):
        return amtl_kernels.tiered_embedding(
            blocks,
            ends,
            rows,
            embedding_dim=dim,
            bounds_check=bounds_check,  # type: ignore[arg-type]
            steps=steps,
            bits=bits,
        )
    flat = amtl_kernels.reference.check_indices(rows, ends[-1], _BOUNDS[bounds_check])
    out = steps.new_zeros(flat.numel(), dim)
    limits = torch.tensor(ends, device=flat.device)
    part = torch.bucketize(flat, limits, right=True)
    for c in part.unique().tolist():
        block = blocks[c]
        here = (part == c).nonzero().flatten()
        local = flat[here] - (ends[c - 1] if c else 0)
        width = block.shape[1] * 8 // bits
        out[here, :width] = decode(block[local], steps[c], bits)
    return out.reshape(*rows.shape, dim)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, steps: Tensor, widths: Tensor, bits: int) -> Tensor:
        half = (2**bits - 1) / 2
        step = steps[:, None]
        codes = (values / step).add_(half).round_().clamp_(0, 2 * half)
        columns = torch.arange(values.shape[1], device=values.device)
        return codes.sub_(half).mul_(step).masked_fill_(columns >= widths[:, None], 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        # Columns beyond a row's width get none: the lookup behind this one sees to it.
        return grad, None, None, None


class Rounding(nn.Module):
    """Rounds what is looked up in the tiers, and follows the mean square of each part.

    Args:
        bits: 2, 4 or 8.
        parts: see `Parts`.
        mean_square: float32 [C].
    """

    ends: Tensor
    widths: Tensor
    mean_square: Tensor

    def __init__(self, bits: int, parts: Parts, mean_square: Tensor) -> None:
        super().__init__()
        self.bits = bits
        device = mean_square.device
        self.register_buffer("ends", torch.tensor(parts.ends, device=device))
        self.register_buffer("widths", torch.tensor(parts.widths, device=device))
        self.register_buffer("mean_square", mean_square.to(torch.float32))

    def _apply(self, fn: Any, recurse: bool = True) -> Rounding:
        kept = self.mean_square
        super()._apply(fn, recurse)
        self.mean_square = kept.to(self.mean_square.device)
        return self

    def parts(self) -> Parts:
        """The parts."""
        return Parts(self.ends.tolist(), self.widths.tolist())

    def steps(self) -> Tensor:
        """Step size of each part, float32 [C]."""
        return (_STEP[self.bits] * self.mean_square.sqrt()).clamp(min=_LEAST_STEP)

    def forward(self, values: Tensor, rows: Tensor) -> Tensor:
        """Values as they will be stored; gradients pass straight through.

        Args:
            values: [..., D], looked up in the tiers.
            rows: [...], their places.
        """
        flat = values.reshape(-1, values.shape[-1])
        last = len(self.ends) - 1
        part = torch.bucketize(rows.reshape(-1), self.ends, right=True).clamp_(max=last)
        widths = self.widths[part]
        rounded: Tensor = _Round.apply(flat, self.steps()[part].to(flat.dtype), widths, self.bits)
        if self.training:
            self._follow(flat.detach(), part, widths)
        return rounded.reshape(values.shape)

    @torch.no_grad()
    def _follow(self, values: Tensor, part: Tensor, widths: Tensor) -> None:
        squares = torch.linalg.vector_norm(values.to(torch.float32), dim=1).square_()
        total = torch.zeros_like(self.mean_square).index_add_(0, part, squares)
        count = torch.zeros_like(total).index_add_(0, part, widths.to(torch.float32))
        mean = torch.where(count > 0, total / count.clamp(min=1), self.mean_square)
        self.mean_square.lerp_(mean, _MOMENTUM)


def mean_squares(blocks: Sequence[Tensor], tier_ends: Sequence[int], parts: Parts) -> Tensor:
    """Mean square of the numbers in each part, float32 [C].

    Args:
        blocks: the tiers.
        tier_ends: first place after each.
        parts: each within one tier.
    """
    pieces = cut(blocks, tier_ends, parts)
    return torch.stack([p.detach().float().square().mean().nan_to_num() for p in pieces])


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


def pooled(
    values: Tensor,
    offsets: Tensor,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    counted: Tensor | None,
) -> Tensor:
    """Bags of looked-up rows.

    Args:
        values: [L, D].
        offsets: [B], or [B + 1] with `include_last_offset`.
        mode: "sum" or "mean".
        per_sample_weights: [L] or None.
        include_last_offset: see nn.EmbeddingBag.
        counted: bool [L], lookups that count; None for all.

    Returns:
        [B, D]; bags of nothing are zero.
    """
    bags = len(offsets) - int(include_last_offset)
    if bags <= 0:
        return values.new_zeros(0, values.shape[1])
    dtype = values.dtype
    if dtype.itemsize < 4:
        # A bfloat16 stops counting at 256.
        values = values.to(torch.float32)
    if per_sample_weights is not None:
        values = values * per_sample_weights[:, None]
    if counted is not None:
        values = values * counted[:, None]
    positions = torch.arange(len(values), device=values.device)
    # What lies past the last offset goes to a bag of its own, which is cut off.
    bag = torch.bucketize(positions, offsets.to(positions.dtype), right=True) - 1
    out = values.new_zeros(bags + 1, values.shape[1]).index_add(0, bag, values)[:bags]
    if mode == "mean":
        one = values.new_ones(len(values)) if counted is None else counted.to(values.dtype)
        count = values.new_zeros(bags + 1).index_add(0, bag, one)[:bags, None].clamp(min=1)
        # As the operators do, so that frozen tables give the same outputs as codes.
        out = out * (1.0 / count)
    return out.to(dtype)
