"""Tables of few bits: codes, decoded as they are looked up, and floats, rounded as they are."""

from __future__ import annotations

import ctypes
import mmap
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from few_bit_tables import (
    BAGS_OF_FOUR,
    BITS,
    FLOATS,
    STORED,
    bags_of,
    decoded,
    for_drawn,
    four_tables,
    lookups_in,
    make,
    pooled,
    require_equal,
    sums_in_order,
)
from kernel_cases import Call, call, in_order
from torch import Tensor

import amtl_kernels as ak


def test_codes_by_hand(backend: Any) -> None:
    blocks = [[[0xF1, 0x20]], [[], []], [[0x7C, 0x00]]]
    codes = [torch.tensor(b, dtype=torch.uint8, device=backend.device) for b in blocks]
    steps = torch.tensor([2.0, 1.0, 0.5], device=backend.device)
    rows = torch.tensor([[0, 2], [3, 0]], device=backend.device)
    options = {"steps": steps, "bits": 4, "embedding_dim": 5}
    out = ak.tiered_embedding(codes, [1, 3, 4], rows, **options)
    first, last = [-13.0, 15.0, -15.0, -11.0, 0.0], [2.25, -0.25, -3.75, -3.75, 0.0]
    assert out.dtype == torch.float32 and out.tolist() == [[first, [0.0] * 5], [last, first]]
    bags = ak.tiered_embedding_bag(codes, [1, 3, 4], rows, **options)
    assert bags.tolist() == [first, [-10.75, 14.75, -18.75, -14.75, 0.0]]
    # Levels of 2 bits at step 2: -3, -1, 1, 3.
    two = [torch.tensor([[0b11100100]], dtype=torch.uint8, device=backend.device)]
    out = ak.tiered_embedding(two, [1], rows[0, :1], steps=steps[:1], bits=2)
    assert out.tolist() == [[-3.0, -1.0, 1.0, 3.0]]
    eight = [torch.tensor([[0, 255, 128]], dtype=torch.uint8, device=backend.device)]
    out = ak.tiered_embedding(eight, [1], rows[0, :1], steps=steps[2:], bits=8)
    assert out.tolist() == [[-63.75, 63.75, 0.25]]
    # Codes 0, 1, 256, 32768 and 65535, the lower byte first.
    pairs = [0, 0, 1, 0, 0, 1, 0, 128, 255, 255]
    sixteen = [torch.tensor([pairs], dtype=torch.uint8, device=backend.device)]
    out = ak.tiered_embedding(sixteen, [1], rows[0, :1], steps=steps[2:], bits=16)
    assert out.tolist() == [[-16383.75, -16383.25, -16255.75, 0.25, 16383.75]]


def test_rounding_by_hand(backend: Any) -> None:
    # Levels of 2 bits at step 2: -3, -1, 1, 3; ties go to even codes, -3 and 1.
    nan = float("nan")
    block = torch.tensor([[-9.0, -1.9, 0.1, 2.5], [-2.0, 0.0, 2.0, nan]], device=backend.device)
    narrow = torch.tensor([[float("inf")], [-0.3]], device=backend.device)
    rows = torch.tensor([0, 1, 2, 3], device=backend.device)
    steps = torch.tensor([2.0, 0.5], device=backend.device)
    got = ak.tiered_embedding([block, narrow], [2, 4], rows, steps=steps, bits=2).tolist()
    assert got[0] == [-3.0, -1.0, 1.0, 3.0] and got[1][:3] == [-3.0, 1.0, 1.0]
    assert got[1][3] != got[1][3]
    assert got[2:] == [[0.75, 0, 0, 0], [-0.25, 0, 0, 0]]
    # The second and third row are a part across no block, the first and last ones of their own.
    steps = torch.tensor([2.0, 4.0, 0.5, 1.0], device=backend.device)
    parts = {"steps": steps, "bits": 2, "step_ends": [1, 2, 3, 4]}
    got = ak.tiered_embedding([block, narrow], [2, 4], rows, **parts).tolist()
    assert got[0][0] == -3.0 and got[1][:3] == [-2.0, 2.0, 2.0] and got[3][0] == -0.5
    codes = torch.tensor([[0b11100100]] * 2, dtype=torch.uint8, device=backend.device)
    got = ak.tiered_embedding([codes, codes], [2, 4], rows, **parts)[:, 0].tolist()
    assert got == [-3.0, -6.0, -0.75, -1.5]


