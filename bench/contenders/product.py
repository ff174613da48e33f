"""What users of the layers get: layers and collections with a fused optimizer, beside their peers.

A layer is compared with the operator that it calls, and many tables with as many nn.Embeddings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bench.contenders.amtl import (
    OPTIMIZERS,
    LearningSession,
    OursInLayers,
    by_sample,
    optimizer_class,
)
from bench.contenders.base import AutogradSession, Contender, Session, table_rows
from bench.inputs import Case, Problem, table_counts
from bench.oracle import Equations, GivenSizes, Outcome

LEARNED: dict[str, dict[str, Any]] = {
    "ordinal": {"parametrization": "ordinal"},
    "fourth": {"parametrization": "ordinal", "learns_every": 4},
    "free": {"parametrization": "free"},
    "paper": {"parametrization": "free", "budget": None},
}
"""States whose sizes are learned: ours at every pass and at every fourth, the paper's layer under a
budget, and as it is there."""

_STATES = {
    "search": "search by the rule",
    "frozen": "frozen",
    "ordinal": "sizes learned",
    "fourth": "sizes learned at every fourth pass",
    "free": "sizes learned by the paper's softmax, under a budget",
    "paper": "sizes learned as in the paper",
}


class _LayerRows:
    """Rows of layers in either phase, one below the other."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = layers

    def _parts(self, rows: Tensor) -> Iterable[tuple[Any, Tensor, Tensor]]:
        start = 0
        for layer in self._layers:
            here = ((rows >= start) & (rows < start + layer.num_embeddings)).nonzero().squeeze(1)
            yield layer, here, rows[here] - start
            start += layer.num_embeddings

    def read(self, rows: Tensor) -> Tensor:
        """A copy of ``rows``, ``[U, D]``: unmasked in the search, zero-extended from tiers.

        As they are stored, which is not what a layer of few bits shows.
        """
        return torch.cat(
            [
                (layer.weight if layer.phase == "search" else layer._dense(rounded=False))[local]
                for layer, _, local in self._parts(rows)
            ]
        ).detach()

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Puts values back."""
        with torch.no_grad():
            for layer, here, local in self._parts(rows):
                if layer.phase == "search":
                    layer.weight.index_copy_(0, local, values[here])
                    continue
                places = local if layer.row_order is None else layer.row_order[local].long()
                start = 0
                for block, end in zip(layer.blocks, layer.tier_ends, strict=True):
                    mine = ((places >= start) & (places < end)).nonzero().squeeze(1)
                    part = values[here[mine], : block.shape[1]].contiguous()
                    block.index_copy_(0, places[mine] - start, part)
                    start = end


class _Product(OursInLayers):
    """A form of ours that takes a fused optimizer in steps.

    Attributes:
        state: Of its tables while they are timed: in the ``"search"``, whose sizes follow from the
            counts by the default rule and learn nothing, ``"frozen"``, or one of :data:`LEARNED`.
    """

    form = ""

    def __init__(self, state: str) -> None:
        self.state = state
        self.name = f"{self.form}_{state}"
        self.title = f"{self.title}, {_STATES[state]}"
        self.period = LEARNED.get(state, {}).get("learns_every", 1)
        self.equations = GivenSizes("kept")

    def refuses(self, case: Case) -> str:
        """Its optimizer is fused, and a frozen table is a copy."""
        if case.work == "backward":
            return "its backward is a step"
        if case.dtype != "float32":
            return "measured in float32"
        return super().refuses(case)

    def _fused(self, problem: Problem) -> Any:
        case = problem.case
        if case.work != "step":
            return None
        options: dict[str, Any] = {"lr": problem.learning_rate}
        if case.optimizer != "sgd":
            options["eps"] = problem.eps
        kind = optimizer_class(case.optimizer)
        assert kind is not None
        return functools.partial(kind, **options)

    def _options(self, problem: Problem, counts: Tensor) -> dict[str, Any]:
        """Sizes in whole tiers: then what a frozen row stores is what it shows."""
        case = problem.case
        width = max(1, min(4, int(case.row_mean * case.dim / 4)))
        return {
            "counts": counts,
            "budget": case.row_mean,
            "bits": None,
            "sparse": True,
            "granularity": width,
            "tier_width": width,
            **LEARNED.get(self.state, {}),
        }

    def _settle(self, problem: Problem, layers: Sequence[Any]) -> Any:
        """Freezes if need be, notes the sizes, and returns the optimizer.

        Lookups alone are inference, for which a model is told to evaluate.
        """
        handle = layers[0].fused_optimizer
        for layer in layers:
            if self.state == "frozen":
                layer.freeze(handle)
            layer.train(problem.case.work != "forward")
        self.equations = GivenSizes("kept", row_dims=torch.cat([e.row_dims() for e in layers]))
        return handle

    def _session(self, problem: Problem, layers: Sequence[Any], lookup: Any) -> Session:
        handle = self._settle(problem, layers)
        options: dict[str, Any] = {
            "lookup": lookup,
            "parameters": [p for layer in layers for p in layer.table_parameters()],
            "optimizer": handle,
            "rows": _LayerRows(layers),
        }
        if self.state in LEARNED:
            return LearningSession(layers, problem, **options)
        return AutogradSession(problem, **options)


class Bag(_Product):
    """``AMTLEmbeddingBag`` as a user has it."""

    form = "amtl_bag"
    title = "AMTLEmbeddingBag, fused optimizer"

    def refuses(self, case: Case) -> str:
        """One table, pooled."""
        if case.tables > 1 or not case.pooled:
            return "a layer of bags is one table"
        return super().refuses(case)

    def _layer(self, problem: Problem) -> Any:
        import amtl

        return amtl.AMTLEmbeddingBag(
            *problem.weight.shape,
            mode="sum",
            _weight=problem.weight,
            fused_optimizer=self._fused(problem),
            **self._options(problem, torch.from_numpy(table_counts(problem.case))),
        )

    def prepare(self, problem: Problem) -> Session:
        """A layer over the problem's weights, its sizes from the same counts and budget."""
        layer = self._layer(problem)
        ids, starts = problem.global_ids, problem.offsets[:-1]

        def lookup(rotation: int) -> Tensor:
            output: Tensor = layer(ids[rotation], starts)
            return output

        return self._session(problem, [layer], lookup)


