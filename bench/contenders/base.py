"""The contract of a contender, and the session that most of them share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from bench.inputs import Case, Problem
from bench.oracle import Equations, Outcome

# A second copy of a table larger than this is not worth its memory and the time to make it.
COPY_LIMIT = 2 * 2**30


CHUNK_ROWS = 1 << 20
"""Rows of a table that are quantised at a time."""


def refuse_copy(case: Case, what: str, bits: int = 32) -> str:
    """A refusal where a private copy of the case's table, of so many bits, is too large."""
    if case.tables * case.rows * case.dim * bits / 8 > COPY_LIMIT:
        return f"{what} of a table this large is left out to spare memory"
    return ""


def state_bytes(case: Case) -> float:
    """Optimizer state of all tables, in float32."""
    wide = 4 * case.dim
    per_row = {"none": 0, "sgd": 0, "rowwise_adagrad": 4, "adagrad": wide, "adam": 2 * wide}
    return float(per_row[case.optimizer] * case.tables * case.rows)


class Session(Protocol):
    """A contender set up on a problem."""

    def call(self, rotation: int) -> object:
        """One timed call on an id set."""
        ...

    def outcome(self, rotation: int) -> Outcome:
        """One call with everything it produced; leaves the weights as they were."""
        ...


class Contender(ABC):
    """Somebody who can do the work of a case.

    Attributes:
        name: Key in cases and results.
        title: What tables show.
        equations: What it computes.
        install: How to get it where it is absent.
        ours: Whether it is this project's.
        tolerance: Larger than the dtype's where it rounds on purpose.
        compiles: Whether its first call compiles something.
        devices: Where it can run.
        row_bits: Of a number in its rows; 0: as in the problem's table.
        period: Calls after which its work repeats.
    """

    name: str
    title: str
    equations: Equations
    install: str = ""
    ours: bool = False
    tolerance: float = 0.0
    compiles: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    row_bits: int = 0
    period: int = 1

    def absent(self) -> str:
        """Why it can't run on this machine at all; empty where it can."""
        return ""

    def refuses(self, case: Case) -> str:
        """Why it has no answer to this case; empty where it has."""
        return ""

    def allocates(self, case: Case) -> dict[str, float]:
        """Bytes that it holds beside the shared table, by a name: who gives the same name shares.

        By default its optimizer's state.
        """
        size = state_bytes(case)
        return {f"{self.name} state": size} if size else {}

    @abstractmethod
    def prepare(self, problem: Problem) -> Session:
        """Sets it up. Weights are the problem's own storage wherever it can take them."""


class RowAccess(Protocol):
    """Reads and writes rows of the concatenated tables, whatever holds them."""

    def read(self, rows: Tensor) -> Tensor:
        """A copy of ``rows``, ``[U, D]``."""
        ...

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Puts values back."""
        ...


class Rows:
    """Rows of one tensor that holds all tables."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def read(self, rows: Tensor) -> Tensor:
        """A copy of ``rows``, ``[U, D]``."""
        return self._weight.detach()[rows]

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Puts values back."""
        with torch.no_grad():
            self._weight.index_copy_(0, rows, values)


class TieredRows:
    """Rows of frozen tiers; what a tier does not store reads as zero."""

    def __init__(self, problem: Problem, tier_width: int, blocks: Sequence[Tensor]) -> None:
        self._tiers = problem.tiers(tier_width)
        self._blocks = blocks
        self._dim = problem.case.dim

    def parts(self, rows: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """Per tier: places within ``rows``, the rows' numbers in the tier, the tier."""
        rank = self._tiers.rank[rows]
        tier = torch.bucketize(rank, torch.tensor(self._tiers.ends), right=True)
        starts = [0, *self._tiers.ends]
        found = []
        for index in range(len(self._blocks)):
            here = (tier == index).nonzero().squeeze(1)
            found.append((here, rank[here] - starts[index], index))
        return found

    def read(self, rows: Tensor) -> Tensor:
        """A copy of ``rows``, zero-extended to ``[U, D]``."""
        found = torch.zeros(rows.numel(), self._dim, dtype=self._blocks[0].dtype)
        for here, local, index in self.parts(rows):
            block = self._blocks[index].detach()
            found[here, : block.shape[1]] = block[local]
        return found

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Puts values back."""
        for here, local, index in self.parts(rows):
            block = self._blocks[index].detach()
            block.index_copy_(0, local, values[here, : block.shape[1]].contiguous())


def sparse_rows(gradient: Tensor, rows: Tensor) -> Tensor:
    """Rows of a gradient, sparse or dense, as ``[U, D]``."""
    if not gradient.is_sparse:
        return gradient[rows]
    gradient = gradient.coalesce()
    place = torch.searchsorted(rows, gradient.indices()[0])
    found = torch.zeros(rows.numel(), gradient.shape[1], dtype=gradient.dtype)
    return found.index_copy_(0, place, gradient.values())


def table_rows(parameters: Sequence[nn.Parameter], rows: Tensor) -> Tensor:
    """Row gradients of tables of equal size, at rows of all of them: ``[U, D]``."""
    parts, start = [], 0
    for parameter in parameters:
        end = start + parameter.shape[0]
        here = rows[(rows >= start) & (rows < end)] - start
        if here.numel():
            assert parameter.grad is not None
            parts.append(sparse_rows(parameter.grad, here))
        start = end
    return torch.cat(parts)


class Optimizer(Protocol):
    """What a session needs of an optimizer."""

    def step(self) -> object:
        """Updates the weights."""
        ...


class DenseNetwork:
    """A network on top of the tables of 26 fields, say: its loss, gradients and Adam step."""

    def __init__(self, case: Case) -> None:
        generator_state = torch.random.get_rng_state()
        torch.manual_seed(7)
        widths = [case.tables * case.dim, *case.dense]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self._network = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self._labels = (torch.rand(case.bags, 1) < 0.3).float()
        torch.random.set_rng_state(generator_state)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=1e-4)
        self._case = case

    def train(self, output: Tensor) -> None:
        """Backward from the loss through the network and the tables' outputs, and its step."""
        case = self._case
        if output.shape[0] != case.bags:
            output = output.view(case.tables, case.bags, case.dim).transpose(0, 1)
        logits = self._network(output.reshape(case.bags, -1))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, self._labels)
        cast(Any, loss).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


