"""A fused step equals lookup, backward and optimizer step one after the other.

Except where the gradient of a row's last kept values is exactly zero: the separate optimizer reads
the kept prefix off the gradient, the fused one knows it. Weights here are drawn so that none is.

Codes have no step but the fused one: it is that of the numbers they stand for, rounded at random.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from few_bit_tables import (
    BAGS_OF_FOUR,
    BITS,
    FewBitTable,
    decoded,
    four_tables,
    lookups_in,
    make,
    packed,
)
from kernel_cases import FORMS, Call, Case, Inputs, build, call, draw_reals, in_order
from test_lookup import limited
from test_tables import make as make_tables
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import _calls, fused, optim

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adam": optim.Adam,
    "adam, counting on the device": functools.partial(optim.Adam, capturable=True),
}
KINDS = [form + what for form in FORMS for what in ("", " bag", " tables")]

RATES = [0.1, 0.0, 0.0, 0.9, 0.99, 1.0]


def of_kind(inputs: Inputs, kind: str) -> Call:
    """With leaves of its own; several tables are those of ``test_tables``, whatever the inputs."""
    form, *what = kind.split()
    if what == ["tables"]:
        return make_tables(form, str(inputs.weight.device), weighted=True).fresh()
    return inputs.call(form, bool(what)).fresh()


@pytest.mark.every(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_separate_steps(backend: Any, kind: str, name: str) -> None:
    case = limited(
        backend, Case(rows=300, dim=17, lookups=1500, weighted=True, sorted_groups=False)
    )
    inputs = build(case, backend.device, values=draw_reals)
    inputs.padding_idx = 0
    results = []
    for is_fused in (False, True):
        call = of_kind(inputs, kind)
        tables = call.tables["blocks"]
        optimizer = OPTIMIZERS[name](tables, lr=0.1, weight_decay=0.01)
        options = {"room": fused, "optimizer": optimizer} if is_fused else {}
        g = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            out = call.look_up(**options)
            # All above zero: a row's gradients do not add up to it.
            out.backward((torch.rand(out.shape, generator=g) + 0.5).to(out.device))
            assert all((t.grad is None) == is_fused for t in tables)
            optimizer.step()
        states = [
            value
            for t in tables
            for value in optimizer.state[t].values()
            if isinstance(value, Tensor)
        ]
        grads = [leaf.grad for leaf in call.learnable[len(tables) :]]
        results.append([*tables, *states, *grads, out.detach()])
    assert len(results[0]) == len(results[1])
    # Of wider tables other gradients are float32 sums of products up to about 6, in the backend's
    # own order.
    atol = 6 * 2.0**-20 if kind.endswith("tables") else 1e-6
    for separate, together in zip(*results, strict=True):
        torch.testing.assert_close(together, separate, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tables(backend: Any, name: str, dtype: torch.dtype) -> None:
    case = limited(backend, Case(rows=300, dim=40, dtype=dtype, padding="first"))
    inputs = build(case, backend.device)
    results = []
    for is_fused in (False, True):
        call = of_kind(inputs, "adaptive bag")
        optimizer = OPTIMIZERS[name](call.tables["blocks"], lr=0.1)
        options = {"room": fused, "optimizer": optimizer} if is_fused else {}
        psw = torch.ones_like(inputs.indices, dtype=dtype)
        call.look_up(**options, per_sample_weights=psw).sum().backward()
        optimizer.step()
        results.append(call.tables["blocks"][0].detach())
    torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps * 2, atol=1e-2)


def test_fused_steps_repeat_bit_for_bit(backend: Any) -> None:
    case = Case(rows=3000, lookups=40_000, weighted=True, padding="first")
    inputs = build(limited(backend, case), backend.device, values=draw_reals)
    threads = torch.get_num_threads()
    tables = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            call = of_kind(inputs, "adaptive bag")
            optimizer = optim.RowwiseAdagrad(call.tables["blocks"], lr=0.1)
            call.look_up(fused, optimizer=optimizer).sum().backward()
            tables.append((*call.tables["blocks"], call.masks[0].grad))
    finally:
        torch.set_num_threads(threads)
    for others in tables[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tables[0], others, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_public_lookups_take_an_optimizer(kind: str) -> None:
    """The same as the fused ones, which must be given one."""
    inputs = build(Case(rows=50, dim=7, lookups=40, weighted=True))
    results = []
    for room in (ak, fused):
        call = of_kind(inputs, kind)
        tables, source = call.tables["blocks"], of_kind(inputs, kind).tables["blocks"]
        optimizer = optim.Adagrad(tables, lr=0.1)
        call.look_up(room, optimizer=optimizer).sum().backward()
        assert all(table.grad is None for table in tables)
        assert any(not torch.equal(a, b) for a, b in zip(tables, source, strict=True))
        results.append([*tables, *(leaf.grad for leaf in call.learnable[len(tables) :])])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(TypeError, match="required keyword-only argument: 'optimizer'"):
        call.look_up(fused)


def test_the_optimizer_must_hold_the_table() -> None:
    inputs = build(Case(rows=50, dim=7, lookups=40))
    other = torch.zeros(3, 3, requires_grad=True)
    weight = inputs.weight.requires_grad_()
    optimizer = optim.SGD([other])
    with pytest.raises(ValueError, match="must be in one group"):
        fused.masked_embedding(weight, inputs.indices, inputs.row_dims, optimizer=optimizer)
    blocks = [block.requires_grad_() for block in inputs.blocks]
    apart = optim.SGD([{"params": [block]} for block in blocks])
    with pytest.raises(ValueError, match="must be in one group"):
        fused.tiered_embedding(blocks, inputs.tier_ends, inputs.indices, optimizer=apart)


def test_schedulers_reach_the_fused_step() -> None:
    inputs = build(Case(rows=50, dim=7, lookups=40))
    table = inputs.weight.requires_grad_()
    optimizer = optim.SGD([table], lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = table.detach().clone()
    fused.masked_embedding(
        table, inputs.indices, inputs.row_dims, optimizer=optimizer
    ).sum().backward()
    assert torch.equal(before, table)


def test_the_order_of_groups_is_looked_at_once() -> None:
    """A changed tensor is looked at again, a dead one forgotten."""
    group = torch.tensor([0, 0, 1, 5], dtype=torch.int32)
    assert _calls._never_falls(group)
    known = _calls._orders[group]
    assert _calls._never_falls(group) and _calls._orders[group] is known
    group[1] = 7
    assert not _calls._never_falls(group)
    before = len(_calls._orders)
    del group
    assert len(_calls._orders) == before - 1
    assert _calls._never_falls(torch.zeros(0, dtype=torch.int32))


def random24(row: int, column: int, step: int) -> int:
    """The upper 24 of a number's random bits in an optimizer's step."""
    word = 0xFFFFFFFF
    x = (row * 0x9E3779B1 + step * 0x85EBCA77 + column * 0xC2B2AE3D) & word
    x = (x ^ x >> 16) * 0x85EBCA6B & word
    x = (x ^ x >> 13) * 0xC2B2AE35 & word
    return (x ^ x >> 16) >> 8


def encoded(rows: Tensor, steps: Tensor, bits: int, count: int) -> Tensor:
    """Bytes of rows of numbers with a step size each, in an optimizer's step ``count``."""
    half, codes = (2**bits - 1) / 2, torch.zeros(rows.shape, dtype=torch.int64)
    for i, (row, step) in enumerate(zip(rows.tolist(), steps.flatten().tolist(), strict=True)):
        for j, number in enumerate(row):
            place = float(torch.tensor(number) / step + half)
            place = 0.0 if math.isnan(place) else min(max(place, 0.0), 2 * half)
            whole = math.floor(place)
            codes[i, j] = whole + (random24(i, j, count) < (place - whole) * 2**24)
    return packed(codes, bits)


