"""The arguments of the operators in their groups, and what forwards and backwards derive."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor

from amtl_kernels.rounding import BITS

SUM, MEAN = 0, 1
"""Values of ``pooling``."""
OFF, RAISE, CLAMP = 0, 1, 2
"""Values of ``bounds_check``: indices are vouched for, refused or moved into range."""
SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM = 0, 1, 2, 3
"""Values of ``optimizer``."""
MOMENTS = {SGD: 0, ADAGRAD: 1, ROWWISE_ADAGRAD: 1, ADAM: 2}
"""State tensors that an optimizer keeps for a block."""

_Result = TypeVar("_Result")

FOUND_BEFORE = "The GPU found this in a lookup that was called before."
"""Last line of errors that a later call raises; native code has the same."""


class Tables(NamedTuple):
    """The arguments that describe tables, in the order of the schemas."""

    blocks: list[Tensor]
    block_counts: list[int]
    dims: Sequence[int] = ()
    sizes: Sequence[Tensor] = ()
    row_groups: Sequence[Tensor] = ()
    seed: int = 0

    @classmethod
    def of(cls, values: Iterable[Any]) -> Tables:
        """Of the values of a call, in which None is an empty list."""
        return cls(*([] if value is None else value for value in values))

    def rows(self) -> list[int]:
        """Of each table."""
        blocks = iter(self.blocks)
        return [sum(next(blocks).shape[0] for _ in range(n)) for n in self.block_counts]


class FewBits(NamedTuple):
    """What makes numbers of tables of few bits, in the order of the schema."""

    steps: list[Tensor]
    bits: list[int]
    step_ends: list[int] | None = None

    @classmethod
    def of(cls, values: Iterable[Any]) -> FewBits | None:
        """Of the values of a call, of which there may be none; None: the tables are no such."""
        given = cls(*(*values, None, None, None)[:3])
        return given if any(given) else None


class Bags(NamedTuple):
    """The arguments that describe lookups in tables, or in one, in the order of the schemas."""

    indices: Tensor
    offsets: Tensor | None
    per_sample_weights: Tensor | None
    pooling: int
    padding_idx: list[int]
    include_last_offset: bool


class Wishes(NamedTuple):
    """The gradients wanted of a backward beside those of rows, in the order of the schemas."""

    mask_grad: bool
    psw_grad: bool


class Step(NamedTuple):
    """A step of an optimizer, in the order of the schemas."""

    state: Sequence[Tensor]
    optimizer: int
    hyper: Sequence[float]

    @property
    def number(self) -> int:
        """From 1, unless there is a counter."""
        return int(self.hyper[5])

    @property
    def stochastic_rounding(self) -> bool:
        """Whether weights of 16 bits are rounded at random."""
        return any(self.hyper[6:])

    def states(self, blocks: Sequence[Tensor]) -> tuple[list[Sequence[Tensor]], Tensor | None]:
        """The state of each block, and the step counter that may follow (None if it does not).

        Raises:
            ValueError: No such optimizer, or as many states as no list of blocks has.
        """
        if self.optimizer not in MOMENTS:
            raise ValueError("optimizer must be in 0..3")
        each = MOMENTS[self.optimizer]
        every = each * len(blocks)
        if len(self.state) not in (every, every + 1):
            raise ValueError(
                f"this optimizer has {every} state tensors, and at most a step counter after them"
            )
        counter = self.state[every] if len(self.state) > every else None
        return [self.state[c * each : (c + 1) * each] for c in range(len(blocks))], counter


def in_groups(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """An operator's function of the groups above as one of the values of its schema, in turn.

    Args:
        function: whose parameters are annotated with the groups; what is none is a single value.
    """
    hints = get_type_hints(function)
    hints.pop("return")
    kinds = [
        next((kind for kind in (hint, *get_args(hint)) if hasattr(kind, "_fields")), None)
        for hint in hints.values()
    ]

    @functools.wraps(function)
    def of_values(*values: Any) -> _Result:
        left = iter(values)
        given: list[Any] = []
        for kind in kinds:
            if kind is None:
                given.append(next(left))
            else:
                mine = itertools.islice(left, len(kind._fields))
                given.append(kind.of(mine) if hasattr(kind, "of") else kind(*mine))
        return function(*given)

    return of_values


def are_codes(blocks: Sequence[Tensor]) -> bool:
    """Whether blocks hold codes of few bits, and so no numbers."""
    return len(blocks) > 0 and blocks[0].dtype == torch.uint8


def numbers_of(blocks: Sequence[Tensor], steps: Tensor | None) -> Tensor:
    """What has the type of the output."""
    return blocks[0] if steps is None or not are_codes(blocks) else steps


def widths_of(blocks: Sequence[Tensor], bits: int) -> list[int]:
    """Numbers in a row of each block, of codes of so many bits if they are codes."""
    columns = [block.shape[1] for block in blocks]
    return [number * 8 // bits for number in columns] if are_codes(blocks) else columns


def parts_of(blocks: Sequence[Tensor], ends: Sequence[int]) -> list[tuple[int, slice]]:
    """The parts of blocks that end before these rows: each one's block, and its rows in that."""
    parts: list[tuple[int, slice]] = []
    first = start = 0
    for c, block in enumerate(blocks):
        after = first + block.shape[0]
        while len(parts) < len(ends) and ends[len(parts)] <= after:
            end = ends[len(parts)]
            parts.append((c, slice(start - first, end - first)))
            start = end
        first = after
    return parts


