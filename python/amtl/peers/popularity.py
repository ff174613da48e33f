"""Widths by how often a value is seen, searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.peers.base import DoesNotFit, Facts, Part, SearchingPeer, choices_in_budget


class ByPopularity(SearchingPeer):
    """A table whose rows of equal count in a field have one of the widths 1, 2, 4 ... D.

    A row has numbers of its own for each width. They are mapped linearly to D, batch-normalised and
    squashed by tanh, with one map for a width. A server keeps the numbers of the width that was
    chosen and the maps of those in use, the normalisation folded in.

    Args:
        facts: see `Peer`.
    """

    group: Tensor
    choice: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        dim = facts.dim
        self.widths = [*(1 << n for n in range(dim.bit_length()) if 1 << n < dim), dim]
        starts = torch.tensor(self.widths).cumsum(0) - torch.tensor(self.widths)
        self.slices = [slice(s, s + d) for s, d in zip(starts.tolist(), self.widths, strict=True)]
        key = facts.fields * (int(facts.counts.max()) + 1) + facts.counts
        _, group = torch.unique(key, return_inverse=True)
        self.group_sizes = torch.bincount(group)
        first = torch.full_like(self.group_sizes, facts.rows)
        first.scatter_reduce_(0, group, torch.arange(facts.rows), "amin")
        self.group_counts, self.group_fields = facts.counts[first], facts.fields[first]
        self.register_buffer("group", group, persistent=False)
        self.register_buffer("choice", torch.zeros(len(self.group_sizes), dtype=torch.int64))
        self.weight = self.row_table(facts.rows, sum(self.widths))
        self.maps = nn.Parameter(
            torch.cat(
                [
                    nn.init.xavier_uniform_(torch.empty(d, dim), generator=self._generator)
                    for d in self.widths
                ]
            )
        )
        options = len(self.widths)
        self.scale = nn.Parameter(torch.ones(options, dim))
        self.shift = nn.Parameter(torch.zeros(options, dim))
        self.register_buffer("mean", torch.zeros(options, dim))
        self.register_buffer("variance", torch.ones(options, dim))

    def shown(self, values: Tensor, option: int) -> Tensor:
        """What the numbers of one width come to, `[L, D]`, of values `[L, 1 + 2 + ... + D]`."""
        here = self.slices[option]
        mapped = nn.functional.batch_norm(
            values[:, here] @ self.maps[here],
            self.mean[option],
            self.variance[option],
            self.scale[option],
            self.shift[option],
            training=self.training and len(values) > 1,
        )
        return torch.tanh(mapped)

    def chosen(self, rows: Tensor, options: Tensor) -> Tensor:
        """Rows, int64 `[L]`, each at the width of its option, int64 `[L]`."""
        values = self.look_up(self.weight, rows)
        parts, where = [], []
        for option in range(len(self.widths)):
            here = (options == option).nonzero().squeeze(1)
            if len(here):
                parts.append(self.shown(values[here], option))
                where.append(here)
        if not parts:
            return values[:, : self.dim]
        return torch.cat(parts)[torch.argsort(torch.cat(where))]

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        return [self.maps, self.scale, self.shift]

    def choose(self, scores: Tensor) -> None:
        """Take widths for groups by `scores - c * bytes`, one c for all, see `choices_in_budget`.

        Maps count, so the widest are given up where that leaves nothing for rows.

        Args:
            scores: `[G, O]`.
        """
        costs = self.group_sizes[:, None] * torch.tensor(self.widths)
        for options in range(len(self.widths), 0, -1):
            beside = sum(part.count for part in self._beside(range(options)))
            try:
                chosen = choices_in_budget(
                    scores[:, :options], costs[:, :options], self.facts.budget // 4 - beside
                )
            except DoesNotFit:
                if options == 1:
                    raise
                continue
            self.choice.copy_(chosen)
            return

    def _beside(self, options: Sequence[int]) -> list[Part]:
        """All but the rows' numbers, where these options are in use."""
        maps = sum((self.widths[o] + 1) * self.dim for o in options)
        ends = len(self.facts.field_sizes) * len(self.widths)
        return [Part("maps and shifts", maps, 32), Part("ends of rows of equal width", ends, 32)]

    def parts(self) -> list[Part]:
        """See `Peer`."""
        numbers = int(self.row_bits().sum()) // 32
        return [Part("numbers", numbers, 32), *self._beside(self.choice.unique().tolist())]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * torch.tensor(self.widths)[self.choice][self.group]


