from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from bench.inputs import Case, TierLayout, make_problem
from bench.oracle import Equations
from bench.traffic import (
    Floor,
    Layout,
    Traffic,
    ceiling_seconds,
    floor,
    misses,
    row_bytes,
    useful_bytes,
)

TRAFFIC = Traffic(
    lookups=1000, distinct=400, outputs=50, dim=64, lookup_mean=32.0, distinct_mean=16.0
)


def test_pooled_lookup() -> None:
    # 4·L·k̄ + 4·B·D + 8·L
    assert useful_bytes(TRAFFIC, "forward") == 4 * 1000 * 32 + 4 * 50 * 64 + 8 * 1000


def test_plain_lookup_writes_every_row() -> None:
    plain = dataclasses.replace(TRAFFIC, outputs=1000)
    assert useful_bytes(plain, "forward") == 4 * 1000 * (32 + 64) + 8 * 1000


def test_backward_reads_whole_rows_for_the_mask_gradient_only() -> None:
    search = dataclasses.replace(TRAFFIC, mask_gradient=True)
    forward = useful_bytes(TRAFFIC, "forward")
    plain = useful_bytes(TRAFFIC, "backward") - forward
    assert plain == 4 * 1000 * 64 + 4 * 400 * 16 + 8 * 1000
    assert useful_bytes(search, "backward") - forward - plain == 4 * 400 * 64


def test_update_bytes() -> None:
    backward = useful_bytes(TRAFFIC, "backward")
    kept = 400 * 16
    assert useful_bytes(TRAFFIC, "step", "sgd") - backward == 12 * kept
    assert useful_bytes(TRAFFIC, "step", "rowwise_adagrad") - backward == 12 * kept + 8 * 400
    assert useful_bytes(TRAFFIC, "step", "adagrad") - backward == 20 * kept


def test_bytes_of_rows_and_the_time_that_a_machine_takes_for_them() -> None:
    search = dataclasses.replace(TRAFFIC, mask_gradient=True)
    looked_up, kept = 4 * 1000 * 32, 400 * 16
    assert row_bytes(search, "forward") == row_bytes(TRAFFIC, "backward") == looked_up
    assert row_bytes(search, "backward") == looked_up + 4 * 400 * 64
    # A step writes back what it reads of rows and states; the gradient that it reads is a stream.
    wanted = looked_up + 4 * 400 * 64 + 8 * kept + 8 * 400
    assert row_bytes(search, "step", "rowwise_adagrad") == wanted
    ceilings = {"copy": 100.0, "rows": 25.0}
    assert ceiling_seconds(1000.0, 200.0, ceilings, at_random=True) == 8.0 + 8.0
    assert ceiling_seconds(1000.0, 200.0, ceilings, at_random=False) == 10.0


def test_elements_and_indices_of_other_widths() -> None:
    half = dataclasses.replace(TRAFFIC, element=2, index=4)
    assert useful_bytes(half, "forward") == useful_bytes(TRAFFIC, "forward") / 2


@pytest.mark.parametrize("noise", [False, True])
def test_traffic_of_a_problem_counts_what_is_there(noise: bool) -> None:
    case = Case("forward", 500, ("a",), (), bags=30, bag_size=4, dim=16, noise=noise)
    problem = make_problem(case)
    ids = problem.global_ids[0]
    dims = problem.dims_of(ids, noise=noise)
    traffic = problem.traffic(ids, dims, mask_gradient=False)
    sizes = {int(row): int(size) for row, size in zip(ids, dims, strict=True)}
    assert traffic.lookups == 120
    assert traffic.distinct == len(sizes)
    assert traffic.outputs == 30
    assert traffic.lookup_mean == pytest.approx(dims.double().mean().item())
    assert traffic.distinct_mean == pytest.approx(sum(sizes.values()) / len(sizes))
    assert traffic.index == 8
    assert torch.unique(ids).numel() == traffic.distinct


def replayed(keys: np.ndarray, sizes: np.ndarray, room: int) -> int:
    """The cache access by access, as one would write it down."""
    held: dict[int, int] = {}
    missed_sizes = 0
    for key, size in zip(keys.tolist(), sizes.tolist(), strict=True):
        missed_sizes += 0 if key in held else size
        held.pop(key, None)
        held[key] = size
        while sum(held.values()) > room:
            del held[next(iter(held))]
    return missed_sizes


def missed(keys: np.ndarray, sizes: np.ndarray, room: int, chunks: int = 1024) -> int:
    return int(sizes[misses(keys, sizes, room, chunks)].sum())


