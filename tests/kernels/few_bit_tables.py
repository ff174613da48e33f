"""Tables of few bits: floats that lookups round, and the codes that they are rounded to.

What lookups show of either is decoded from the bytes of the codes, by code that shares nothing with
the package.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Call, call
from torch import Tensor
from torch.nn.functional import pad

BITS = (2, 4, 8, 16)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STORED = ("codes", "floats")


def decoded(codes: Tensor, step: float | Tensor, bits: int) -> Tensor:
    """Numbers in float32; ``step`` is one for all, or ``[rows, 1]``."""
    shape = (len(codes), codes.shape[1] * 8 // bits, bits)
    each = torch.from_numpy(np.unpackbits(codes.cpu().numpy(), axis=1, bitorder="little"))
    places = (each.view(shape) * 2 ** torch.arange(bits)).sum(-1)
    return (places.float() - (2**bits - 1) / 2) * step


def packed(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes ``[rows, width]``."""
    each = codes[..., None] >> torch.arange(bits) & 1
    return torch.from_numpy(np.packbits(each.flatten(1).numpy(), axis=1, bitorder="little"))


def of_rows(steps: Tensor, ends: Sequence[int]) -> Tensor:
    """The step sizes ``[rows, 1]`` of all rows, in parts that end there."""
    part = torch.bucketize(torch.arange(ends[-1]), torch.tensor(ends), right=True)
    return steps.cpu()[part, None]