class FewBitsBag(Bag):
    """The same in training with few bits, which rounds what is looked up; as many numbers.

    Args:
        bits: Of a stored number.
        tolerance: How far a lookup may be from that of the numbers that it rounds.
    """

    def __init__(self, bits: int, tolerance: float) -> None:
        self.form = f"amtl_bag_int{bits}"
        self.title = f"AMTLEmbeddingBag, {bits} bits, fused optimizer"
        self.bits, self.tolerance = bits, tolerance
        super().__init__("frozen")

    def _layer(self, problem: Problem) -> Any:
        import amtl

        options = self._options(problem, torch.from_numpy(table_counts(problem.case)))
        # Rows of few bits fill bytes.
        width = -(-options["tier_width"] // (8 // self.bits)) * (8 // self.bits)
        options |= {"granularity": width, "tier_width": width}
        options |= {"bits": self.bits, "budget": options["budget"] * self.bits / 32}
        return amtl.AMTLEmbeddingBag(
            *problem.weight.shape,
            mode="sum",
            _weight=problem.weight,
            fused_optimizer=self._fused(problem),
            **options,
        )


class BareBag(Bag):
    """The operator that such a layer calls, over the very tensors, with the same optimizer."""

    form = "amtl_bag_bare"
    title = "the operator that AMTLEmbeddingBag calls"

    def prepare(self, problem: Problem) -> Session:
        """A layer, of which only the tensors are used."""
        import amtl_kernels

        layer = self._layer(problem)
        handle = self._settle(problem, [layer])
        ids, starts, dim = problem.global_ids, problem.offsets[:-1], problem.case.dim
        source: Any = amtl_kernels if handle is None else amtl_kernels.fused
        extra = {} if handle is None else {"optimizer": handle}
        if self.state == "frozen":
            blocks, ends = list(layer.blocks), list(layer.tier_ends)
            masks: list[Tensor] = []

            def lookup(rotation: int) -> Tensor:
                output: Tensor = source.tiered_embedding_bag(
                    blocks, ends, ids[rotation], starts, embedding_dim=dim, **extra
                )
                return output
        else:
            weight, row_group = layer.weight, layer.row_group
            noisy, mask, sizes = layer.head(noise=True)
            # Where sizes are learned, the gradient of the mask is a part of the operator's work.
            mask = mask.detach().requires_grad_(mask.requires_grad)
            masks = [mask] if mask.requires_grad else []

            def lookup(rotation: int) -> Tensor:
                dims = noisy if layer.training else sizes
                output: Tensor = source.adaptive_embedding_bag(
                    weight, ids[rotation], starts, row_group, dims, mask, **extra
                )
                return output

        parameters = [*layer.table_parameters(), *masks]
        return _BareSession(layer, problem, lookup, parameters, rows=_LayerRows([layer]))


class _BareSession(AutogradSession):
    """Checks the operator without size noise, times it as the layer in training calls it."""

    def __init__(self, layer: Any, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._layer = layer.train(self._work != "forward")

    def outcome(self, rotation: int) -> Outcome:
        """One call with sizes at rest."""
        self._layer.eval()
        try:
            return super().outcome(rotation)
        finally:
            self._layer.train(self._work != "forward")


def _refuse_many(case: Case) -> str:
    if case.tables == 1 or case.bag_size > 1 or not case.pooled:
        return "is for several tables with one lookup each"
    return ""


class Layers(_Product):
    """One ``AMTLEmbedding`` a table, one optimizer for all, side by side as an MLP takes them."""

    form = "amtl_layers"
    title = "AMTLEmbedding per table, fused optimizer"

    def refuses(self, case: Case) -> str:
        """Needs several tables."""
        return _refuse_many(case) or super().refuses(case)

    def prepare(self, problem: Problem) -> Session:
        """Layers over the problem's weights."""
        import amtl

        case = problem.case
        counts = torch.from_numpy(table_counts(case))
        layers = nn.ModuleList(
            amtl.AMTLEmbedding(*part.shape, _weight=part, **self._options(problem, counts))
            for part in problem.weight.split(problem.rows_per_table)
        )
        fused = self._fused(problem)
        if fused is not None:
            amtl.fuse(layers, fused)
        ids = [list(rotation.view(case.tables, case.bags)) for rotation in problem.ids]
        each = list(layers)

        def lookup(rotation: int) -> Tensor:
            return torch.cat([layer(i) for layer, i in zip(each, ids[rotation], strict=True)], 1)

        return self._session(problem, each, lookup)


class Collection(_Product):
    """``AMTLEmbeddingCollection``: all tables in one call."""

    form = "amtl_collection"
    title = "AMTLEmbeddingCollection, fused optimizer"

    def refuses(self, case: Case) -> str:
        """Needs several tables."""
        return _refuse_many(case) or super().refuses(case)

    def prepare(self, problem: Problem) -> Session:
        """A collection over the problem's weights."""
        import amtl

        case = problem.case
        counts = [torch.from_numpy(table_counts(case))] * case.tables
        options = {**self._options(problem, counts[0]), "counts": counts}
        collection = amtl.AMTLEmbeddingCollection(
            [problem.rows_per_table] * case.tables,
            case.dim,
            _weight=problem.weight,
            fused_optimizer=self._fused(problem),
            **options,
        )
        starts = torch.arange(case.tables) * problem.rows_per_table
        samples = by_sample(problem)
        assert samples is not None
        ids = [rotation - starts for rotation in samples]

        def lookup(rotation: int) -> Tensor:
            output: Tensor = collection(ids[rotation])
            return output.flatten(1)

        return self._session(problem, [collection], lookup)


class Embeddings(Contender):
    """One ``nn.Embedding`` a table, as most models are written.

    Attributes:
        sparse: Whether gradients are sparse, for the Adam that updates the rows of a batch only.
    """

    name = "torch_embeddings"
    title = "nn.Embedding per table"
    equations = Equations("all")
    devices = ("cpu",)

    def __init__(self, sparse: bool) -> None:
        self.sparse = sparse
        if sparse:
            self.name += "_sparse"
            self.title = "nn.Embedding(sparse=True) per table, SparseAdam"

    def refuses(self, case: Case) -> str:
        """Needs several tables; row-wise Adagrad does not exist here."""
        if case.optimizer == "rowwise_adagrad":
            return "torch.optim has no row-wise Adagrad"
        if self.sparse and case.optimizer != "adam":
            return "takes part for SparseAdam"
        return _refuse_many(case)

    def prepare(self, problem: Problem) -> Session:
        """Modules over the problem's storage."""
        case = problem.case
        tables = [
            nn.Embedding.from_pretrained(part, freeze=False, sparse=self.sparse)
            for part in problem.weight.split(problem.rows_per_table)
        ]
        parameters = [cast(nn.Parameter, table.weight) for table in tables]
        ids = [list(rotation.view(case.tables, case.bags)) for rotation in problem.ids]

        def lookup(rotation: int) -> Tensor:
            return torch.cat([table(i) for table, i in zip(tables, ids[rotation], strict=True)], 1)

        optimizer: Any = None
        if case.work == "step":
            kind: Any = getattr(torch.optim, OPTIMIZERS[case.optimizer])
            options = {} if case.optimizer == "sgd" else {"eps": problem.eps}
            if self.sparse:
                # Its eps is added before the second moment's bias is taken out, Adam's after it:
                # so scaled, both take the same first step, which is the one that is checked.
                kind, options = torch.optim.SparseAdam, {"eps": problem.eps * (1 - 0.999) ** 0.5}
            optimizer = kind(parameters, lr=problem.learning_rate, **options)
        return AutogradSession(
            problem,
            lookup,
            parameters,
            optimizer=optimizer,
            gradient=lambda rows: table_rows(parameters, rows),
        )


def contenders() -> Iterable[Contender]:
    """Those of this module."""
    states = {
        Bag: ("search", "frozen", "ordinal", "fourth"),
        BareBag: ("search", "frozen", "ordinal"),
        Layers: ("search", "frozen", "ordinal", "fourth", "paper"),
        Collection: ("search", "frozen", "ordinal", "free", "paper"),
    }
    each = [kind(state) for kind, held in states.items() for state in held]
    peers = [Embeddings(sparse) for sparse in (False, True)]
    few = ((8, 0.02), (4, 0.2), (2, 0.6))
    return [*peers, *each, *(FewBitsBag(*entry) for entry in few)]