@pytest.mark.parametrize("bits", BITS)
def test_ties_are_those_of_the_nearest_quotient(backend: Any, bits: int) -> None:
    # A reciprocal of the step size, multiplied by, would be off by an ulp: another code next to it.
    rows = 400 if backend.name.startswith("cpu") else 24
    g = torch.Generator().manual_seed(bits)
    exponents = torch.randint(-20, 20, (rows,), generator=g).float()
    exponents[:10] = torch.tensor([-149, -140, -128, -126, -101, -100, 99, 101, 120, 126.0])
    steps = torch.rand(rows, generator=g).add(1).double().mul(torch.exp2(exponents.double()))
    steps = steps.float()
    steps[10] = 0.0
    half = (2**bits - 1) / 2
    whole = torch.arange(-int(half) - 2, int(half) + 3)
    if bits == 16:
        # Those at both ends, in the middle, and some between.
        between = torch.randperm(len(whole), generator=g)[:200]
        middle = len(whole) // 2
        whole = torch.cat(
            [whole[:20], whole[middle - 20 : middle + 20], whole[-20:], whole[between]]
        )
    near = (whole[None, :].double() * steps[:, None].double()).float()
    values = [near]
    for towards in (float("inf"), float("-inf")):
        for _ in range(2):
            values.append(torch.nextafter(values[-1], torch.tensor(towards)))
        values.append(near)
    values.append(torch.tensor([[float("inf"), float("-inf"), 3e38, 0.0]]).expand(rows, -1))
    block = torch.cat(values, 1).contiguous()
    codes = torch.round(block / steps[:, None] + half).clamp(0, 2 * half)
    got = ak.tiered_embedding(
        [block.to(backend.device)],
        [rows],
        torch.arange(rows, device=backend.device),
        steps=steps.to(backend.device),
        bits=bits,
        step_ends=range(1, rows + 1),
    )
    torch.testing.assert_close(
        got.cpu(), (codes - half) * steps[:, None], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("stored", "dtype"), [("codes", torch.float32), *(("floats", dtype) for dtype in FLOATS)]
)
def test_rows_bit_for_bit(backend: Any, stored: str, dtype: torch.dtype) -> None:
    def check(drawn: dict[str, Any]) -> None:
        one, seed = make(**drawn, device=backend.device, dtype=dtype), drawn["seed"]
        rows = torch.randperm(one.ends[-1], generator=torch.Generator().manual_seed(seed))
        got = lookups_in([one], stored, rows.int() if seed % 2 else rows).look_up()
        require_equal(got, one.numbers[rows].to(dtype))

    for_drawn(backend, check)


@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bags(backend: Any, mode: str) -> None:
    def check(drawn: dict[str, Any]) -> None:
        # Those of floats are those of codes bit for bit, where they are summed in one order.
        for exact in {True, not sums_in_order(backend)}:
            one, seed = make(**drawn, device=backend.device, exact=exact), drawn["seed"]
            indices, offsets = bags_of(one.ends[-1], seed)
            padding = None if seed % 3 else int(indices[3])
            options: dict[str, Any] = {"padding_idx": padding}
            values = one.numbers[indices.long()]
            if mode == "weighted":
                g = torch.Generator().manual_seed(seed)
                weights = 8 * torch.rand(len(indices), generator=g) - 4
                weights = weights.round() if exact else weights
                options["per_sample_weights"] = weights.to(backend.device)
                values = values * weights[:, None]
            else:
                options["mode"] = mode
            calls = [lookups_in([one], stored, indices, offsets) for stored in STORED]
            got, of_floats = (of.look_up(**options) for of in calls)
            assert torch.equal(got, of_floats)
            if exact:
                counted = indices != (-1 if padding is None else padding)
                want = pooled(values, offsets, counted, mode == "mean")
                close = 1e-6 if mode == "mean" else 0
                torch.testing.assert_close(got.cpu(), want, rtol=close, atol=close)

    for_drawn(backend, check)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [12, 64, 128, 200])
