"""Tables of few bits in training: blocks of floats, rounded as they are looked up."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from kernel_cases import call, in_order
from test_codes import BITS, bags_of, drawn
from torch import Tensor

import amtl_kernels as ak

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Numbers:
    """Blocks of floats, step sizes of parts of their rows, and what a lookup is to show."""

    def __init__(
        self,
        bits: int,
        counts: list[int],
        widths: list[int],
        device: str,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        finite: bool = False,
        exact: bool = False,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.bits, self.dim = bits, max(*widths, 1)
        self.ends: list[int] = torch.tensor(counts).cumsum(0).tolist()
        cuts = torch.randint(0, self.ends[-1] + 1, (seed % 4,), generator=g).tolist()
        self.step_ends = sorted([*self.ends, *cuts])
        steps = torch.rand(len(self.step_ends), generator=g) + 0.1
        if exact:
            steps = torch.exp2(torch.randint(-3, 3, steps.shape, generator=g))
        blocks, self.shown, self.codes = [], torch.zeros(self.ends[-1], self.dim), []
        half, start = (2**bits - 1) / 2, 0
        for c, (count, width) in enumerate(zip(counts, widths, strict=True)):
            # Rows begin anywhere in a line, or where lines do.
            at = (seed * 5 + 3 * c) % 16 * (seed % 2)
            memory = torch.randn(at + count * width + 16, generator=g) * 2**bits / 4
            if exact and bits == 16:
                # Of larger numbers sums would be rounded.
                memory /= 2**8
            block = memory.to(dtype)[at : at + count * width].view(count, width)
            part = torch.bucketize(
                torch.arange(start, start + count), torch.tensor(self.step_ends), right=True
            )
            step = steps[part][:, None]
            if width:
                # Ties, and what has no nearest code but the last.
                block[:, :1] = (step * (c % 3)).to(dtype)
                block[seed % count :, 1] = 0.0 if finite else float("inf") * (-1) ** seed
            code = torch.round(block.float() / step + half).clamp(0, 2 * half)
            self.shown[start : start + count, :width] = (code - half) * step
            packed = torch.zeros(count, width * bits // 8, dtype=torch.uint8)
            if bits == 16:
                packed[:, 0::2] = (code % 256).to(torch.uint8)
                packed[:, 1::2] = (code / 256).floor().to(torch.uint8)
            for e in range(8 // bits):
                packed += (code[:, e :: 8 // bits] * 2 ** (e * bits)).to(torch.uint8)
            self.codes.append(packed.to(device))
            blocks.append(block.to(device) if device != "cpu" else block)
            start += count
        self.blocks = blocks
        self.steps = steps.to(device)

    @property
    def few(self) -> dict[str, Any]:
        return {"steps": self.steps, "bits": self.bits, "step_ends": self.step_ends}

    @property
    def options(self) -> dict[str, Any]:
        return {**self.few, "embedding_dim": self.dim}


def require_equal(got: Tensor, want: Tensor) -> None:
    """Bit for bit; but Triton's interpreter cuts a bfloat16 off where a GPU rounds it."""
    cuts = got.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1"
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=2.0**-7 if cuts else 0, atol=0)


def sums_in_order(backend: Any) -> bool:
    """Whether bags are summed in order; on GPUs the order depends on how rows are read."""
    return bool(backend.name == "reference" or backend.name.startswith("cpu"))


def present(counts: list[int], widths: list[int]) -> tuple[list[int], list[int]]:
    """Tiers of at least one row."""
    return [max(1, count) for count in counts], widths


