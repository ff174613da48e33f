"""Inputs of the operators, drawn from a few numbers, and comparisons with the reference.

A :class:`Case` is what hypothesis draws; :func:`build` turns it into tensors. Their values are
small integers, and bags of a mean hold a power of two of them, so that float32 sums are exact in
any order: a backend must agree with the reference to the last bit, and a lost or doubled lookup
cannot hide in a tolerance. Only means that leave out padding divide by other numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from amtl_kernels import reference

FORMS = ("masked", "adaptive", "tiered")
"""Tables with a size of every row, with sizes of groups, in tiers."""

DIMS = (1, 3, 8, 16, 17, 40, 64, 129, 300)


@dataclass(frozen=True)
class Case:
    seed: int
    rows: int
    dim: int
    lookups: int
    pattern: str
    dtype: torch.dtype
    index_dtype: torch.dtype
    size_dtype: torch.dtype
    groups: int
    columns: int
    sorted_groups: bool
    bags: int
    include_last_offset: bool
    mean: bool
    weighted: bool
    padding: str
    tiers: int
    hash_seed: int


@st.composite
def cases(draw: st.DrawFn, max_lookups: int = 6_000, max_dim: int = 300) -> Case:
    mean = draw(st.booleans())
    return Case(
        seed=draw(st.integers(0, 2**31)),
        rows=draw(st.sampled_from([1, 2, 37, 1000, 5_000])),
        dim=draw(st.sampled_from([d for d in DIMS if d <= max_dim])),
        lookups=min(max_lookups, draw(st.sampled_from([0, 1, 5, 64, 300, 1_500, 6_000]))),
        pattern=draw(st.sampled_from(["uniform", "zipf", "one row", "distinct"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        size_dtype=draw(st.sampled_from([torch.uint8, torch.int32])),
        groups=draw(st.sampled_from([1, 5, 200])),
        columns=draw(st.sampled_from([0, 1, 7])),
        sorted_groups=draw(st.booleans()),
        bags=draw(st.sampled_from([0, 1, 3, 2_000])),
        include_last_offset=mean or draw(st.booleans()),
        mean=mean,
        weighted=not mean and draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "first", "last"])),
        tiers=draw(st.integers(1, 4)),
        hash_seed=draw(st.integers(-(2**63), 2**63 - 1)),
    )


@dataclass
class Inputs:
    """Tensors of a case, and the operators' arguments."""

    case: Case
    weight: Tensor
    indices: Tensor
    offsets: Tensor
    row_dims: Tensor
    row_group: Tensor
    group_dims: Tensor
    group_mask: Tensor
    per_sample_weights: Tensor | None
    blocks: list[Tensor]
    tier_ends: list[int]
    padding_idx: int
    grad_flat: Tensor
    grad_bags: Tensor
    include_last_offset: bool = field(init=False)

    def __post_init__(self) -> None:
        self.include_last_offset = self.case.include_last_offset

    def forwards(self, bounds_check: int = 1) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The lookups, as operator and arguments."""
        for form, pooled in itertools.product(FORMS, (False, True)):
            arguments = self.call(form, pooled).lookup(bounds_check)
            yield "lookup", in_order("lookup", arguments)

    def backwards(self) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """The backwards, as operator and arguments."""
        for form, pooled in itertools.product(FORMS, (True, False)):
            call = self.call(form, pooled)
            wants = [(True, True)]
            if form == "adaptive" and not pooled:
                wants += [(False, True), (True, False)]
            for weight_grad, mask_grad in wants:
                arguments = call.backward(weight_grad, mask_grad)
                yield "lookup_backward", in_order("lookup_backward", arguments)

    def call(self, form: str, pooled: bool) -> Call:
        """The arguments of the four operators, of one of ``FORMS``."""
        return Call(
            tables=self.tables(form),
            masks=[self.group_mask] if form == "adaptive" else [],
            bags={
                "indices": self.indices if pooled else self.indices.reshape(1, -1),
                "offsets": self.offsets if pooled else None,
                "per_sample_weights": self.per_sample_weights if pooled else None,
                "pooling": int(self.case.mean and pooled),
                "padding_idx": [self.padding_idx],
                "include_last_offset": self.include_last_offset and pooled,
            },
            grad=self.grad_bags if pooled else self.grad_flat,
            groups_sorted=self.case.sorted_groups,
        )

    def tables(self, form: str) -> dict[str, Any]:
        """The arguments that describe a table, as those of a call with one."""
        arguments: dict[str, Any] = {
            "blocks": [self.weight],
            "block_counts": [1],
            "dims": [],
            "sizes": [],
            "row_groups": [],
            "seed": 0,
        }
        if form == "masked":
            return arguments | {"sizes": [self.row_dims]}
        if form == "adaptive":
            groups = {"sizes": [self.group_dims], "row_groups": [self.row_group]}
            return arguments | groups | {"seed": self.case.hash_seed}
        blocks = list(self.blocks)
        return arguments | {
            "blocks": blocks,
            "block_counts": [len(blocks)],
            "dims": [self.case.dim],
        }


@dataclass
class Call:
    """The arguments of the four operators, by the names of their schemas."""

    tables: dict[str, Any]
    masks: list[Tensor]
    bags: dict[str, Any]
    grad: Tensor
    groups_sorted: bool

    @property
    def has_masks(self) -> bool:
        return bool(self.tables["row_groups"])

    @property
    def has_weights(self) -> bool:
        return self.bags["per_sample_weights"] is not None

    def lookup(self, bounds_check: int = 1, sparse_grad: bool = True) -> dict[str, Any]:
        """Arguments of ``lookup``."""
        options = {"bounds_check": bounds_check, "sparse_grad": sparse_grad}
        return {**self.tables, "masks": self.masks, **self.bags, **options}

    def backward(self, weight_grad: bool = True, mask_grad: bool = True) -> dict[str, Any]:
        """Arguments of ``lookup_backward``."""
        wants = {
            "weight_grad": weight_grad,
            "mask_grad": mask_grad and self.has_masks,
            "psw_grad": self.has_weights,
        }
        return {**self.tables, "grad": self.grad, **self.bags, **wants}

    def update(self, optimizer: int, stochastic: bool = False) -> dict[str, Any]:
        """Arguments of ``lookup_update_``, with blocks and states of its own."""
        return {
            **self.tables,
            "grad": self.grad,
            **self.bags,
            "mask_grad": self.has_masks,
            "psw_grad": self.has_weights,
            "groups_sorted": self.groups_sorted,
            **self._step(optimizer, stochastic),
        }

    def apply(
        self, rows: list[Tensor], grads: list[Tensor], optimizer: int, stochastic: bool = False
    ) -> dict[str, Any]:
        """Arguments of ``apply_``, with blocks and states of its own."""
        return {"rows": rows, "grads": grads, **self._step(optimizer, stochastic)}

    def _step(self, optimizer: int, stochastic: bool) -> dict[str, Any]:
        blocks = [block.clone() for block in self.tables["blocks"]]
        state = []
        for block in blocks:
            shape = block.shape[:1] if optimizer == reference.ROWWISE_ADAGRAD else block.shape
            for moment in range((0, 1, 1, 2)[optimizer]):
                value = torch.full(shape, 0.5 + moment, device=block.device)
                state.append(value.double() if block.dtype == torch.float64 else value)
        hyper = [0.125, 1e-3, 0.25, 0.875, 0.75, 3.0, *([1.0] if stochastic else [])]
        return {"blocks": blocks, "state": state, "optimizer": optimizer, "hyper": hyper}


def in_order(op: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of an operator in the order of its schema; those of codes may be missing."""
    schema = getattr(torch.ops.amtl, op).default._schema
    names = [a.name for a in schema.arguments if a.name in arguments or not a.has_default_value()]
    assert arguments.keys() == set(names)
    return tuple(arguments[name] for name in names)


