"""Tables of few bits: blocks of codes, decoded as they are looked up."""

from __future__ import annotations

import ctypes
import mmap
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import call, in_order
from torch import Tensor

import amtl_kernels as ak

BITS = (2, 4, 8, 16)


@dataclass
class Coded:
    """A table of codes, and the numbers that they stand for."""

    blocks: list[Tensor]
    ends: list[int]
    steps: Tensor
    bits: int
    dim: int
    numbers: Tensor

    @property
    def table(self) -> tuple[list[Tensor], list[int]]:
        return self.blocks, self.ends

    @property
    def options(self) -> dict[str, Any]:
        return {"steps": self.steps, "bits": self.bits, "embedding_dim": self.dim}


def decoded(block: Tensor, step: float | Tensor, bits: int) -> list[list[float]]:
    """Row by row and number by number, in float32."""
    half = torch.tensor((2**bits - 1) / 2)
    rows = []
    for row in block.tolist():
        codes = [byte >> shift & (2**bits - 1) for byte in row for shift in range(0, 8, bits)]
        if bits == 16:
            codes = [low + 256 * high for low, high in zip(row[::2], row[1::2], strict=True)]
        rows.append(((torch.tensor(codes).float() - half) * step).tolist())
    return rows


def make(
    bits: int, counts: list[int], widths: list[int], device: str, seed: int = 0, exact: bool = True
) -> Coded:
    """Widths are cut to whole bytes. ``exact``: sums are the same in any order."""
    g = torch.Generator().manual_seed(seed)
    sizes = [width * bits // 8 for width in widths]
    blocks = []
    for c, (n, size) in enumerate(zip(counts, sizes, strict=True)):
        # Files are mapped: codes may begin at any byte.
        at = (seed + 37 * c) % 64
        memory = torch.randint(0, 256, (at + n * size,), generator=g, dtype=torch.uint8)
        if exact and bits == 16:
            # Codes 0x7F80 to 0x807F: of larger numbers sums would be rounded.
            memory[at + 1 :: 2] = 0x80 - (memory[at::2] >> 7)
        blocks.append(memory[at:].view(n, size))
    steps = torch.rand(len(blocks), generator=g) + 0.1
    if exact:
        steps = torch.exp2(torch.randint(-3, 3, steps.shape, generator=g))
    dim = max([*(size * 8 // bits for size in sizes), 1])
    numbers = torch.zeros(sum(counts), dim)
    start = 0
    for block, step in zip(blocks, steps, strict=True):
        if block.numel():
            width = block.shape[1] * 8 // bits
            numbers[start : start + len(block), :width] = torch.tensor(decoded(block, step, bits))
        start += len(block)
    ends = torch.tensor(counts).cumsum(0).tolist()
    return Coded([block.to(device) for block in blocks], ends, steps.to(device), bits, dim, numbers)


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, list[int], list[int], int]:
    bits = draw(st.sampled_from(BITS))
    widths = draw(
        st.lists(st.sampled_from([0, 4, 8, 12, 16, 20, 36, 64, 100]), min_size=1, max_size=6)
    )
    if draw(st.booleans()):
        # Rows of whole registers have a path of their own.
        widths = [width // 16 * 16 for width in widths]
    counts = [draw(st.integers(0, 9)) for _ in widths]
    counts[0] += 1
    return bits, counts, widths, draw(st.integers(0, 1000))


def drawn(backend: Any, check: Any) -> None:
    slow = list(HealthCheck)
    settings(deadline=None, max_examples=backend.examples, suppress_health_check=slow)(
        given(drawn=tables())(check)
    )()


def bags_of(rows: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Indices and offsets of bags of different lengths, some empty, and some lookups in none."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, 60, (9,), generator=g).sort().values
    offsets[0] = 0
    indices = torch.randint(0, rows, (62,), generator=g)
    if seed % 2:
        indices, offsets = indices.int(), offsets.int()
    return indices.to(device), offsets.to(device)


def pooled(values: Tensor, offsets: Tensor, counted: Tensor, mean: bool) -> Tensor:
    """Bags of rows, one row after the other in float32."""
    out = torch.zeros(len(offsets) - 1, values.shape[1])
    for b, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        for row in values[begin:end][counted[begin:end]]:
            out[b] += row
        count = int(counted[begin:end].sum())
        if mean and count:
            out[b] *= torch.tensor(1.0) / count
    return out


def test_by_hand(backend: Any) -> None:
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


def test_rows_are_decoded_bit_for_bit(backend: Any) -> None:
    def check(drawn: tuple[int, list[int], list[int], int]) -> None:
        bits, counts, widths, seed = drawn
        one = make(bits, counts, widths, backend.device, seed, exact=False)
        rows = torch.randperm(one.ends[-1], generator=torch.Generator().manual_seed(seed))
        rows = rows.int() if seed % 2 else rows
        got = ak.tiered_embedding(*one.table, rows.to(backend.device), **one.options)
        assert got.dtype == torch.float32
        assert torch.equal(got.cpu(), one.numbers[rows.long()])

    drawn(backend, check)


@pytest.mark.parametrize("mode", ["sum", "mean", "weighted"])
def test_bags(backend: Any, mode: str) -> None:
    def check(drawn: tuple[int, list[int], list[int], int]) -> None:
        bits, counts, widths, seed = drawn
        one = make(bits, counts, widths, backend.device, seed)
        indices, offsets = bags_of(one.ends[-1], seed, backend.device)
        padding = None if seed % 3 else int(indices[3])
        values = one.numbers[indices.long().cpu()]
        counted = indices.cpu() != (-1 if padding is None else padding)
        options: dict[str, Any] = {"padding_idx": padding, "include_last_offset": True}
        if mode == "weighted":
            g = torch.Generator().manual_seed(seed)
            weights = torch.randint(-4, 5, (len(indices),), generator=g).float()
            options["per_sample_weights"] = weights.to(backend.device)
            values = values * weights[:, None]
        else:
            options["mode"] = mode
        want = pooled(values, offsets.cpu(), counted, mode == "mean")
        got = ak.tiered_embedding_bag(*one.table, indices, offsets, **options, **one.options)
        if mode == "mean":
            torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(got.cpu(), want)

    drawn(backend, check)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [12, 64, 128, 200])
def test_sums_are_made_in_order_from_rounded_numbers(backend: Any, bits: int, width: int) -> None:
    one = make(bits, [30, 20], [width, width // 2], backend.device, exact=False)
    indices, offsets = bags_of(50, 0, backend.device)
    got = ak.tiered_embedding_bag(
        *one.table, indices, offsets, include_last_offset=True, **one.options
    )
    every = torch.ones(len(indices), dtype=torch.bool)
    values, offsets = one.numbers[indices.long().cpu()], offsets.cpu()
    want = pooled(values, offsets, every, False)
    if backend.name == "reference" or backend.name.startswith("cpu"):
        assert torch.equal(got, want)
    else:
        # The order is another one on GPUs.
        bound = pooled(values.abs(), offsets, every, False) * 60 * 2.0**-24
        assert bool(((got.cpu() - want).abs() <= bound).all())


@pytest.mark.parametrize("bits", BITS)
def test_as_many_blocks_as_a_table_may_have(backend: Any, bits: int) -> None:
    widths = [(8, 0, 16, 4)[c % 4] for c in range(1024)]
    one = make(bits, [1 + (c % 2) for c in range(1024)], widths, backend.device, exact=False)
    g = torch.Generator().manual_seed(1)
    rows = torch.randint(0, one.ends[-1], (100,), generator=g)
    got = ak.tiered_embedding(*one.table, rows.to(backend.device), **one.options)
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
            assert got.tolist() == decoded(block[rows], step.cpu(), bits)
    assert not any(libc.mprotect(wall, page, mmap.PROT_READ | mmap.PROT_WRITE) for wall in walls)


def test_large_tables_are_asked_for_ahead(backend: Any) -> None:
    """Those that are larger than the caches take other paths of the CPU kernels."""
    g = torch.Generator().manual_seed(0)
    for bits in BITS:
        count = 20_000_000 // (64 * bits)
        sizes = (64 * bits // 8, 40 * bits // 8)
        blocks = [torch.randint(0, 256, (count, n), generator=g, dtype=torch.uint8) for n in sizes]
        steps = torch.tensor([0.3, 0.7])
        rows = torch.randint(0, 2 * count, (200,), generator=g)
        table = ([block.to(backend.device) for block in blocks], [count, 2 * count])
        options = {"steps": steps.to(backend.device), "bits": bits}
        out = ak.tiered_embedding(*table, rows.to(backend.device), **options).cpu()
        for row, values in zip(rows.tolist(), out, strict=True):
            tier, local = divmod(row, count)
            (want,) = decoded(blocks[tier][local : local + 1], float(steps[tier]), bits)
            assert values.tolist() == [*want, *[0.0] * (64 - len(want))]


@pytest.mark.parametrize("alike", [None, 8, 16])
def test_several_tables(backend: Any, alike: int | None) -> None:
    shapes = [(2, [5, 3], [16, 8]), (8, [4], [20]), (4, [1, 2, 3], [64, 0, 2]), (16, [6], [9])]
    every = [
        make(alike or bits, *shape, backend.device, seed)
        for seed, (bits, *shape) in enumerate(shapes)
    ]
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, one.ends[-1], (10,), generator=g) for one in every]
    inner = torch.tensor([0, 3, 3, 8, 10])
    offsets = torch.cat([inner[:-1], inner[:-1] + 10, inner[:-1] + 20, inner + 30])
    offsets = offsets.to(backend.device)
    steps, bits = [one.steps for one in every], [one.bits for one in every]
    padding = [None, int(rows[1][0]), -1, None]
    got = ak.tiered_embedding_bag_tables(
        [one.blocks for one in every],
        [one.ends for one in every],
        torch.cat(rows).to(backend.device),
        offsets,
        padding_idx=padding,
        steps=steps,
        bits=bits,
    )
    out = []
    for one, mine, pad in zip(every, rows, padding, strict=True):
        counted = mine != (-1 if pad is None else pad % one.ends[-1])
        out.append(pooled(one.numbers[mine], inner, counted, False))
    assert torch.equal(got.cpu(), torch.cat(out, 1))
    with pytest.raises(IndexError, match="table 1: index 4 at position 2"):
        bad = torch.cat([rows[0], torch.tensor([0, 0, 4]), rows[1][3:], *rows[2:]])
        ak.tiered_embedding_bag_tables(
            [one.blocks for one in every],
            [one.ends for one in every],
            bad.to(backend.device),
            offsets,
            steps=steps,
            bits=bits,
        )
        ak.synchronize()


def test_rows_that_are_not_there(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ak.reference, "_warned_clamped", False)
    one = make(4, [3, 2], [8, 4], backend.device)
    rows = torch.tensor([0, 7, -1], device=backend.device)
    with pytest.raises(IndexError, match=r"index 7 at position 1 is out of range .* of 5 rows"):
        ak.tiered_embedding(*one.table, rows, **one.options)
        ak.synchronize()
    with pytest.warns(RuntimeWarning, match=r"index 7 at position 1 .* was clamped"):
        got = ak.tiered_embedding(*one.table, rows, bounds_check="clamp", **one.options)
        ak.synchronize()
    assert torch.equal(got.cpu(), one.numbers[[0, 4, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = ak.tiered_embedding(*one.table, rows[:1], bounds_check="off", **one.options)
    assert torch.equal(inside.cpu(), one.numbers[:1])


def test_there_is_no_gradient(backend: Any) -> None:
    one = make(4, [3], [8], backend.device)
    rows = torch.tensor([[0, 1]], device=backend.device)
    weights = torch.ones(1, 2, device=backend.device, requires_grad=True)
    out = ak.tiered_embedding_bag(*one.table, rows, per_sample_weights=weights, **one.options)
    assert torch.equal(out.detach().cpu(), one.numbers[:2].sum(0, keepdim=True))
    out.sum().backward()
    assert torch.equal(weights.grad.cpu(), one.numbers[:2].sum(1)[None])
    assert not ak.tiered_embedding(*one.table, rows, **one.options).requires_grad
    of = call(one.blocks, rows[0], torch.zeros(2, 8, device=backend.device), dims=[8])
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

    def look_up(blocks: Any = one.blocks, **options: Any) -> None:
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
            look_up(steps=one.steps, bits=4, optimizer=kind(one.blocks, lr=0.1))
    with pytest.raises(ValueError, match="must be in one group of its optimizer"):
        weight = torch.zeros(1, 1, requires_grad=True)
        look_up(steps=one.steps, bits=4, optimizer=ak.optim.SGD([weight], lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer must be of amtl_kernels.optim, got a float"):
        look_up(steps=one.steps, bits=4, optimizer=0.1)
    bag = torch.ones(1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"per_sample_weights are torch.float16 .* torch.float32"):
        ak.tiered_embedding_bag(
            *one.table, rows[None], per_sample_weights=bag, steps=one.steps, bits=4
        )
    tables = ([one.blocks], [one.ends], rows, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 steps and 1 bits for 1 tables"):
        ak.tiered_embedding_bag_tables(*tables, steps=[one.steps] * 2, bits=4)
    with pytest.raises(ValueError, match="table 0: bits must be 2, 4, 8 or 16, got 1"):
        ak.tiered_embedding_bag_tables(*tables, steps=[one.steps], bits=1)
    with pytest.raises(TypeError, match="steps must be a list of tensors"):
        ak.tiered_embedding_bag_tables(*tables, steps=one.steps, bits=4)
    with pytest.raises(ValueError, match="2 step_ends for 1 tables"):
        ak.tiered_embedding_bag_tables(*tables, steps=[one.steps], bits=4, step_ends=[[3], [3]])


@pytest.mark.parametrize("bits", [4, 16])
def test_compiled(backend: Any, bits: int) -> None:
    one = make(bits, [3, 2], [16, 8], backend.device)
    # A number that was another one in the test before would not be a constant.
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(rows: Tensor, offsets: Tensor, scale: Tensor) -> Tensor:
        bags = ak.tiered_embedding_bag(*one.table, rows, offsets, steps=one.steps, bits=bits)
        return bags * scale

    rows = torch.tensor([0, 4, 2], device=backend.device)
    scale = torch.full((2, 1), 2.0, device=backend.device, requires_grad=True)
    out = run(rows, torch.tensor([0, 2], device=backend.device), scale)
    want = torch.stack([one.numbers[0] + one.numbers[4], one.numbers[2]])
    assert torch.equal(out.detach().cpu(), 2 * want)
    out.sum().backward()
    assert torch.equal(scale.grad.cpu(), want.sum(1, keepdim=True))
    offsets = torch.tensor([0, 2], device=backend.device)
    of = call(one.blocks, rows, offsets=offsets, steps=[one.steps], bits=[bits])
    torch.library.opcheck(torch.ops.amtl.lookup.default, in_order("lookup", of.lookup()))
