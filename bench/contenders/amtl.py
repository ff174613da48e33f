"""This project's operators, in every phase that a table goes through."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders.base import (
    CHUNK_ROWS,
    AutogradSession,
    Contender,
    Optimizer,
    Rows,
    Session,
    TieredRows,
    refuse_copy,
    sparse_rows,
    table_rows,
)
from bench.inputs import Case, Problem, TierLayout, noise_columns, table_counts
from bench.oracle import Equations, GivenSizes, MismatchError, Outcome

INSTALL = "pip install --no-build-isolation -e ."
OPTIMIZERS = {
    "sgd": "SGD",
    "adagrad": "Adagrad",
    "rowwise_adagrad": "RowwiseAdagrad",
    "adam": "Adam",
}


def optimizer_class(name: str) -> Callable[..., Optimizer] | None:
    """The optimizer of a case in ``amtl_kernels.optim``, if there is one."""
    try:
        module = importlib.import_module("amtl_kernels.optim")
    except ImportError:
        return None
    found = getattr(module, OPTIMIZERS[name], None)
    return found if callable(found) else None


def _functions(fused: bool, optimizer: Optimizer | None) -> tuple[Any, dict[str, Any]]:
    """Where the lookups come from, and what they take beside their arguments."""
    if fused:
        return importlib.import_module("amtl_kernels.fused"), {"optimizer": optimizer}
    return importlib.import_module("amtl_kernels"), {}


def _make_optimizer(problem: Problem, parameters: list[nn.Parameter]) -> Optimizer | None:
    case = problem.case
    if case.work != "step":
        return None
    kind = optimizer_class(case.optimizer)
    assert kind is not None
    options: dict[str, Any] = {"lr": problem.learning_rate}
    if case.optimizer != "sgd":
        options["eps"] = problem.eps
    return kind(parameters, **options)


class Ours(Contender):
    """One of ours.

    Attributes:
        fused: Whether the backward updates the table, with no gradient in between.
    """

    ours = True
    install = INSTALL
    fused = False

    def _fuse(self, name: str, title: str) -> None:
        self.fused = True
        self.name = f"{name}_fused"
        self.title = f"{title}, fused update"

    def absent(self) -> str:
        """Whether the native operators are there: the reference alone is the eager contender."""
        if importlib.util.find_spec("amtl_kernels") is None:
            return "amtl_kernels is not importable"
        import amtl_kernels

        if amtl_kernels.get_backend() != "auto":
            return ""
        native = amtl_kernels.build_info().get("native") or {}
        if not isinstance(native, dict) or "cpu_capability" not in native:
            return "amtl_kernels was built without native CPU operators"
        return ""

    def refuses(self, case: Case) -> str:
        """Steps need the optimizer, and only steps can be fused."""
        if self.fused and case.work != "step":
            return "only a step has an update to fuse"
        if case.work == "step" and optimizer_class(case.optimizer) is None:
            return f"amtl_kernels.optim has no {OPTIMIZERS[case.optimizer]}"
        return ""


def by_sample(problem: Problem) -> list[Tensor] | None:
    """Ids of several one-lookup fields sample by sample, as a model's batch comes: ``[B, T]``.

    None where bags are pooled or there is one table. Looked up like this, the output is
    ``[B, T, D]``, which is what TBE returns too.
    """
    case = problem.case
    if case.tables == 1 or case.bag_size > 1 or not case.pooled:
        return None
    return [ids.view(case.tables, case.bags).t().contiguous() for ids in problem.global_ids]


class Search(Ours):
    """The search phase as trained: size noise, mask gradient, sparse coalesced row gradient."""

    name = "amtl_search"
    title = "amtl search"
    equations = Equations("noisy", mask_gradient=True)

    def __init__(self, fused: bool = False) -> None:
        if fused:
            self._fuse(self.name, self.title)

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights."""
        weight = nn.Parameter(problem.weight)
        mask = nn.Parameter(problem.group_mask)
        optimizer = _make_optimizer(problem, [weight])
        amtl_kernels, extra = _functions(self.fused, optimizer)
        ids, starts, seed = problem.global_ids, problem.offsets[:-1], problem.seed
        row_group, group_dims = problem.row_group, problem.group_dims
        samples = by_sample(problem)
        if samples is not None:

            def lookup(rotation: int) -> Tensor:
                output: Tensor = amtl_kernels.adaptive_embedding(
                    weight, samples[rotation], row_group, group_dims, mask, seed=seed, **extra
                )
                return output.flatten(1)
        elif problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                output: Tensor = amtl_kernels.adaptive_embedding_bag(
                    weight, ids[rotation], starts, row_group, group_dims, mask, seed=seed, **extra
                )
                return output
        else:

            def lookup(rotation: int) -> Tensor:
                output: Tensor = amtl_kernels.adaptive_embedding(
                    weight, ids[rotation], row_group, group_dims, mask, seed=seed, **extra
                )
                return output

        separate = None if self.fused else optimizer
        return AutogradSession(problem, lookup, [weight], optimizer=separate, masks=[mask])


