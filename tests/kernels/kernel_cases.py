"""Inputs of the operators, drawn from a few numbers, and comparisons with the reference.

A :class:`Case` is what hypothesis draws; :func:`build` turns it into tensors. Their values are
small integers, and bags of a mean hold a power of two of them, so that float32 sums are exact in
any order: a backend must agree with the reference to the last bit, and a lost or doubled lookup
cannot hide in a tolerance. Only means that leave out padding divide by other numbers.

Whatever the tensors, drawn here or a test's own, :func:`call` makes a :class:`Call` of them: the
arguments of every operator by the names of its schema, and of the public function that asks it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

import amtl_kernels
from amtl_kernels import reference

FORMS = ("masked", "adaptive", "tiered")
"""Tables with a size of every row, with sizes of groups, in tiers."""

RULES = {"sgd": 0, "adagrad": 1, "rowwise_adagrad": 1, "adam": 2}
"""Optimizers in the order of their numbers, and how many moments each keeps of a block."""

DIMS = (1, 3, 8, 16, 17, 40, 64, 129, 300)


@dataclass(frozen=True)
class Case:
    seed: int = 1
    rows: int = 1000
    dim: int = 64
    lookups: int = 5000
    pattern: str = "zipf"
    dtype: torch.dtype = torch.float32
    index_dtype: torch.dtype = torch.int64
    size_dtype: torch.dtype = torch.int32
    groups: int = 200
    columns: int = 7
    sorted_groups: bool = True
    bags: int = 300
    include_last_offset: bool = False
    mean: bool = False
    weighted: bool = False
    padding: str = "none"
    tiers: int = 3
    hash_seed: int = 5


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

    def call(self, form: str, pooled: bool, **given: Any) -> Call:
        """The arguments of the four operators, of one of ``FORMS``; ``given`` are others."""
        blocks, described = self.table(form)
        arguments = {
            **described,
            "indices": self.indices if pooled else self.indices.reshape(1, -1),
            "grad": self.grad_bags if pooled else self.grad_flat,
            "masks": [self.group_mask] if form == "adaptive" else [],
            "offsets": self.offsets if pooled else None,
            "per_sample_weights": self.per_sample_weights if pooled else None,
            "pooling": int(self.case.mean and pooled),
            "padding_idx": [self.padding_idx],
            "include_last_offset": self.include_last_offset and pooled,
            "groups_sorted": self.case.sorted_groups,
        }
        return call(blocks, **{**arguments, **given})

    def table(self, form: str) -> tuple[list[Tensor], dict[str, Any]]:
        """A table's blocks, and what else describes it."""
        if form == "masked":
            return [self.weight], {"sizes": [self.row_dims]}
        if form == "adaptive":
            groups = {"sizes": [self.group_dims], "row_groups": [self.row_group]}
            return [self.weight], {**groups, "seed": self.case.hash_seed}
        return list(self.blocks), {"dims": [self.case.dim]}


PLURALS = {
    "weight": "weights",
    "embedding_dim": "embedding_dims",
    "row_group": "row_groups",
    "group_mask": "group_masks",
}


def apart(values: Iterable[Any], counts: Iterable[int]) -> list[list[Any]]:
    """What is said of table after table, as one list a table."""
    left = iter(values)
    return [list(itertools.islice(left, count)) for count in counts]


