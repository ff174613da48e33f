"""What meets the embeddings beside the MLP: the click models of the literature, kept small.

All of them end in a sum of logits, so each is the MLP plus one part of its own: an `Interaction`
with a logit, or for DIN an attention that pools a field of several values. None has a table. A
first-order weight for each value, where the paper has one, is the first number of the value's row
in the embedding table: a table of width 1 beside it, in the same file and the same budget. So what
is reported of the table's bytes is all that values cost.

Where a paper sums over fields, pairs of fields or the numbers of an embedding, a part takes the
mean. The models are the same ones, for a table's values are as large as they are trained to be, but
logits of forty fields move in one step as far as those of two: tables are trained at high rates,
which the MLP wants, and by which such sums run away.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from amtl.errors import UserError


class Interaction(nn.Module):
    """A part of a click model with a logit of its own; this one has none, and is the plain MLP.

    Args:
        num_fields: embedded fields F.
        dim: width D of what follows the first-order weight, if the part has one.
        num_dense: numbers K beside the embeddings.
        means: whether to take means, as above; models from before have sums.
    """

    first_order: ClassVar[bool] = False
    """Whether the first number of a row is the value's own weight."""

    def __init__(self, num_fields: int, dim: int, num_dense: int, means: bool = True) -> None:
        super().__init__()
        self.means = means

    def forward(self, own: Tensor, embedded: Tensor, dense: Tensor) -> Tensor:
        """The part's logits.

        Args:
            own: `[B, F]`, first-order weights; `[B, 0]` if the part has none.
            embedded: `[B, F, D]`.
            dense: `[B, K]`.

        Returns:
            `[B]`.
        """
        return embedded.new_zeros(embedded.shape[0])


class Wide(Interaction):
    """The wide part of Wide & Deep (Cheng et al. 2016, arXiv 1606.07792), without crossed fields.

    `mean_f w[v_f] + <u, dense>`. O(B (F + K)).
    """

    first_order = True

    def __init__(self, num_fields: int, dim: int, num_dense: int, means: bool = True) -> None:
        super().__init__(num_fields, dim, num_dense, means)
        self.dense_weight = nn.Parameter(torch.zeros(num_dense))

    def forward(self, own: Tensor, embedded: Tensor, dense: Tensor) -> Tensor:
        """See `Interaction`."""
        weights = own.mean(1) if self.means else own.sum(1)
        return weights + dense.to(own.dtype) @ self.dense_weight


class FactorizationMachine(Wide):
    """The FM part of DeepFM (Guo et al. 2017, arXiv 1703.04247): first order and pairs of fields.

    `mean_f w[v_f] + <u, dense> + mean_{f<g} <e_f, e_g> / D`, with the embeddings of the MLP.
    O(B F D).
    """

    def forward(self, own: Tensor, embedded: Tensor, dense: Tensor) -> Tensor:
        """See `Interaction`."""
        _, fields, dim = embedded.shape
        pairs = embedded.sum(1).square() - embedded.square().sum(1)
        share = 1 / (max(fields * (fields - 1), 1) * dim) if self.means else 0.5
        return super().forward(own, embedded, dense) + share * pairs.sum(1)


class CrossNetwork(Interaction):
    """The cross network of DCN (Wang et al. 2017, arXiv 1708.05123).

    `x_{l+1} = x_0 <x_l, w_l> / n + b_l + x_l` over the concatenated input of n numbers, three
    times, then a linear layer; the deep part has its own, which is the same as one over both.
    O(B (F D + K)).
    """

    depth = 3

    def __init__(self, num_fields: int, dim: int, num_dense: int, means: bool = True) -> None:
        super().__init__(num_fields, dim, num_dense, means)
        width = num_fields * dim + num_dense
        self.weights = nn.Parameter(torch.empty(self.depth, width))
        self.biases = nn.Parameter(torch.zeros(self.depth, width))
        nn.init.normal_(self.weights, std=1.0 if means else width**-0.5)
        self.out = nn.Linear(width, 1, bias=False)

    def forward(self, own: Tensor, embedded: Tensor, dense: Tensor) -> Tensor:
        """See `Interaction`."""
        first = torch.cat([embedded.flatten(1), dense.to(embedded.dtype)], 1)
        x, share = first, 1 / first.shape[1] if self.means else 1.0
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = first * (x @ weight * share)[:, None] + bias + x
        logits: Tensor = self.out(x)
        return logits.squeeze(1)


class CompressedInteraction(Wide):
    """CIN and linear part of xDeepFM (Lian et al. 2018, arXiv 1803.05170).

    Each layer weighs all products of its rows with the fields' embeddings, column by column; its
    rows, their means over columns, go to the logit. O(B H F D) memory for H rows a layer.
    """

    rows = (16, 16)  # H of each layer

    def __init__(self, num_fields: int, dim: int, num_dense: int, means: bool = True) -> None:
        super().__init__(num_fields, dim, num_dense, means)
        before = (num_fields, *self.rows)
        self.layers = nn.ModuleList(
            nn.Linear(h * num_fields, n) for h, n in zip(before, self.rows, strict=False)
        )
        self.out = nn.Linear(sum(self.rows), 1, bias=False)

    def forward(self, own: Tensor, embedded: Tensor, dense: Tensor) -> Tensor:
        """See `Interaction`."""
        fields = embedded.transpose(1, 2)
        x, sums = fields, []
        for layer in self.layers:
            x = layer((x[:, :, :, None] * fields[:, :, None, :]).flatten(2))
            sums.append(x.mean(1) if self.means else x.sum(1))
        logits: Tensor = self.out(torch.cat(sums, 1))
        return super().forward(own, embedded, dense) + logits.squeeze(1)


