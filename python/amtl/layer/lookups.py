"""Lookups of a table in either phase: rows, and bags of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amtl.layer.table_rows import TableRows


class TableLookups(TableRows):
    """The lookups of `AMTLTable`."""

    def _embed(self, input: Tensor) -> Tensor:
        """The rows at indices of any shape: `input.shape + [D]`."""
        self._check_caller()
        bounds = self._operator_bounds()
        if self.tier_ends is not None:
            return self._frozen("tiered_embedding", input)
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
            if self.steps is not None and per_sample_weights is not None:
                per_sample_weights = per_sample_weights.to(torch.float32)
            return self._frozen(
                "tiered_embedding_bag",
                input,
                offsets,
                mode=mode,
                per_sample_weights=per_sample_weights,
                include_last_offset=include_last_offset,
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

    def _keep_up(self, rows: Tensor, few: dict[str, Any]) -> None:
        """Let the step sizes of codes that train follow what is looked up."""
        assert self.rounding is not None and self.steps is not None and self.tier_ends is not None
        if torch.is_grad_enabled() and self.fused_optimizer is None:
            raise RuntimeError(
                f"table {self.name!r} has no masters, and codes have no gradient: "
                "layer.fuse(functools.partial(amtl_kernels.optim.RowwiseAdagrad, lr=...)) trains "
                "them (of a model: amtl.fuse), eval() or torch.no_grad() does without"
            )
        tiers = self._tiers()
        if self.rounding.follow(tiers, self.tier_ends, rows, self.embedding_dim, **few):
            # In place: lookups whose backward is to come find codes and step sizes that fit.
            self.rounding.recode(tiers, self.steps)

    def _frozen(self, name: str, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A lookup in the tiers, rounded or decoded where the table has few bits."""
        assert self.tier_ends is not None
        rows = self._renormed(self._frozen_rows(input))
        tiers, few, dim = self._tiers(), {}, self.embedding_dim
        if self.steps is not None:
            few = {"steps": self.steps.to(torch.float32), "bits": self.options.bits}
            if self.rounding is not None and self.training:
                self._keep_up(rows, few)
        elif self.rounding is not None:
            if self.training:
                # Before the lookup, so that one that checkpointing repeats shows the same.
                self.rounding.follow(tiers, self.tier_ends, rows, dim)
            few = self.rounding.arguments(self.dtype)
        out = self._call(
            name,
            tiers,
            self.tier_ends,
            rows,
            *args,
            embedding_dim=dim,
            padding_idx=self._frozen_padding(),
            bounds_check=self._operator_bounds(),
            **few,
            **kwargs,
        )
        return out if self.steps is None else out.to(self.steps.dtype)
