"""The arguments of the operators in their two groups, and what forwards and backwards derive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CLAMP = 2
"""The value of ``bounds_check`` that moves indices into range."""


class Tables(NamedTuple):
    """The arguments that describe tables, in the order of the schemas."""

    blocks: list[Tensor]
    block_counts: list[int]
    dims: Sequence[int] = ()
    sizes: Sequence[Tensor] = ()
    row_groups: Sequence[Tensor] = ()
    seed: int = 0

    def rows(self) -> list[int]:
        """Of each table."""
        blocks = iter(self.blocks)
        return [sum(next(blocks).shape[0] for _ in range(n)) for n in self.block_counts]


class Codes(NamedTuple):
    """What makes numbers of tables of few bits: step sizes of their blocks, and their bits."""

    steps: list[Tensor]
    bits: list[int]


class Bags(NamedTuple):
    """The arguments that describe lookups, in the order of the schemas."""

    indices: Tensor
    offsets: Tensor | None
    per_sample_weights: Tensor | None
    pooling: int
    padding_idx: list[int]
    include_last_offset: bool


def clamped(indices: Tensor, offsets: Tensor | None, rows: Sequence[int]) -> Tensor:
    """The indices as a forward with ``bounds_check="clamp"`` uses them."""
    if len(rows) == 1 or offsets is None:
        return indices.clamp(0, rows[0] - 1)
    bags = (offsets.shape[0] - 1) // len(rows)
    if bags == 0:
        return indices
    positions = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    table = torch.bucketize(positions, offsets[bags::bags].contiguous(), right=True)
    last = torch.tensor([n - 1 for n in rows], device=indices.device, dtype=indices.dtype)
    return indices.clamp(min=0).minimum(last[table.clamp(max=len(rows) - 1)])


def split_masks(flat: Tensor, sizes: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The mask gradients ``[G_t, D_t]`` in the flat one."""
    counts = [each.shape[0] * dim for each, dim in zip(sizes, dims, strict=True)]
    return [part.view(-1, dim) for part, dim in zip(flat.split(counts), dims, strict=True)]
