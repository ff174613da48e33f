"""Several tables in one call equal as many calls side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import fused, optim

SHAPES = ((50, 7), (3, 64), (200, 1), (20, 33))
BAGS = 9


def make(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(4)
    lengths = torch.randint(0, 6, (len(SHAPES) * BAGS,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    indices = torch.cat(
        [
            torch.randint(0, rows, (int(lengths[t * BAGS : (t + 1) * BAGS].sum()),), generator=g)
            for t, (rows, _) in enumerate(SHAPES)
        ]
    )
    groups = [torch.randint(0, 5, (rows,), generator=g).int() for rows, _ in SHAPES]
    return {
        "weights": [torch.randn(*shape, generator=g).to(dtype).to(device) for shape in SHAPES],
        "indices": indices.to(device),
        "offsets": offsets.to(device),
        "row_groups": [group.to(device) for group in groups],
        "group_dims": [
            torch.randint(1, dim + 1, (5, 3), generator=g).int().to(device) for _, dim in SHAPES
        ],
        "masks": [torch.rand(5, dim, generator=g).to(device) for _, dim in SHAPES],
    }


def one_by_one(x: dict[str, Any], weights: list[Tensor], masks: list[Tensor], mode: str) -> Tensor:
    outs = []
    for t, weight in enumerate(weights):
        mine = x["offsets"][t * BAGS : (t + 1) * BAGS + 1]
        outs.append(
            ak.adaptive_embedding_bag(
                weight,
                x["indices"][mine[0] : mine[-1]],
                mine - mine[0],
                x["row_groups"][t],
                x["group_dims"][t],
                masks[t],
                mode=mode,
                seed=8,
                include_last_offset=True,
            )
        )
    return torch.cat(outs, 1)


def together(
    room: Any, x: dict[str, Any], weights: list[Tensor], masks: list[Tensor], **options: Any
) -> Tensor:
    return room.adaptive_embedding_bag_tables(
        weights,
        x["indices"],
        x["offsets"],
        x["row_groups"],
        x["group_dims"],
        masks,
        seed=8,
        **options,
    )


def fresh(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_equal_to_calls_side_by_side(backend: Any, mode: str, index_dtype: torch.dtype) -> None:
    x = make(backend.device)
    x["indices"] = x["indices"].to(index_dtype)
    target = torch.randn(BAGS, sum(dim for _, dim in SHAPES), device=backend.device)
    results = []
    for batched in (False, True):
        weights, masks = fresh(x["weights"]), fresh(x["masks"])
        if batched:
            out = together(ak, x, weights, masks, mode=mode)
        else:
            out = one_by_one(x, weights, masks, mode)
        (out * target).sum().backward()
        results.append([out, *(w.grad.to_dense() for w in weights), *(m.grad for m in masks)])
    for separate, batched_result in zip(*results, strict=True):
        torch.testing.assert_close(batched_result, separate)


@pytest.mark.parametrize("make_optimizer", [optim.SGD, optim.RowwiseAdagrad, optim.Adam])
def test_fused_step(backend: Any, make_optimizer: Any) -> None:
    x = make(backend.device)
    results = []
    for is_fused in (False, True):
        weights, masks = fresh(x["weights"]), fresh(x["masks"])
        optimizer = make_optimizer(weights, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            options = {"optimizer": optimizer} if is_fused else {}
            out = together(fused if is_fused else ak, x, weights, masks, **options)
            out.square().sum().backward()
            assert all((w.grad is None) == is_fused for w in weights)
            optimizer.step()
        results.append([*weights, *(m.grad for m in masks)])
    # Mask gradients are float32 sums of products up to about 50, in an order of the backend's own.
    for separate, fused_result in zip(*results, strict=True):
        torch.testing.assert_close(fused_result, separate, rtol=1e-5, atol=50 * 2.0**-20)


def test_errors_name_the_table(backend: Any) -> None:
    x = make(backend.device)
    first = int(x["offsets"][BAGS])
    x["indices"][first + 2] = 3
    with pytest.raises(IndexError, match=r"table 1: index 3 at position 2 .* a table of 3 rows"):
        together(ak, x, x["weights"], x["masks"])
    with pytest.raises(ValueError, match="offsets must hold 4"):
        x["offsets"] = x["offsets"][:-1]
        together(ak, x, x["weights"], x["masks"])


def test_opcheck() -> None:
    x = make("cpu")
    arguments = (
        fresh(x["weights"]),
        x["indices"],
        x["offsets"],
        x["row_groups"],
        x["group_dims"],
        fresh(x["masks"]),
        0,
        8,
        1,
    )
    torch.library.opcheck(torch.ops.amtl.adaptive_embedding_bag_tables.default, arguments)
