"""How many 32-byte sectors the kernels move, against the bytes that a lookup must move.

The simulator counts the distinct sectors of every instruction of every warp, as the L1 cache would
request them. The bounds are those of the design: bytes that no implementation can avoid, with
``k`` the mean kept size over lookups: gather ``4 L (k + D)``, pooled ``4 L k + 4 B D``, search
backward ``4 L D + 4 U D + 4 U k``. Index, size and sorting traffic comes on top, and is bounded
apart. This is the evidence on speed that exists without a GPU.

In float32 the bounds are in bytes. In bfloat16 they are in useful sectors: a kept prefix of k
values costs ``ceil(2 k / 32)`` sectors whoever reads it, because memory moves no less than a
sector. Half of the rows here keep fewer than 16 values, so a pooled lookup of uniform ids moves
1.36 times its bytes and exactly its useful sectors. Mask gradients and partial sums are float32
beside a 16-bit gradient and count as that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Call, call
from torch import Tensor

from . import simulator as sim
from .calls import in_double, run

SECTOR = 32
ROWS, DIM, LOOKUPS, BAG = 3_000, 64, 4_000, 20


class Batch:
    """Zipf or uniform lookups into a table in frequency order, hot rows long."""

    def __init__(self, pattern: str, dtype: torch.dtype = torch.float32, dim: int = DIM) -> None:
        g = torch.Generator().manual_seed(1)
        weights = torch.arange(1, ROWS + 1).double()
        weights = weights**-1.05 if pattern == "zipf" else torch.ones(ROWS).double()
        self.indices = torch.multinomial(weights, LOOKUPS, replacement=True, generator=g)
        rank = torch.arange(ROWS).double() / ROWS
        self.sizes = (4 + 60 * torch.exp(-4 * rank)).int().clamp(max=DIM) * (dim // DIM)
        self.row_group = (torch.arange(ROWS) // 10).int()
        self.group_dims = self.sizes[::10].contiguous()
        self.offsets = torch.arange(0, LOOKUPS, BAG)
        self.weight = torch.randn(ROWS, dim, generator=g).to(dtype)
        self.grad = torch.randn(len(self.offsets), dim, generator=g).to(dtype)
        self.element = self.weight.element_size()

    def search(self, **options: Any) -> Call:
        """Bags in the table in groups, which are in order."""
        given: dict[str, Any] = {"offsets": self.offsets, "groups_sorted": True}
        groups = {"sizes": [self.group_dims], "row_groups": [self.row_group]}
        return call([self.weight], self.indices, self.grad, **groups, **given | options)

    def prefixes(self, rows: Tensor, whole: bool = False) -> int:
        """Bytes of the kept prefixes of ``rows``; ``whole``, or of a 16-bit table, in sectors."""
        sizes = self.element * self.group_dims[self.row_group[rows].long()].long()
        if whole or self.element == 2:
            sizes = (sizes + SECTOR - 1) // SECTOR * SECTOR
        return int(sizes.sum())


@pytest.fixture(params=["zipf", "uniform", "zipf bfloat16", "uniform bfloat16"])
def batch(request: pytest.FixtureRequest) -> Batch:
    pattern, *dtype = str(request.param).split()
    return Batch(pattern, torch.bfloat16 if dtype else torch.float32)


def measured(run: Any, capturing: bool = False) -> dict[str, dict[str, int]]:
    sim.tools.reset_traffic()
    with sim.simulation(1, track_traffic=True, capturing=capturing):
        run()
    return sim.tools.traffic()


def sectors(traffic: dict[str, dict[str, int]], *classes: str) -> int:
    return SECTOR * sum(
        traffic[name]["read_sectors"] + traffic[name]["write_sectors"] for name in classes
    )


def least(needed: int, batch: Batch) -> float:
    """What cannot be undercut but by lookups of one row that meet in one instruction."""
    return needed * (0.98 if batch.element == 4 else 0.95)


def most(needed: int, batch: Batch) -> float:
    """1.15 times the bytes; a bound in sectors leaves nothing to round up."""
    return needed * (1.15 if batch.element == 4 else 1.01)


def test_gather(batch: Batch) -> None:
    arguments = batch.search(offsets=None).lookup(bounds_check=0)
    traffic = measured(lambda: run("lookup", arguments))
    needed = batch.prefixes(batch.indices) + batch.element * LOOKUPS * DIM
    assert least(needed, batch) <= sectors(traffic, "table", "output") <= most(needed, batch)
    # One sector for a row's group, one for the group's size, eight bytes for the index.
    assert sectors(traffic, "index", "sizes") <= LOOKUPS * (8 + 2 * SECTOR) * 1.01


def test_pooled(batch: Batch) -> None:
    arguments = batch.search().lookup(bounds_check=0)
    traffic = measured(lambda: run("lookup", arguments))
    needed = batch.prefixes(batch.indices) + batch.element * len(batch.offsets) * DIM
    assert least(needed, batch) <= sectors(traffic, "table", "output") <= most(needed, batch)
    assert sectors(traffic, "index", "sizes") <= LOOKUPS * (3 * 8 + 2 * SECTOR)


def test_frozen_pooled_reads_nothing_but_indices_and_rows(batch: Batch) -> None:
    """Size tiers: no metadata, and the padding of tiers is all that is read in excess."""
    # Tiers in whole sectors: narrower ones would share theirs with rows that nobody asked for.
    step = SECTOR // batch.element
    width = (batch.sizes.long() + step - 1) // step * step
    values, counts = torch.unique_consecutive(width, return_counts=True)
    blocks = [
        torch.randn(int(n), int(w)).to(batch.weight.dtype)
        for n, w in zip(counts, values, strict=True)
    ]
    frozen = call(blocks, batch.indices, offsets=batch.offsets, dims=[DIM]).lookup(bounds_check=0)
    traffic = measured(lambda: run("lookup", frozen))
    needed = batch.element * (int(width[batch.indices].sum()) + len(batch.offsets) * DIM)
    assert sectors(traffic, "table", "output") <= 1.01 * needed
    assert sectors(traffic, "sizes") == 0


def backward_moved(traffic: dict[str, dict[str, int]]) -> int:
    """What comes from beyond L1 of gradient, weights, outputs and partial sums.

    The step reads the prefix of a row straight after its product was taken, and threads with eight
    columns read the two halves of a sector of partial sums one after the other: L1 has the second.
    """
    moved = sectors(traffic, "grad", "table", "output", "partial")
    for name in ("table", "partial"):
        again = traffic[name]["read_sectors"] - traffic[name]["unique_read_sectors"]
        moved -= SECTOR * again
    return moved


def fused_step(batch: Batch, promised: bool, row_state: Tensor | None = None) -> None:
    """One step with mask gradients: of SGD, or row-wise Adagrad with its state."""
    state, rule, decay = ([], "sgd", 0.0)
    if row_state is not None:
        state, rule, decay = [row_state], "rowwise_adagrad", 0.1
    of, rates = batch.search(groups_sorted=promised), [0.1, 1e-8, decay, 0.0, 0.0, 1.0]
    run("lookup_update_", of.update(rule, rates, state, [batch.weight]))


def test_search_backward_with_a_fused_step(batch: Batch) -> None:
    """Everything but the sort: gradient, weights read and written, partial sums, masks."""
    traffic = measured(lambda: fused_step(batch, True))
    distinct = batch.indices.unique()
    needed = batch.element * (LOOKUPS + distinct.numel()) * DIM + batch.prefixes(distinct)
    needed += 4 * batch.row_group[distinct].unique().numel() * DIM
    assert backward_moved(traffic) <= 1.3 * needed
    assert sectors(traffic, "sorted", "index") <= LOOKUPS * 4 * 12


@pytest.mark.parametrize("pattern", ["zipf", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_row_wise_step_reads_the_gradient_once(pattern: str, dtype: torch.dtype) -> None:
    """Sums wait in shared memory for the row's squares: no more moves than where a warp has them.

    A row's weights are read for the product with the mask, for the squares and for the step, which
    count once: the row has just passed through L1.
    """
    dim = 512
    batch = Batch(pattern, dtype, dim)
    traffic = measured(lambda: fused_step(batch, True, torch.ones(ROWS)))
    distinct = batch.indices.unique()
    needed = batch.element * (LOOKUPS + distinct.numel()) * dim + batch.prefixes(distinct)
    needed += 4 * batch.row_group[distinct].unique().numel() * dim
    assert sectors(traffic, "grad") == batch.element * LOOKUPS * dim
    assert backward_moved(traffic) <= 1.3 * needed
    # One number a row, read and written, by one lane for all.
    assert sectors(traffic, "state") == distinct.numel() * 2 * SECTOR


def test_search_backward_to_row_gradients(batch: Batch) -> None:
    """As above, but rows of gradients are written at full width for the optimizer to read."""
    traffic = measured(lambda: run("lookup_backward", batch.search().backward()))
    distinct = batch.indices.unique().numel()
    needed = batch.element * (LOOKUPS * DIM + 2 * distinct * DIM) + 4 * 300 * DIM
    assert backward_moved(traffic) <= 1.3 * needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_store_of_sums_fills_its_sectors(dtype: torch.dtype) -> None:
    """No sector of mask gradients is written twice, eight columns a thread or four."""
    batch = Batch("uniform", dtype)
    traffic = measured(lambda: fused_step(batch, True))["output"]
    assert traffic["write_sectors"] == traffic["unique_write_sectors"]


@pytest.mark.parametrize("lengths", [1, 3, "skewed"])
@pytest.mark.parametrize("mode", [0, 1], ids=["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_bags_move_no_more_than_long_ones(
    lengths: int | str, mode: int, dtype: torch.dtype
) -> None:
    """One lookup a lane, whosever it is: the same rows, each once, and the bags' own sums."""
    batch = Batch("uniform", dtype)
    bags = LOOKUPS // 3
    offsets = torch.arange(0, LOOKUPS, lengths) if isinstance(lengths, int) else None
    if offsets is None:
        g = torch.Generator().manual_seed(4)
        inner = torch.randint(0, LOOKUPS + 1, (bags - 1,), generator=g).sort().values
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), inner])
    of = batch.search(offsets=offsets, pooling=mode)
    out = []
    traffic = measured(lambda: out.append(run("lookup", of.lookup(bounds_check=0))))
    needed = batch.prefixes(batch.indices, whole=True) + batch.element * len(offsets) * DIM
    assert 0.98 * needed <= sectors(traffic, "table", "output") <= needed
    sums = in_double("lookup", of.lookup(bounds_check=0))
    close = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out[0].double(), sums, rtol=close, atol=close)


