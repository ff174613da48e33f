"""CUDA kernels in the simulator beyond what ``tests/kernels`` runs on every backend.

Watched here: races between threads and blocks, independence of thread and block order, fused
optimizer steps, several tables in one call, hot rows over many chunks, unusual launches.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    RULES,
    Call,
    Case,
    Inputs,
    applying,
    build,
    call,
    draw_reals,
    join,
    states,
)
from torch import Tensor

from amtl_kernels import reference

from . import simulator as sim
from .calls import flatten, in_double, run

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.int64: 0.0, torch.float32: 2e-6, torch.float16: 1.2e-3, torch.bfloat16: 9e-3}


def close(got: Tensor, want: Tensor, what: str, scale: float = 1.0, least: float = 1e-30) -> None:
    """Equal up to one rounding, relative to the largest value, or to ``least`` if that is more."""
    assert got.shape == want.shape, what
    if not got.numel():
        return
    assert not got.isnan().any(), f"{what}: something was not written"
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=least)
    assert error <= scale * TOLERANCE[got.dtype], f"{what}: relative error {error:.2e}"


def draw(seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Inputs:
    """A table, lookups in weighted bags, and a gradient, of real numbers."""
    case = Case(seed, rows=40, dim=17, lookups=300, dtype=dtype, groups=6, columns=0, bags=30)
    return build(replace(case, weighted=True, **changes), values=draw_reals)


def search(batch: Inputs, **given: Any) -> Call:
    """Bags in the table in groups."""
    return batch.call("adaptive", True, **given)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sorted_groups", [True, False])
def test_no_races_in_any_order_and_equal_results(
    order: str, dtype: torch.dtype, sorted_groups: bool
) -> None:
    """The same bits whatever runs first: no atomics on floats, no race."""
    batch = draw(3, dtype, dim=16, columns=5, sorted_groups=sorted_groups)
    arguments = search(batch).backward()
    with sim.simulation(0, "forward"):
        first = flatten(run("lookup_backward", arguments))
    for seed in (1, 2):
        with sim.simulation(seed, order, track_races=True):
            again = flatten(run("lookup_backward", arguments))
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
    backward_is_close(batch, first)


def backward_is_close(batch: Inputs, found: Any, scale: float = 3) -> None:
    """Row gradients, mask gradients and those of the weights, against float64.

    Relative to the largest or, if that is more, to the root of the most that terms squared come to:
    of one lookup the gradient of its weight is one sum, whose terms may cancel.
    """
    squared = copy.copy(batch)
    for name in ("weight", "per_sample_weights", "grad_flat", "grad_bags"):
        setattr(squared, name, getattr(batch, name).double().square())
    want, squares = (
        flatten(in_double("lookup_backward", search(each).backward())) for each in (batch, squared)
    )
    for got, wanted, square in zip(flatten(found), want, squares, strict=True):
        least = float(square.double().max().sqrt()) if len(square) else 0.0
        close(got, wanted, "backward", scale, max(least, 1e-30))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    dim=st.sampled_from([1, 3, 4, 8, 17, 24, 64, 129, 260, 520]),
    lookups=st.sampled_from([1, 31, 33, 700]),
    bags=st.sampled_from([1, 2, 50]),
    columns=st.sampled_from([0, 3]),
    sorted_groups=st.booleans(),
    wide=st.booleans(),
    pattern=st.sampled_from(["zipf", "uniform", "one row"]),
    mean=st.booleans(),
)
@example(612431, torch.float32, 520, 1, 1, 3, True, False, "one row", False)
def test_relative_error_of_everything(
    seed: int,
    dtype: torch.dtype,
    dim: int,
    lookups: int,
    bags: int,
    columns: int,
    sorted_groups: bool,
    wide: bool,
    pattern: str,
    mean: bool,
) -> None:
    """Forward and backward of real-valued inputs against float64."""
    batch = draw(
        seed,
        dtype,
        dim=dim,
        lookups=lookups,
        bags=bags,
        columns=columns,
        sorted_groups=sorted_groups,
        index_dtype=torch.int64 if wide else torch.int32,
        pattern=pattern,
    )
    # Terms of both signs can cancel, which leaves nothing to be relative to.
    batch.per_sample_weights = batch.per_sample_weights.abs()
    weighted = None if mean else batch.per_sample_weights
    pooled = {"pooling": int(mean), "padding_idx": [2], "seed": seed}
    forward = search(batch, per_sample_weights=weighted, **pooled).lookup()
    with sim.simulation(seed):
        got = run("lookup", forward)
        grads = run("lookup_backward", search(batch).backward())
    close(got, in_double("lookup", forward), "forward", scale=3)
    backward_is_close(batch, grads)


@pytest.mark.parametrize("dim", [8, 24, 40, 520])
def test_neighbours_that_swap_halves_keep_to_the_row(dim: int) -> None:
    """Eight columns a thread: alone, with a last thread that has no neighbour, over two pieces."""
    batch = draw(6, torch.bfloat16, dim=dim, lookups=900, pattern="uniform")
    with sim.simulation(6, track_races=True):
        grads = run("lookup_backward", search(batch).backward())
    backward_is_close(batch, grads)


def test_hot_row_and_one_group_over_many_levels() -> None:
    """20,000 lookups of few rows: partial sums of partial sums, three levels, a launch each."""
    batch = draw(5, dim=4, rows=3, groups=1, lookups=20_000, bags=1_000, pattern="uniform")
    before = dict(sim.tools.launch_counts())
    backward_is_close(batch, run("lookup_backward", search(batch).backward()), scale=10)
    after = sim.tools.launch_counts()
    levels = {
        kind: sum(n - before.get(k, 0) for k, n in after.items() if f"reduce_{kind}" in k)
        for kind in ("both", "partials")
    }
    assert levels == {"both": 3, "partials": 0}


@pytest.mark.parametrize("weight_grad", [True, False], ids=["rows and masks", "masks"])
def test_rows_and_groups_of_more_than_32_bits(weight_grad: bool) -> None:
    """Together they are what lookups are sorted by where groups fall somewhere."""
    batch = draw(10, dim=4, rows=70_000, groups=65_536, pattern="uniform", sorted_groups=False)
    arguments = search(batch).backward() | {"weight_grad": weight_grad}
    want = in_double("lookup_backward", arguments)
    with sim.simulation(10, track_races=True):
        found = run("lookup_backward", arguments)
    for got, wanted in zip(flatten(found), flatten(want), strict=True):
        close(got, wanted, "backward", scale=3)
    with sim.simulation(10, "reverse", track_races=True):
        mask = search_step(batch, batch.weight.clone(), [], "sgd", promised=False)
    assert torch.equal(mask, found[2])


# --- Fused optimizer steps ------------------------------------------------------------------------

HYPER = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.02, "beta1": 0.9, "beta2": 0.99, "step": 3.0}
RATES = list(HYPER.values())


def states_of(rule: str, blocks: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return states(rule, blocks, lambda shape: torch.rand(shape, generator=g).to(dtype))


def reference_step(
    rule: str, blocks: list[Tensor], state: list[Tensor], rows: list[Tensor], grads: list[Tensor]
) -> None:
    run("apply_", applying(blocks, rows, grads, rule, RATES, state), reference.IMPLEMENTATIONS)


def search_step(
    batch: Inputs,
    weight: Tensor,
    state: list[Tensor],
    rule: str = "rowwise_adagrad",
    masks: bool = True,
    promised: bool = True,
) -> Tensor:
    """A fused step of a table in groups; returns the mask gradient."""
    of = search(batch, groups_sorted=promised)
    arguments = of.update(rule, RATES, state, [weight], mask_grad=masks, psw_grad=False)
    mask: Tensor = run("lookup_update_", arguments)[0]
    return mask


# Wider than a warp's registers: one, four and eight columns a thread.
WIDE = (129, 192, 256, 260, 1000, 1024)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("rule", "dim"),
    [
        *((rule, dim) for rule in RULES for dim in (1, 12, 17, 24, 64)),
        *(("rowwise_adagrad", d) for d in WIDE),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masks", ["none", "promised", "unsorted", "sorted", "captured"])
def test_fused_step_of_a_dense_table(rule: str, dtype: torch.dtype, dim: int, masks: str) -> None:
    narrow = dtype != torch.float32 and dim in (64, 129, 1000)
    batch = draw(dim, dtype, dim=dim, columns=3, sorted_groups=masks != "unsorted")
    rows, grads, mask_grad, _ = in_double("lookup_backward", search(batch).backward())
    weight = batch.weight.clone()
    state = states_of(rule, [weight], dtype if narrow else torch.float32)
    want_weight = weight.double()
    want_states = [moment.double() for moment in state]
    reference_step(rule, [want_weight], want_states, rows, grads)
    untouched = [t.clone() for t in (weight, *state)]
    with sim.simulation(dim, track_races=True, capturing=masks == "captured"):
        got_mask = search_step(batch, weight, state, rule, masks != "none", masks == "promised")
    close(weight, want_weight, f"{rule} weight", scale=4)
    for moment, want in zip(state, want_states, strict=True):
        close(moment, want, f"{rule} state", scale=4)
    if masks != "none":
        close(got_mask, mask_grad, "mask gradient", scale=4)
    # Past the kept prefix, and in rows not looked up, not a bit has changed.
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    kept[rows[0]] = reference.kept_prefix(grads[0])
    for now, before in zip((weight, *state), untouched, strict=True):
        left = ~kept if now.dim() == 2 else ~kept.any(1)
        assert torch.equal(now[left], before[left])


@pytest.mark.parametrize(
    ("rule", "widths"),
    [
        *((rule, widths) for rule in RULES for widths in ((16, 8, 0), (17, 5, 1), (24, 0, 8))),
        *(("rowwise_adagrad", widths) for widths in ((129, 64, 1), (260, 128, 0), (1024, 0, 8))),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_step_of_a_tiered_table(
    rule: str, dtype: torch.dtype, widths: tuple[int, ...]
) -> None:
    g = torch.Generator().manual_seed(2)
    ends = [5, 20, 40]
    blocks = [
        torch.randn(end - start, width, generator=g).to(dtype)
        for start, end, width in zip([0, *ends], ends, widths, strict=False)
    ]
    batch = draw(4, dtype, dim=widths[0])
    batch.blocks = blocks
    of = batch.call("tiered", True)
    rows, grads, _, _ = in_double("lookup_backward", of.backward())
    state = states_of(rule, blocks)
    want = [block.double() for block in blocks]
    want_states = [moment.double() for moment in state]
    reference_step(rule, want, want_states, rows, grads)
    with sim.simulation(7, track_races=True):
        run("lookup_update_", of.update(rule, RATES, state, blocks, psw_grad=False))
    for c in range(3):
        close(blocks[c], want[c], f"tier {c}", scale=4)
    for moment, wanted in zip(state, want_states, strict=True):
        close(moment, wanted, "state", scale=4)


@pytest.mark.parametrize("form", ["search", "frozen"])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 256), (torch.bfloat16, 520)])
def test_a_hot_wide_row_steps_the_same_in_any_order(
    form: str, dtype: torch.dtype, dim: int
) -> None:
    """A tenth of the lookups is of one row, over many chunks and two levels of partial sums."""
    batch = draw(8, dtype, rows=300, dim=dim, lookups=3_000, groups=20, pattern="uniform")
    batch.indices[::10] = 150
    batch.per_sample_weights = batch.per_sample_weights / 8
    batch.blocks = [batch.weight]
    of = batch.call("adaptive" if form == "search" else "tiered", True)
    rows, grads, mask_grad, _ = in_double("lookup_backward", of.backward())
    want = [batch.weight.double(), torch.ones(300).double(), mask_grad]
    reference_step("rowwise_adagrad", [want[0]], [want[1]], rows, grads)
    results = []
    for seed, order in ((0, "forward"), (1, "reverse"), (2, "random"), (3, "random")):
        weight, state = batch.weight.clone(), torch.ones(300)
        arguments = of.update("rowwise_adagrad", RATES, [state], [weight], psw_grad=False)
        with sim.simulation(seed, order, track_races=seed < 2):
            mask, _ = run("lookup_update_", arguments)
        results.append([weight, state, mask])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))
    for got, wanted, what in zip(results[0], want, ("weight", "state", "mask"), strict=True):
        close(got, wanted, what, scale=4)


def test_rows_as_wide_as_shared_memory() -> None:
    """Sums of a row and of its mask fill a block's 48 KB; a wider row takes a step of its own."""
    for dim in (2_000, 6_144, 6_145):
        batch = draw(9, dim=dim, rows=5, lookups=40, bags=8, groups=2)
        rows, grads, mask_grad, _ = in_double("lookup_backward", search(batch).backward())
        weight, state = batch.weight.clone(), torch.ones(5)
        want, want_state = weight.double(), state.double()
        reference_step("rowwise_adagrad", [want], [want_state], rows, grads)
        if dim > 6_144:
            # The number of rows is read back between the backward and the step.
            with sim.simulation(capturing=True), pytest.raises(RuntimeError, match="captur"):
                search_step(batch, weight, [state])
        with sim.simulation(capturing=dim <= 6_144):
            mask = search_step(batch, weight, [state])
        close(weight, want, "weight", scale=4)
        close(state, want_state, "state", scale=4)
        close(mask, mask_grad, "mask gradient", scale=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_the_mean(dtype: torch.dtype) -> None:
    """A step far below half a unit in the last place moves weights by the right amount on average.

    Rounding to nearest would leave every weight where it was.
    """
    rows, dim = 200, 64
    weight = torch.ones(rows, dim, dtype=dtype)
    rate = torch.finfo(dtype).eps / 8
    grad = torch.ones(rows, dim, dtype=dtype)
    sizes = torch.full((rows,), dim, dtype=torch.int32)
    of = call([weight], torch.arange(rows), grad, sizes=[sizes])
    rounding = [rate, 0.0, 0.0, 0.0, 0.0, 9.0, 1.0]
    run("lookup_update_", of.update("sgd", rounding, [], [weight]))
    moved = 1 - weight.double().mean().item()
    deviation = torch.finfo(dtype).eps / 2 * math.sqrt(0.25 * 0.75 / (rows * dim))
    assert weight.unique().numel() == 2
    assert abs(moved - rate) < 5 * deviation
    again = torch.ones(rows, dim, dtype=dtype)
    run("lookup_update_", of.update("sgd", rounding, [], [again]))
    assert torch.equal(weight, again), "the same seed rounds the same way"


def off_by(offset: int, shape: torch.Size) -> Tensor:
    """float32 ones, ``offset`` bytes off the alignment of an allocation."""
    flat = torch.ones(shape.numel() + 32)
    start = (offset - flat.data_ptr()) % 64 // 4
    return flat[start : start + shape.numel()].view(shape)


@pytest.mark.parametrize("rule", ["adagrad", "adam"])
@pytest.mark.parametrize("form", ["dense", "tiered"])
def test_wide_state_need_not_lie_as_narrow_weights_do(form: str, rule: str) -> None:
    """Eight bytes suffice for four 16-bit weights; their float32 state moves by sixteen."""
    rows, dim = 12, 16
    hyper = [0.1, 1e-8, 0.0, 0.9, 0.99, 1.0]
    results = []
    for offset in (0, 8):
        blocks = [torch.ones(rows, dim).half(), torch.ones(rows, 8).half()]
        blocks = blocks[:1] if form == "dense" else blocks
        state = states(rule, blocks, partial(off_by, offset))
        sizes = [torch.full((rows,), 7, dtype=torch.int32)] if form == "dense" else []
        indices = torch.arange(rows * len(blocks))
        of = call(blocks, indices, torch.ones(len(indices), dim).half(), sizes=sizes)
        run("lookup_update_", of.update(rule, hyper, state, blocks))
        touched = [torch.arange(rows)] * len(blocks)
        grads = [torch.ones_like(block) for block in blocks]
        run("apply_", applying(blocks, touched, grads, rule, hyper, state))
        results.append([*blocks, *state])
    for aligned, apart in zip(*results, strict=True):
        assert torch.equal(aligned, apart)


def test_adam_step_counted_on_the_device() -> None:
    """A graph replays with the step that device memory holds; equal to the host's arithmetic."""
    for number in (1, 7, 100_000):
        got, want = torch.ones(4, 8), torch.ones(4, 8)
        rows, grads = torch.arange(4), torch.full((4, 8), 0.5)
        state = [*(torch.zeros(4, 8) for _ in range(2)), torch.tensor(number)]
        rates = [0.1, 1e-8, 0.0, 0.9, 0.999]
        of = call([got], rows, grads, sizes=[torch.full((4,), 8, dtype=torch.int32)])
        with sim.simulation(capturing=True):
            # What the host would have computed must not be used.
            run("lookup_update_", of.update("adam", [*rates, 1e6], state, [got]))
        moments = [torch.zeros(4, 8), torch.zeros(4, 8)]
        arguments = applying([want], [rows], [grads], "adam", [*rates, number], moments)
        run("apply_", arguments, reference.IMPLEMENTATIONS)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=0)