def step_on_codes(
    one: FewBitTable, kind: Any, lookups: tuple[Tensor, ...], slope: Tensor, **options: Any
) -> Any:
    """One update of a table of codes by a fused optimizer, which is returned."""
    optimizer = kind(one.codes)
    lookup = ak.tiered_embedding if len(lookups) == 1 else ak.tiered_embedding_bag
    out = lookup(one.codes, one.ends, *lookups, optimizer=optimizer, **one.options, **options)
    assert out.requires_grad and not any(block.requires_grad for block in one.codes)
    out.backward(slope.to(out.device))
    return optimizer


def sgd(blocks: list[Tensor]) -> Any:
    return ak.optim.SGD(blocks, lr=0.25)


def test_an_update_by_hand(backend: Any) -> None:
    # Numbers -13, 15, -15, -11 at step 2.
    block = torch.tensor([[0xF1, 0x20]], dtype=torch.uint8, device=backend.device)
    one = FewBitTable([block], torch.tensor([2.0], device=backend.device), 4)
    rows = torch.tensor([0, 0], device=backend.device)
    slope = torch.tensor([[8.0, -80.0, float("nan"), 2.0], [0.0, 0.0, 0.0, 2.0]])
    step_on_codes(one, sgd, (rows,), slope)
    # They become -15, 35, NaN and -12: codes 0, 15 (the last), 0 and, of 1.5, one of two.
    up = random24(0, 3, 1) < 2**23
    assert block.tolist() == [[0xF0, 0x20 if up else 0x10]]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mode", ["plain", "sum", "mean", "weighted"])