def standardised(counts: Tensor, fields: Tensor) -> Tensor:
    """`log(1 + count)` of mean 0 and deviation 1 within each field, 0 where all are equal."""
    logs = counts.double().log1p()
    sizes = torch.bincount(fields).clamp(min=1)
    mean = (torch.bincount(fields, logs) / sizes)[fields]
    deviation = (torch.bincount(fields, (logs - mean).square()) / sizes).sqrt()[fields]
    return ((logs - mean) / deviation.clamp(min=1e-6)).float()


class AutoEmb(ByPopularity):
    """AutoEmb, Zhao et al. 2020 (arXiv 2002.11252): controllers choose widths by popularity.

    In the paper's terms, its sections not numbered here. The search shows a value as the mean of
    what it comes to at the widths 1, 2, 4 ... D (each mapped to D, batch-normalised, tanh),
    weighed by the softmax of its field's controller, a network of one hidden layer that sees how
    popular the value is (soft selection). Controllers learn on validation batches, all else on
    training batches, in turns, to first order.

    Departures. The paper stops there: its rows keep every width, 2 D numbers or so, more than a
    full table has. So a hard choice follows, the likeliest width for each count of a field, moved
    to the largest that the budget allows by `log p - c * bytes`, and all trains again from the
    start. Popularity is the count in training, not that so far in a stream, and controllers see it
    alone, as its logarithm, without their own last choice and loss. Maps are shared by the fields,
    which here are many and short. Controllers start with equal weights.

    Args:
        facts: see `Peer`.
        hidden: width of the controllers' hidden layer.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"hidden": (32, 8)}

    def __init__(self, facts: Facts, hidden: int = 32) -> None:
        super().__init__(facts)
        popularity = standardised(self.group_counts, self.group_fields)[:, None]
        self.register_buffer("popularity", popularity, persistent=False)
        self.controllers = nn.ModuleList(
            nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, len(self.widths)))
            for _ in facts.field_sizes
        )
        for controller in self.controllers:
            nn.init.zeros_(controller[2].weight)  # type: ignore[index, arg-type]
            nn.init.zeros_(controller[2].bias)  # type: ignore[index, arg-type]

    def log_weights(self) -> Tensor:
        """Logarithm of the controllers' weights, `[G, O]`."""
        sizes = torch.bincount(self.group_fields, minlength=len(self.controllers)).tolist()
        parts = zip(self.controllers, self.get_buffer("popularity").split(sizes), strict=True)
        return torch.log_softmax(torch.cat([network(x) for network, x in parts]), 1)

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        if self.phase == "frozen":
            return self.chosen(rows, self.choice[self.group[rows]])
        values, weights = self.look_up(self.weight, rows), self.log_weights().exp()
        weights = weights[self.group[rows]]
        out = torch.zeros(len(rows), self.dim)
        for option in range(len(self.widths)):
            out = out + weights[:, option : option + 1] * self.shown(values, option)
        return out

    def architecture(self) -> list[nn.Parameter]:
        """See `SearchingPeer`."""
        return list(self.controllers.parameters()) if self.phase == "search" else []

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self.choose(found.log_weights())