def several(case: Case, count: int, **options: Any) -> list[Inputs]:
    """Inputs of tables that one call takes together: of other sizes, with as many bags."""
    tables = []
    for t in range(count):
        mine = replace(
            case,
            seed=case.seed + t,
            rows=case.rows + 3 * t,
            dim=(case.dim, case.dim + 5, 1)[t % 3],
            groups=case.groups + t,
            columns=(case.columns + t) % 8,
            padding=("none", case.padding)[t % 2],
            include_last_offset=True,
        )
        tables.append(build(mine, **options))
    return tables


def join(form: str, tables: list[Inputs]) -> Call:
    """Pooled lookups in several tables at once; those past the last bag of the last stay there."""
    bags = min(table.offsets.numel() for table in tables) - 1
    indices, weights, begins, start = [], [], [], 0
    for t, table in enumerate(tables):
        end = int(table.offsets[bags]) if t + 1 < len(tables) else table.indices.numel()
        indices.append(table.indices[:end])
        if table.per_sample_weights is not None:
            weights.append(table.per_sample_weights[:end])
        begins.append(table.offsets[: bags + (t + 1 == len(tables))] + start)
        start += end
    calls = [table.call(form, True) for table in tables]
    arguments = {
        name: [value for call in calls for value in call.tables[name]]
        for name in ("blocks", "block_counts", "dims", "sizes", "row_groups")
    }
    return Call(
        tables={**arguments, "seed": calls[0].tables["seed"]},
        masks=[mask for call in calls for mask in call.masks],
        bags={
            "indices": torch.cat(indices),
            "offsets": torch.cat(begins),
            "per_sample_weights": torch.cat(weights) if weights else None,
            "pooling": calls[0].bags["pooling"],
            "padding_idx": [table.padding_idx for table in tables],
            "include_last_offset": True,
        },
        grad=torch.cat([table.grad_bags[:bags] for table in tables], 1),
        groups_sorted=all(call.groups_sorted for call in calls),
    )


