"""What a method of the field is here: a table in a budget of bytes, and an exact account of them.

A peer is for comparison: plain PyTorch, trained by the loop that trains the product's own tables,
not packed. `amtl paper --add FILE` takes one from a file, see `examples/my_method.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class DoesNotFit(ValueError):
    """No table of this kind is as small as the budget."""


def choices_in_budget(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """An option for each group: `argmax_o scores_o - c * costs_o`, c the least that fits.

    c above 0 gives less than what was found (the best scores), below 0 more. What one c for all
    leaves over goes to groups that would have more at the next one.

    Args:
        scores: `[G, O]`.
        costs: int64 `[G, O]`.
        budget: of all groups.

    Returns:
        int64 `[G]`. O(G O) for each of 60 steps.

    Raises:
        DoesNotFit: the cheapest options cost more.
    """
    if int(costs.min(1).values.sum()) > budget:
        raise DoesNotFit(f"the least that can be chosen is larger than {budget:,}")
    values, groups = scores.double(), torch.arange(len(scores))
    share = costs.double() / float(costs.max())

    def chosen(c: float) -> Tensor:
        return (values - c * share).argmax(1)

    ordered = share.sort(1).values
    steps = (ordered[:, 1:] - ordered[:, :-1])[ordered[:, 1:] > ordered[:, :-1]]
    high = (float(values.max() - values.min()) + 1.0) / float(steps.min()) if len(steps) else 1.0
    low = -high
    for _ in range(60):
        middle = (low + high) / 2
        fits = int(costs[groups, chosen(middle)].sum()) <= budget
        low, high = (low, middle) if fits else (middle, high)
    options, more = chosen(high), chosen(low)
    spare = budget - int(costs[groups, options].sum())
    for g in torch.nonzero(costs[groups, more] > costs[groups, options]).squeeze(1).tolist():
        extra = costs[g] - costs[g, options[g]]
        allowed = (extra <= spare) & (costs[g] <= costs[g, more[g]])
        best = int(torch.where(allowed, extra, -1).argmax())
        if int(extra[best]) > 0:
            options[g] = best
            spare -= int(extra[best])
    return options


@dataclass(frozen=True)
class Part:
    """Equal things that a server must keep.

    Attributes:
        count: how many.
        bits: of each.
    """

    count: int
    bits: int


def served_bytes(parts: Iterable[Part]) -> int:
    """Bytes of everything a server must keep, each part in whole bytes.

    For all methods alike: numbers, codes, step sizes, projections, codebooks, masks and maps count.
    Vocabularies don't, and so neither does an order of rows, which a vocabulary can have at no
    cost: rows of one kind lie side by side, and where they end is what counts. Hashes of a row's
    number are computed.
    """
    return sum(-(-part.count * part.bits // 8) for part in parts)


@dataclass(frozen=True)
class Facts:
    """What a method is told.

    Attributes:
        counts: int64 `[N]`, lookups of each row in the training split.
        fields: int64 `[N]`, field of each row. Rows of a field are numbered one after the other.
        field_sizes: rows of each field.
        dim: full width D.
        budget: bytes that `served_bytes` may come to.
        init_std: deviation of initial weights.
        seed: of what is drawn.
    """

    counts: Tensor
    fields: Tensor
    field_sizes: Sequence[int]
    dim: int
    budget: int
    init_std: float = 0.01
    seed: int = 0

    @property
    def rows(self) -> int:
        """N."""
        return len(self.counts)

    def ranks(self) -> Tensor:
        """Place of each row among those of its field by falling count: int64 `[N]`."""
        order = torch.argsort(self.counts, descending=True, stable=True)
        order = order[torch.argsort(self.fields[order], stable=True)]
        sizes = torch.tensor(self.field_sizes)
        starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order)) - starts
        return ranks

    def widest(self, bits: int, beside: int) -> int:
        """Largest width, at most D, of rows within the budget, 0 for none.

        Args:
            bits: of a number.
            beside: bytes that something else takes.
        """
        width = 8 * (self.budget - beside) // (bits * max(1, self.rows))
        return max(0, min(self.dim, width))


class Peer(nn.Module):
    """A method: rows in, embeddings out, in a budget of bytes.

    A subclass makes its parameters in `__init__`, with `row_table` those that are looked up by
    row, and has `embed` and `parts`. What else it may have:

    - `space`: settings to tune, name to values, the first one being the default; keyword arguments
      of `__init__`.
    - `after_step`: called after each step of the optimizers.
    - `searches = True` for a method that trains first to find something and then again with it:
      see `SearchingPeer`.

    Args:
        facts: see `Facts`.
    """

    space: ClassVar[Mapping[str, Sequence[Any]]] = {}
    searches: ClassVar[bool] = False
    file: ClassVar[str | None] = None
    """Where it was added from; None for those that are here."""
    code: ClassVar[str | None] = None
    """Checksum of that file."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.dim = facts.dim
        self._generator = torch.Generator().manual_seed(facts.seed)
        self._row_tables: list[nn.Parameter] = []
        self.sparse = True

    def embed(self, rows: Tensor) -> Tensor:
        """Embeddings `[L, D]` of rows, int64 `[L]`."""
        raise NotImplementedError(f"{type(self).__name__} needs a method embed(rows)")

    def parts(self) -> list[Part]:
        """Everything a server must keep."""
        raise NotImplementedError(f"{type(self).__name__} needs a method parts()")

    def row_bits(self) -> Tensor | None:
        """Bits of each row, int64 `[N]`; None where rows share what is stored."""
        return None

    def after_step(self) -> None:
        """Called after each step of the optimizers."""

    def forward(self, indices: Tensor, offsets: Tensor | None = None) -> Tensor:
        """As `nn.Embedding`, and with offsets as `nn.EmbeddingBag` of mode "mean"."""
        rows = indices.reshape(-1).long()
        values = self.embed(rows)
        if values.shape != (len(rows), self.dim):
            raise ValueError(
                f"embed returned {list(values.shape)}, wanted is [{len(rows)}, {self.dim}]"
            )
        if offsets is None:
            return values.view(*indices.shape, self.dim)
        each = torch.arange(len(values), device=values.device)
        return nn.functional.embedding_bag(each, values, offsets.to(each.dtype), mode="mean")

    def row_table(self, rows: int, width: int, mean: float = 0.0) -> nn.Parameter:
        """A matrix looked up by row, initially normal with deviation `init_std`; see `look_up`."""
        values = torch.empty(rows, width)
        values.normal_(mean, self.facts.init_std, generator=self._generator)
        parameter = nn.Parameter(values)
        self._row_tables.append(parameter)
        return parameter

    def look_up(self, table: nn.Parameter, rows: Tensor) -> Tensor:
        """Rows of a `row_table`, `[L, width]`; its gradient is of these rows only if `sparse`."""
        return nn.functional.embedding(rows, table, sparse=self.sparse)

    def padded(self, values: Tensor) -> Tensor:
        """Values `[L, width]` and zeros up to width D."""
        return nn.functional.pad(values, (0, self.dim - values.shape[1]))

    def table_parameters(self) -> list[nn.Parameter]:
        """What the optimizer of the table trains."""
        return list(self._row_tables)

    def mask_parameters(self) -> list[nn.Parameter]:
        """What else there is to train: projections, step sizes, thresholds."""
        own = {id(table) for table in self._row_tables}
        return [p for p in self.parameters() if id(p) not in own and p.requires_grad]

    @property
    def phase(self) -> str:
        """Either "search" or "frozen"."""
        return "frozen"

    def value_bytes(self) -> int:
        """`served_bytes` of its parts."""
        return served_bytes(self.parts())

    def dense_bytes(self) -> int:
        """Bytes of N × D numbers of 32 bits."""
        return 4 * self.facts.rows * self.dim

    def require_fit(self) -> None:
        """Raise unless the parts are within the budget.

        Raises:
            DoesNotFit: they are not.
        """
        if self.value_bytes() > self.facts.budget:
            raise DoesNotFit(
                f"{self.value_bytes():,} bytes at least, and the budget is {self.facts.budget:,}"
            )


