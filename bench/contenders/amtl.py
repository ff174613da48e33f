"""This project's operators, in every phase that a table goes through."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders.base import (
    AutogradSession,
    Contender,
    Optimizer,
    Session,
    TieredRows,
    sparse_rows,
)
from bench.inputs import Case, Problem
from bench.oracle import Equations

INSTALL = "pip install --no-build-isolation -e ."
_OPTIMIZERS = {"sgd": "SGD", "adagrad": "Adagrad", "rowwise_adagrad": "RowwiseAdagrad"}


def _optimizer_class(name: str) -> Callable[..., Optimizer] | None:
    try:
        module = importlib.import_module("amtl_kernels.optim")
    except ImportError:
        return None
    found = getattr(module, _OPTIMIZERS[name], None)
    return found if callable(found) else None


def _make_optimizer(problem: Problem, parameters: list[nn.Parameter]) -> Optimizer | None:
    case = problem.case
    if case.work != "step":
        return None
    kind = _optimizer_class(case.optimizer)
    assert kind is not None
    options: dict[str, Any] = {"lr": problem.learning_rate}
    if case.optimizer != "sgd":
        options["eps"] = problem.eps
    return kind(parameters, **options)


class _Ours(Contender):
    ours = True
    install = INSTALL

    def absent(self) -> str:
        """Whether the native operators are there: the reference alone is the eager contender."""
        if importlib.util.find_spec("amtl_kernels") is None:
            return "amtl_kernels is not importable"
        import amtl_kernels

        native = amtl_kernels.build_info().get("native") or {}
        if not isinstance(native, dict) or "cpu_capability" not in native:
            return "amtl_kernels was built without native CPU operators"
        return ""

    def refuses(self, case: Case) -> str:
        """Steps need the optimizer."""
        if case.work == "step" and _optimizer_class(case.optimizer) is None:
            return f"amtl_kernels.optim has no {_OPTIMIZERS[case.optimizer]}"
        return ""


class Search(_Ours):
    """The search phase as trained: size noise, mask gradient, sparse coalesced row gradient."""

    name = "amtl_search"
    title = "amtl search"
    equations = Equations("noisy", mask_gradient=True)

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights."""
        import amtl_kernels

        weight = nn.Parameter(problem.weight)
        mask = nn.Parameter(problem.group_mask)
        ids, starts, seed = problem.global_ids, problem.offsets[:-1], problem.seed
        row_group, group_dims = problem.row_group, problem.group_dims
        if problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.adaptive_embedding_bag(
                    weight, ids[rotation], starts, row_group, group_dims, mask, seed=seed
                )
        else:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.adaptive_embedding(
                    weight, ids[rotation], row_group, group_dims, mask, seed=seed
                )

        optimizer = _make_optimizer(problem, [weight])
        return AutogradSession(problem, lookup, [weight], optimizer=optimizer, mask=mask)


class Masked(_Ours):
    """Sizes given per row, no mask gradient."""

    name = "amtl_masked"
    title = "amtl masked"
    equations = Equations("kept")

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights."""
        import amtl_kernels

        weight = nn.Parameter(problem.weight)
        ids, starts, row_dims = problem.global_ids, problem.offsets[:-1], problem.row_dims
        if problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.masked_embedding_bag(weight, ids[rotation], starts, row_dims)
        else:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.masked_embedding(weight, ids[rotation], row_dims)

        optimizer = _make_optimizer(problem, [weight])
        return AutogradSession(problem, lookup, [weight], optimizer=optimizer)


class Frozen(_Ours):
    """Frozen tiers, trained on or served."""

    def __init__(self, name: str, tier_width: int) -> None:
        self.name = name
        self.tier_width = tier_width
        self.title = f"amtl frozen, {tier_width * 4}-byte tiers"
        self.equations = Equations("stored", tier_width=tier_width)

    def prepare(self, problem: Problem) -> Session:
        """Freezes the problem's weights; ids are renumbered beforehand, as vocabularies are."""
        import amtl_kernels

        tiers = problem.tiers(self.tier_width)
        blocks = [nn.Parameter(block) for block in problem.blocks(self.tier_width)]
        ids = [tiers.rank[part] for part in problem.global_ids]
        starts, ends, dim = problem.offsets[:-1], tiers.ends, problem.case.dim
        if problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.tiered_embedding_bag(
                    blocks, ends, ids[rotation], starts, embedding_dim=dim
                )
        else:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.tiered_embedding(blocks, ends, ids[rotation], embedding_dim=dim)

        def gradient(rows: Tensor) -> Tensor:
            whole = torch.zeros(rows.numel(), dim)
            for here, local, index in access.parts(rows):
                found = blocks[index].grad
                if found is not None and here.numel():
                    order = torch.argsort(local)
                    values = sparse_rows(found, local[order])
                    whole[here[order], : values.shape[1]] = values
            return whole

        access = TieredRows(problem, self.tier_width, blocks)
        optimizer = _make_optimizer(problem, blocks)
        return AutogradSession(
            problem, lookup, blocks, optimizer=optimizer, rows=access, gradient=gradient
        )


def contenders() -> Iterable[Contender]:
    """Those of this module."""
    return [Search(), Masked(), Frozen("amtl_frozen", 4), Frozen("amtl_frozen64", 16)]