def test_sums_are_made_in_order_from_rounded_numbers(backend: Any, bits: int, width: int) -> None:
    indices, offsets = bags_of(50, 0)
    every = torch.ones(len(indices), dtype=torch.bool)
    for exact in {False, not sums_in_order(backend)}:
        one = make(
            bits, [30, 20], [width, width // 2], backend.device, 3, cuts=width % 3, exact=exact
        )
        values = one.numbers[indices]
        want, bound = pooled(values, offsets, every), torch.tensor(0.0)
        if not (exact or sums_in_order(backend)):
            bound = pooled(values.abs(), offsets, every) * 60 * 2.0**-24
        for stored in STORED:
            assert torch.equal(lookups_in([one], stored, indices).look_up().cpu(), values)
            got = lookups_in([one], stored, indices, offsets).look_up()
            assert bool(((got.cpu() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_sums_of_16_bits_are_rounded_once(backend: Any, dtype: torch.dtype) -> None:
    exact = not sums_in_order(backend)
    one = make(8, [40], [16], backend.device, 2, cuts=2, dtype=dtype, exact=exact)
    calls = [lookups_in([one], which, torch.arange(40), torch.tensor([0, 40])) for which in STORED]
    want, got = (of.look_up() for of in calls)
    require_equal(got, want.to(dtype))


def test_many_parts(backend: Any) -> None:
    one = make(4, [3000], [8], backend.device, cuts=1500)
    rows = torch.randint(0, 3000, (100,), generator=torch.Generator().manual_seed(0))
    for stored in STORED:
        assert torch.equal(lookups_in([one], stored, rows).look_up().cpu(), one.numbers[rows])


@pytest.mark.parametrize("bits", BITS)
def test_as_many_blocks_as_a_table_may_have(backend: Any, bits: int) -> None:
    widths = [(8, 0, 16, 4)[c % 4] for c in range(1024)]
    one = make(bits, [1 + (c % 2) for c in range(1024)], widths, backend.device)
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(0, one.ends[-1], (100,), generator=g)
    got = lookups_in([one], "codes", rows).look_up()
    assert torch.equal(got.cpu(), one.numbers[rows])


@pytest.mark.parametrize("bits", BITS)
def test_nothing_beyond_the_pages_of_a_table_is_read(backend: Any, bits: int) -> None:
    """The pages before and behind the table cannot be read."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, 3 * page)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    g = torch.Generator().manual_seed(bits)
    whole[page : 2 * page] = torch.randint(0, 256, (page,), generator=g, dtype=torch.uint8)
    walls = [ctypes.c_void_p(whole.data_ptr()), ctypes.c_void_p(whole.data_ptr() + 2 * page)]
    assert not any(libc.mprotect(wall, page, 0) for wall in walls)
    step = torch.tensor([0.3], device=backend.device)
    for size in (1, 2, 3, 4, 5, 8, 12, 16, 23, 32, 46, 62):
        if size * 8 % bits:
            continue
        count = page // size
        for start in (page, 2 * page - count * size):
            block = whole[start : start + count * size].view(count, size)
            rows = torch.tensor([0, 1, count - 2, count - 1])
            got = ak.tiered_embedding(
                [block.to(backend.device)], [count], rows.to(backend.device), steps=step, bits=bits
            )
            assert torch.equal(got.cpu(), decoded(block[rows], step.cpu(), bits))
    assert not any(libc.mprotect(wall, page, mmap.PROT_READ | mmap.PROT_WRITE) for wall in walls)


@pytest.mark.parametrize("bits", BITS)
def test_large_tables_are_asked_for_ahead(backend: Any, bits: int) -> None:
    """From 128 KiB on other paths of the CPU kernels are taken."""
    count = 20_000 // bits
    one = make(bits, [count, count], [64, 40], backend.device, 5, cuts=1)
    assert sum(block.numel() for block in one.codes) > 2**17
    rows = torch.randint(0, 2 * count, (200,), generator=torch.Generator().manual_seed(0))
    want = one.numbers[rows]
    for stored in STORED:
        assert torch.equal(lookups_in([one], stored, rows).look_up().cpu(), want)


def require_straight_gradients(of: Call, **options: Any) -> None:
    """Those of floats that are rounded are those of the floats as they are."""
    blocks = [block.requires_grad_() for block in of.tables["blocks"]]
    outs = [mine.look_up(**options) for mine in (of, replace(of, few_bits={}))]
    assert not torch.equal(*outs)
    slope = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(0))
    both = [torch.autograd.grad(out, blocks, slope.to(out.device)) for out in outs]
    for ours, theirs in zip(*both, strict=True):
        assert ours.is_sparse == theirs.is_sparse == options.get("sparse", True)
        assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("cuts", [0, 2])
@pytest.mark.parametrize("alike", [None, 8, 16])
def test_several_tables(backend: Any, alike: int | None, cuts: int) -> None:
    exact = not sums_in_order(backend)
    tables, rows, offsets = four_tables(backend.device, alike, cuts=cuts, exact=exact)
    padding = [None, int(rows[1][0]), -1, None]
    want = []
    for one, mine, pad in zip(tables, rows, padding, strict=True):
        counted = mine != (-1 if pad is None else pad % one.ends[-1])
        want.append(pooled(one.numbers[mine], BAGS_OF_FOUR, counted))
    bad = torch.cat([rows[0], torch.tensor([0, 0, 4]), rows[1][3:], *rows[2:]])
    weights = torch.ones(40, device=backend.device, requires_grad=True)
    for stored in STORED:
        of = lookups_in(tables, stored, torch.cat(rows), offsets)
        got = of.look_up(padding_idx=padding)
        assert torch.equal(got.cpu(), torch.cat(want, 1))
        with pytest.raises(IndexError, match="table 1: index 4 at position 2"):
            of.look_up(indices=bad.to(backend.device))
            ak.synchronize()
        with pytest.raises(ValueError, match="no gradient from several tables of few bits"):
            of.look_up(per_sample_weights=weights)
    require_straight_gradients(of)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_pass_straight_through(backend: Any, sparse: bool) -> None:
    one = make(4, [6, 5], [16, 8], backend.device, 3, cuts=3)
    rows = torch.tensor([[0, 10, 3], [3, 7, 0]])
    for lookups in ((rows,), (rows.flatten(), torch.tensor([0, 3, 6]))):
        require_straight_gradients(lookups_in([one], "floats", *lookups), sparse=sparse)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_samples_learn_from_what_is_shown(backend: Any, fused: bool) -> None:
    one = make(2, [6, 5], [16, 8], backend.device, 4, exact=True)
    indices, offsets = bags_of(11, 1)
    weights = torch.rand(62, generator=torch.Generator().manual_seed(0)).to(backend.device)
    weights.requires_grad_()
    of = lookups_in([one], "floats", indices, offsets)
    of.tables["blocks"] = blocks = [torch.nn.Parameter(block) for block in one.floats]
    optimizer = ak.optim.SGD(blocks, lr=0.1) if fused else None
    options = {"per_sample_weights": weights, "padding_idx": 3, "bounds_check": "clamp"}
    out = of.look_up(**options, optimizer=optimizer)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(slope.to(backend.device))
    bag = torch.repeat_interleave(torch.arange(8), offsets.diff())
    rows = indices[: len(bag)].long()
    wanted = torch.zeros(62)
    wanted[: len(bag)] = (one.numbers[rows] * slope[bag]).sum(1) * (rows != 3)
    torch.testing.assert_close(weights.grad.cpu(), wanted)


def test_updates_in_the_backward_are_those_without_rounding(backend: Any) -> None:
    one = make(4, [6, 5], [16, 8], backend.device, 1, cuts=1, exact=True)
    rows = torch.tensor([[0, 10, 3], [3, 7, 0]], device=backend.device)
    after = []
    for few in (one.options, {}):
        blocks = [torch.nn.Parameter(block.clone()) for block in one.floats]
        optimizer = ak.optim.Adam(blocks, lr=0.1)
        out = ak.fused.tiered_embedding_bag(blocks, one.ends, rows, optimizer=optimizer, **few)
        out.backward(torch.ones_like(out))
        after.append(blocks)
    for ours, theirs, before in zip(*after, one.floats, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)


def test_float64_is_rounded_in_float32() -> None:
    one = make(4, [6, 5], [16, 8], "cpu", 1, cuts=1, dtype=torch.float64)
    with ak.use_backend("reference"):
        got = lookups_in([one], "floats", torch.arange(11)).look_up()
    assert got.dtype == torch.float64 and torch.equal(got, one.numbers.double())


def test_rows_that_are_not_there(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ak.reference, "_warned_clamped", False)
    one = make(4, [3, 2], [8, 4], backend.device)
    of = lookups_in([one], "codes", torch.tensor([0, 7, -1]))
    with pytest.raises(IndexError, match=r"index 7 at position 1 is out of range .* of 5 rows"):
        of.look_up()
        ak.synchronize()
    with pytest.warns(RuntimeWarning, match=r"index 7 at position 1 .* was clamped"):
        got = of.look_up(bounds_check="clamp")
        ak.synchronize()
    assert torch.equal(got.cpu(), one.numbers[[0, 4, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = of.look_up(indices=of.bags["indices"][:1], bounds_check="off")
    assert torch.equal(inside.cpu(), one.numbers[:1])


def test_there_is_no_gradient(backend: Any) -> None:
    one = make(4, [3], [8], backend.device, exact=True)
    rows = torch.tensor([[0, 1]], device=backend.device)
    weights = torch.ones(1, 2, device=backend.device, requires_grad=True)
    table = (one.codes, one.ends, rows)
    out = ak.tiered_embedding_bag(*table, per_sample_weights=weights, **one.options)
    assert torch.equal(out.detach().cpu(), one.numbers[:2].sum(0, keepdim=True))
    out.sum().backward()
    assert torch.equal(weights.grad.cpu(), one.numbers[:2].sum(1)[None])
    assert not ak.tiered_embedding(*table, **one.options).requires_grad
    of = call(one.codes, rows[0], torch.zeros(2, 8, device=backend.device), dims=[8])
    for op, arguments in (("lookup_backward", of.backward()), ("lookup_update_", of.update("sgd"))):
        with pytest.raises(ValueError, match="need steps and bits, and have no gradient"):
            getattr(torch.ops.amtl, op)(*in_order(op, arguments))


def test_operators_refuse_what_does_not_fit(backend: Any) -> None:
    block = torch.zeros(3, 4, dtype=torch.uint8, device=backend.device)
    steps = torch.ones(1, device=backend.device)
    rows = torch.tensor([0], device=backend.device)

    def lookup(steps: Any, bits: Any, block: Tensor = block, **options: Any) -> None:
        of = call([block], rows, steps=steps, bits=bits, **options)
        torch.ops.amtl.lookup(*in_order("lookup", of.lookup()))

    with pytest.raises(ValueError, match="need steps and bits"):
        lookup(None, None)
    with pytest.raises(ValueError, match="bits must be 2, 4, 8 or 16, got 3"):
        lookup([steps], [3])
    with pytest.raises(ValueError, match="a row of codes of 16 bits cannot take 3 bytes"):
        lookup([steps], [16], block[:, :3].contiguous())
    with pytest.raises(ValueError, match=r"steps must be float32 \[1\]"):
        lookup([steps[:0]], [4])
    with pytest.raises(ValueError, match=r"steps must be float32 \[1\]"):
        lookup([steps.double()], [4])
    with pytest.raises(ValueError, match="one tensor of steps and one number of bits per table"):
        lookup([steps, steps], [4, 4])
    with pytest.raises(ValueError, match="steps and bits go together"):
        lookup([steps], None)
    with pytest.raises(ValueError, match="step_ends need steps and bits"):
        lookup(None, None, block.float(), step_ends=[3])
    with pytest.raises(ValueError, match="one of step_ends per step is needed"):
        lookup([steps], [4], step_ends=[2, 3])
    for ends in ([2, 2], [1, 4], [-1, 3], [3, 2]):
        with pytest.raises(ValueError, match="step_ends must not decrease, and every block must"):
            lookup([steps.expand(2).contiguous()], [4], step_ends=ends)
    with pytest.raises(ValueError, match="a table of few bits has no sizes"):
        sizes = [torch.ones(3, dtype=torch.int32, device=backend.device)]
        lookup([steps], [4], sizes=sizes)


def test_mistakes_are_named() -> None:
    one = make(4, [3], [8], "cpu")
    rows = torch.tensor([0])

    def look_up(blocks: Any = one.codes, **options: Any) -> None:
        ak.tiered_embedding(blocks, [3], rows, **options)

    with pytest.raises(ValueError, match="steps and bits go together"):
        look_up(bits=4)
    with pytest.raises(ValueError, match="steps and bits go together"):
        look_up(steps=one.steps)
    with pytest.raises(ValueError, match="bits must be 2, 4, 8 or 16, got 5"):
        look_up(steps=one.steps, bits=5)
    with pytest.raises(TypeError, match="bits must be a whole number, got a str"):
        look_up(steps=one.steps, bits="4")
    with pytest.raises(TypeError, match="steps must be a tensor, got a list"):
        look_up(steps=[1.0], bits=4)
    with pytest.raises(ValueError, match=r"steps must be float32 \[1\], got torch.float64"):
        look_up(steps=one.steps.double(), bits=4)
    with pytest.raises(ValueError, match=r"blocks\[0\] must be float32, .* got torch.int32"):
        look_up([torch.zeros(3, 8, dtype=torch.int32)], steps=one.steps, bits=4)
    with pytest.raises(ValueError, match="step_ends need steps and bits"):
        look_up([torch.zeros(3, 8)], step_ends=[3])
    with pytest.raises(ValueError, match=r"steps must be float32 \[2\], got torch.float32 \(1,\)"):
        look_up(steps=one.steps, bits=4, step_ends=[1, 3])
    with pytest.raises(TypeError, match="step_ends must be a list of whole numbers"):
        look_up(steps=one.steps, bits=4, step_ends=3)
    with pytest.raises(ValueError, match=r"blocks\[0\] must be float32, float16 or bfloat16"):
        look_up()
    with pytest.raises(ValueError, match="the widest tier has 8 columns"):
        look_up(steps=one.steps, bits=4, embedding_dim=7)
    for kind in (ak.optim.Adagrad, ak.optim.Adam):
        with pytest.raises(ValueError, match="are updated by SGD or RowwiseAdagrad: the state of"):
            look_up(steps=one.steps, bits=4, optimizer=kind(one.codes, lr=0.1))
    with pytest.raises(ValueError, match="must be in one group of its optimizer"):
        weight = torch.zeros(1, 1, requires_grad=True)
        look_up(steps=one.steps, bits=4, optimizer=ak.optim.SGD([weight], lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer must be of amtl_kernels.optim, got a float"):
        look_up(steps=one.steps, bits=4, optimizer=0.1)
    bag = torch.ones(1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"per_sample_weights are torch.float16 .* torch.float32"):
        ak.tiered_embedding_bag(
            one.codes, one.ends, rows[None], per_sample_weights=bag, steps=one.steps, bits=4
        )
    tables = ([one.codes], [one.ends], rows, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 steps and 1 bits for 1 tables"):
        ak.tiered_embedding_bag_tables(*tables, steps=[one.steps] * 2, bits=4)
    with pytest.raises(ValueError, match="table 0: bits must be 2, 4, 8 or 16, got 1"):
        ak.tiered_embedding_bag_tables(*tables, steps=[one.steps], bits=1)
    with pytest.raises(TypeError, match="steps must be a list of tensors"):
        ak.tiered_embedding_bag_tables(*tables, steps=one.steps, bits=4)
    with pytest.raises(ValueError, match="2 step_ends for 1 tables"):
        ak.tiered_embedding_bag_tables(*tables, steps=[one.steps], bits=4, step_ends=[[3], [3]])


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("stored", "bits", "weighted"),
    [("codes", 4, False), ("codes", 16, False), ("floats", 4, False), ("floats", 4, True)],
)
def test_compiled(backend: Any, stored: str, bits: int, weighted: bool) -> None:
    one = make(bits, [3, 2], [16, 8], backend.device, 3, cuts=3 if stored == "floats" else 0)
    of = lookups_in([one], stored, torch.tensor([0, 4, 2]), torch.tensor([0, 2, 3]))
    blocks, ends, few = of.tables["blocks"], one.ends, one.options
    leaves = [block.requires_grad_() for block in blocks if block.is_floating_point()]
    scale = torch.full((2, 1), 2.0, device=backend.device, requires_grad=True)
    weights, want = None, torch.stack([one.numbers[0] + one.numbers[4], one.numbers[2]])
    if weighted:
        weights = torch.tensor([2.0, -1.0, 0.5], device=backend.device, requires_grad=True)
        want = torch.stack([2 * one.numbers[0] - one.numbers[4], one.numbers[2] / 2])
        leaves.append(weights)
    of.bags["per_sample_weights"] = weights

    def run(scale: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        options = {"include_last_offset": True, "per_sample_weights": weights, "sparse": False}
        return scale * ak.tiered_embedding_bag(blocks, ends, rows, offsets, **options, **few)

    # A number that was another one in the test before would not be a constant.
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outs = [
        function(scale, of.bags["indices"], of.bags["offsets"], weights)
        for function in (compiled, run)
    ]
    assert all(torch.equal(out.detach().cpu(), 2 * want) for out in outs)
    both = [torch.autograd.grad(out.square().sum(), [*leaves, scale]) for out in outs]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.library.opcheck(
        torch.ops.amtl.lookup.default, in_order("lookup", of.lookup(sparse_grad=False))
    )
