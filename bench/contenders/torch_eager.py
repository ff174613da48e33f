"""PyTorch itself: its unmasked lookups, and the masked equations written in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.contenders.base import (
    AutogradSession,
    Contender,
    Optimizer,
    Rows,
    Session,
    refuse_copy,
    table_rows,
)
from bench.inputs import Case, Problem, noise_columns
from bench.oracle import Equations


def make_optimizer(problem: Problem, parameters: list[nn.Parameter]) -> Optimizer | None:
    """torch.optim's optimizer of the case, over sparse gradients."""
    case = problem.case
    if case.work != "step":
        return None
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=problem.learning_rate)
    return torch.optim.Adagrad(parameters, lr=problem.learning_rate, eps=problem.eps)


def _refuse_rowwise(case: Case) -> str:
    if case.optimizer == "rowwise_adagrad":
        return "torch.optim has no row-wise Adagrad"
    if case.optimizer == "adam":
        return "torch.optim.Adam refuses sparse gradients"
    return ""


class Bag(Contender):
    """``F.embedding_bag`` or ``F.embedding`` with sparse gradients, and no mask."""

    name = "torch"
    title = "F.embedding_bag"
    equations = Equations("all")

    def refuses(self, case: Case) -> str:
        """Row-wise Adagrad does not exist here."""
        return _refuse_rowwise(case)

    def _weight(self, problem: Problem) -> Tensor:
        return problem.weight

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights as they are."""
        weight = nn.Parameter(self._weight(problem))
        ids, starts = problem.global_ids, problem.offsets[:-1]
        if problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                return F.embedding_bag(ids[rotation], weight, starts, mode="sum", sparse=True)
        else:

            def lookup(rotation: int) -> Tensor:
                return F.embedding(ids[rotation], weight, sparse=True)

        optimizer = make_optimizer(problem, [weight])
        return AutogradSession(
            problem, lookup, [weight], optimizer=optimizer, rows=Rows(weight.detach())
        )


class PreMasked(Bag):
    """The same lookup over a table whose masked coordinates were set to zero beforehand."""

    name = "torch_premasked"
    title = "F.embedding_bag, pre-masked"
    equations = Equations("kept")

    def refuses(self, case: Case) -> str:
        """Only lookups: its gradients would fill the zeros again."""
        if case.work != "forward":
            return "a table masked beforehand serves lookups only"
        return refuse_copy(case, "a masked copy")

    def allocates(self, case: Case) -> dict[str, float]:
        """A masked copy, and the mask while it is made."""
        return {self.name: case.tables * case.rows * case.dim * 5.0}

    def _weight(self, problem: Problem) -> Tensor:
        mask = torch.arange(problem.case.dim) < problem.row_dims.unsqueeze(1)
        return problem.weight * mask


class BagLoop(Contender):
    """One ``nn.EmbeddingBag`` a table, called in turn, as models are usually written."""

    name = "torch_loop"
    title = "nn.EmbeddingBag per table"
    equations = Equations("all")

    def refuses(self, case: Case) -> str:
        """Needs several tables."""
        if case.tables == 1:
            return "one table has no loop"
        return _refuse_rowwise(case)

    def prepare(self, problem: Problem) -> Session:
        """One module a table over the problem's storage."""
        case = problem.case
        size = problem.rows_per_table
        tables = [
            nn.EmbeddingBag.from_pretrained(
                problem.weight[t * size : (t + 1) * size], freeze=False, mode="sum", sparse=True
            )
            for t in range(case.tables)
        ]
        parameters = [cast(nn.Parameter, table.weight) for table in tables]
        per_table = case.bags * case.bag_size
        ids = [rotation.view(case.tables, per_table) for rotation in problem.ids]
        starts = problem.offsets[: case.bags]

        def lookup(rotation: int) -> Tensor:
            outputs = [
                table(part, starts) for table, part in zip(tables, ids[rotation], strict=True)
            ]
            return torch.cat(outputs)

        def gradient(rows: Tensor) -> Tensor:
            return table_rows(parameters, rows)

        optimizer = make_optimizer(problem, parameters)
        return AutogradSession(problem, lookup, parameters, optimizer=optimizer, gradient=gradient)


