"""Numbers left out one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.peers.base import DoesNotFit, Facts, Part, SearchingPeer, served_bytes


def sparse_parts(kept: Tensor, dim: int) -> list[Part]:
    """What a sparse table takes.

    Rows with equally many numbers lie side by side. Beside its numbers, a row has a bit for each
    column or the numbers of its columns, whichever is less; a full row needs neither.

    Args:
        kept: int64 `[N]`, numbers kept of each row.
        dim: D.
    """
    column = max(1, math.ceil(math.log2(dim)))
    positions = torch.where(kept < dim, (kept * column).clamp(max=dim), torch.zeros_like(kept))
    return [
        Part(int(kept.sum()), 32),
        Part(int(positions.sum()), 1),  # their columns
        Part(dim, 64),  # ends of rows of equal length
    ]


class Masked(SearchingPeer):
    """A table with a mask over its numbers."""

    mask: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.weight = self.row_table(facts.rows, facts.dim)
        self.register_buffer("mask", torch.ones(facts.rows, facts.dim, dtype=torch.bool))

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        return self.look_up(self.weight, rows) * self.mask[rows]

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return sparse_parts(self.mask.sum(1), self.dim)

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * self.mask.sum(1)

    def keep_largest(self, scores: Tensor) -> None:
        """Mask all but the numbers of the largest scores `[N, D]`, as many as the budget allows.

        Raises:
            DoesNotFit: none is.
        """
        order = torch.argsort(scores.flatten(), descending=True, stable=True)
        least, most = 0, len(order) + 1
        while most - least > 1:
            middle = (least + most) // 2
            rows = torch.bincount(order[:middle] // self.dim, minlength=self.facts.rows)
            bits = served_bytes(sparse_parts(rows, self.dim))
            least, most = (middle, most) if bits <= self.facts.budget else (least, middle)
        if least == 0:
            raise DoesNotFit(f"not one number fits into {self.facts.budget:,} bytes")
        self.mask.zero_().view(-1)[order[:least]] = True


class MagnitudePruning(Masked):
    """Train, prune, retrain: Han et al. 2015 (arXiv 1506.02626), section 3, on the table alone.

    The numbers smallest in magnitude over the whole table go at once, and training goes on with
    the others at a tenth of the rates (the paper prunes step by step, layer by layer).

    Args:
        facts: see `Peer`.
        by: "value" compares numbers as they are, "row" times the root of their row's count, as a
            saliency would that takes every lookup for equally steep.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"by": ("value", "row")}
    plain_search = True
    keeps_model = True
    goes_on = True

    def __init__(self, facts: Facts, by: str = "value") -> None:
        super().__init__(facts)
        if by not in ("value", "row"):
            raise ValueError(f"by must be value or row, not {by!r}")
        self.by_row = by == "row"

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self.weight.copy_(found.weight)
        scores = found.weight.abs()
        if self.by_row:
            scores = scores * (self.facts.counts.float() + 1).sqrt()[:, None]
        self.keep_largest(scores)


class Pep(Masked):
    """PEP, Liu et al. 2021 (arXiv 2101.07577), section 3: thresholds that are learned.

    The search shows `sign(V) * relu(|V| - sigmoid(s))` (equation 6), V and s trained together, both
    with weight decay, until the budget is met. Of s, which is negative, it makes thresholds rise;
    of V it makes rows fall that few lookups hold up, since Adam moves a number whose gradient is
    decay alone as fast as any other. Then the numbers that survived train again from their initial
    values (the paper's lottery ticket).

    s starts at -7 instead of -15 to -150, as initial weights are small here, and changes `pull`
    times as fast as its learning rate says, since training is shorter. If the search ends first,
    those numbers survive that are most above their threshold.

    Args:
        facts: see `Peer`.
        each: threshold for each "row" or "number" (the paper's feature and feature-dimension).
        pull: see above.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"each": ("row", "number"), "pull": (2.0, 5.0)}
    takes_last = True
    _DECAY = 1e-5
    _START = -7.0

    def __init__(self, facts: Facts, each: str = "row", pull: float = 2.0) -> None:
        super().__init__(facts)
        if each not in ("row", "number"):
            raise ValueError(f"each must be row or number, not {each!r}")
        self.pull = pull
        columns = 1 if each == "row" else facts.dim
        self.threshold = nn.Parameter(torch.full((facts.rows, columns), self._START / pull))

    def thresholds(self) -> Tensor:
        """s, `[N, 1]` or `[N, D]`."""
        return self.pull * self.threshold

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        if self.phase == "frozen":
            return super().embed(rows)
        values = self.look_up(self.weight, rows)
        above = torch.relu(values.abs() - torch.sigmoid(self.thresholds()[rows]))
        return values.sign() * above

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        return [self.threshold] if self.phase == "search" else []

    def penalty(self) -> Tensor:
        """See `SearchingPeer`."""
        squares = self.thresholds().square().sum() + self.weight.square().sum()
        return 0.5 * self._DECAY * squares

    def _above(self) -> Tensor:
        return self.weight.detach().abs() - torch.sigmoid(self.thresholds().detach())

    def searched(self) -> bool:
        """Whether the numbers above their thresholds are within the budget."""
        kept = (self._above() > 0).sum(1)
        return served_bytes(sparse_parts(kept, self.dim)) <= self.facts.budget

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self.keep_largest(found._above())