class FieldAttention(Interaction):
    """The attention of AutoInt (Song et al. 2019, arXiv 1810.11921), with the MLP as in AutoInt+.

    Two layers of multi-head self-attention between fields, each with a linear residual and ReLU.
    O(B F^2) for a head.
    """

    depth, heads = 2, 2
    width = 16  # of a field, all heads together

    def __init__(self, num_fields: int, dim: int, num_dense: int, means: bool = True) -> None:
        super().__init__(num_fields, dim, num_dense, means)
        before = (dim, *[self.width] * (self.depth - 1))
        self.layers = nn.ModuleList(nn.Linear(w, 4 * self.width, bias=False) for w in before)
        self.out = nn.Linear(num_fields * self.width, 1)

    def forward(self, own: Tensor, embedded: Tensor, dense: Tensor) -> Tensor:
        """See `Interaction`."""
        x = embedded
        for layer in self.layers:
            *parts, residual = layer(x).chunk(4, -1)
            query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, scale=1.0)
            x = torch.relu(mixed.transpose(1, 2).flatten(2) + residual)
        logits: Tensor = self.out(x.flatten(1))
        return logits.squeeze(1)


class InterestPooling(nn.Module):
    """The attention of DIN (Zhou et al. 2018, arXiv 1706.06978) over fields of several values.

    The activation unit weighs each value by itself, the query, their difference and their product,
    without a softmax, and the weighted values are summed. The paper's query is the candidate; here
    it is what the single-valued fields say, mapped to D numbers. O(T D) for T values.

    Args:
        num_single: single-valued fields S, at least 1.
        num_bags: fields of several values, at least 1.
        dim: width D.
    """

    hidden = 32  # width of the unit

    def __init__(self, num_single: int, num_bags: int, dim: int) -> None:
        super().__init__()
        self.num_single = num_single
        self.query = nn.Linear(num_single * dim, dim)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Linear(4 * dim, self.hidden), nn.PReLU(), nn.Linear(self.hidden, 1))
            for _ in range(num_bags)
        )

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Pools bags.

        Args:
            values: `[T, D]`, the embedding of each value, sample-major.
            offsets: `[B * (S + bags)]` starts of the bags, those of the S single values included.

        Returns:
            `[B, S + bags, D]`; empty bags are zero.
        """
        dtype = self.query.weight.dtype
        values = values.to(dtype)
        fields = self.num_single + len(self.units)
        starts = offsets.long()
        ends = torch.cat([starts[1:], starts.new_full((1,), values.shape[0])])
        bag = torch.repeat_interleave(ends - starts, output_size=values.shape[0])
        pooled = values.new_zeros(starts.shape[0], values.shape[1])
        single = torch.nonzero(bag % fields < self.num_single).squeeze(1)
        pooled = pooled.index_add(0, bag[single], values[single])
        samples = pooled.view(-1, fields, values.shape[1])
        query = self.query(samples[:, : self.num_single].flatten(1))
        for number, unit in enumerate(self.units):
            places = torch.nonzero(bag % fields == self.num_single + number).squeeze(1)
            key = values[places]
            asked = query[bag[places] // fields]
            weight = unit(torch.cat([key, asked, key - asked, key * asked], 1))
            pooled = pooled.index_add(0, bag[places], weight * key)
        return pooled.view(-1, fields, values.shape[1])


INTERACTIONS: dict[str, type[Interaction]] = {
    "dnn": Interaction,
    "deepfm": FactorizationMachine,
    "dcn": CrossNetwork,
    "xdeepfm": CompressedInteraction,
    "autoint": FieldAttention,
    "din": Interaction,
    "widedeep": Wide,
}


def least_dim(name: str) -> int:
    """The narrowest rows that a backbone can have: a number beside the first-order weight."""
    return 1 + INTERACTIONS[name].first_order


def interaction(
    name: str, num_fields: int, dim: int, num_dense: int, means: bool = True
) -> Interaction:
    """The part of a backbone that meets embeddings of `dim` numbers, first-order one included.

    Raises:
        UserError: `dim` leaves nothing beside the first-order weight.
    """
    kind = INTERACTIONS[name]
    width = dim - kind.first_order
    if width < 1:
        raise UserError(
            f"--backbone {name} needs --dim 2 or more: the first number of a row is its value's "
            "first-order weight"
        )
    return kind(num_fields, width, num_dense, means)


def pooling(name: str, num_single: int, num_bags: int, dim: int) -> InterestPooling | None:
    """The attention of `din`; None for the others, whose bags are averaged.

    Raises:
        UserError: there is no history to attend to, or nothing to ask it with.
    """
    if name != "din":
        return None
    if not num_bags:
        raise UserError(
            "--backbone din needs a field of several values, a history: name one with --multi "
            "COLUMN, or choose another backbone"
        )
    if not num_single:
        raise UserError(
            "--backbone din needs a field of one value to compare the history with: add one to "
            "--fields, or choose another backbone"
        )
    return InterestPooling(num_single, num_bags, dim)