@dataclass
class FewBitTable:
    """Blocks of codes and, if it was drawn, of floats; without ``step_ends`` blocks are parts."""

    codes: list[Tensor]
    steps: Tensor
    bits: int
    step_ends: list[int] | None = None
    floats: list[Tensor] = field(default_factory=list)

    @property
    def ends(self) -> list[int]:
        return list(itertools.accumulate(map(len, self.codes)))

    @property
    def dim(self) -> int:
        return max(1, *(block.shape[1] * 8 // self.bits for block in self.codes))

    @property
    def options(self) -> dict[str, Any]:
        few = {"steps": self.steps, "bits": self.bits, "step_ends": self.step_ends}
        return {**few, "embedding_dim": self.dim}

    @property
    def row_steps(self) -> list[Tensor]:
        """Of each block, ``[rows, 1]``."""
        steps = of_rows(self.steps, self.step_ends or self.ends)
        return list(steps.split([len(block) for block in self.codes]))

    @property
    def numbers(self) -> Tensor:
        """What lookups show of all rows, in float32."""
        dim, blocks = self.dim, zip(self.codes, self.row_steps, strict=True)
        shown = [decoded(block, steps, self.bits) for block, steps in blocks]
        return torch.cat([pad(block, (0, dim - block.shape[1])) for block in shown])


def placed(values: Tensor, begin: int, device: str) -> Tensor:
    """The same, so many elements from where memory begins, and some from where it ends."""
    memory = torch.empty(begin + values.numel() + 16, dtype=values.dtype, device=device)
    return memory[begin : begin + values.numel()].view(values.shape).copy_(values)


def make(
    bits: int,
    counts: Sequence[int],
    widths: Sequence[int],
    device: str = "cpu",
    seed: int = 0,
    *,
    cuts: int = 0,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
) -> FewBitTable:
    """A table of codes that are spread about evenly; of its floats some are ties, some infinite.

    Widths are cut to whole bytes. ``cuts`` are ends of parts beside those of blocks, at random.
    ``exact``: sums are the same in any order, and no float is infinite.
    """
    g = torch.Generator().manual_seed(seed)
    ends = list(itertools.accumulate(counts))
    parts = sorted([*ends, *torch.randint(0, ends[-1] + 1, (cuts,), generator=g).tolist()])
    steps = torch.rand(len(parts), generator=g) + 0.1
    if exact:
        steps = torch.exp2(torch.randint(-3, 3, steps.shape, generator=g))
    step, half = of_rows(steps, parts), (2**bits - 1) / 2
    # A step beyond the first code and the last. Of larger exact numbers sums would be rounded.
    spread = 2**8 if exact and bits == 16 else 2**bits + 1
    draws = torch.rand(3, ends[-1], max(1, *widths), generator=g)
    places = half + (draws[0] - 0.5) * spread
    places = torch.where(draws[1] < 1 / 8, places.floor() + 0.5, places)
    values = (places - half) * step
    if not exact:
        infinite = torch.full_like(values, float("inf")).copysign(values)
        values = torch.where(draws[2] < 1 / 16, infinite, values)
    values = values.to(dtype)
    codes = torch.round(values.float() / step + half).clamp(0, 2 * half).long()
    one = FewBitTable([], steps.to(device), bits, parts if cuts else None)
    for c, (end, count, width) in enumerate(zip(ends, counts, widths, strict=True)):
        kept = slice(end - count, end), slice(width * bits // 8 * 8 // bits)
        # Files are mapped, so codes may begin at any byte; floats where lines do, or anywhere.
        one.codes.append(placed(packed(codes[kept], bits), (seed + 37 * c) % 64, device))
        one.floats.append(placed(values[kept], (5 * seed + 3 * c) % 16 * (seed % 2), device))
    return one


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of :func:`make`."""
    widths = draw(
        st.lists(st.sampled_from([0, 4, 8, 12, 16, 20, 36, 64, 100]), min_size=1, max_size=6)
    )
    if draw(st.booleans()):
        # Rows of whole registers have a path of their own.
        widths = [width // 16 * 16 for width in widths]
    counts = [draw(st.integers(0, 9)) for _ in widths]
    counts[0] += 1
    bits, cuts = draw(st.sampled_from(BITS)), draw(st.integers(0, 3))
    seed = draw(st.integers(0, 1000))
    return {"bits": bits, "counts": counts, "widths": widths, "seed": seed, "cuts": cuts}


def for_drawn(backend: Any, check: Callable[[dict[str, Any]], None]) -> None:
    slow = list(HealthCheck)
    settings(deadline=None, max_examples=backend.examples, suppress_health_check=slow)(
        given(drawn=shapes())(check)
    )()


def lookups_in(
    tables: Sequence[FewBitTable], stored: str, indices: Tensor, offsets: Tensor | None = None
) -> Call:
    """A call of tables that are one of ``STORED``; offsets hold the end of the last bag, too."""
    blocks = [getattr(one, stored) for one in tables]
    device = tables[0].steps.device
    cut = any(one.step_ends for one in tables)
    return call(
        [block for mine in blocks for block in mine],
        indices.to(device),
        block_counts=[len(mine) for mine in blocks],
        dims=[one.dim for one in tables],
        offsets=None if offsets is None else offsets.to(device),
        include_last_offset=offsets is not None,
        steps=[one.steps for one in tables],
        bits=[one.bits for one in tables],
        step_ends=[end for one in tables for end in one.step_ends or one.ends] if cut else None,
    )


def bags_of(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices and offsets of bags of different lengths, some empty, and some lookups in none."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, 60, (9,), generator=g).sort().values
    offsets[0] = 0
    indices = torch.randint(0, rows, (62,), generator=g)
    return (indices.int(), offsets.int()) if seed % 2 else (indices, offsets)


FOUR = [(2, [5, 3], [16, 8]), (8, [4], [20]), (4, [1, 2, 3], [64, 0, 2]), (16, [6], [9])]
BAGS_OF_FOUR = torch.tensor([0, 3, 3, 8, 10])


def four_tables(
    device: str, alike: int | None = None, **drawn: Any
) -> tuple[list[FewBitTable], list[Tensor], Tensor]:
    """Tables of different bits or of equal ones, lookups in each, and the offsets of all."""
    tables = [
        make(alike or bits, counts, widths, device, seed, **drawn)
        for seed, (bits, counts, widths) in enumerate(FOUR)
    ]
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, one.ends[-1], (10,), generator=g) for one in tables]
    starts = [BAGS_OF_FOUR[:-1] + 10 * t for t in range(4)]
    return tables, rows, torch.cat([*starts, torch.tensor([40])])


def pooled(values: Tensor, offsets: Tensor, counted: Tensor, mean: bool = False) -> Tensor:
    """Bags of rows, one row after the other in float32."""
    out = torch.zeros(len(offsets) - 1, values.shape[1])
    for b, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        for row in values[begin:end][counted[begin:end]]:
            out[b] += row
        count = int(counted[begin:end].sum())
        if mean and count:
            out[b] *= torch.tensor(1.0) / count
    return out


def sums_in_order(backend: Any) -> bool:
    """Whether bags are summed in order; on GPUs the order depends on how rows are read."""
    return bool(backend.name == "reference" or backend.name.startswith("cpu"))


def require_equal(got: Tensor, want: Tensor) -> None:
    """Bit for bit; but Triton's interpreter cuts a bfloat16 off where a GPU rounds it."""
    cuts = got.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=2.0**-7 if cuts else 0, atol=0)
