"""Rows of values that training has not seen: what the model is to take them for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from amtl.data import Encoder
from amtl.run import methods


@torch.no_grad()
def settle_unseen(table: nn.Module, encoder: Encoder) -> None:
    """Gives out-of-vocabulary rows that nothing trains the mean of their field's rows.

    They would stay as they were drawn, next to zero, where the MLP has never been: of a column of
    two values, an unseen one took predictions of 4 % to 9 %. Rare values count as much as frequent
    ones, for what is unseen is rare. Where rows that keep no numbers are looked up as that row, it
    is trained and stays. So do tables of peers, codes without masters, and sizes being searched.

    Args:
        table: of `methods.build_table`.
        encoder: whose rows it has.

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
        if vocabulary.counts[vocabulary.oov_row] > 0 or vocabulary.size == 1:
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