def test_by_hand(backend: Any) -> None:
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
        step_ends=list(range(1, rows + 1)),
    )
    torch.testing.assert_close(
        got.cpu(), (codes - half) * steps[:, None], rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_rounded_bit_for_bit(backend: Any, dtype: torch.dtype) -> None:
    def check(drawn: tuple[int, list[int], list[int], int]) -> None:
        bits, counts, widths, seed = drawn
        one = Numbers(bits, *present(counts, widths), backend.device, seed, dtype)
        rows = torch.randperm(one.ends[-1], generator=torch.Generator().manual_seed(seed))
        rows = rows.int() if seed % 2 else rows
        got = ak.tiered_embedding(one.blocks, one.ends, rows.to(backend.device), **one.options)
        require_equal(got, one.shown[rows.long()].to(dtype))

    drawn(backend, check)


def test_bags_are_those_of_codes_bit_for_bit(backend: Any) -> None:
    def check(drawn: tuple[int, list[int], list[int], int]) -> None:
        bits, counts, widths, seed = drawn
        shape = present(counts, widths)
        one = Numbers(bits, *shape, backend.device, seed, exact=not sums_in_order(backend))
        indices, offsets = bags_of(one.ends[-1], seed, backend.device)
        mode = ("sum", "mean", "weighted")[seed // 3 % 3]
        options: dict[str, Any] = {**one.options, "include_last_offset": True}
        options["padding_idx"] = None if seed % 3 else int(indices[3])
        if mode == "weighted":
            g = torch.Generator().manual_seed(seed)
            weights = torch.rand(62, generator=g)
            weights = (8 * weights).round() if not sums_in_order(backend) else weights
            options["per_sample_weights"] = weights.to(backend.device)
        else:
            options["mode"] = mode
        got = ak.tiered_embedding_bag(one.blocks, one.ends, indices, offsets, **options)
        codes = ak.tiered_embedding_bag(one.codes, one.ends, indices, offsets, **options)
        assert torch.equal(got, codes)

    drawn(backend, check)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [12, 64, 128, 200])
def test_wide_rows(backend: Any, bits: int, width: int) -> None:
    widths = [width, width // 3 // 4 * 4]
    one = Numbers(bits, [30, 20], widths, backend.device, 3, exact=not sums_in_order(backend))
    indices, offsets = bags_of(50, 0, backend.device)
    bags = (indices, offsets)
    got = ak.tiered_embedding(one.blocks, one.ends, indices, **one.options)
    assert torch.equal(got.cpu(), one.shown[indices.long().cpu()])
    got = ak.tiered_embedding_bag(one.blocks, one.ends, *bags, **one.options)
    assert torch.equal(got, ak.tiered_embedding_bag(one.codes, one.ends, *bags, **one.options))


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_sums_of_16_bits_are_rounded_once(backend: Any, dtype: torch.dtype) -> None:
    one = Numbers(8, [40], [16], backend.device, 2, dtype, exact=not sums_in_order(backend))
    rows = torch.arange(40, device=backend.device)[None]
    got = ak.tiered_embedding_bag(one.blocks, one.ends, rows, **one.options)
    codes = ak.tiered_embedding_bag(one.codes, one.ends, rows, **one.options)
    require_equal(got, codes.to(dtype))


def test_many_parts(backend: Any) -> None:
    g = torch.Generator().manual_seed(0)
    block = torch.randn(3000, 8, generator=g)
    steps = torch.rand(1500, generator=g) + 0.1
    rows = torch.randint(0, 3000, (100,), generator=g)
    got = ak.tiered_embedding(
        [block.to(backend.device)],
        [3000],
        rows.to(backend.device),
        steps=steps.to(backend.device),
        bits=4,
        step_ends=range(2, 3001, 2),
    )
    step = steps[rows // 2][:, None]
    codes = torch.round(block[rows] / step + 7.5).clamp(0, 15)
    assert torch.equal(got.cpu(), (codes - 7.5) * step)


def test_large_tables_are_asked_for_ahead(backend: Any) -> None:
    one = Numbers(4, [30_000, 30_000], [32, 20], backend.device, 5)
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 60_000, (200,), generator=g)
    got = ak.tiered_embedding(one.blocks, one.ends, rows.to(backend.device), **one.options)
    assert torch.equal(got.cpu(), one.shown[rows])


@pytest.mark.parametrize("alike", [None, 8, 16])
def test_several_tables(backend: Any, alike: int | None) -> None:
    shapes = [(2, [5, 3], [16, 8]), (8, [4], [20]), (4, [1, 2, 3], [64, 0, 4]), (16, [6], [9])]
    exact = not sums_in_order(backend)
    every = [
        Numbers(alike or bits, *shape, backend.device, seed, exact=exact)
        for seed, (bits, *shape) in enumerate(shapes, 1)
    ]
    g = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randint(0, one.ends[-1], (10,), generator=g) for one in every])
    inner = torch.tensor([0, 3, 3, 8, 10])
    offsets = torch.cat([inner[:-1], inner[:-1] + 10, inner[:-1] + 20, inner + 30])
    offsets = offsets.to(backend.device)
    bags = ([one.ends for one in every], rows.to(backend.device), offsets)
    few = {
        "steps": [one.steps for one in every],
        "bits": [one.bits for one in every],
        "step_ends": [one.step_ends for one in every],
    }
    for one in every:
        for block in one.blocks:
            block.requires_grad_()
    got = ak.tiered_embedding_bag_tables([one.blocks for one in every], *bags, **few)
    codes = ak.tiered_embedding_bag_tables([one.codes for one in every], *bags, **few)
    assert torch.equal(got.detach(), codes)
    plain = ak.tiered_embedding_bag_tables([one.blocks for one in every], *bags)
    blocks = [block for one in every for block in one.blocks]
    slope = torch.randn(got.shape, generator=g).to(backend.device)
    both = [torch.autograd.grad(out, blocks, slope) for out in (got, plain)]
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours.to_dense(), theirs.to_dense())
    weights = torch.ones(40, device=backend.device, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient from several tables of few bits"):
        ak.tiered_embedding_bag_tables(
            [one.blocks for one in every], *bags, per_sample_weights=weights, **few
        )


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_pass_straight_through(backend: Any, sparse: bool) -> None:
    one = Numbers(4, [6, 5], [16, 8], backend.device, 3)
    blocks = [block.requires_grad_() for block in one.blocks]
    g = torch.Generator().manual_seed(0)
    rows = torch.tensor([[0, 10, 3], [3, 7, 0]], device=backend.device)
    for lookup, inputs in ((ak.tiered_embedding, (rows,)), (ak.tiered_embedding_bag, (rows,))):
        got = lookup(blocks, one.ends, *inputs, sparse=sparse, **one.options)
        plain = lookup(blocks, one.ends, *inputs, sparse=sparse, embedding_dim=one.dim)
        assert not torch.equal(got, plain)
        slope = torch.randn(got.shape, generator=g).to(backend.device)
        both = [torch.autograd.grad(out, blocks, slope) for out in (got, plain)]
        for ours, theirs in zip(*both, strict=True):
            assert ours.is_sparse == sparse
            assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_samples_learn_from_what_is_shown(backend: Any, fused: bool) -> None:
    one = Numbers(2, [6, 5], [16, 8], backend.device, 4, finite=True)
    indices, offsets = bags_of(11, 1, backend.device)
    weights = torch.rand(62, generator=torch.Generator().manual_seed(0)).to(backend.device)
    weights.requires_grad_()
    blocks = [torch.nn.Parameter(block) for block in one.blocks]
    optimizer = ak.optim.SGD(blocks, lr=0.1) if fused else None
    out = ak.tiered_embedding_bag(
        blocks, one.ends, indices, offsets, per_sample_weights=weights, padding_idx=3,
        include_last_offset=True, bounds_check="clamp", optimizer=optimizer, **one.options,
    )  # fmt: skip
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(slope.to(backend.device))
    wanted, offsets = torch.zeros(62), offsets.cpu()
    for bag in range(8):
        for p in range(int(offsets[bag]), int(offsets[bag + 1])):
            if int(indices[p]) != 3:
                wanted[p] = (one.shown[int(indices[p])] * slope[bag]).sum()
    torch.testing.assert_close(weights.grad.cpu(), wanted)


def test_updates_in_the_backward_are_those_without_rounding(backend: Any) -> None:
    one = Numbers(4, [6, 5], [16, 8], backend.device, 1, finite=True)
    rows = torch.tensor([[0, 10, 3], [3, 7, 0]], device=backend.device)
    after = []
    for few in (one.few, {}):
        blocks = [torch.nn.Parameter(block.clone()) for block in one.blocks]
        optimizer = ak.optim.Adam(blocks, lr=0.1)
        out = ak.fused.tiered_embedding_bag(blocks, one.ends, rows, optimizer=optimizer, **few)
        out.backward(torch.ones_like(out))
        after.append(blocks)
    for ours, theirs, before in zip(*after, one.blocks, strict=True):
        assert torch.equal(ours, theirs) and not torch.equal(ours, before)


def test_compiled(backend: Any) -> None:
    one = Numbers(4, [3, 2], [16, 8], backend.device, 3)
    blocks = [block.requires_grad_() for block in one.blocks]
    rows = torch.tensor([0, 4, 2], device=backend.device)
    offsets = torch.tensor([0, 2], device=backend.device)
    weights = torch.rand(3, device=backend.device, requires_grad=True)

    def run(rows: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        return ak.tiered_embedding_bag(
            blocks, one.ends, rows, offsets, per_sample_weights=weights, sparse=False, **one.few
        )

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for psw in (None, weights):
        outs = [function(rows, offsets, psw) for function in (compiled, run)]
        assert torch.equal(*outs)
        wanted = blocks if psw is None else [*blocks, psw]
        both = [torch.autograd.grad(out.square().sum(), wanted) for out in outs]
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs)
    few = {"steps": [one.steps], "bits": [4], "step_ends": one.step_ends}
    of = call(blocks, rows, offsets=offsets, per_sample_weights=weights, **few)
    arguments = in_order("lookup", of.lookup(sparse_grad=False))
    torch.library.opcheck(torch.ops.amtl.lookup.default, arguments)


def test_float64_is_rounded_in_float32() -> None:
    one = Numbers(4, [6, 5], [16, 8], "cpu", 1, torch.float64)
    rows = torch.arange(11)
    with ak.use_backend("reference"):
        got = ak.tiered_embedding(one.blocks, one.ends, rows, **one.options)
    assert got.dtype == torch.float64 and torch.equal(got, one.shown.double())