def test_a_cache_drops_the_oldest() -> None:
    keys = np.array([1, 2, 1, 3, 2, 1, 1])
    ones = np.ones_like(keys)
    # 1 and 2 missed; 1 hit; 3 pushes 2 out, 2 pushes 1 out, 1 pushes 3 out; 1 hit.
    assert missed(keys, ones, 2) == 5
    assert missed(keys, ones, 3) == 3
    assert missed(keys, ones, 1) == 6
    # What fits into no cache is missed every time.
    assert missed(np.zeros(4, int), np.full(4, 9), 8) == 4 * 9


def test_a_cache_of_entries_of_several_sizes_is_that_of_a_replay() -> None:
    generator = np.random.default_rng(1)
    keys = generator.zipf(1.3, 1_500) % 300
    sizes = (keys * 7 % 5 + 1).astype(np.int64)
    for room in (1, 5, 60, 200, 10_000):
        assert missed(keys, sizes, room) == replayed(keys, sizes, room)
    # Many accesses at once: few hits too many, never too few.
    long = generator.zipf(1.2, 40_000) % 5_000
    exact, quick = (missed(long, np.ones_like(long), 800, chunks) for chunks in (40_000, 1_000))
    assert 0.97 * exact <= quick <= exact


# Rows of two sectors each, of which 16, 4, 9 and 8 numbers are kept: 2, 1, 2, 1 sectors.
HAND = Traffic(lookups=6, distinct=4, outputs=2, dim=16, lookup_mean=69 / 6, distinct_mean=37 / 4)
HAND_ROWS = np.array([0, 1, 0, 2, 3, 0])
HAND_LAYOUT = Layout(
    HAND_ROWS, 64 * HAND_ROWS, 4 * np.array([16, 4, 9, 8])[HAND_ROWS], np.full_like(HAND_ROWS, 64)
)
SEARCH = dataclasses.replace(HAND, mask_gradient=True)


def test_floor_of_a_case_by_hand() -> None:
    """A cache of four sectors and two bags of three lookups."""

    def least(traffic: Traffic, *asked: str) -> float:
        return floor(traffic, HAND_LAYOUT, 3, 4 * 32, *asked).total  # type: ignore[arg-type]

    # 0 and 1 missed, 0 hit, 2 pushes 1 out, 3 pushes 0 out, 0 pushes 2 out: 2 + 1 + 2 + 1 + 2.
    forward = 32 * 8 + 8 * 6 + 4 * 2 * 16
    assert least(HAND, "forward") == forward
    # Gradients of the bags 0 0 1 0 1 1, of two sectors each, fit; row gradients are written whole.
    gradient = 32 * 4
    assert least(HAND, "backward") == forward + gradient + 4 * 64
    # Every row whole: its prefix was pushed out by the gradients.
    whole = 32 * 8
    assert least(SEARCH, "backward") == forward + gradient + whole + 4 * 64
    # A step writes prefixes, and no row gradients.
    assert least(SEARCH, "step", "sgd") == forward + gradient + whole + 32 * 6
    assert least(HAND, "step", "sgd") == forward + gradient + 32 * 6 + 32 * 6
    # One sector holds the numbers of all four rows, and stays.
    assert least(SEARCH, "step", "rowwise_adagrad") == (
        forward + gradient + whole + 32 + 32 * 6 + 32
    )
    # Adagrad's and Adam's moments are read and written like the kept weights.
    assert least(SEARCH, "step", "adagrad") == least(SEARCH, "step", "sgd") + 2 * 32 * 6
    assert least(SEARCH, "step", "adam") == least(SEARCH, "step", "sgd") + 4 * 32 * 6
    # Each lookup's bytes, whatever a cache holds.
    assert useful_bytes(HAND, "forward") == 4 * 69 + 4 * 2 * 16 + 8 * 6


def test_streams_are_told_from_what_lies_apart() -> None:
    """Ids, outputs and row gradients at the copy's rate, the rest at that of lines."""
    asked = (3, 4 * 32)
    assert floor(HAND, HAND_LAYOUT, *asked, "forward") == Floor(8 * 6 + 4 * 2 * 16, 32 * 8, 5)
    backward = floor(HAND, HAND_LAYOUT, *asked, "backward")
    assert backward == Floor(8 * 6 + 4 * 2 * 16 + 4 * 64, 32 * 8 + 32 * 4, 5 + 2)
    # Lines of 64 bytes are whole rows here; a cache of two holds 0 but for 2 and 3, and both bags.
    step = floor(SEARCH, HAND_LAYOUT, *asked, "step", "sgd", sector=64)
    assert step == Floor(8 * 6 + 4 * 2 * 16, 64 * (5 + 2 + 4 + 4), 5 + 2 + 4)
    # 8 seconds for a line somewhere, 4 for each of the three after it; written ones were read.
    rates = {"copy": 16.0, "lines": 8.0, "rows": 256 / (8 + 3 * 4)}
    assert step.seconds(rates) == 176 / 16 + 11 * 8 + 4 * 4


