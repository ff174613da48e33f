"""Frozen tables that are looked at once and looked up in many times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from amtl_kernels._arguments import FewBits, Tables, numbers_of
from amtl_kernels._calls import call
from amtl_kernels._checks import (
    BoundsCheck,
    Mode,
    bounds_of,
    check_indices,
    check_tiers,
    few_bits,
    padding_of,
    plain,
    pooled,
)
from amtl_kernels._planned import Plan
from amtl_kernels.optim import RowOptimizer


class TieredTable(NamedTuple):
    """What :func:`amtl_kernels.tiered_embedding` makes of its tiers, for calls with the same ones.

    To look at a dozen tiers takes as long as a small lookup in them. Blocks and steps are held as
    they are: what is written into them shows. The fields are for this package; make one by
    :meth:`of`.
    """

    tables: Tables
    few: FewBits | None
    rows: int
    numbers: Tensor
    """What has the type of the output."""
    plan: Plan

    @classmethod
    def of(
        cls,
        blocks: Sequence[Tensor],
        tier_ends: Sequence[int],
        embedding_dim: int | None = None,
        steps: Tensor | None = None,
        bits: int | None = None,
        step_ends: Sequence[int] | None = None,
    ) -> TieredTable:
        """A table of tiers; arguments and errors are those of ``tiered_embedding``. O(tiers)."""
        few = few_bits(blocks, steps, bits, step_ends)
        dim = check_tiers(blocks, tier_ends, embedding_dim, bits)
        tables = Tables(list(blocks), [len(blocks)], [dim])
        numbers = numbers_of(blocks, steps)
        return cls(tables, few, tier_ends[-1], numbers, Plan(tables, few, numbers))

    def embedding(
        self,
        indices: Tensor,
        *,
        padding_idx: int | None = None,
        bounds_check: BoundsCheck = "raise",
        sparse: bool = True,
        optimizer: RowOptimizer | None = None,
    ) -> Tensor:
        """:func:`amtl_kernels.tiered_embedding` in this table."""
        indices = check_indices(indices, self.tables.blocks[0].device)
        bags, bounds = plain(indices, padding_of(padding_idx, self.rows)), bounds_of(bounds_check)
        return call(self.tables, [], bags, bounds, sparse, optimizer, self.few, self.plan)

    def embedding_bag(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        *,
        mode: Mode = "sum",
        per_sample_weights: Tensor | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        bounds_check: BoundsCheck = "raise",
        sparse: bool = True,
        optimizer: RowOptimizer | None = None,
    ) -> Tensor:
        """:func:`amtl_kernels.tiered_embedding_bag` in this table."""
        padding = [padding_of(padding_idx, self.rows)]
        weights = (per_sample_weights, padding, include_last_offset)
        bags = pooled(self.numbers, indices, offsets, mode, *weights)
        bounds = bounds_of(bounds_check)
        return call(self.tables, [], bags, bounds, sparse, optimizer, self.few, self.plan)