@dataclass
class Call:
    """The arguments of the four operators, by the names of their schemas."""

    tables: dict[str, Any]
    masks: list[Tensor]
    bags: dict[str, Any]
    grad: Tensor
    groups_sorted: bool
    few_bits: dict[str, Any]

    @property
    def has_masks(self) -> bool:
        return bool(self.tables["row_groups"])

    @property
    def has_weights(self) -> bool:
        return self.bags["per_sample_weights"] is not None

    @property
    def learnable(self) -> list[Tensor]:
        weights = [self.bags["per_sample_weights"]] if self.has_weights else []
        return [*self.tables["blocks"], *self.masks, *weights]

    def fresh(self) -> Call:
        """The same with leaves of its own that get gradients."""

        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_()

        bags = dict(self.bags)
        if self.has_weights:
            bags["per_sample_weights"] = leaf(bags["per_sample_weights"])
        blocks = [leaf(block) for block in self.tables["blocks"]]
        masks = [leaf(mask) for mask in self.masks]
        return replace(self, tables={**self.tables, "blocks": blocks}, masks=masks, bags=bags)

    def lookup(self, bounds_check: int = 1, sparse_grad: bool = True) -> dict[str, Any]:
        """Arguments of ``lookup``."""
        options = {"bounds_check": bounds_check, "sparse_grad": sparse_grad}
        return {**self.tables, "masks": self.masks, **self.bags, **options, **self.few_bits}

    def backward(self, weight_grad: bool = True, mask_grad: bool = True) -> dict[str, Any]:
        """Arguments of ``lookup_backward``."""
        wants = {
            "weight_grad": weight_grad,
            "mask_grad": mask_grad and self.has_masks,
            "psw_grad": self.has_weights,
        }
        return {**self.tables, "grad": self.grad, **self.bags, **wants}

    def update(
        self,
        rule: str,
        hyper: Sequence[float] | None = None,
        state: list[Tensor] | None = None,
        blocks: list[Tensor] | None = None,
        **wants: bool,
    ) -> dict[str, Any]:
        """Arguments of ``lookup_update_``, with blocks and states of its own if none are given."""
        if blocks is None:
            blocks = [block.clone() for block in self.tables["blocks"]]
        return {
            **self.tables,
            "grad": self.grad,
            **self.bags,
            "mask_grad": self.has_masks,
            "psw_grad": self.has_weights,
            "groups_sorted": self.groups_sorted,
            **step(blocks, rule, hyper, state),
            **self.few_bits,
            **wants,
        }

    def public(self, several: bool | None = None) -> tuple[str, dict[str, Any]]:
        """The public function that asks for this lookup, and its arguments by name.

        ``several``: the one that takes lists of tables, also of a single one.
        """
        tables, bags = self.tables, self.bags
        counts, pooled = tables["block_counts"], bags["offsets"] is not None
        several = len(counts) > 1 if several is None else several
        each: dict[str, Any] = {"padding_idx": [None if p < 0 else p for p in bags["padding_idx"]]}
        shared: dict[str, Any] = {"indices": bags["indices"]}
        if not tables["sizes"]:
            form, blocks = "tiered", apart(tables["blocks"], counts)
            ends = [list(itertools.accumulate(map(len, mine))) for mine in blocks]
            each |= {"blocks": blocks, "tier_ends": ends, "embedding_dim": tables["dims"]}
            each |= {name: values for name, values in self.few_bits.items() if values}
            if "step_ends" in each:
                each["step_ends"] = apart(each["step_ends"], map(len, each["steps"]))
        elif not tables["row_groups"]:
            form = "masked"
            each |= {"weight": tables["blocks"], "row_dims": tables["sizes"]}
        else:
            form, shared["seed"] = "adaptive", tables["seed"]
            each |= {"weight": tables["blocks"], "row_group": tables["row_groups"]}
            each |= {"group_dims": tables["sizes"], "group_mask": self.masks}
        if pooled:
            names = ["offsets", "per_sample_weights"] + ["include_last_offset"] * (not several)
            shared |= {name: bags[name] for name in names}
            shared["mode"] = ("sum", "mean")[bags["pooling"]]
        if several:
            each = {PLURALS.get(name, name): values for name, values in each.items()}
        else:
            each = {name: values[0] for name, values in each.items()}
        name = f"{form}_embedding" + "_bag" * pooled + "_tables" * several
        return name, {**each, **shared}

    def look_up(
        self, room: Any = amtl_kernels, several: bool | None = None, **given: Any
    ) -> Tensor:
        """What the public function says to this, of ``amtl_kernels`` or its ``fused``."""
        name, arguments = self.public(several)
        out: Tensor = getattr(room, name)(**{**arguments, **given})
        return out