class Tables(Ours):
    """The search phase of several tables in one call, in FBGEMM's layout."""

    name = "amtl_tables"
    title = "amtl search, one call for all tables"

    def __init__(self, fused: bool = False) -> None:
        self.equations = GivenSizes("noisy", mask_gradient=True)
        if fused:
            self._fuse(self.name, self.title)

    def refuses(self, case: Case) -> str:
        """Needs several tables."""
        return "one table needs no such call" if case.tables == 1 else super().refuses(case)

    def prepare(self, problem: Problem) -> Session:
        """Views of the problem's storage, a parameter a table."""
        tables, rows = problem.case.tables, problem.rows_per_table
        masks = [nn.Parameter(part) for part in problem.group_mask.chunk(tables)]
        weights = [nn.Parameter(part) for part in problem.weight.split(rows)]
        group_dims = [part.contiguous() for part in problem.group_dims.chunk(tables)]
        groups = masks[0].shape[0]
        row_groups = [
            part - index * groups for index, part in enumerate(problem.row_group.split(rows))
        ]
        # Rows are hashed by their number within their table.
        local = torch.arange(rows).repeat(tables)
        sizes = problem.group_dims[problem.row_group.long()] if not problem.case.noise else None
        if sizes is None:
            column = noise_columns(local, problem.seed, problem.group_dims.shape[1])
            sizes = problem.group_dims[problem.row_group.long(), column]
        self.equations = GivenSizes("noisy", mask_gradient=True, row_dims=sizes)
        optimizer = _make_optimizer(problem, weights)
        functions, extra = _functions(self.fused, optimizer)
        ids, offsets, seed = problem.ids, problem.offsets, problem.seed

        def lookup(rotation: int) -> Tensor:
            output: Tensor = functions.adaptive_embedding_bag_tables(
                weights, ids[rotation], offsets, row_groups, group_dims, masks, seed=seed, **extra
            )
            return output

        def gradient(touched: Tensor) -> Tensor:
            return table_rows(weights, touched)

        return AutogradSession(
            problem,
            lookup,
            weights,
            optimizer=None if self.fused else optimizer,
            masks=masks,
            gradient=gradient,
        )


class Masked(Ours):
    """Sizes given per row, no mask gradient."""

    name = "amtl_masked"
    title = "amtl masked"
    equations = Equations("kept")

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights."""
        import amtl_kernels

        weight = nn.Parameter(problem.weight)
        ids, starts, row_dims = problem.global_ids, problem.offsets[:-1], problem.row_dims
        samples = by_sample(problem)
        if samples is not None:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.masked_embedding(weight, samples[rotation], row_dims).flatten(1)
        elif problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.masked_embedding_bag(weight, ids[rotation], starts, row_dims)
        else:

            def lookup(rotation: int) -> Tensor:
                return amtl_kernels.masked_embedding(weight, ids[rotation], row_dims)

        optimizer = _make_optimizer(problem, [weight])
        return AutogradSession(problem, lookup, [weight], optimizer=optimizer)


class Frozen(Ours):
    """Frozen tiers, trained on or served."""

    def __init__(self, name: str, tier_width: int, fused: bool = False) -> None:
        self.name = name
        self.tier_width = tier_width
        self.title = f"amtl frozen, {tier_width * 4}-byte tiers"
        if fused:
            self._fuse(name, self.title)
        self.equations = Equations("stored", tier_width=tier_width)

    def refuses(self, case: Case) -> str:
        """One frozen copy of a table of gigabytes is enough: the narrow tiers."""
        wide = refuse_copy(case, "a second frozen copy") if self.tier_width > 4 else ""
        return wide or super().refuses(case)

    def allocates(self, case: Case) -> dict[str, float]:
        """The blocks of its tiers, which both its forms of a step share, and their state."""
        width = min(case.row_mean * case.dim + self.tier_width * 0.6, case.dim)
        element = 4 if case.dtype == "float32" else 2
        size = case.tables * case.rows * width * element
        return {f"tiers of {self.tier_width}": size, **super().allocates(case)}

    def prepare(self, problem: Problem) -> Session:
        """Freezes the problem's weights; ids are renumbered beforehand, as vocabularies are."""
        tiers = problem.tiers(self.tier_width)
        blocks = [nn.Parameter(block) for block in problem.blocks(self.tier_width)]
        optimizer = _make_optimizer(problem, blocks)
        amtl_kernels, extra = _functions(self.fused, optimizer)
        ids = [tiers.rank[part] for part in problem.global_ids]
        starts, ends, dim = problem.offsets[:-1], tiers.ends, problem.case.dim
        samples = by_sample(problem)
        if samples is not None:
            places = [tiers.rank[part] for part in samples]

            def lookup(rotation: int) -> Tensor:
                output: Tensor = amtl_kernels.tiered_embedding(
                    blocks, ends, places[rotation], embedding_dim=dim, **extra
                )
                return output.flatten(1)
        elif problem.case.pooled:

            def lookup(rotation: int) -> Tensor:
                output: Tensor = amtl_kernels.tiered_embedding_bag(
                    blocks, ends, ids[rotation], starts, embedding_dim=dim, **extra
                )
                return output
        else:

            def lookup(rotation: int) -> Tensor:
                output: Tensor = amtl_kernels.tiered_embedding(
                    blocks, ends, ids[rotation], embedding_dim=dim, **extra
                )
                return output

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
        separate = None if self.fused else optimizer
        return AutogradSession(
            problem, lookup, blocks, optimizer=separate, rows=access, gradient=gradient
        )