def check_few_bits(tables: Tables, few: FewBits | None) -> None:
    """Raises ValueError unless tables of few bits are whole, and others are none."""
    blocks, block_counts, sizes = tables.blocks, tables.block_counts, tables.sizes
    given = few or FewBits([], [])
    steps, bits, step_ends = given.steps or [], given.bits or [], given.step_ends or []

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise ValueError(message)

    check(bool(steps) == bool(bits), "steps and bits go together")
    if not steps:
        check(not step_ends, "step_ends need steps and bits")
        check(
            not are_codes(blocks),
            "blocks of codes need steps and bits, and have no gradient: an optimizer of the "
            "lookup, SGD or RowwiseAdagrad, updates them",
        )
        return
    check(
        len(steps) == len(bits) == len(block_counts),
        "one tensor of steps and one number of bits per table are needed",
    )
    check(not sizes, "a table of few bits has no sizes")
    same = all(block.dtype == blocks[0].dtype for block in blocks)
    check(same, "blocks differ in type")
    every = sum(mine.numel() for mine in steps)
    check(not step_ends or every == len(step_ends), "one of step_ends per step is needed")
    first, part = 0, 0
    for mine, each, count in zip(steps, bits, block_counts, strict=True):
        check(each in BITS, f"bits must be 2, 4, 8 or 16, got {each}")
        for block in blocks[first : first + count] if are_codes(blocks) else ():
            taken = block.shape[1]
            whole = taken * 8 % each == 0
            check(whole, f"a row of codes of {each} bits cannot take {taken} bytes")
        parts = mine.numel() if step_ends else count
        check(
            mine.dtype == torch.float32 and mine.shape == (parts,),
            f"steps must be float32 [{parts}]",
        )
        ends = step_ends[part : part + parts]
        rows = [block.shape[0] for block in blocks[first : first + count]]
        of_blocks = {sum(rows[: c + 1]) for c in range(count)}
        whole = of_blocks <= {0, *ends} and list(ends) == sorted(ends)
        whole = whole and min(ends, default=0) >= 0 and max(ends, default=0) == max(of_blocks)
        first, part = first + count, part + parts
        check(
            whole or not step_ends,
            "step_ends must not decrease, and every block must end at one of them",
        )


def check_rule_of_codes(optimizer: int) -> None:
    """Raises ValueError unless the optimizer of this number updates codes."""
    if optimizer not in (SGD, ROWWISE_ADAGRAD):
        raise ValueError(
            "blocks of codes are updated by SGD or RowwiseAdagrad: the state of other optimizers "
            "is larger than the numbers that codes save"
        )


def check_update_of_codes(blocks: Sequence[Tensor], wishes: Wishes, step: Step) -> None:
    """Raises ValueError unless the optimizer can update blocks that have step sizes."""
    if not are_codes(blocks):
        raise ValueError("blocks of floats are updated as they are, without steps and bits")
    check_rule_of_codes(step.optimizer)
    if wishes.psw_grad:
        raise ValueError("an update of codes makes no gradient of per_sample_weights")


def clamped(indices: Tensor, offsets: Tensor | None, rows: Sequence[int]) -> Tensor:
    """The indices as a forward with ``bounds_check="clamp"`` uses them."""
    if len(rows) == 1 or offsets is None:
        return indices.clamp(0, rows[0] - 1)
    bags = (offsets.shape[0] - 1) // len(rows)
    if bags == 0:
        return indices
    positions = torch.arange(indices.shape[0], device=indices.device, dtype=offsets.dtype)
    table = torch.bucketize(positions, offsets[bags::bags].contiguous(), right=True)
    last = torch.tensor([n - 1 for n in rows], device=indices.device, dtype=indices.dtype)
    return indices.clamp(min=0).minimum(last[table.clamp(max=len(rows) - 1)])


def split_masks(flat: Tensor, sizes: Sequence[Tensor], dims: Sequence[int]) -> list[Tensor]:
    """The mask gradients ``[G_t, D_t]`` in the flat one."""
    if len(sizes) == 1:
        return [flat.view(-1, dims[0])]
    counts = [each.shape[0] * dim for each, dim in zip(sizes, dims, strict=True)]
    return [part.view(-1, dim) for part, dim in zip(flat.split(counts), dims, strict=True)]