class SearchingPeer(Peer):
    """A method that trains twice: `settle` takes what was found in the first training.

    In between the model is made anew with the same seed, so a table that takes no weights over
    trains again from the very same initial ones.
    """

    searches = True
    plain_search: ClassVar[bool] = False
    """Whether the first training is an ordinary one, rates falling and to its end."""
    takes_last: ClassVar[bool] = False
    """Whether what was found is in the last state of the search and not in the best one."""
    keeps_model: ClassVar[bool] = False
    """Whether all but the table is taken over."""
    goes_on: ClassVar[bool] = False
    """Whether the second training refines the first one's weights, at smaller rates."""
    trains_again: ClassVar[bool] = True
    """Whether there is a second training."""

    trying: bool = False
    """Whether a pass is one of a validation batch, of which `architecture` learns."""

    settled: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.register_buffer("settled", torch.tensor(False))

    @property
    def phase(self) -> str:
        """It is "search" until settled, unless that is ordinary training."""
        return "search" if not (self.settled or self.plain_search) else "frozen"

    @torch.no_grad()
    def settle(self, found: SearchingPeer) -> None:
        """Take what `found`, a table trained in the search, has found, within the budget.

        Raises:
            DoesNotFit: even the least is larger than the budget.
        """
        self.adopt(found)
        self.settled.fill_(True)
        self.require_fit()

    def adopt(self, found: Any) -> None:
        """What `settle` takes over; `found` is of the same class."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """Added to the loss of the search, or None."""
        return None

    def architecture(self) -> list[nn.Parameter]:
        """What the search trains on validation batches, in turns with all else on training ones."""
        return []

    def architecture_loss(self, losses: Tensor) -> Tensor:
        """What `architecture` learns to lower, right after a pass of a validation batch.

        Args:
            losses: log loss of each sample, `[B]`.
        """
        return losses.mean()

    def searched(self) -> bool:
        """Whether the search may end; asked after each validation."""
        return False

    def conclude(self, score: Callable[[], float]) -> None:
        """Called when the search has trained and before `settle`, for what is tried out then.

        Args:
            score: validates the model as the table now is: AUC minus log loss.
        """