class AutogradSession:
    """Lookup, backward and step through autograd, with fresh outputs and gradients each call."""

    def __init__(
        self,
        problem: Problem,
        lookup: Callable[[int], Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        optimizer: Optimizer | None = None,
        rows: RowAccess | None = None,
        masks: Sequence[nn.Parameter] = (),
        gradient: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Sets up one session.

        Args:
            problem: Its problem.
            lookup: Output ``[T·B, D]``, or anything that holds as many numbers, of an id set.
            parameters: Whose gradients are dropped after each call.
            optimizer: Of a step; None also where the backward updates by itself.
            rows: Access to the rows; by default to ``problem.weight``.
            masks: Parameters of the soft mask, one after another.
            gradient: Row gradient ``[U, D]`` of given rows after a backward; by default that of
                the one parameter.
        """
        self._problem = problem
        self._work = problem.case.work
        self._lookup = lookup
        self._parameters = [*parameters, *masks]
        self._optimizer = optimizer
        self._rows: RowAccess = rows or Rows(problem.weight)
        self._masks = masks
        self._gradient = gradient or self._only_gradient
        self._grad: Tensor | None = None
        self._network = DenseNetwork(problem.case) if problem.case.dense else None

    def _only_gradient(self, rows: Tensor) -> Tensor:
        gradient = self._parameters[0].grad
        assert gradient is not None
        return sparse_rows(gradient, rows)

    def _incoming(self, output: Tensor) -> Tensor:
        if self._grad is None:
            case = self._problem.case
            grad = self._problem.grad
            if output.dim() == 2 and output.shape[1] == case.tables * case.dim > case.dim:
                grad = grad.view(case.tables, case.bags, case.dim).transpose(0, 1)
            self._grad = grad.reshape(output.shape).to(output.dtype).contiguous()
        return self._grad

    def _backward(self, output: Tensor) -> None:
        cast(Any, output).backward(self._incoming(output))

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def call(self, rotation: int) -> object:
        """One timed call."""
        if self._work == "forward":
            with torch.no_grad():
                return self._lookup(rotation)
        output = self._lookup(rotation)
        if self._network is not None:
            self._network.train(output)
        else:
            self._backward(output)
        if self._work == "step" and self._optimizer is not None:
            self._optimizer.step()
        self._drop_gradients()
        return None

    def _table_major(self, output: Tensor) -> Tensor:
        case = self._problem.case
        output = output.detach()
        if output.dim() == 2 and output.shape[1] == case.tables * case.dim > case.dim:
            output = output.view(case.bags, case.tables, case.dim).transpose(0, 1)
        return output.reshape(-1, case.dim)

    def outcome(self, rotation: int) -> Outcome:
        """One call with everything it produced."""
        if self._work == "forward":
            with torch.no_grad():
                return Outcome(self._table_major(self._lookup(rotation)))
        touched = torch.unique(self._problem.global_ids[rotation])
        before = self._rows.read(touched)
        output = self._lookup(rotation)
        self._backward(output)
        result = Outcome(self._table_major(output).clone())
        found = [mask.grad for mask in self._masks if mask.grad is not None]
        if found:
            result.mask_gradient = torch.cat(found)
        if self._work == "backward":
            result.row_gradient = self._gradient(touched)
        else:
            if self._optimizer is not None:
                self._optimizer.step()
            result.update = self._rows.read(touched).double() - before.double()
        self._rows.write(touched, before)
        self._drop_gradients()
        return result