def _search(
    ids: Tensor,
    weight: Tensor,
    mask: Tensor,
    row_group: Tensor,
    kept: Tensor,
    columns: Tensor,
    bag_size: int,
) -> Tensor:
    """Masked, pooled rows; the soft mask enters straight-through, its value cancels."""
    rows = F.embedding(ids, weight, sparse=True)
    soft = F.embedding(row_group[ids], mask)
    hard = (columns < kept.unsqueeze(1)).to(rows.dtype)
    masked = rows * (hard + (soft - soft.detach()))
    return masked if bag_size == 1 else masked.view(-1, bag_size, rows.shape[1]).sum(1)


class _RowwiseAdagrad:
    """Row-wise Adagrad over sparse gradients, which torch.optim lacks, as one would write it.

    A row's state adds up its mean square over its kept size.
    """

    def __init__(self, problem: Problem, weight: nn.Parameter, sizes: Tensor) -> None:
        self._weight, self._sizes = weight, sizes
        self._state = torch.zeros(weight.shape[0])
        self._rate, self._eps = problem.learning_rate, problem.eps

    @torch.no_grad()
    def step(self) -> None:
        assert self._weight.grad is not None
        gradient = self._weight.grad.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        self._state.index_add_(0, rows, values.square().sum(1) / self._sizes[rows])
        steps = values / (self._state[rows].sqrt() + self._eps).unsqueeze(1)
        self._weight.index_add_(0, rows, steps, alpha=-self._rate)


class Eager(Contender):
    """The search phase in plain PyTorch: gather, mask straight-through, pool, sparse Adagrad."""

    name = "eager"
    title = "eager PyTorch, same equations"
    equations = Equations("noisy", mask_gradient=True)

    def refuses(self, case: Case) -> str:
        """Needs full precision, and an optimizer for sparse gradients."""
        if case.dtype != "float32":
            return "written for float32"
        return "" if case.optimizer == "rowwise_adagrad" else _refuse_rowwise(case)

    def _function(self) -> Callable[..., Tensor]:
        return _search

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights; sizes under noise are hashed as the operators do it."""
        weight = nn.Parameter(problem.weight)
        mask = nn.Parameter(problem.group_mask)
        ids, row_group, group_dims = problem.global_ids, problem.row_group, problem.group_dims
        columns = torch.arange(problem.case.dim)
        bag_size = problem.case.bag_size
        search = self._function()
        # The hash is left out of the timed part: torch has no fast way to write it.
        quantiles = group_dims.shape[1] if group_dims.dim() == 2 else 1
        flat_dims = group_dims.reshape(-1)
        column = [noise_columns(part, problem.seed, quantiles) for part in ids]

        def lookup(rotation: int) -> Tensor:
            part = ids[rotation]
            kept = flat_dims[row_group[part] * quantiles + column[rotation]]
            return search(part, weight, mask, row_group, kept, columns, bag_size)

        optimizer: Optimizer | None
        if problem.case.optimizer == "rowwise_adagrad":
            rows = torch.arange(weight.shape[0])
            sizes = flat_dims[row_group * quantiles + noise_columns(rows, problem.seed, quantiles)]
            optimizer = _RowwiseAdagrad(problem, weight, sizes.clamp(min=1).to(weight.dtype))
        else:
            optimizer = make_optimizer(problem, [weight])
        return AutogradSession(problem, lookup, [weight], optimizer=optimizer, masks=[mask])


class Compiled(Eager):
    """The same under ``torch.compile``, forward and backward; the sparse update stays eager."""

    name = "compiled"
    title = "torch.compile of it"
    compiles = True

    def absent(self) -> str:
        """Inductor needs a C++ compiler on a CPU."""
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception:
            return "torch.compile found no C++ compiler"
        return ""

    def _function(self) -> Callable[..., Tensor]:
        return torch.compile(_search, dynamic=False)


def contenders() -> Iterable[Contender]:
    """Those of this module."""
    return [Bag(), PreMasked(), BagLoop(), Eager(), Compiled()]
