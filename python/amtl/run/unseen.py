"""Rows of values that training has not seen: what the model is to take them for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from amtl.data import Encoder
from amtl.data.encoded import EncodedData
from amtl.run import methods

_SOME = 0.01
"""Share of unseen values from which on a field's out-of-vocabulary row is trained for them."""
_MOST = 0.5
"""Share of hidden values at most: the others are learned from rows that have them."""


class Hiding:
    """Takes values as unseen in training, as often as held out rows hold values that are.

    All that a row that trains has is known. Many of the rows to come have an item, say, that is
    new, and of which all that is known are its author and the user: what these say by themselves is
    learned from rows whose item is hidden, and so is what unseen items are like. A value that comes
    `c` times is hidden in `a / (a + c)` of its rows, for what is unseen is rare; `a` is such that
    as many of a field are hidden as held out rows lack. Fields of several values, whose average
    hardly misses one, stay as they are, and so do those whose out-of-vocabulary row is trained on
    values that are too rare for one of their own.

    Args:
        encoder: fitted on the rows that train.
        held_out: encoded rows that stand for those to come.
    """

    def __init__(self, encoder: Encoder, held_out: EncodedData) -> None:
        self.fields = fields_to_hide(encoder, held_out)
        """Numbers of the fields that have values hidden."""
        self._shares = torch.zeros(encoder.num_rows)
        self._unseen = torch.arange(encoder.num_rows, dtype=torch.int32)
        for field in self.fields:
            vocabulary, rows = encoder.vocabularies[field], encoder.field_rows(field)
            share = min(_unseen(held_out, encoder.names[field]), _MOST)
            self._shares[rows] = _hidden(vocabulary.counts.double(), share).float()
            self._unseen[rows] = rows[vocabulary.oov_row].to(torch.int32)

    def hide(self, indices: Tensor, seed: int) -> Tensor:
        """The rows that are looked up, some of them those of unseen values; O(lookups).

        Args:
            indices: int32, of a batch of rows that train.
            seed: of the draw.
        """
        if not self.fields:
            return indices
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.rand(indices.shape, generator=generator) < self._shares[indices]
        return torch.where(hidden, self._unseen[indices], indices)


def fields_to_hide(encoder: Encoder, held_out: EncodedData) -> list[int]:
    """Numbers of the fields of which held out rows lack enough, and training lacks none; O(F)."""
    singles = held_out.rows.shape[1]
    return [
        field
        for field, vocabulary in enumerate(encoder.vocabularies[:singles])
        if _unseen(held_out, encoder.names[field]) >= _SOME
        and vocabulary.counts[vocabulary.oov_row] <= 0
        and vocabulary.size > 1
    ]


def _unseen(held_out: EncodedData, name: str) -> float:
    """Share of a field's values that training has not seen."""
    return held_out.unknown[name] / max(1, held_out.values[name])


def _hidden(counts: Tensor, share: float) -> Tensor:
    """Which part of each value's rows is hidden for that share of all, by float64 counts `[n]`."""
    low, high = 0.0, float(counts.sum())
    for _ in range(60):
        middle = (low + high) / 2
        parts = middle / (middle + counts)
        low, high = (
            (middle, high) if (parts * counts).sum() < share * counts.sum() else (low, middle)
        )
    return high / (high + counts)


@torch.no_grad()
def settle_unseen(table: nn.Module, encoder: Encoder, trained: Collection[int] = ()) -> None:
    """Gives out-of-vocabulary rows that nothing trains the mean of their field's rows.

    They would stay as they were drawn, next to zero, where the MLP has never been: of a column of
    two values, an unseen one took predictions of 4 % to 9 %. Rare values count as much as frequent
    ones, for what is unseen is rare. Where rows that keep no numbers are looked up as that row, it
    is trained and stays. So do tables of peers, codes without masters, and sizes being searched.

    Args:
        table: of `methods.build_table`.
        encoder: whose rows it has.
        trained: numbers of fields whose row is trained, see `Hiding`.

    Complexity:
        O(N * D) where there are such rows.
    """
    coded = getattr(table, "steps", None) is not None
    if methods.is_peer(table) or coded or not methods.is_frozen(table):
        return
    blocks = methods.table_parameters(table)
    places_in_all = sum(map(len, blocks))
    order: Tensor | None = getattr(table, "row_order", None)
    for field, vocabulary in enumerate(encoder.vocabularies):
        if field in trained or vocabulary.counts[vocabulary.oov_row] > 0 or vocabulary.size == 1:
            continue
        rows = encoder.field_rows(field).to(blocks[0].device)
        places = rows if order is None else order[rows].long()
        own = int(places[vocabulary.oov_row])
        others = torch.cat([places[: vocabulary.oov_row], places[vocabulary.oov_row + 1 :]])
        # Rows that keep no numbers have its place, or one behind all.
        if bool(((others == own) | (others >= places_in_all)).any()):
            continue
        _average(blocks, own, others)


def _average(blocks: Sequence[Tensor], own: int, others: Tensor) -> None:
    """Writes into one place of blocks [n_c, w_c] the mean over others; what is cut off is zero."""
    width = max(block.shape[1] for block in blocks)
    total = torch.zeros(width, dtype=torch.float64, device=others.device)
    begin, found = 0, None
    for block in blocks:
        inside = others[(others >= begin) & (others < begin + len(block))] - begin
        total[: block.shape[1]] += block[inside].sum(0, dtype=torch.float64)
        if begin <= own < begin + len(block):
            found = block[own - begin]
        begin += len(block)
    if found is not None:
        found.copy_(total[: len(found)] / len(others))
