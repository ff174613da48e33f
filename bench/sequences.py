"""Next items by self-attention, every item scored, as SASRec does: a task of ``bench.factors``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ITEMS, KINDS, LENGTH, DIM, TOP = 1500, 30, 20, 16, 20
PADDING = 0
"""No item; those there are count from 1."""


class Attention(nn.Module):
    """One block of causal self-attention over items and places, and a score for every item."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ITEMS + 1, DIM, padding_idx=PADDING)
        self.place = nn.Embedding(LENGTH, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.block = nn.TransformerEncoderLayer(DIM, 2, 4 * DIM, 0.1, batch_first=True)
        for table in (self.item, self.place):
            nn.init.normal_(table.weight, std=0.1)
        with torch.no_grad():
            self.item.weight[PADDING] = 0

    def forward(self, sequences: Tensor) -> Tensor:
        """Scores `[B, LENGTH, ITEMS + 1]` of what follows each item of `[B, LENGTH]`."""
        shown = self.norm(self.item(sequences) + self.place(torch.arange(LENGTH)))
        ahead = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        states: Tensor = self.block(shown, src_mask=ahead, is_causal=True)
        # Through the module, not by its weight: so the same lines serve a converted one.
        every: Tensor = self.item(torch.arange(ITEMS + 1))
        return states @ every.T


class Sequences:
    """Users who go from one kind of item to the next and take a popular one of each.

    Training foretells the items after the first of each user; validation and test the two last.
    """

    batch = 128
    sign = 1

    def __init__(self, seed: int, samples: int) -> None:
        self.generator = g = torch.Generator().manual_seed(seed)
        kind = torch.arange(ITEMS) % KINDS
        popular = torch.arange(1, ITEMS + 1).pow(-0.8)[torch.randperm(ITEMS, generator=g)]
        chances = popular * (kind == torch.arange(KINDS)[:, None])
        follows = (3 * torch.randn(KINDS, KINDS, generator=g)).softmax(1)
        users = samples // LENGTH
        now, taken = torch.randint(KINDS, (users,), generator=g), []
        for _ in range(LENGTH + 3):
            taken.append(1 + chances[now].multinomial(1, generator=g)[:, 0])
            now = follows[now].multinomial(1, generator=g)[:, 0]
        self.taken = torch.stack(taken, 1)
        self.rows = torch.arange(users)

    def model(self) -> nn.Module:
        """Untrained."""
        return Attention()

    def counts(self) -> dict[str, Tensor]:
        """Of what training looks up, by table; every place is as frequent as the others."""
        seen = self.taken[:, :LENGTH]
        places = torch.full((LENGTH,), len(seen))
        return {"item": torch.bincount(seen.flatten(), minlength=ITEMS + 1), "place": places}

    def loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Cross-entropy of the next item, over all."""
        taken = self.taken[rows]
        scores = model(taken[:, :LENGTH])
        return F.cross_entropy(scores.flatten(0, 1), taken[:, 1 : LENGTH + 1].flatten())

    @torch.no_grad()
    def metric(self, model: nn.Module, part: int) -> float:
        """How often the next item is among the best."""
        hits = []
        for taken in self.taken.split(500):
            scores = model(taken[:, part : part + LENGTH])[:, -1]
            target = taken[:, part + LENGTH, None]
            hits.append((scores.topk(TOP).indices == target).any(1))
        return float(torch.cat(hits).float().mean())