def test_what_tells_sizes_is_read_by_sectors() -> None:
    """Groups of four bytes, eight a sector, beside rows that the cache holds."""
    told = dataclasses.replace(HAND_LAYOUT, told=[4 * 8 * HAND_ROWS, HAND_ROWS])
    asked = (3, 1 << 20, "forward")
    plain = floor(HAND, HAND_LAYOUT, *asked).total  # type: ignore[arg-type]
    assert floor(HAND, told, *asked).total == plain + 32 * (4 + 1)  # type: ignore[arg-type]


def test_narrow_rows_share_sectors() -> None:
    """Tiers of 48 and 16 bytes a row: 2 rows in 3 sectors, 3 rows in 2."""
    tiers = TierLayout(*[torch.arange(5)] * 3, ends=[2, 5], sizes=[12, 4])
    begins = tiers.begins(32)
    assert begins.tolist() == [0, 48, 96, 112, 128]
    widths = np.array([48, 48, 16, 16, 16])
    layout = Layout(np.arange(5), begins, widths, widths)
    traffic = Traffic(5, 5, 5, 12, 7.2, 7.2)
    written = 4 * 5 * 12 + 8 * 5
    assert floor(traffic, layout, 1, 1 << 20, "forward").total == 32 * 5 + written
    # A cache of one sector finds what the row before has ended with.
    assert floor(traffic, layout, 1, 32, "forward").total == 32 * 5 + written
    back = Layout(*(values[::2] for values in (np.arange(5), begins, widths, widths)))
    assert floor(traffic, back, 1, 32, "forward").total == 32 * (2 + 1 + 1) + written


@pytest.mark.parametrize(
    ("equations", "told", "distinct"),
    [
        (Equations("all"), 0, 16 * 4),
        (Equations("kept"), 1, None),
        (Equations("noisy", mask_gradient=True), 2, None),
        (Equations("stored", tier_width=4), 0, None),
    ],
)
def test_layout_of_a_problem(equations: Equations, told: int, distinct: int | None) -> None:
    case = Case("forward", 500, ("a",), (), bags=30, bag_size=4, dim=16, noise=True)
    problem = make_problem(case)
    ids = problem.global_ids[0]
    layout = equations.layout(problem, ids)
    assert len(layout.told) == told
    assert layout.kept.tolist() == (4 * equations.dims(problem, ids)).tolist()
    if distinct is not None:
        assert set(layout.kept) == {distinct} and (layout.begin == distinct * ids.numpy()).all()
    # Rows do not overlap.
    once = layout.distinct()
    assert (once.begin[1:] >= (once.begin + once.stored)[:-1]).all()
    assert once.rows.size == torch.unique(ids).numel()


def test_the_floor_lies_between_distinct_sectors_and_every_lookup() -> None:
    generator = np.random.default_rng(0)
    ids = np.minimum(generator.zipf(1.3, 4_000), 500) - 1
    kept = 8 * (ids % 8 + 1)
    layout = Layout(ids, 256 * ids, 4 * kept, np.full_like(ids, 256))
    once = layout.distinct()
    means = kept.mean(), once.kept.mean() / 4
    traffic = Traffic(4_000, once.rows.size, 200, 64, *means, mask_gradient=True)
    for work, optimizer in (("forward", "none"), ("backward", "none"), ("step", "adam")):
        asked = (work, optimizer)
        sizes = (32, 1 << 12, 1 << 16, 1 << 30)
        floors = [floor(traffic, layout, 20, size, *asked).total for size in sizes]  # type: ignore[arg-type]
        assert floors == sorted(floors, reverse=True)
        # Everything is read once, and the incoming gradient once a bag.
        rows = once.kept.sum() + 4 * 200 * 64 + 8 * 4_000
        if work == "forward":
            # Whole sectors, and nothing cached: what every lookup asks for.
            assert floors[0] <= useful_bytes(traffic, "forward")
            assert floors[-1] == rows
        if work == "backward":
            rest = (256 - once.kept).sum()
            assert floors[-1] == rows + 4 * 200 * 64 + rest + 256 * once.rows.size
