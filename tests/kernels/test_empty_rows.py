"""Rows of size 0 and tiers without columns: nothing of them is read, and nothing is written.

The inputs of every other test hold some too (``kernel_cases.draw_sizes``); here it is all that
there is to see. What must stay as it is holds NaN or minus zero, which no arithmetic leaves alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import draw_values
from test_fused import OPTIMIZERS
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import fused

N = 12
SIZES = (0, 3, 0, 8, 1, 0, 0, 8, 2, 0, 5, 8)
INDICES = (0, 1, 2, 3, 3, 0, 5, 7, 8, 11, 10, 6, 6, 6)
OFFSETS = (0, 4, 6, 6, 11)
"""The last bag holds a row of size 5 and three lookups of one of size 0."""


def draw(device: str, dim: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table, sizes, indices and offsets; the kept prefixes are small integers, the rest NaN."""
    sizes = (torch.tensor(SIZES) * dim).div(8, rounding_mode="floor").clamp(max=dim)
    weight = draw_values((N, dim), torch.Generator().manual_seed(3))
    weight[torch.arange(dim) >= sizes[:, None]] = float("nan")
    numbers = (torch.tensor(INDICES), torch.tensor(OFFSETS))
    return (weight.to(device), sizes.int().to(device), *(t.to(device) for t in numbers))


