"""Widths of whole fields, searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from amtl.peers.base import Facts, Part, SearchingPeer, choices_in_budget

Widths = tuple[int, ...]
"""Of each field."""

_PARENTS, _CHILDREN, _MUTATION, _TRIES = 15, 10, 0.1, 20
"""Of an evolution: the best so far that have children, children of either kind in a generation,
probability that a width changes, and draws for one that has not been scored yet."""


class AutoDim(SearchingPeer):
    """AutoDim, Zhao et al. 2020 (arXiv 2006.14827): a width for each field.

    In the paper's terms, its sections not numbered here. The search shows a value as the mean of
    its first 1, 2, 4, ... D numbers (weight-sharing embeddings), each candidate mapped linearly to
    D and batch-normalised, weighed by a Gumbel-softmax of the field's `alpha` (temperature 1).
    alpha learns on validation batches, all else on training batches, in turns, to first order. Then
    each field has its most likely width, and all trains again from the start (parameter
    re-training), mapped to D but without the normalisation.

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
            Part(numbers, 32),
            Part(sum(d * self.dim for d in widths if d < self.dim), 32),  # maps
            Part(len(widths), 32),
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * torch.tensor(self.widths)[self.choice][self.facts.fields]


class _Step(torch.autograd.Function):
    """Whether a number is above 0, with a gradient of long tails.

    That of dynamic sparse training, which OptEmbed takes over: `2 - 4 |x|` up to .4, .4 up to 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        away = ctx.saved_tensors[0].abs()
        near = torch.where(away <= 0.4, 2 - 4 * away, torch.full_like(away, 0.4))
        return grads[0] * near * (away <= 1)


def evolved(
    score: Callable[[Widths], float],
    first: Sequence[Widths],
    most: int,
    generations: int,
    generator: torch.Generator,
) -> Widths:
    """The widths of the best score that an evolution meets.

    Args:
        score: asked once for each choice of widths.
        first: choices that the first generation has beside those drawn.
        most: widths are from 1 to this.
        generations: after the first.
        generator: of what is drawn.
    """
    fields = len(first[0])
    scored = {widths: score(widths) for widths in first}
    parents: list[Widths] = []

    def draw(high: int, size: int = 1) -> list[int]:
        drawn: list[int] = torch.randint(high, (size,), generator=generator).tolist()
        return drawn

    def anew() -> Widths:
        return tuple(1 + k for k in draw(most, fields))

    def mutated() -> Widths:
        change = torch.rand(fields, generator=generator) < _MUTATION
        both = zip(change.tolist(), anew(), parents[draw(len(parents))[0]], strict=True)
        return tuple(new if changed else old for changed, new, old in both)

    def crossed() -> Widths:
        one, other = (parents[p] for p in draw(len(parents), 2))
        cut = draw(fields)[0]
        return one[:cut] + other[cut:]

    def bear(how: Callable[[], Widths], times: int) -> None:
        for _ in range(times):
            for _ in range(_TRIES):
                child = how()
                if child not in scored:
                    scored[child] = score(child)
                    break

    bear(anew, 2 * _CHILDREN)
    for _ in range(generations):
        parents = sorted(scored, key=scored.__getitem__, reverse=True)[:_PARENTS]
        bear(mutated, _CHILDREN)
        bear(crossed, _CHILDREN)
    return max(scored, key=scored.__getitem__)


class OptEmbed(SearchingPeer):
    """OptEmbed, Lyu et al. 2022 (arXiv 2208.04482): rows that matter, and a width for each field.

    Its three parts, in the paper's terms, sections not numbered here:

    - Redundant embedding pruning: a row is shown if its L1 norm is above its field's threshold, and
      as zeros otherwise. Thresholds start at 0 and learn with the table; `alpha * sum_f exp(-t_f)`
      in the loss makes them rise.
    - Embedding dimension search: meanwhile each lookup shows the first k numbers of its row, k
      drawn evenly from 1 to D, so that every choice of widths is trained (the supernet). Then
      widths of the fields evolve on the validation split: the best 15 so far have ten children by
      mutation (each width is drawn again with probability .1) and ten by crossover at a field.
    - Re-training: what survives trains again from its initial values, and all else with it.

    Departures. The budget: rows above their thresholds that a choice of widths has no bytes for go
    too, those nearest to it first; what is scored is what would be kept. The first generation has
    the equal widths 1, 2, 4 ... D among those drawn. Ten generations instead of 30, as fields are
    few, and children that were scored before are drawn again. The score is AUC minus log loss, as
    everywhere here, instead of AUC. The values of a field of several are drawn one by one.

    Args:
        facts: see `Peer`.
        alpha: see above.
        generations: after the first.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {"alpha": (1e-4, 1e-5, 1e-6)}
    widths: Tensor
    kept: Tensor

    def __init__(self, facts: Facts, alpha: float = 1e-4, generations: int = 10) -> None:
        super().__init__(facts)
        self.alpha, self.generations = alpha, generations
        fields = len(facts.field_sizes)
        self.weight = self.row_table(facts.rows, facts.dim)
        self.threshold = nn.Parameter(torch.zeros(fields))
        self.register_buffer("fields", facts.fields, persistent=False)
        self.register_buffer("widths", torch.full((fields,), facts.dim))
        self.register_buffer("kept", torch.ones(facts.rows, dtype=torch.bool))

    def embed(self, rows: Tensor) -> Tensor:
        """See `Peer`."""
        values, fields = self.look_up(self.weight, rows), self.get_buffer("fields")[rows]
        searching = self.phase == "search"
        width = self.widths[fields]
        if searching and self.training:
            width = torch.randint(1, self.dim + 1, width.shape)
        shown = values * ((torch.arange(self.dim) < width[:, None]) & self.kept[rows, None])
        if searching:
            above = _Step.apply(values.abs().sum(1) - self.threshold[fields])
            shown = shown * above[:, None]
        return shown

    def mask_parameters(self) -> list[nn.Parameter]:
        """See `Peer`."""
        return [self.threshold] if self.phase == "search" else []

    def penalty(self) -> Tensor:
        """See `SearchingPeer`."""
        return self.alpha * torch.exp(-self.threshold).sum()

    def _order(self) -> Tensor:
        """Rows above their threshold, the farthest first."""
        margin = self.weight.detach().abs().sum(1) - self.threshold.detach()[self.facts.fields]
        order = torch.argsort(margin, descending=True, stable=True)
        return order[margin[order] > 0]

    def _take(self, widths: Tensor, order: Tensor) -> None:
        """Have these widths, and as many rows of `order` as the budget has bytes for."""
        numbers = (self.facts.budget - 8 * len(widths)) // 4
        ends = widths[self.facts.fields[order]].cumsum(0)
        self.widths.copy_(widths)
        self.kept.zero_()
        self.kept[order[: int((ends <= numbers).sum())]] = True

    @torch.no_grad()
    def conclude(self, score: Callable[[], float]) -> None:
        """See `SearchingPeer`."""
        order, fields = self._order(), len(self.widths)

        def kept(widths: Widths) -> float:
            self._take(torch.tensor(widths), order)
            return score()

        equal = {(min(1 << n, self.dim),) * fields for n in range(self.dim.bit_length() + 1)}
        best = evolved(kept, sorted(equal), self.dim, self.generations, self._generator)
        self._take(torch.tensor(best), order)

    def adopt(self, found: Any) -> None:
        """See `SearchingPeer`."""
        self._take(found.widths, found._order())

    def parts(self) -> list[Part]:
        """See `Peer`."""
        return [
            Part(int(self.row_bits().sum()) // 32, 32),
            Part(len(self.widths), 64),  # ends and widths of fields
        ]

    def row_bits(self) -> Tensor:
        """See `Peer`."""
        return 32 * self.widths[self.facts.fields] * self.kept
