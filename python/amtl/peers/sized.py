"""Rows of different widths that nothing learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.layer.embedding import AMTLEmbedding
from amtl.peers.base import DoesNotFit, Facts, Part, Peer

_BLOCKS = 4
"""Popularity blocks of a field."""


class MixedDimension(Peer):
    """Mixed dimension embeddings, Ginart et al. 2019 (arXiv 1909.11810), popularity-based.

    By the numbers of the paper's first version, which later ones changed: block b of the rows has
    width `d_b = lambda * p_b^alpha` (section 4.2, algorithm 3) and a projection `[d_b, D]` unless
    d_b is D (section 4, algorithm 1). Blocks are the fields, or within each field four with equally
    many lookups (section 4.1, algorithm 2): the paper's two schemes.

    p_b is how often a row of the block is looked up, as in the authors' code (`md_solver` of DLRM,
    queries over rows), where the first version has the lookups of the block. lambda is the largest
    that the budget allows, projections counted; widths are rounded to whole numbers, at least 1.

    Args:
        facts: see `Peer`.
        alpha: temperature, 0 for equal widths to 1.
        blocks: "field" or "popularity".
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {
        "alpha": (0.3, 0.15, 0.6),
        "blocks": ("field", "popularity"),
    }
    block: Tensor
    place: Tensor

    def __init__(self, facts: Facts, alpha: float = 0.3, blocks: str = "field") -> None:
        super().__init__(facts)
        if blocks not in ("field", "popularity"):
            raise ValueError(f"blocks must be field or popularity, not {blocks!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {alpha}")
        block = facts.fields
        if blocks == "popularity":
            block = facts.fields * _BLOCKS + _quarters(facts)
        _, block = torch.unique(block, return_inverse=True)
        rows = torch.bincount(block)
        lookups = torch.bincount(block, weights=facts.counts.double())
        self.widths = mixed_widths((lookups + 1) / rows, rows, alpha, facts.dim, facts.budget)
        order = torch.argsort(block, stable=True)
        place = torch.empty_like(block)
        place[order] = torch.cat([torch.arange(int(n)) for n in rows])
        self.register_buffer("block", block, persistent=False)
        self.register_buffer("place", place, persistent=False)
        self.tables = nn.ParameterList(
            self.row_table(int(n), d) for n, d in zip(rows, self.widths, strict=True)
        )
        self.projections = nn.ParameterList(
            nn.init.xavier_uniform_(torch.empty(d, facts.dim), generator=self._generator)
            for d in self.widths
            if d < facts.dim
        )

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        blocks, places = self.block[rows], self.place[rows]
        parts, where = [], []
        projections = iter(self.projections)
        for b, table in enumerate(self.tables):
            here = (blocks == b).nonzero().squeeze(1)
            values = self.look_up(table, places[here])  # type: ignore[arg-type]
            parts.append(values if table.shape[1] == self.dim else values @ next(projections))
            where.append(here)
        back = torch.argsort(torch.cat(where))
        return torch.cat(parts)[back]

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part(sum(t.numel() for t in self.tables), 32),
            Part(sum(p.numel() for p in self.projections), 32),
            Part(len(self.widths), 64),  # ends and widths of blocks
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * torch.tensor(self.widths)[self.block]


def mixed_widths(
    popularity: Tensor, rows: Tensor, alpha: float, dim: int, budget: int
) -> list[int]:
    """Widths of blocks in proportion to `popularity^alpha`, the largest within the budget.

    Args:
        popularity: float64 `[b]`, mean lookups of a row of each block.
        rows: int64 `[b]`.
        alpha: temperature.
        dim: D, the largest width.
        budget: bytes for numbers, projections, and 8 for each block.

    Raises:
        DoesNotFit: a number a row is more than that.
    """
    shape = (popularity / popularity.max()) ** alpha
    for scale in torch.logspace(0, -3, 1500, dtype=torch.float64) * dim / float(shape.min()):
        widths = (scale * shape).round().clamp(1, dim).long()
        projected = widths[widths < dim].sum() * dim
        if 4 * int((rows * widths).sum() + projected) + 8 * len(rows) <= budget:
            return [int(w) for w in widths]
    raise DoesNotFit(f"a number a row takes more than {budget:,} bytes")


def _quarters(facts: Facts) -> Tensor:
    """Which quarter of its field's lookups, from the most frequent value on, a row is in."""
    quarters = torch.empty(facts.rows, dtype=torch.int64)
    ranks = facts.ranks()
    for f in range(len(facts.field_sizes)):
        rows = (facts.fields == f).nonzero().squeeze(1)
        rows = rows[torch.argsort(ranks[rows])]
        before = facts.counts[rows].double().cumsum(0) - facts.counts[rows]
        total = max(1.0, float(facts.counts[rows].sum()))
        quarters[rows] = (before / total * _BLOCKS).long().clamp(max=_BLOCKS - 1)
    return quarters


class Shuffled(Peer):
    """The sizes of the capacity rule, dealt out to rows at random: are they worth anything?

    Not of a paper: the paper of AMTL has no such ablation. Rows show a prefix, as there.

    Args:
        facts: see `Peer`.
        capacity_bits: see `amtl.layer.options.SearchOptions`.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"capacity_bits": (4.0, 16.0, 1.0)}
    widths: Tensor

    def __init__(self, facts: Facts, capacity_bits: float = 4.0) -> None:
        super().__init__(facts)
        spare = facts.budget - 8 * (facts.dim + 1)
        if spare <= 0:
            raise DoesNotFit(f"ends of the widths take more than {facts.budget:,} bytes")
        rule = AMTLEmbedding(
            facts.rows,
            facts.dim,
            counts=facts.counts,
            field_sizes=facts.field_sizes,
            budget=min(1.0, spare / self.dense_bytes()),
            bits=None,
            capacity_bits=capacity_bits,
            tier_width=1,
        )
        widths = rule.row_dims().long()
        order = torch.randperm(facts.rows, generator=self._generator)
        self.register_buffer("widths", widths[order], persistent=False)
        self.weight = self.row_table(facts.rows, facts.dim)

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        mask = torch.arange(self.dim) < self.widths[rows][:, None]
        return self.look_up(self.weight, rows) * mask

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part(int(self.widths.sum()), 32),
            Part(len(self.widths.unique()), 64),  # ends of widths
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * self.widths