def same_bits(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dim", [1, 8, 129])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("is_adaptive", [False, True])
def test_a_bag_counts_rows_that_keep_nothing(
    backend: Any, dim: int, mode: str, is_adaptive: bool
) -> None:
    dim = min(dim, backend.max_dim)
    weight, sizes, indices, offsets = draw(backend.device, dim)
    groups = torch.arange(N, dtype=torch.int32, device=backend.device)
    mask = torch.zeros(N, dim, device=backend.device)
    options: dict[str, Any] = {"mode": mode, "padding_idx": 5}
    if is_adaptive:
        flat = ak.adaptive_embedding(weight, indices, groups, sizes, mask)
        out = ak.adaptive_embedding_bag(weight, indices, offsets, groups, sizes, mask, **options)
    else:
        flat = ak.masked_embedding(weight, indices, sizes)
        out = ak.masked_embedding_bag(weight, indices, offsets, sizes, **options)
    assert flat.isfinite().all() and not flat[sizes[indices.long()] == 0].any()
    want = torch.zeros(len(OFFSETS), dim)
    for b, (begin, end) in enumerate(zip(OFFSETS, (*OFFSETS[1:], len(INDICES)), strict=True)):
        rows = [p for p in range(begin, end) if INDICES[p] != 5]
        for p in rows:
            want[b] += flat[p].cpu()
        if mode == "mean" and rows:
            want[b] *= 1.0 / len(rows)
    torch.testing.assert_close(out.cpu(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_gradients_of_rows_that_keep_nothing(backend: Any, is_sparse: bool) -> None:
    """None for the weight and the per-sample weight; the mask's, over all columns."""
    weight, sizes, indices, offsets = draw(backend.device)
    gone = sizes == 0
    full = draw_values((N, 8), torch.Generator().manual_seed(4)).to(backend.device)
    full.requires_grad_()
    mask = torch.zeros(N, 8, device=backend.device, requires_grad=True)
    groups = torch.arange(N, dtype=torch.int32, device=backend.device)
    psw = torch.ones(len(INDICES), device=backend.device, requires_grad=True)
    out = ak.adaptive_embedding_bag(
        full, indices, offsets, groups, sizes, mask, per_sample_weights=psw, sparse=is_sparse
    )
    out.sum().backward()
    assert full.grad is not None and mask.grad is not None and psw.grad is not None
    grad = full.grad.to_dense() if is_sparse else full.grad
    counts = torch.bincount(indices, minlength=N)
    kept = torch.arange(8, device=backend.device) < sizes[:, None]
    assert torch.equal(grad, counts[:, None] * kept)
    assert torch.equal(mask.grad, counts[:, None] * full.detach())
    assert not psw.grad[gone[indices]].any()

    # Of the row's own values nothing is read for these.
    table = weight.clone().requires_grad_()
    psw = torch.ones(len(INDICES), device=backend.device, requires_grad=True)
    out = ak.masked_embedding_bag(
        table, indices, offsets, sizes, per_sample_weights=psw, sparse=is_sparse
    )
    out.sum().backward()
    assert table.grad is not None and psw.grad is not None
    assert psw.grad.isfinite().all() and not psw.grad[gone[indices]].any()
    assert table.grad.to_dense().isfinite().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("dim", [8, 17, 129])
def test_no_update_touches_what_is_not_kept(
    backend: Any, name: str, is_fused: bool, dim: int
) -> None:
    """Weights and states of rows of size 0 keep every bit, minus zeros and NaN included."""
    weight, sizes, indices, offsets = draw(backend.device, dim)
    table = weight.clone().requires_grad_()
    optimizer = OPTIMIZERS[name]([table], lr=0.1, weight_decay=0.01)
    for tensor in optimizer._moments(table, optimizer.param_groups[0]):
        tensor.fill_(-0.0)
    kept = torch.arange(dim, device=backend.device) < sizes[:, None]
    before = table.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        options: dict[str, Any] = {"optimizer": optimizer} if is_fused else {}
        room = fused if is_fused else ak
        room.masked_embedding_bag(table, indices, offsets, sizes, **options).sum().backward()
        optimizer.step()
    changed = torch.zeros(N, dtype=torch.bool, device=backend.device)
    changed[indices] = sizes[indices] > 0
    now = table.detach()
    assert same_bits(now[~kept], before[~kept]) and now[kept].isfinite().all()
    assert (now != before)[changed][:, 0].all()
    for tensor in optimizer._moments(table, optimizer.param_groups[0]):
        left = ~kept if tensor.dim() == 2 else ~changed
        assert (tensor[left] == 0).all() and tensor[left].signbit().all()
        assert tensor.isfinite().all()


PLACES = {"last": (8, 5, 0), "first": (0, 8, 5), "middle": (8, 0, 4), "all": (0, 0, 0)}
ENDS = [4, 7, N]


def tiers(device: str, place: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    starts = [0, *ENDS[:-1]]
    shapes = zip(starts, ENDS, PLACES[place], strict=True)
    return [draw_values((b - a, width), g).to(device) for a, b, width in shapes]


def as_table(blocks: list[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """The same rows in one table, and their sizes."""
    padded = [torch.nn.functional.pad(block, (0, dim - block.shape[1])) for block in blocks]
    sizes = [torch.full((len(block),), block.shape[1]) for block in blocks]
    return torch.cat(padded), torch.cat(sizes).int().to(blocks[0].device)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", [None, "sum", "mean"])
def test_tiers_without_columns(backend: Any, place: str, mode: str | None) -> None:
    """As one table whose rows keep nothing there; their gradients have no columns."""
    _, _, indices, offsets = draw(backend.device)
    results = []
    for in_tiers in (True, False):
        blocks = [block.requires_grad_() for block in tiers(backend.device, place)]
        table, sizes = as_table([b.detach() for b in blocks], 8)
        table.requires_grad_()
        psw = torch.ones(len(INDICES), device=backend.device, requires_grad=True)
        bags = {"mode": mode, "per_sample_weights": psw if mode == "sum" else None}
        if mode is None and in_tiers:
            out = ak.tiered_embedding(blocks, ENDS, indices, embedding_dim=8)
        elif mode is None:
            out = ak.masked_embedding(table, indices, sizes)
        elif in_tiers:
            out = ak.tiered_embedding_bag(blocks, ENDS, indices, offsets, embedding_dim=8, **bags)
        else:
            out = ak.masked_embedding_bag(table, indices, offsets, sizes, **bags)
        out.square().sum().backward()
        if in_tiers:
            assert all(b.grad is not None and b.grad.shape == b.shape for b in blocks)
            grads, _ = as_table([b.grad.to_dense() for b in blocks], 8)
            rows = [b.grad._indices().shape[1] for b in blocks]
            assert sum(rows) == indices.unique().numel()
        else:
            grads = table.grad.to_dense()
        results.append([out.detach(), grads, *([psw.grad] if mode == "sum" else [])])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_fused", [False, True])
def test_steps_of_tiers_without_columns(
    backend: Any, place: str, name: str, is_fused: bool
) -> None:
    _, _, indices, offsets = draw(backend.device)
    blocks = [block.requires_grad_() for block in tiers(backend.device, place)]
    optimizer = OPTIMIZERS[name](blocks, lr=0.1)
    group = optimizer.param_groups[0]
    for block in blocks:
        for tensor in optimizer._moments(block, group):
            assert tensor.shape[0] == block.shape[0]
            tensor.fill_(-0.0)
    before = [block.detach().clone() for block in blocks]
    options: dict[str, Any] = {"optimizer": optimizer} if is_fused else {}
    room = fused if is_fused else ak
    lookups = (indices, offsets)
    room.tiered_embedding_bag(blocks, ENDS, *lookups, embedding_dim=8, **options).sum().backward()
    optimizer.step()
    for block, old in zip(blocks, before, strict=True):
        assert block.isfinite().all() and (not block.numel() or not torch.equal(block, old))
        if not block.shape[1]:
            for tensor in optimizer._moments(block, group):
                assert tensor.signbit().all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_gradients_of_tiers_without_columns(name: str) -> None:
    """A plain optimizer finds nothing to do, and no mean of no values."""
    blocks = [block.requires_grad_() for block in tiers("cpu", "last")]
    optimizer = OPTIMIZERS[name](blocks, lr=0.1)
    indices = torch.tensor(INDICES)
    ak.tiered_embedding(blocks, ENDS, indices, sparse=False).sum().backward()
    optimizer.step()
    for block in blocks:
        assert block.grad is not None and block.grad.shape == block.shape
        states = optimizer._moments(block, optimizer.param_groups[0])
        assert all(tensor.isfinite().all() for tensor in (block, *states))


def test_the_width_of_tiers_without_columns_must_be_said() -> None:
    blocks = tiers("cpu", "all")
    with pytest.raises(ValueError, match="embedding_dim must be given"):
        ak.tiered_embedding(blocks, ENDS, torch.tensor([1]))
    with pytest.raises(ValueError, match="embedding_dim must be given"):
        ak.tiered_embedding(blocks, ENDS, torch.tensor([1]), embedding_dim=0)