class Nis(SearchingPeer):
    """NIS, Joglekar et al. 2019 (arXiv 1907.04471): a controller buys embedding blocks.

    In the paper's terms, its sections not numbered here. The table is a grid of embedding blocks,
    rows by falling count times columns. For each column block of a field the controller chooses
    how many of the row blocks, from the top, have it (multi-size embedding), with probabilities
    `softmax(logits)`. Each training batch shows a fresh draw; a draw on a validation batch is
    rewarded by `-log loss - price * max(numbers / budget - 1, 0)`, and the controller learns by
    policy gradient against the mean of past rewards. After a warm-up in which everything is shown,
    training and rewards take turns. Then the likeliest choice trains again from the start.

    Departures. The likeliest choice is moved to the largest that the budget allows by
    `log p - c * bytes`. Row blocks end after 1/16, 1/8 ... 1 of a field's values and there are four
    column blocks for all fields. Column blocks lie side by side instead of being projected to D,
    and what a row lacks is zero. The gradient is plain REINFORCE by one actor, where the paper has
    A3C. As quality it has the log loss, whatever the task.

    Args:
        facts: see `Peer`.
        price: of numbers beyond the budget, in nats for as many again.
        warm_up: training steps before the controller learns.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"price": (0.1, 0.01)}
    takes_last = True
    _ROW_BLOCKS, _COLUMN_BLOCKS, _FORGET = 5, 4, 0.05
    choice: Tensor
    usual: Tensor
    steps: Tensor

    def __init__(self, facts: Facts, price: float = 0.1, warm_up: int = 100) -> None:
        super().__init__(facts)
        self.price, self.warm_up = price, warm_up
        sizes = torch.tensor(facts.field_sizes)
        shares = 2 ** torch.arange(self._ROW_BLOCKS - 1, -1, -1)
        ends = torch.cat([torch.zeros(len(sizes), 1).long(), -(-sizes[:, None] // shares)], 1)
        columns = torch.arange(facts.dim) * min(self._COLUMN_BLOCKS, facts.dim) // facts.dim
        first = (facts.ranks()[:, None] >= ends[facts.fields]).sum(1)
        self.costs = ends[:, None, :] * torch.bincount(columns)[:, None]
        """Numbers of each choice: int64 `[F, T, O]`."""
        self.weight = self.row_table(facts.rows, facts.dim)
        self.logits = nn.Parameter(torch.zeros(self.costs.shape))
        self.register_buffer("fields", facts.fields, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("first", first, persistent=False)
        self.register_buffer("choice", torch.full(self.costs.shape[:2], self._ROW_BLOCKS))
        self.register_buffer("usual", torch.tensor(torch.nan))
        self.register_buffer("steps", torch.tensor(0))
        self._drawn = self.choice
        if self._spare() < 0:
            raise DoesNotFit(f"where blocks end takes more than {facts.budget:,} bytes")

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        choice = self.choice
        if self.phase == "search" and self.training and int(self.steps) >= self.warm_up:
            probabilities = torch.softmax(self.logits.detach(), -1)
            choice = torch.multinomial(probabilities.flatten(0, 1), 1).view(choice.shape)
        elif self.phase == "search" and not self.training:
            choice = self.affordable()
        self._drawn = choice
        return self.look_up(self.weight, rows) * self._has(rows, choice)

    def _has(self, rows: Tensor, choice: Tensor) -> Tensor:
        """Which numbers rows have by a choice: bool `[L, D]`."""
        fields, first = self.get_buffer("fields")[rows], self.get_buffer("first")[rows]
        return choice[fields][:, self.get_buffer("columns")] >= first[:, None]

    def architecture(self) -> list[nn.Parameter]:
        """See `SearchingPeer`."""
        return [self.logits] if self.phase == "search" else []

    def mask_parameters(self) -> list[nn.Parameter]:
        """None: the controller learns by rewards alone."""
        return []

    def architecture_loss(self, losses: Tensor) -> Tensor:
        """See `SearchingPeer`: the policy gradient of the draw that was shown."""
        self.steps += 1
        if int(self.steps) <= self.warm_up:
            return 0 * self.logits.sum()
        numbers = self.costs.gather(2, self._drawn[:, :, None]).sum()
        beyond = max(0.0, 4 * int(numbers) / max(1, self._spare()) - 1)
        reward = -losses.detach().mean() - self.price * beyond
        if bool(self.usual.isnan()):
            self.usual.copy_(reward)
        taken = torch.log_softmax(self.logits, -1).gather(2, self._drawn[:, :, None]).sum()
        loss = -(reward - self.usual) * taken
        self.usual.lerp_(reward, self._FORGET)
        return loss

    def _spare(self) -> int:
        return self.facts.budget - 4 * self.choice.numel()

    def affordable(self) -> Tensor:
        """The likeliest choice, moved to the budget: int64 `[F, T]`."""
        scores = torch.log_softmax(self.logits.detach(), -1).flatten(0, 1)
        chosen = choices_in_budget(scores, 4 * self.costs.flatten(0, 1), self._spare())
        return chosen.view(self.choice.shape)

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self.choice.copy_(found.affordable())

    def parts(self) -> list[Part]:
        """See `Peer`."""
        numbers = int(self.costs.gather(2, self.choice[:, :, None]).sum())
        return [
            Part("numbers", numbers, 32),
            Part("rows of column blocks", self.choice.numel(), 32),
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * self._has(torch.arange(self.facts.rows), self.choice).sum(1)
