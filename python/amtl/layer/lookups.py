"""Lookups of a table in either phase: rows, and bags of rows."""

from __future__ import annotations

import torch
from torch import Tensor

import amtl_kernels
from amtl.layer.rounding import in_operators, lookup, pooled
from amtl.layer.table_rows import TableRows


class TableLookups(TableRows):
    """The lookups of `AMTLTable`."""

    def _embed(self, input: Tensor) -> Tensor:
        """The rows at indices of any shape: `input.shape + [D]`."""
        self._check_caller()
        bounds = self._operator_bounds()
        if self.tier_ends is not None:
            rows = self._renormed(self._frozen_rows(input))
            return self._frozen_lookup(rows)
        assert self.weight is not None and self.row_group is not None
        rows, dims, mask, seed = self._searched(input)
        return self._call(
            "adaptive_embedding",
            self.weight,
            rows,
            self.row_group,
            dims,
            mask,
            seed=seed,
            padding_idx=self.padding_idx,
            bounds_check=bounds,
        )

    def _pool(
        self,
        input: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        mode: str,
        include_last_offset: bool,
    ) -> Tensor:
        """The rows at indices, pooled by bag: [B, D]."""
        self._check_caller()
        bounds = self._operator_bounds()
        if self.tier_ends is not None:
            rows = self._renormed(self._frozen_rows(input))
            if self.steps is not None and in_operators(self.blocks, self.steps, per_sample_weights):
                return amtl_kernels.tiered_embedding_bag(
                    self._tiers(),
                    self.tier_ends,
                    rows,
                    offsets,
                    mode=mode,  # type: ignore[arg-type]
                    per_sample_weights=per_sample_weights,
                    embedding_dim=self.embedding_dim,
                    padding_idx=self._frozen_padding(),
                    include_last_offset=include_last_offset,
                    bounds_check=bounds,  # type: ignore[arg-type]
                    steps=self.steps,
                    bits=self.options.bits or 8,
                )
            if self.rounding is not None or self.steps is not None:
                return self._bags_of_few_bits(
                    rows, offsets, per_sample_weights, mode, include_last_offset
                )
            return self._call(
                "tiered_embedding_bag",
                self._tiers(),
                self.tier_ends,
                rows,
                offsets,
                mode=mode,
                per_sample_weights=per_sample_weights,
                embedding_dim=self.embedding_dim,
                padding_idx=self._frozen_padding(),
                include_last_offset=include_last_offset,
                bounds_check=bounds,
            )
        assert self.weight is not None and self.row_group is not None
        rows, dims, mask, seed = self._searched(input)
        return self._call(
            "adaptive_embedding_bag",
            self.weight,
            rows,
            offsets,
            self.row_group,
            dims,
            mask,
            mode=mode,
            per_sample_weights=per_sample_weights,
            padding_idx=self.padding_idx,
            include_last_offset=include_last_offset,
            seed=seed,
            bounds_check=bounds,
        )

    def _searched(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """Rows to look up in the search phase, sizes and soft mask of the groups, and the seed."""
        noisy = self._noisy()
        dims, mask, sizes = self._head()(noisy)
        self._notice_learning(sizes)
        rows = self._renormed(self._searched_rows(input, sizes))
        return rows, dims, mask, self._seed(noisy)

    def _renormed(self, rows: Tensor) -> Tensor:
        """These rows, scaled in the table if it has a `max_norm`."""
        if self.max_norm is not None:
            self._renorm(rows)
        return rows

    def _frozen_lookup(self, rows: Tensor) -> Tensor:
        """Rows of the tiers, rounded or decoded where the table has few bits: [..., D]."""
        assert self.tier_ends is not None
        bounds, dim = self._operator_bounds(), self.embedding_dim
        if self.steps is not None:
            bits = self.options.bits or 8
            return lookup(self._tiers(), self.tier_ends, self.steps, bits, rows, dim, bounds)
        values = self._call(
            "tiered_embedding",
            self._tiers(),
            self.tier_ends,
            rows,
            embedding_dim=dim,
            padding_idx=self._frozen_padding(),
            bounds_check=bounds,
        )
        if self.rounding is None:
            return values
        rounded: Tensor = self.rounding(values, rows)
        return rounded

    def _bags_of_few_bits(
        self,
        rows: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        mode: str,
        include_last_offset: bool,
    ) -> Tensor:
        """Bags of frozen rows, which are rounded or decoded before they are pooled."""
        if offsets is None:
            if rows.dim() != 2:
                raise ValueError(f"without offsets, input must be [B, l], got {tuple(rows.shape)}")
            offsets = torch.arange(len(rows), device=rows.device) * rows.shape[1]
            rows, include_last_offset = rows.reshape(-1), False
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights.reshape(-1)
        amtl_kernels.reference.check_offsets(offsets, rows.numel())
        padding = self._frozen_padding()
        counted = None if padding is None else rows != padding
        values = self._frozen_lookup(rows)
        return pooled(values, offsets, mode, per_sample_weights, include_last_offset, counted)
