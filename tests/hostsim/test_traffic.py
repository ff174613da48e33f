"""How many 32-byte sectors the kernels move, against the bytes that a lookup must move.

The simulator counts the distinct sectors of every instruction of every warp, as the L1 cache would
request them. The bounds are those of the design: bytes that no implementation can avoid, with
``k`` the mean kept size over lookups: gather ``4 L (k + D)``, pooled ``4 L k + 4 B D``, search
backward ``4 L D + 4 U D + 4 U k``. Index, size and sorting traffic comes on top, and is bounded
apart. This is the evidence on speed that exists without a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from . import simulated as sim

SECTOR = 32
ROWS, DIM, LOOKUPS, BAG = 3_000, 64, 4_000, 20


class Batch:
    """Zipf or uniform lookups into a table in frequency order, hot rows long."""

    def __init__(self, pattern: str, dtype: torch.dtype = torch.float32) -> None:
        g = torch.Generator().manual_seed(1)
        weights = torch.arange(1, ROWS + 1).double()
        weights = weights**-1.05 if pattern == "zipf" else torch.ones(ROWS).double()
        self.indices = torch.multinomial(weights, LOOKUPS, replacement=True, generator=g)
        rank = torch.arange(ROWS).double() / ROWS
        self.sizes = (4 + 60 * torch.exp(-4 * rank)).int().clamp(max=DIM)
        self.row_group = (torch.arange(ROWS) // 10).int()
        self.group_dims = self.sizes[::10].contiguous()
        self.kept = int(self.group_dims[self.row_group[self.indices].long()].sum())
        self.offsets = torch.arange(0, LOOKUPS, BAG)
        self.weight = torch.randn(ROWS, DIM, generator=g).to(dtype)
        self.grad = torch.randn(len(self.offsets), DIM, generator=g).to(dtype)
        self.element = self.weight.element_size()
        self.groups = (self.row_group, self.group_dims)


@pytest.fixture(params=["zipf", "uniform"])
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(str(request.param))


def measured(run: Any) -> dict[str, dict[str, int]]:
    sim.tools.reset_traffic()
    with sim.simulation(1, track_traffic=True):
        run()
    return sim.tools.traffic()


def sectors(traffic: dict[str, dict[str, int]], *classes: str) -> int:
    return SECTOR * sum(
        traffic[name]["read_sectors"] + traffic[name]["write_sectors"] for name in classes
    )


def test_gather(batch: Batch) -> None:
    traffic = measured(
        lambda: sim.adaptive_embedding(
            batch.weight, batch.indices, *batch.groups, batch.weight, 0, -1, 0
        )
    )
    needed = batch.element * (batch.kept + LOOKUPS * DIM)
    assert needed * 0.98 <= sectors(traffic, "table", "output") <= 1.15 * needed
    # One sector for a row's group, one for the group's size, eight bytes for the index.
    assert sectors(traffic, "index", "sizes") <= LOOKUPS * (8 + 2 * SECTOR) * 1.01


def test_pooled(batch: Batch) -> None:
    traffic = measured(
        lambda: sim.adaptive_embedding_bag(
            batch.weight,
            batch.indices,
            batch.offsets,
            *batch.groups,
            batch.weight,
            None,
            0,
            -1,
            False,
            0,
            0,
        )
    )
    needed = batch.element * (batch.kept + len(batch.offsets) * DIM)
    assert needed * 0.98 <= sectors(traffic, "table", "output") <= 1.15 * needed
    assert sectors(traffic, "index", "sizes") <= LOOKUPS * (3 * 8 + 2 * SECTOR)


def test_frozen_pooled_reads_nothing_but_indices_and_rows(batch: Batch) -> None:
    """Size tiers: no metadata, and the padding of tiers is all that is read in excess."""
    width = (batch.sizes.long() + 7) // 8 * 8
    values, counts = torch.unique_consecutive(width, return_counts=True)
    ends = counts.cumsum(0).tolist()
    blocks = [torch.randn(int(n), int(w)) for n, w in zip(counts, values, strict=True)]
    traffic = measured(
        lambda: sim.tiered_embedding_bag(
            blocks, ends, batch.indices, batch.offsets, None, DIM, 0, -1, False, 0
        )
    )
    needed = batch.element * (int(width[batch.indices].sum()) + len(batch.offsets) * DIM)
    assert sectors(traffic, "table", "output") <= 1.01 * needed
    assert sectors(traffic, "sizes") == 0


def backward_needed(batch: Batch) -> tuple[int, Tensor]:
    distinct = batch.indices.unique()
    kept = int(batch.sizes[batch.row_group[distinct].long() * 10].sum())
    rows = distinct.numel()
    return batch.element * (LOOKUPS * DIM + rows * DIM + kept), distinct


def test_search_backward_with_a_fused_step(batch: Batch) -> None:
    """Everything but the sort: gradient, weights read and written, partial sums, masks."""
    mask = sim.poisoned(300, DIM, dtype=torch.float32)
    table = sim.dense(batch.weight, row_group=batch.row_group, group_dims=batch.group_dims)
    call = sim.lookups(batch.indices, batch.offsets)
    step = sim.update("sgd", lr=0.1, weight_decay=0.0)
    wishes = {"group_grad": sim.array(mask), "groups_sorted": True}
    traffic = measured(
        lambda: sim.tools.backward_update(
            "float32", table, call, sim.array(batch.grad), step, wishes
        )
    )
    needed, distinct = backward_needed(batch)
    touched_groups = batch.row_group[distinct].unique().numel()
    needed += 4 * touched_groups * DIM
    # The step reads the prefix of a row again, straight after its product was taken: from L1.
    again = traffic["table"]["read_sectors"] - traffic["table"]["unique_read_sectors"]
    moved = sectors(traffic, "grad", "table", "output", "partial") - SECTOR * again
    assert moved <= 1.3 * needed
    assert sectors(traffic, "sorted", "index") <= LOOKUPS * 4 * 12


def test_search_backward_to_row_gradients(batch: Batch) -> None:
    """As above, but rows of gradients are written at full width for the optimizer to read."""
    traffic = measured(
        lambda: sim.adaptive_embedding_backward(
            batch.grad,
            batch.weight,
            batch.indices,
            batch.offsets,
            *batch.groups,
            None,
            0,
            -1,
            False,
            0,
            True,
            True,
            False,
            groups_sorted=True,
        )
    )
    distinct = batch.indices.unique().numel()
    needed = batch.element * (LOOKUPS * DIM + 2 * distinct * DIM) + 4 * 300 * DIM
    again = traffic["table"]["read_sectors"] - traffic["table"]["unique_read_sectors"]
    moved = sectors(traffic, "grad", "table", "output", "partial") - SECTOR * again
    assert moved <= 1.3 * needed


def test_masked_columns_cost_nothing() -> None:
    """Half the size, half the table traffic: the point of it all."""
    batch = Batch("uniform")
    halves = []
    for size in (DIM, DIM // 2, DIM // 8):
        sizes = torch.full((ROWS,), size, dtype=torch.uint8)
        traffic = measured(
            lambda sizes=sizes: sim.masked_embedding_bag(
                batch.weight, batch.indices, batch.offsets, sizes, None, 0, -1, False, 0
            )
        )
        halves.append(traffic["table"]["read_sectors"])
    assert halves == [halves[0], halves[0] // 2, halves[0] // 8]