def draw_indices(case: Case, generator: torch.Generator) -> Tensor:
    if case.pattern == "one row":
        return torch.full((case.lookups,), case.rows // 2, dtype=case.index_dtype)
    if case.pattern == "distinct":
        return (torch.randperm(max(case.rows, case.lookups), generator=generator) % case.rows)[
            : case.lookups
        ].to(case.index_dtype)
    uniform = torch.rand(case.lookups, generator=generator)
    if case.pattern == "zipf":
        uniform = uniform**6
    return (uniform * case.rows).long().clamp(max=case.rows - 1).to(case.index_dtype)


def draw_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).float()


def draw_sizes(shape: tuple[int, ...], largest: int, generator: torch.Generator) -> Tensor:
    """Sizes in 1..largest, and a fifth of 0."""
    sizes = torch.randint(1, largest + 1, shape, generator=generator)
    return sizes * (torch.rand(shape, generator=generator) > 0.2)


def build(case: Case, device: str = "cpu", dtype: torch.dtype | None = None) -> Inputs:
    dtype = dtype or case.dtype
    g = torch.Generator().manual_seed(case.seed)
    indices = draw_indices(case, g)
    largest = min(case.dim, 255) if case.size_dtype == torch.uint8 else case.dim
    row_dims = draw_sizes((case.rows,), largest, g)
    row_group = torch.randint(0, case.groups, (case.rows,), generator=g, dtype=torch.int32)
    if case.sorted_groups:
        row_group = row_group.sort().values
    shape = (case.groups, case.columns) if case.columns else (case.groups,)
    group_dims = draw_sizes(shape, largest, g)
    weight = draw_values((case.rows, case.dim), g).to(dtype)

    bags = max(1, case.bags) if case.include_last_offset else case.bags
    offsets = torch.randint(0, case.lookups + 1, (bags,), generator=g).sort().values
    if case.mean:
        lengths = 2 ** torch.randint(0, 5, (bags,), generator=g)
        lengths *= torch.rand(bags, generator=g) > 0.1
        offsets = (lengths.cumsum(0) - lengths).clamp(max=case.lookups)
        whole = offsets < case.lookups
        offsets = offsets[whole] if case.include_last_offset and whole.any() else offsets[:1]
        bags = offsets.numel()
    if bags:
        offsets[0] = 0
    width = torch.randint(1, case.dim + 1, (case.tiers,), generator=g)
    if case.seed % 4:
        # As in a table put in order; others have rows that stay where they are.
        width = width.sort(descending=True).values
    # The last tier mostly has no columns; sometimes another one, sometimes none.
    empty = int(torch.randint(-2, case.tiers + 2, (), generator=g))
    if empty >= 0:
        width[min(empty, case.tiers - 1)] = 0
    cuts = torch.randint(0, case.rows + 1, (case.tiers - 1,), generator=g).sort().values.tolist()
    tier_ends = [*cuts, case.rows]
    starts = [0, *cuts]
    blocks = [
        draw_values((end - start, int(w)), g).to(dtype)
        for start, end, w in zip(starts, tier_ends, width, strict=True)
    ]
    psw = draw_values((case.lookups,), g).to(dtype) if case.weighted else None
    grad_bags = bags - int(case.include_last_offset)
    return Inputs(
        case=case,
        weight=weight.to(device),
        indices=indices.to(device),
        offsets=offsets.to(case.index_dtype).to(device),
        row_dims=row_dims.to(case.size_dtype).to(device),
        row_group=row_group.to(device),
        group_dims=group_dims.to(case.size_dtype).to(device),
        group_mask=torch.rand(case.groups, case.dim, generator=g).to(device),
        per_sample_weights=None if psw is None else psw.to(device),
        blocks=[block.to(device) for block in blocks],
        tier_ends=tier_ends,
        padding_idx={"none": -1, "first": 0, "last": case.rows - 1}[case.padding],
        grad_flat=draw_values((case.lookups, case.dim), g).to(dtype).to(device),
        grad_bags=draw_values((grad_bags, case.dim), g).to(dtype).to(device),
    )


def wide(value: Any) -> Any:
    """Arguments in float64, for a reference without roundings in between."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, (list, tuple)):
        return type(value)(wide(v) for v in value)
    return value


def assert_agrees(got: Any, want: Any, case: Case, what: str) -> None:
    """Bit for bit, or, for means that leave out padding, up to the roundings of a long sum."""
    if isinstance(want, (list, tuple)):
        assert len(got) == len(want), what
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_agrees(g, w, case, f"{what}[{i}]")
        return
    assert got.shape == want.shape, (what, got.shape, want.shape)
    rounded = want.to(got.dtype) if got.is_floating_point() else want
    tolerance = 0.0
    if case.mean and case.padding != "none" and got.is_floating_point():
        tolerance = torch.finfo(got.dtype).eps + max(10, case.lookups) * 2.0**-24
    torch.testing.assert_close(
        got.cpu(),
        rounded.cpu(),
        rtol=tolerance,
        atol=tolerance * 4,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def expected(op: str, arguments: tuple[Any, ...]) -> Any:
    """The reference's answer, computed in float64."""
    return reference.IMPLEMENTATIONS[op](*wide(arguments))