def call(
    blocks: Sequence[Tensor],
    indices: Tensor,
    grad: Tensor | None = None,
    *,
    block_counts: Sequence[int] | None = None,
    dims: Sequence[int] = (),
    sizes: Sequence[Tensor] = (),
    row_groups: Sequence[Tensor] = (),
    seed: int = 0,
    masks: Sequence[Tensor] | None = None,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
    pooling: int = 0,
    padding_idx: Sequence[int] | None = None,
    include_last_offset: bool | None = None,
    groups_sorted: bool = False,
    steps: list[Tensor] | None = None,
    bits: list[int] | None = None,
    step_ends: list[int] | None = None,
) -> Call:
    """A call of a table for every one of ``sizes``, or else, as tiers, of one; not padded.

    Its masks, which no operator reads, are the blocks unless they are given.
    """
    if block_counts is None:
        block_counts = [1] * len(blocks) if sizes else [len(blocks)]
    if masks is None:
        masks = blocks if row_groups else []
    tables = len(block_counts)
    few_bits = {"steps": steps, "bits": bits, "step_ends": step_ends}
    return Call(
        tables={
            "blocks": list(blocks),
            "block_counts": list(block_counts),
            "dims": list(dims),
            "sizes": list(sizes),
            "row_groups": list(row_groups),
            "seed": seed,
        },
        masks=list(masks),
        bags={
            "indices": indices,
            "offsets": offsets,
            "per_sample_weights": per_sample_weights,
            "pooling": pooling,
            "padding_idx": [-1] * tables if padding_idx is None else list(padding_idx),
            "include_last_offset": tables > 1
            if include_last_offset is None
            else include_last_offset,
        },
        grad=torch.empty(0) if grad is None else grad,
        groups_sorted=groups_sorted,
        few_bits=few_bits if any(value is not None for value in few_bits.values()) else {},
    )


def states(
    rule: str, blocks: Sequence[Tensor], make: Callable[[torch.Size], Tensor]
) -> list[Tensor]:
    """An optimizer's moments of every block, which ``make`` makes by their shapes."""
    shapes = [block.shape[: 1 if rule == "rowwise_adagrad" else 2] for block in blocks]
    return [make(shape) for shape in shapes for _ in range(RULES[rule])]


def step(
    blocks: list[Tensor],
    rule: str,
    hyper: Sequence[float] | None = None,
    state: list[Tensor] | None = None,
) -> dict[str, Any]:
    """What an operator that updates ``blocks`` is told of its step."""
    if state is None:
        like = {
            "device": blocks[0].device,
            "dtype": torch.promote_types(blocks[0].dtype, torch.float32),
        }
        levels = itertools.cycle([0.5, 1.5][: RULES[rule]])
        state = states(rule, blocks, lambda shape: torch.full(shape, next(levels), **like))
    hyper = [0.125, 1e-3, 0.25, 0.875, 0.75, 3.0] if hyper is None else list(hyper)
    return {"blocks": blocks, "state": state, "optimizer": [*RULES].index(rule), "hyper": hyper}


def applying(
    blocks: list[Tensor],
    rows: list[Tensor],
    grads: list[Tensor],
    rule: str,
    hyper: Sequence[float] | None = None,
    state: list[Tensor] | None = None,
) -> dict[str, Any]:
    """Arguments of ``apply_``."""
    return {"rows": rows, "grads": grads, **step(blocks, rule, hyper, state)}


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
    described = {
        name: [value for one in calls for value in one.tables[name]]
        for name in ("blocks", "block_counts", "dims", "sizes", "row_groups")
    }
    return call(
        indices=torch.cat(indices),
        grad=torch.cat([table.grad_bags[:bags] for table in tables], 1),
        **described,
        seed=calls[0].tables["seed"],
        masks=[mask for one in calls for mask in one.masks],
        offsets=torch.cat(begins),
        per_sample_weights=torch.cat(weights) if weights else None,
        pooling=calls[0].bags["pooling"],
        padding_idx=[table.padding_idx for table in tables],
        include_last_offset=True,
        groups_sorted=all(one.groups_sorted for one in calls),
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


def draw_reals(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def draw_sizes(shape: tuple[int, ...], largest: int, generator: torch.Generator) -> Tensor:
    """Sizes in 1..largest, and a fifth of 0."""
    sizes = torch.randint(1, largest + 1, shape, generator=generator)
    return sizes * (torch.rand(shape, generator=generator) > 0.2)


def build(
    case: Case,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    values: Callable[[tuple[int, ...], torch.Generator], Tensor] = draw_values,
) -> Inputs:
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
    weight = values((case.rows, case.dim), g).to(dtype)

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
        values((end - start, int(w)), g).to(dtype)
        for start, end, w in zip(starts, tier_ends, width, strict=True)
    ]
    psw = values((case.lookups,), g).to(dtype) if case.weighted else None
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
        grad_flat=values((case.lookups, case.dim), g).to(dtype).to(device),
        grad_bags=values((grad_bags, case.dim), g).to(dtype).to(device),
    )


def wide(value: Any) -> Any:
    """Arguments in float64, for a reference without roundings in between."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, dict):
        return {name: wide(v) for name, v in value.items()}
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