def test_several_tables_read_the_gradient_once() -> None:
    """A step of two tables with masks in order, as of one."""
    first, second = Batch("zipf"), Batch("uniform")
    tables = [first.weight.clone(), second.weight.clone()]
    of = call(
        tables,
        torch.cat([first.indices, second.indices]),
        torch.cat([first.grad, second.grad], 1),
        sizes=[first.group_dims, second.group_dims],
        row_groups=[first.row_group, second.row_group],
        offsets=torch.arange(0, 2 * LOOKUPS + 1, BAG),
        groups_sorted=True,
    )
    arguments = of.update("sgd", [0.1, 0.0, 0.0, 0.0, 0.0, 1.0], blocks=tables)
    traffic = measured(lambda: run("lookup_update_", arguments))
    needed = 2 * first.element * LOOKUPS * DIM
    assert least(needed, first) <= sectors(traffic, "grad") <= needed


@pytest.mark.parametrize(
    ("dim", "others"), [(128, 2), (256, 30)], ids=["in registers", "in shared memory"]
)
def test_a_row_of_many_lookups_finds_its_table_once(dim: int, others: int) -> None:
    """Of 32 lookups of one row that are staged together one searches for the row's table.

    ``others`` are numbers that the ends of runs ask for, a lookup: in shared memory every lane
    does, of a run that has 64 lookups.
    """
    tables, lookups = 26, 128
    g = torch.Generator().manual_seed(2)
    blocks = [torch.randn(8, dim, generator=g) for _ in range(tables)]
    of = call(
        blocks,
        torch.full((tables * lookups,), 5),
        torch.randn(lookups, tables * dim, generator=g),
        sizes=[torch.full((2,), dim, dtype=torch.int32)] * tables,
        row_groups=[torch.arange(8, dtype=torch.int32) // 4] * tables,
        offsets=torch.arange(tables * lookups + 1),
        groups_sorted=True,
    )
    arguments = of.update("rowwise_adagrad", [0.1, 1e-8, 0.0, 0.0, 0.0, 1.0])
    traffic = measured(lambda: run("lookup_update_", arguments))
    # Making the keys takes five numbers a lookup, a table's rows and columns four; a search for
    # the table among 26 would take five more.
    assert traffic["sizes"]["read_bytes"] <= tables * lookups * 8 * (5 + 4 + others)


def test_what_not_knowing_the_order_of_groups_costs() -> None:
    """Little: without the promise, as in a capture, lookups are sorted by group and row at once.

    Measured: 1.04 times the traffic of a Zipf batch, 1.05 times that of a uniform one, for the
    groups are read lookup by lookup; the sort's own passes come on top, over longer keys.
    """
    for pattern in ("zipf", "uniform"):
        batch = Batch(pattern)
        moved = {}
        for promised in (True, False):
            traffic = measured(lambda b=batch, p=promised: fused_step(b, p), capturing=True)
            assert sectors(traffic, "grad") <= batch.element * LOOKUPS * DIM
            moved[promised] = sectors(traffic, *traffic)
        assert moved[False] < 1.07 * moved[True]


@pytest.mark.parametrize("wanted", ["rows and masks", "masks", "step"])
def test_groups_in_no_order_cost_no_second_gradient(wanted: str) -> None:
    """Sums of rows and of groups are taken in one pass over the lookups."""
    batch = Batch("uniform")
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))
    batch.row_group = batch.row_group[order].contiguous()
    if wanted == "step":
        traffic = measured(lambda: fused_step(batch, False))
    else:
        arguments = batch.search().backward() | {"weight_grad": wanted != "masks"}
        traffic = measured(lambda: run("lookup_backward", arguments))
    assert sectors(traffic, "grad") <= batch.element * LOOKUPS * DIM


def test_masked_columns_cost_nothing() -> None:
    """Half the size, half the table traffic: the point of it all."""
    batch = Batch("uniform")
    halves = []
    for size in (DIM, DIM // 2, DIM // 8):
        sizes = torch.full((ROWS,), size, dtype=torch.uint8)
        masked = call([batch.weight], batch.indices, sizes=[sizes], offsets=batch.offsets)
        traffic = measured(lambda of=masked: run("lookup", of.lookup(bounds_check=0)))
        halves.append(traffic["table"]["read_sectors"])
    assert halves == [halves[0], halves[0] // 2, halves[0] // 8]