class LearningSession(AutogradSession):
    """Checks layers that learn sizes without their size noise, times them as they train.

    Args:
        layers: What holds the size heads.
        problem: Its problem.
        **options: See :class:`AutogradSession`.
    """

    def __init__(self, layers: Sequence[Any], problem: Problem, **options: Any) -> None:
        super().__init__(problem, **options)
        import amtl

        self._layers = layers
        self._size_parameters = amtl.mask_parameters(torch.nn.ModuleList(layers))
        self._sizes = torch.optim.Adam(self._size_parameters, lr=1e-3)
        self._train(self._work != "forward")

    def _train(self, mode: bool) -> None:
        for layer in self._layers:
            layer.train(mode)

    def call(self, rotation: int) -> object:
        """One timed call; a step updates the size heads as well."""
        super().call(rotation)
        if self._work == "step":
            self._sizes.step()
        self._drop_sizes()
        return None

    def _drop_sizes(self) -> None:
        for parameter in self._size_parameters:
            parameter.grad = None

    def outcome(self, rotation: int) -> Outcome:
        """One call with sizes at rest.

        Raises:
            MismatchError: A backward gives what learns sizes no gradient.
        """
        self._train(False)
        try:
            found = super().outcome(rotation)
            if self._work != "forward":
                missing = sum(p.grad is None for p in self._size_parameters)
                if missing:
                    raise MismatchError(f"{missing} parameters of sizes have no gradient")
            return found
        finally:
            self._drop_sizes()
            self._train(self._work != "forward")


class OursInLayers(Ours):
    """A form of ours that is a layer, or several."""

    devices = ("cpu",)

    def absent(self) -> str:
        """Needs the layer package too."""
        if importlib.util.find_spec("amtl") is None:
            return "amtl is not importable"
        return super().absent()

    def refuses(self, case: Case) -> str:
        """Its counts, groups and sizes of every row are copies, too."""
        return refuse_copy(case, "the bookkeeping") or super().refuses(case)


class Layer(OursInLayers):
    """The whole layer in its search phase: size head, budget solver, lookup, both optimizers."""

    name = "amtl_layer"
    title = "amtl layer, search"

    def __init__(self) -> None:
        self.equations = GivenSizes("kept")

    def allocates(self, case: Case) -> dict[str, float]:
        """Counts, groups and sizes of rows."""
        return {self.name: case.tables * case.rows * 60.0, **super().allocates(case)}

    def prepare(self, problem: Problem) -> Session:
        """A layer over the problem's weights, with sizes of its own under the same budget."""
        import amtl

        case = problem.case
        counts = table_counts(case)
        options: dict[str, Any] = {
            "sparse": True,
            "_weight": problem.weight,
            "counts": torch.from_numpy(counts).repeat(case.tables),
            "field_sizes": [counts.size] * case.tables,
            "budget": case.row_mean,
            "parametrization": "ordinal",
        }
        rows, dim = problem.weight.shape
        ids, starts = problem.global_ids, problem.offsets[:-1]
        samples = by_sample(problem)
        layer: Any
        if samples is not None or not case.pooled:
            layer = amtl.AMTLEmbedding(rows, dim, **options)
            inputs = ids if samples is None else samples

            def lookup(rotation: int) -> Tensor:
                output: Tensor = layer(inputs[rotation])
                return output.flatten(1)
        else:
            layer = amtl.AMTLEmbeddingBag(rows, dim, mode="sum", **options)

            def lookup(rotation: int) -> Tensor:
                output: Tensor = layer(ids[rotation], starts)
                return output

        self.equations = GivenSizes("kept", row_dims=layer.row_dims())
        optimizer = _make_optimizer(problem, [layer.weight])
        return LearningSession(
            [layer],
            problem,
            lookup=lookup,
            parameters=[layer.weight],
            optimizer=optimizer,
            rows=Rows(layer.weight),
        )