def test_updates_are_those_of_numbers_rounded_at_random(backend: Any, bits: int, mode: str) -> None:
    """Sums are the same in any order here, so nothing but the rounding decides on a bit."""
    counts, widths = [7, 2, 1, 30], [20, 12, 0, 8]
    g = torch.Generator().manual_seed(bits)
    one = make(bits, counts, widths, backend.device, 1, exact=True)
    # Step sizes of parts: the first block has three of them, one for no rows.
    one.step_ends = [3, 3, 7, 9, 10, 40]
    one.steps = torch.exp2(torch.randint(-3, 3, (6,), generator=g)).to(backend.device)
    rows = torch.randint(0, 20, (64,), generator=g)
    lookups: tuple[Tensor, ...] = (rows.to(backend.device),)
    # One over three is no exact number.
    padding = None if mode == "mean" else 5
    options: dict[str, Any] = {"padding_idx": padding}
    slope = torch.randint(-8, 9, (64, 20), generator=g) / 8
    scale, bag = torch.ones(64), torch.arange(64)
    if mode != "plain":
        lookups = (rows.view(16, 4).int().to(backend.device), None)  # type: ignore[assignment]
        bag, slope = bag // 4, slope[:16]
    if mode == "weighted":
        scale = torch.randint(-4, 5, (64,), generator=g).float()
        options["per_sample_weights"] = scale.view(16, 4).to(backend.device)
    elif mode != "plain":
        options["mode"] = mode
    if mode == "mean":
        scale = torch.full((64,), 0.25)
    numbers, before = one.numbers, [block.cpu().clone() for block in one.codes]
    optimizer = step_on_codes(one, sgd, lookups, slope, **options)
    assert all(int(optimizer.state[block]["step"]) == 1 for block in one.codes)
    counted = rows != (-1 if padding is None else padding)
    total = torch.zeros(40, 20)
    total.index_add_(0, rows, slope[bag] * scale[:, None] * counted[:, None])
    numbers -= 0.25 * total
    touched = torch.isin(torch.arange(40), rows[counted]).split(counts)
    for c, (block, mine) in enumerate(zip(one.codes, numbers.split(counts), strict=True)):
        wanted = encoded(mine[:, : widths[c]], one.row_steps[c], bits, 1)
        wanted[~touched[c]] = before[c][~touched[c]]
        assert torch.equal(block.cpu(), wanted)
    assert mode != "plain" or not torch.equal(one.codes[0].cpu(), before[0])


@pytest.mark.parametrize("bits", BITS)
def test_row_wise_adagrad_of_codes(backend: Any, bits: int) -> None:
    """Those of a table of floats, up to the rounding, with the same state."""
    widths = [64, 36, 200] if backend.max_dim >= 200 else [64, 36, 100]
    one = make(bits, [9, 8, 7], widths, backend.device, 2)
    g = torch.Generator().manual_seed(bits)
    slope = torch.randn(60, one.dim, generator=g)
    rows = torch.randint(0, 24, (60,), generator=g).to(backend.device)
    numbers = [
        torch.nn.Parameter(mine[:, :width].contiguous().to(backend.device))
        for mine, width in zip(one.numbers.split([9, 8, 7]), widths, strict=True)
    ]

    def kind(blocks: Any) -> Any:
        return ak.optim.RowwiseAdagrad(blocks, lr=0.5, weight_decay=0.25)

    theirs = kind(numbers)
    ak.tiered_embedding(numbers, one.ends, rows, embedding_dim=one.dim, optimizer=theirs).backward(
        slope.to(backend.device)
    )
    ours = step_on_codes(one, kind, (rows,), slope)
    same, count, half = 0, 0, (2**bits - 1) / 2
    for block, number, step in zip(one.codes, numbers, one.row_steps, strict=True):
        torch.testing.assert_close(ours.state[block]["sum"], theirs.state[number]["sum"])
        wanted = encoded(number.detach().cpu(), step, bits, 1)
        looked_up = (ours.state[block]["sum"] > 0).cpu()
        same += int((block.cpu() == wanted)[looked_up].sum())
        count += int(looked_up.sum()) * block.shape[1]
        kept = number.detach().cpu().clamp(-half * step, half * step)
        apart = ((decoded(block, step, bits) - kept).abs() / step)[looked_up]
        # In float32 a code of 16 bits has 8 bits left for what lies between it and the next.
        assert float(apart.max()) <= (1.001 if bits < 16 else 1 + 2.0**-7)
    # A sum that is rounded otherwise is rarely across what decides.
    assert count > 100 and same >= 0.995 * count


