"""Widths by how often a value is seen, searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.peers.base import DoesNotFit, Facts, Part, SearchingPeer, choices_in_budget


class ByPopularity(SearchingPeer):
    """A table whose rows of equal count in a field have one of the widths 1, 2, 4 ... D.

    A row has numbers of its own for each width. They are mapped linearly to D (`mapped`),
    batch-normalised and squashed by tanh. A server keeps the numbers of the width that was chosen
    and the maps of those in use, the normalisation folded in.

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
        options = len(self.widths)
        self.scale = nn.Parameter(torch.ones(options, dim))
        self.shift = nn.Parameter(torch.zeros(options, dim))
        self.register_buffer("mean", torch.zeros(options, dim))
        self.register_buffer("variance", torch.ones(options, dim))

    def mapped(self, values: Tensor, option: int) -> Tensor:
        """Numbers of one width, `[L, d]`, in D dimensions."""
        raise NotImplementedError

    def kept_numbers(self, option: int) -> int:
        """Of the map of an option, what normalisation does to it included."""
        return (self.widths[option] + 1) * self.dim

    def linear(self, high: int, wide: int) -> Tensor:
        """Initial numbers of a map, `[high, wide]`."""
        return nn.init.xavier_uniform_(torch.empty(high, wide), generator=self._generator)

    def shown(self, values: Tensor, option: int) -> Tensor:
        """What the numbers of one width come to, `[L, D]`, of values `[L, 1 + 2 + ... + D]`."""
        mapped = nn.functional.batch_norm(
            self.mapped(values[:, self.slices[option]], option),
            self.mean[option],
            self.variance[option],
            self.scale[option],
            self.shift[option],
            training=self.training and len(values) > 1,
        )
        return torch.tanh(mapped)

    def chosen(self, values: Tensor, options: Tensor) -> Tensor:
        """Values `[L, 1 + 2 + ... + D]`, each at the width of its option, int64 `[L]`: `[L, D]`."""
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
        return [self.scale, self.shift]

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
        maps = sum(map(self.kept_numbers, options))
        ends = len(self.facts.field_sizes) * len(self.widths)
        return [Part(maps, 32), Part(ends, 32)]

    def parts(self) -> list[Part]:
        """See `Peer`."""
        numbers = int(self.row_bits().sum()) // 32
        return [Part(numbers, 32), *self._beside(self.choice.unique().tolist())]

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
        self.maps = nn.Parameter(torch.cat([self.linear(d, facts.dim) for d in self.widths]))
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

    def mapped(self, values: Tensor, option: int) -> Tensor:
        """See `ByPopularity`."""
        return values @ self.maps[self.slices[option]]

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        return [self.maps, *super().mask_parameters()]

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        values = self.look_up(self.weight, rows)
        if self.phase == "frozen":
            return self.chosen(values, self.choice[self.group[rows]])
        weights = self.log_weights().exp()[self.group[rows]]
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