# --- Memory safety whatever the input -------------------------------------------------------------


@pytest.mark.every(5)
@pytest.mark.parametrize("form", ["masked", "adaptive", "tiered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dims", [(8, 16, 8), (5, 1, 9), (129, 3, 40), (1000, 16, 264)])
def test_a_list_of_tables_has_no_races(
    form: str, dtype: torch.dtype, dims: tuple[int, ...]
) -> None:
    """The operators' own layout, tables in memory of their own; values: ``tests/kernels``."""
    given = {"bags": 7, "include_last_offset": True, "sorted_groups": False, "columns": 3}
    every = [draw(t, dtype, rows=20 + t, dim=dims[t], **given) for t in range(3)]
    results = []
    for seed, order in ((0, "forward"), (1, "reverse"), (2, "random")):
        of = join(form, every)
        of.bags["padding_idx"] = [1, -1, 0]
        if form == "tiered":
            blocks = [half.contiguous() for batch in every for half in batch.weight.chunk(2)]
            blocks[3] = blocks[3][:, :0].contiguous()
            of.tables |= {"blocks": blocks, "block_counts": [2, 2, 2]}
        state = states("rowwise_adagrad", of.tables["blocks"], torch.zeros)
        fused = of.update("rowwise_adagrad", RATES, state)
        with sim.simulation(seed, order, track_races=True):
            out = run("lookup", of.lookup())
            rows, grads, *found = run("lookup_backward", of.backward())
            again = run("lookup_update_", fused)
        # Mask gradients and those of per-sample weights, fused or not.
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        results.append([out, *rows, *grads, *found, *fused["blocks"], *state])
    assert not results[0][0].isnan().any() and results[0][-1].any()
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.parametrize("rule", ["rowwise_adagrad", "adam"])
@pytest.mark.parametrize("pooled", [True, False])
def test_more_tiers_than_travel_with_a_launch(rule: str, pooled: bool) -> None:
    """The 129th tier moves them all to memory of the device, which changes no bit."""
    batch = draw(3, rows=300, dim=12, lookups=500, pattern="uniform")
    indices = batch.indices.clamp(min=5)
    ends = [*range(1, 128), 180, 240, 300]
    halves = [batch.weight[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    every = [half[:, : 12 - c % 3].contiguous() for c, half in enumerate(halves)]
    assert len(every) == 130
    bags: dict[str, Any] = {}
    grad = batch.weight[indices]
    if pooled:
        bags = {"offsets": batch.offsets, "per_sample_weights": batch.per_sample_weights}
        grad = batch.grad_bags
    results = []
    # Without the first five, whose rows nobody asks for, they do travel.
    for missing in (0, 5):
        blocks = [block.clone() for block in every[missing:]]
        of = call(blocks, indices - missing, grad, dims=[12], padding_idx=[200 - missing], **bags)
        state = [moment for block in blocks for moment in states_of(rule, [block])]
        want = in_double("lookup", of.lookup())
        with sim.simulation(4, track_races=True):
            rows, grads, _, psw = run("lookup_backward", of.backward())
        with sim.simulation(5, capturing=True):
            out = run("lookup", of.lookup(bounds_check=0))
            run("lookup_update_", of.update(rule, RATES, state, blocks, psw_grad=False))
        if missing == 0:
            close(out, want, "forward")
            rows, grads, blocks = rows[5:], grads[5:], blocks[5:]
        results.append([out, psw, *rows, *grads, *blocks, *state[-125:]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nonsense_is_never_followed() -> None:
    """Without a bounds check, bad indices, offsets and sizes stay inside of every buffer."""
    batch = draw(1, dim=8)
    indices = batch.indices.clone()
    indices[::7] = 10**12
    indices[3::7] = -5
    offsets = batch.offsets.clone()
    offsets[2], offsets[5], offsets[9] = -4, 10**10, 1
    sizes = batch.row_dims.clone()
    sizes[0], sizes[1] = -7, 10**6
    given = {"sizes": [sizes], "indices": indices}
    run("lookup", batch.call("masked", False, **given).lookup(bounds_check=0))
    for weights, pooling in ((batch.per_sample_weights, 0), (None, 1)):
        bags = {"offsets": offsets, "per_sample_weights": weights, "pooling": pooling}
        of = batch.call("masked", True, **given, **bags, padding_idx=[2])
        assert run("lookup", of.lookup(bounds_check=0)).isfinite().all()
        run("lookup_backward", of.backward())


def test_groups_that_are_not_there_stay_inside_of_every_buffer() -> None:
    """Rows of such groups keep nothing; sums of groups go to groups that are there."""
    batch = draw(1, dim=8)
    batch.group_dims.clamp_(min=1)
    known = batch.row_group.clone()
    batch.row_group[::9], batch.row_group[1::9] = -3, 10**6
    lost = (batch.row_group != known).nonzero().flatten()
    plain = search(batch, offsets=None, per_sample_weights=None)
    out = run("lookup", plain.lookup(bounds_check=0))
    kept = torch.isin(batch.indices, lost, invert=True)
    assert out[kept].any(1).all() and not out[~kept].any() and not kept.all()
    for grads in flatten(run("lookup_backward", search(batch).backward())):
        assert grads.isfinite().all()
    twice = call(
        [batch.weight] * 2,
        batch.indices,
        torch.cat([batch.grad_bags, batch.grad_bags], 1),
        sizes=[batch.group_dims] * 2,
        row_groups=[batch.row_group] * 2,
        seed=11,
        offsets=torch.cat([batch.offsets, batch.offsets, torch.tensor([300])]).sort().values,
        per_sample_weights=batch.per_sample_weights,
    )
    for grads in flatten(run("lookup_backward", twice.backward())):
        assert grads.isfinite().all()


def test_a_false_promise_of_order_stays_inside_of_every_buffer() -> None:
    """Groups said to be in order that are not: mask gradients are wrong, memory is safe."""
    batch = draw(1, dim=8, groups=40, sorted_groups=False)
    weights = []
    for promised in (True, False):
        weights.append(batch.weight.clone())
        search_step(batch, weights[-1], [], "sgd", promised=promised)
    # The lookups of a row are cut up elsewhere where they are sorted by group.
    close(weights[0], weights[1], "weights")


@pytest.mark.no_poison
def test_rows_beyond_two_to_the_31_elements() -> None:
    """Read, pooled, summed, stepped: address space is reserved, pages are not."""
    dim, rows = 64, 2**31 // 64 + 1_000
    chosen = torch.tensor([5, 2**31 // 64 + 3, rows - 1])
    indices, offsets = chosen[[2, 0, 1, 2]], torch.tensor([0, 2])
    values = torch.arange(3 * dim, dtype=torch.float32).view(3, dim)
    weight = torch.empty(rows, dim)
    weight[chosen] = values
    sizes = torch.full((rows,), 40, dtype=torch.uint8)
    groups = {
        "row_groups": [torch.zeros(rows, dtype=torch.int32)],
        "sizes": [torch.tensor([40], dtype=torch.int32)],
    }
    kept = values.clone()
    kept[:, 40:] = 0
    got = run("lookup", call([weight], indices, sizes=[sizes]).lookup())
    assert torch.equal(got, kept[[2, 0, 1, 2]])
    of = call([weight], indices, torch.ones(2, dim), **groups, offsets=offsets, groups_sorted=True)
    pooled = run("lookup", of.lookup())
    assert torch.equal(pooled, torch.stack([kept[2] + kept[0], kept[1] + kept[2]]))
    tiered = run("lookup", call([weight[:9], weight[9:]], indices).lookup())
    assert torch.equal(tiered, values[[2, 0, 1, 2]])

    rates = [1.0, *RATES[1:2], 0.0, *RATES[3:]]
    mask, _ = run("lookup_update_", of.update("sgd", rates, [], [weight]))
    assert torch.equal(mask, values[0] + values[1] + 2 * values[2])
    values[:, :40] -= torch.tensor([[1.0], [1.0], [2.0]])
    assert torch.equal(weight[chosen], values)


def test_a_grid_that_a_gpu_refuses_is_refused_here() -> None:
    """Column pieces go to the y dimension, which ends at 65,535."""
    with pytest.raises(RuntimeError, match="amtl: a lookup failed: invalid argument"):
        run(
            "lookup",
            call(
                [torch.zeros(1, 32 * 65_536 + 1, dtype=torch.float16)],
                torch.zeros(1, dtype=torch.int64),
                sizes=[torch.ones(1, dtype=torch.int32)],
            ).lookup(bounds_check=0),
        )


def test_every_kernel_has_been_executed() -> None:
    """Runs last in this file: no kernel of csrc/kernels is without a run above."""
    sources = Path(__file__).resolve().parents[2] / "csrc" / "kernels"
    defined = set()
    for path in sources.glob("*.cuh"):
        text = path.read_text()
        defined |= set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", text))
    assert len(defined) >= 15
    batch = draw(2)
    batch.blocks = [batch.weight[:20].contiguous(), batch.weight[20:, :4].contiguous()]
    means = batch.call("masked", True, per_sample_weights=None, pooling=1, padding_idx=[3])
    tiers = batch.call("tiered", True, per_sample_weights=None)
    for of in (means, tiers, search(draw(3)), search(draw(3, sorted_groups=False))):
        run("lookup", of.lookup())
        run("lookup_backward", of.backward())
    run("lookup", batch.call("tiered", False).lookup())
    few = [torch.zeros(40, 8, dtype=torch.uint8)]
    for bags in (None, batch.offsets):
        of = call(few, batch.indices, offsets=bags, steps=[torch.ones(1)], bits=[4])
        run("lookup", of.lookup())
    of = replace(of, grad=torch.ones(len(batch.offsets), 16))
    run("lookup_update_", of.update("sgd", RATES, [], few))
    run("apply_", applying([batch.weight], [torch.arange(40)], [torch.ones(40, 17)], "sgd", RATES))
    test_a_list_of_tables_has_no_races("masked", torch.float32, (5, 1, 9))
    executed = {
        match for name in sim.tools.launch_counts() for match in re.findall(r"(\w+_kernel)", name)
    }
    assert defined <= executed, f"never executed: {sorted(defined - executed)}"