@pytest.mark.parametrize("bits", BITS)
def test_rounding_keeps_the_mean(backend: Any, bits: int) -> None:
    """Updates of a tenth of a step, which rounding to the nearest code would lose."""
    start = packed(torch.full((100, 64), 2 ** (bits - 1) - 1), bits)
    block = start.to(backend.device, copy=True)
    one = FewBitTable([block], torch.ones(1, device=backend.device), bits)
    of = lookups_in([one], "codes", torch.arange(100))
    optimizer = ak.optim.SGD([block], lr=0.1)
    found = []
    for _ in range(4):
        block.copy_(start)
        out = of.look_up(optimizer=optimizer)
        out.backward(-torch.ones_like(out))
        found.append(one.numbers)
    moved = torch.stack(found) + 0.5
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    # Of 25,600 draws the mean has a standard deviation of .0019.
    assert abs(float(moved.mean()) - 0.1) < 0.006
    assert float((moved.mean((1, 2)) - 0.1).abs().max()) < 0.012
    # Each step draws anew, and so do neighbours.
    assert float((moved[0] * moved[1]).mean()) < 0.02
    assert float((moved[:, :, 1:] * moved[:, :, :-1]).mean()) < 0.015
    assert float((moved[:, 1:] * moved[:, :-1]).mean()) < 0.015


def test_updates_of_codes_in_several_tables(backend: Any) -> None:
    g = torch.Generator().manual_seed(0)
    slope = torch.randint(-4, 5, (4, 109), generator=g).float().to(backend.device)
    results = []
    for together in (True, False):
        tables, rows, offsets = four_tables(backend.device, cuts=1, exact=True)
        each = zip(tables, rows, slope.split([one.dim for one in tables], 1), strict=True)
        calls = [(lookups_in([one], "codes", some, BAGS_OF_FOUR), mine) for one, some, mine in each]
        if together:
            calls = [(lookups_in(tables, "codes", torch.cat(rows), offsets), slope)]
        for of, mine in calls:
            of.look_up(optimizer=sgd(of.tables["blocks"])).backward(mine)
        results.append([block for one in tables for block in one.codes])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_updates_of_codes_repeat_bit_for_bit(backend: Any) -> None:
    lookups = min(20_000, backend.max_lookups)
    rows = torch.randint(0, 1500, (lookups,), generator=torch.Generator().manual_seed(0))
    slope = torch.randn(lookups, 32, generator=torch.Generator().manual_seed(1))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            one = make(4, [1000, 500], [32, 20], backend.device)
            for _ in range(2):
                step_on_codes(one, ak.optim.RowwiseAdagrad, (rows.to(backend.device),), slope)
            found.append(one.codes)
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_steps_counted_on_the_device_round_alike(backend: Any) -> None:
    tables = []
    for capturable in (False, True):
        one = make(8, [20], [12], backend.device)
        optimizer = ak.optim.SGD(one.codes, lr=0.1, capturable=capturable)
        for _ in range(3):
            out = lookups_in([one], "codes", torch.arange(20)).look_up(optimizer=optimizer)
            out.backward(torch.full_like(out, 0.3))
        tables.append(one.codes[0])
    assert torch.equal(*tables)


def test_weights_of_samples_learn_beside_codes(backend: Any) -> None:
    one = make(4, [6], [8], backend.device, exact=True)
    of = lookups_in([one], "codes", torch.tensor([0, 5, 5]), torch.tensor([0, 3]))
    weights = torch.full((3,), 2.0, device=backend.device, requires_grad=True)
    out = of.look_up(per_sample_weights=weights, optimizer=sgd(one.codes))
    numbers, before = one.numbers, one.codes[0].clone()
    out.sum().backward()
    # Of the numbers before the update.
    assert torch.equal(weights.grad.cpu(), numbers[[0, 5, 5]].sum(1))
    changed = (one.codes[0] != before).any(1).cpu()
    assert not bool(changed[1:5].any())
    with torch.no_grad():
        assert not of.look_up(optimizer=sgd(one.codes)).requires_grad