class Codes(Ours):
    """Tables of few bits, of full width as FBGEMM's or in frozen tiers: served only."""

    def __init__(self, bits: int, tolerance: float, tiers: bool = False) -> None:
        self.name = f"amtl_tiers_int{bits}" if tiers else f"amtl_int{bits}"
        self.title = f"amtl frozen int{bits}, {'tiers' if tiers else 'full width'}"
        self.row_bits = bits
        self.tolerance = tolerance
        self.tiers = tiers
        self.equations = Equations("all")

    def refuses(self, case: Case) -> str:
        """Lookups only."""
        if case.work != "forward":
            return "tables of few bits serve only"
        if case.dtype != "float32":
            return "their output is float32"
        return refuse_copy(case, "a quantised copy", self.row_bits) or super().refuses(case)

    def allocates(self, case: Case) -> dict[str, float]:
        """Its rows."""
        width = min(case.row_mean * case.dim + 4 / self.row_bits, case.dim)
        width = width if self.tiers else case.dim
        return {self.name: case.tables * case.rows * width * self.row_bits / 8}

    def prepare(self, problem: Problem) -> Session:
        """Quantises a copy of the problem's weights, with one step size a tier."""
        from amtl.layer.rounding import unit

        import amtl_kernels

        case, bits, starts = problem.case, self.row_bits, problem.offsets[:-1]
        layout, ids = None, problem.global_ids
        if self.tiers:
            # Rows fill whole bytes, so some keep a few numbers more than asked for.
            layout = problem.tiers(unit(bits))
            ids = [layout.rank[part] for part in ids]
            self.equations = GivenSizes("kept", row_dims=layout.widths)
        blocks, steps = few_bits(problem.weight, bits, layout)
        table = (blocks, layout.ends if layout else [problem.weight.shape[0]])
        few: dict[str, Any] = {"steps": steps, "bits": bits, "embedding_dim": case.dim}

        def lookup(rotation: int) -> Tensor:
            if not case.pooled:
                return amtl_kernels.tiered_embedding(*table, ids[rotation], **few)
            return amtl_kernels.tiered_embedding_bag(*table, ids[rotation], starts, **few)

        return AutogradSession(problem, lookup, [])


def few_bits(weight: Tensor, bits: int, layout: TierLayout | None) -> tuple[list[Tensor], Tensor]:
    """Codes of a table's rows in tiers, or of the whole table, and the step size of each block.

    A step size is the layer's: what loses least of a normal distribution.

    Args:
        weight: ``[N, D]``.
        bits: 2, 4, 8 or 16.
        layout: The tiers, whose widths fill whole bytes.

    Returns:
        Blocks of uint8 ``[n, w * bits / 8]``, and float32 ``[C]``.
    """
    from amtl.layer.rounding import Parts, Rounding, encode

    from amtl_kernels.rounding import pack_codes

    ends, sizes = (layout.ends, layout.sizes) if layout else ([len(weight)], [weight.shape[1]])
    blocks, steps, start = [], [], 0
    for end, size in zip(ends, sizes, strict=True):
        rows = layout.order[start:end] if layout else torch.arange(start, end)
        square = weight[rows[:CHUNK_ROWS], :size].square().mean().reshape(1)
        step = Rounding(bits, Parts([end - start], [size]), square).steps()
        block = torch.empty(end - start, size * bits // 8, dtype=torch.uint8)
        for first in range(0, end - start, CHUNK_ROWS):
            part = weight[rows[first : first + CHUNK_ROWS], :size]
            block[first : first + CHUNK_ROWS] = pack_codes(encode(part, step, bits), bits)
        blocks.append(block)
        steps.append(step)
        start = end
    return blocks, torch.cat(steps)


def contenders() -> Iterable[Contender]:
    """Those of this module; the tolerances of codes are their quantisation error."""
    losses = {16: 1e-4, 8: 2e-2, 4: 0.2, 2: 0.5}
    codes = [Codes(*pair, tiers=tiers) for tiers in (False, True) for pair in losses.items()]
    fused = [Search(fused=True), Frozen("amtl_frozen", 4, fused=True)]
    frozen = [Frozen("amtl_frozen", 4), Frozen("amtl_frozen64", 16)]
    tables = [Tables(), Tables(fused=True)]
    return [Search(), Masked(), *frozen, *codes, *fused, *tables, Layer()]
