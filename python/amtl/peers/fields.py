"""Widths of whole fields, searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.peers.base import Facts, Part, SearchingPeer, choices_in_budget


class AutoDim(SearchingPeer):
    """AutoDim, Zhao et al. 2020 (arXiv 2006.14827), sections 2.2 to 2.4: a width for each field.

    The search shows a value as the mean of its first 1, 2, 4, ... D numbers (the shared weights of
    section 2.2), each candidate mapped linearly to D and batch-normalised, weighed by a
    Gumbel-softmax of the field's `alpha` (equation 5, temperature 1). alpha learns on validation
    batches, all else on training batches, in turns (section 2.3, to first order). Then each field
    has its most likely width, and all trains again from the start, mapped to D but without the
    normalisation (section 2.4).

    The widths so found meet no budget: they are moved to the largest that does by
    `log p - c * bytes`, one c for all fields.

    Args:
        facts: see `Peer`.
        noise: share of the Gumbel noise, 0 for none.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"noise": (1.0, 0.0)}
    choice: Tensor

    def __init__(self, facts: Facts, noise: float = 1.0) -> None:
        super().__init__(facts)
        self.noise = noise
        fields = len(facts.field_sizes)
        self.widths = [1 << n for n in range(facts.dim.bit_length()) if 1 << n < facts.dim]
        self.widths.append(facts.dim)
        self.weight = self.row_table(facts.rows, facts.dim)
        self.alpha = nn.Parameter(torch.zeros(fields, len(self.widths)))
        self.maps = nn.ParameterList(
            torch.stack(
                [
                    nn.init.xavier_uniform_(torch.empty(d, facts.dim), generator=self._generator)
                    for _ in range(fields)
                ]
            )
            for d in self.widths
        )
        self.register_buffer("fields", facts.fields, persistent=False)
        self.register_buffer("choice", torch.zeros(fields, dtype=torch.int64))

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        values, fields = self.look_up(self.weight, rows), self.get_buffer("fields")[rows]
        weights = None if self.phase == "frozen" else self._weights()
        parts, where = [], []
        for f in range(len(self.choice)):
            here = (fields == f).nonzero().squeeze(1)
            where.append(here)
            if weights is None:
                parts.append(self._mapped(values[here], f, int(self.choice[f])))
                continue
            shown = torch.zeros_like(values[here])
            for o in range(len(self.widths)):
                mapped = values[here][:, : self.widths[o]] @ self.maps[o][f]
                if len(here) > 1:
                    mapped = nn.functional.batch_norm(mapped, None, None, training=True)
                shown = shown + weights[f, o] * mapped
            parts.append(shown)
        return torch.cat(parts)[torch.argsort(torch.cat(where))]

    def _mapped(self, values: Tensor, field: int, option: int) -> Tensor:
        width = self.widths[option]
        return values if width == self.dim else values[:, :width] @ self.maps[option][field]

    def _weights(self) -> Tensor:
        logits = torch.log_softmax(self.alpha, 1)
        if self.training and self.noise:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = logits - self.noise * torch.log(-torch.log(uniform))
        return torch.softmax(logits, 1)

    def architecture(self) -> list[nn.Parameter]:
        """See `SearchingPeer`."""
        return [self.alpha] if self.phase == "search" else []

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        return list(self.maps)

    def costs(self) -> Tensor:
        """Bytes of each field at each width, its map included: int64 `[F, O]`."""
        rows, widths = torch.tensor(self.facts.field_sizes), torch.tensor(self.widths)
        maps = torch.where(widths < self.dim, widths * self.dim, 0)
        return 4 * (rows[:, None] * widths + maps)

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        spare = self.facts.budget - 4 * len(self.choice)
        scores = torch.log_softmax(found.alpha, 1)
        self.choice.copy_(choices_in_budget(scores, self.costs(), spare))

    def parts(self) -> list[Part]:
        """See `Peer`."""
        widths = [self.widths[o] for o in self.choice.tolist()]
        sizes = self.facts.field_sizes
        numbers = sum(n * d for n, d in zip(sizes, widths, strict=True))
        return [
            Part("numbers", numbers, 32),
            Part("maps", sum(d * self.dim for d in widths if d < self.dim), 32),
            Part("widths of fields", len(widths), 32),
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * torch.tensor(self.widths)[self.choice][self.facts.fields]