def test_updates_of_codes_that_do_not_fit(backend: Any) -> None:
    block = torch.zeros(3, 4, dtype=torch.uint8, device=backend.device)
    rows = torch.tensor([0], device=backend.device)
    grad = torch.zeros(1, 8, device=backend.device)
    few = {"steps": [torch.ones(1, device=backend.device)], "bits": [4]}

    def update(
        block: Tensor, rule: str = "sgd", psw: bool = False, state: Any = ()
    ) -> tuple[Any, ...]:
        of = call([block], rows, grad, dims=[8], **few)
        return in_order("lookup_update_", of.update(rule, RATES, [*state], [block], psw_grad=psw))

    operator = torch.ops.amtl.lookup_update_
    with pytest.raises(ValueError, match="blocks of floats are updated as they are"):
        operator(*update(torch.zeros(3, 8, device=backend.device)))
    with pytest.raises(ValueError, match="an update of codes makes no gradient of per_sample"):
        operator(*update(block, psw=True))
    for rule in ("adagrad", "adam"):
        with pytest.raises(ValueError, match="are updated by SGD or RowwiseAdagrad"):
            operator(*update(block, rule, state=[torch.zeros(3, 8, device=backend.device)] * 2))
    torch.library.opcheck(
        operator.default, update(block), test_utils=("test_schema", "test_faketensor")
    )


def test_tiers_are_counted_in_one_addition_and_can_go_their_own_ways() -> None:
    """Their counters share memory, through copies, loading and steps of one tier alone."""
    blocks = [torch.nn.Parameter(torch.ones(3, width)) for width in (4, 2, 1)]
    rows = torch.arange(9)

    def passes(optimizer: Any, count: int) -> list[int]:
        held = optimizer.param_groups[0]["params"]
        for _ in range(count):
            ak.tiered_embedding(held, [3, 6, 9], rows, optimizer=optimizer).sum().backward()
        return [int(optimizer.state[block]["step"]) for block in held]

    optimizer = ak.optim.Adam(blocks, lr=0.1)
    assert passes(optimizer, 3) == [3, 3, 3]
    steps = [optimizer.state[block]["step"] for block in blocks]
    assert len({step.untyped_storage().data_ptr() for step in steps}) == 1
    blocks[1].grad = torch.ones(3, 2)
    optimizer.step()
    blocks[1].grad = None
    assert passes(optimizer, 1) == [4, 5, 4]
    copied = copy.deepcopy(optimizer)
    assert passes(copied, 2) == [6, 7, 6]
    assert passes(optimizer, 0) == [4, 5, 4]
    other = ak.optim.Adam([torch.nn.Parameter(block.detach().clone()) for block in blocks], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert passes(other, 2) == [6, 7, 6] and passes(optimizer, 2) == [6, 7, 6]
    for ours, theirs in zip(blocks, other.param_groups[0]["params"], strict=True):
        assert torch.equal(ours, theirs)


def test_a_table_that_is_given_twice_is_counted_twice() -> None:
    table, dims = torch.nn.Parameter(torch.ones(4, 3)), torch.full((4,), 3).int()
    optimizer = ak.optim.Adam([table], lr=0.1)
    tables = [table, table], torch.arange(4), torch.arange(5), [dims, dims]
    for count in (2, 4, 6):
        ak.masked_embedding_bag_tables(*tables, optimizer=optimizer).sum().backward()
        assert int(optimizer.state[table]["step"]) == count


def test_one_block_leads_to_the_backward_for_all() -> None:
    """None of them gets a gradient, and each would be a node of the graph."""
    blocks = [torch.nn.Parameter(torch.ones(3, width), width != 4) for width in (4, 2, 1)]
    optimizer = ak.optim.SGD(blocks, lr=1.0)
    out = ak.tiered_embedding(blocks, [3, 6, 9], torch.arange(9), optimizer=optimizer)
    edges = [edge for edge, _ in out.grad_fn.next_functions if edge is not None]
    assert [edge.variable for edge in edges] == blocks[1:2]
    out.sum().backward()
    assert all(torch.equal(block, torch.zeros_like(block)) for block in blocks[1:])