class Esapn(ByPopularity):
    """ESAPN, Liu et al. 2020 (SIGIR): a policy that lets rows grow.

    "Automated Embedding Size Search in Deep Recommender Systems", in the paper's terms, its
    sections not numbered here. Every value starts with one number. Each time it is looked up in
    training, the policy network of its field sees how often that has been so far and the present
    width, and keeps the width or doubles it (hard selection); the new numbers start as a linear
    image of the old ones. Narrow rows are shown through the images up to D, batch-normalised, tanh.
    On validation batches actions are drawn, and the policy learns by policy gradient from their
    reward, by how much the loss is below the mean of the value's last.

    Departures. The search has epochs where the paper has a stream; what is counted ends at the
    count in training. The mean of the last five losses is one that forgets a fifth each time.
    Validation batches are of the validation split, not the last training batch, and drawn growth is
    undone. Widths of the counts of a field are then chosen by the policy's probability of ending
    there, moved to the largest that the budget allows by `log p - c * bytes`, and all trains again
    from the start. Maps are shared by the fields, which here are many and short.

    A weakness of the method itself: right after it grows, a row is shown as before, but for what
    normalises it. So an action hardly decides its own reward, in the authors' code as here.

    Args:
        facts: see `Peer`.
        hidden: width of the policies' hidden layer.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"hidden": (32, 8)}
    takes_last = True
    _FORGET = 0.2
    option: Tensor
    seen: Tensor
    usual: Tensor

    def __init__(self, facts: Facts, hidden: int = 32) -> None:
        super().__init__(facts)
        pairs = zip(self.widths[:-1], self.widths[1:], strict=True)
        self.images = nn.ParameterList(self.linear(narrow, wide) for narrow, wide in pairs)
        options = len(self.widths)
        self.policies = nn.ModuleList(
            nn.Sequential(nn.Linear(1 + options, hidden), nn.Tanh(), nn.Linear(hidden, 2))
            for _ in facts.field_sizes
        )
        most = torch.zeros(len(facts.field_sizes)).long()
        most.scatter_reduce_(0, facts.fields, facts.counts, "amax")
        self.register_buffer("fields", facts.fields, persistent=False)
        self.register_buffer("most", most.clamp(min=1), persistent=False)
        self.register_buffer("option", torch.zeros(facts.rows, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(facts.rows, dtype=torch.int64))
        self.register_buffer("usual", torch.full((facts.rows,), torch.nan))
        self._samples = self._rows = torch.empty(0, dtype=torch.int64)
        self._taken = torch.empty(0)

    def mapped(self, values: Tensor, option: int) -> Tensor:
        """See `ByPopularity`."""
        for image in list(self.images)[option:]:
            values = values @ image
        return values

    def kept_numbers(self, option: int) -> int:
        """See `ByPopularity`; full rows have no map."""
        full = option == len(self.widths) - 1
        return 2 * self.dim if full else super().kept_numbers(option)

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        return [*self.images, *super().mask_parameters()]

    def architecture(self) -> list[nn.Parameter]:
        """See `SearchingPeer`."""
        return list(self.policies.parameters()) if self.phase == "search" else []

    def log_policy(self, fields: Tensor, seen: Tensor, options: Tensor) -> Tensor:
        """Logarithm of the probabilities to keep and to double a width.

        Args:
            fields: int64 `[K]`.
            seen: int64 `[K]`, lookups so far.
            options: int64 `[K]`, present width.

        Returns:
            `[K, 2]`.
        """
        most = self.get_buffer("most")[fields]
        popularity = seen.float().log1p() / most.float().log1p()
        present = nn.functional.one_hot(options, len(self.widths)).float()
        known = torch.cat([popularity[:, None], present], 1)
        logits = torch.zeros(len(fields), 2)
        for field, policy in enumerate(self.policies):
            here = (fields == field).nonzero().squeeze(1)
            if len(here):
                logits = logits.index_copy(0, here, policy(known[here]))
        return torch.log_softmax(logits, 1)

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """See `Peer`; remembers which sample each lookup is of."""
        bag = torch.arange(indices.numel())
        if offsets is not None:
            bag = torch.searchsorted(offsets.long(), bag, right=True) - 1
        self._samples = bag // len(self.policies)
        return super().forward(indices, offsets)

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        if self.phase == "frozen":
            return self.chosen(self.look_up(self.weight, rows), self.choice[self.group[rows]])
        if self.training and self.trying:
            return self._try(rows)
        if self.training:
            self._grow(rows)
        return self.chosen(self.look_up(self.weight, rows), self.option[rows])

    @torch.no_grad()
    def _grow(self, rows: Tensor) -> None:
        """Counts lookups, and doubles the widths of rows that the policy would rather double."""
        rows, times = rows.unique(return_counts=True)
        self.seen[rows] = torch.minimum(self.seen[rows] + times, self.facts.counts[rows])
        options = self.option[rows]
        policy = self.log_policy(self.get_buffer("fields")[rows], self.seen[rows], options)
        doubles = policy[:, 1] > policy[:, 0]
        for option, image in enumerate(self.images):
            here = rows[doubles & (options == option)]
            old, new = self.slices[option], self.slices[option + 1]
            self.weight[here, new] = self.weight[here, old] @ image
            self.option[here] = option + 1

    def _try(self, rows: Tensor) -> Tensor:
        """Rows after actions that are drawn, which nothing but the reward remembers."""
        options = self.option[rows]
        policy = self.log_policy(self.get_buffer("fields")[rows], self.seen[rows], options)
        action = torch.multinomial(policy.detach().exp(), 1)
        can = options < len(self.widths) - 1
        self._rows, self._taken = rows, policy.gather(1, action).squeeze(1) * can
        doubles = can & (action.squeeze(1) == 1)
        with torch.no_grad():
            values = self.weight[rows]
            for option, image in enumerate(self.images):
                here = doubles & (options == option)
                values[here, self.slices[option + 1]] = values[here, self.slices[option]] @ image
            return self.chosen(values, options + doubles)

    def architecture_loss(self, losses: Tensor) -> Tensor:
        """See `SearchingPeer`: the policy gradient of the actions that were drawn."""
        rows, loss = self._rows, losses.detach()[self._samples]
        usual = torch.where(self.usual[rows].isnan(), loss, self.usual[rows])
        result = -((usual - loss) * self._taken).sum()
        times = torch.bincount(rows, minlength=len(self.usual))
        mean = torch.bincount(rows, loss, len(self.usual)) / times
        start = torch.where(self.usual.isnan(), mean, self.usual)
        self.usual.copy_(torch.where(times > 0, start.lerp(mean, self._FORGET), self.usual))
        return result

    @torch.no_grad()
    def log_widths(self) -> Tensor:
        """Logarithm of the policy's probability that a count ends at a width, `[G, O]`."""
        found, reached = [], torch.zeros(len(self.group_counts))
        for option in range(len(self.widths)):
            options = torch.full_like(self.group_counts, option)
            policy = self.log_policy(self.group_fields, self.group_counts, options)
            last = option == len(self.widths) - 1
            found.append(reached + (0 if last else policy[:, 0]))
            reached = reached + policy[:, 1]
        return torch.stack(found, 1)

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self.choose(found.log_widths())


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
            Part(numbers, 32),
            Part(self.choice.numel(), 32),  # rows of column blocks
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * self._has(torch.arange(self.facts.rows), self.choice).sum(1)
