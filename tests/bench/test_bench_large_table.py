"""Tables beyond 2^31 elements, in little memory: address space is reserved, pages are not."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

import amtl_kernels
from amtl_kernels import optim, reference


def reserved(elements: int, dtype: type) -> torch.Tensor:
    """Zeros that take address space; memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    area = mmap.mmap(-1, elements * np.dtype(dtype).itemsize, flags=flags)
    return torch.from_numpy(np.frombuffer(area, dtype=dtype))


N, D = 84_000_000, 64
ROWS = torch.tensor([0, 3, 33_554_432, 33_554_433, 67_108_864, N - 1])


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """``[84M, 64]`` fp32: 21.5 GB of addresses, 5.4e9 elements, a few touched pages."""
    assert N * D > 2**32
    weight = reserved(N * D, np.float32).view(N, D)
    generator = torch.Generator().manual_seed(3)
    weight[ROWS] = torch.randn(len(ROWS), D, generator=generator)
    return weight


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", ["masked", "adaptive", "tiered"])
def test_rows_beyond_two_to_the_31_elements(
    table: torch.Tensor, kind: str, index: torch.dtype
) -> None:
    ids = torch.tensor([5, 1, 2, 2, 4, 3, 0, 5])
    lookups = ROWS[ids].to(index)
    offsets = torch.tensor([0, 3, 3, 5])
    kept = 7
    weight = torch.nn.Parameter(table)
    if kind == "masked":
        dims = reserved(N, np.uint8)
        dims[ROWS] = kept
        output = amtl_kernels.masked_embedding_bag(weight, lookups, offsets, dims)
    elif kind == "adaptive":
        mask = torch.nn.Parameter(torch.zeros(1, D))
        group = reserved(N, np.int32)
        output = amtl_kernels.adaptive_embedding_bag(
            weight, lookups, offsets, group, torch.tensor([kept], dtype=torch.int32), mask
        )
    else:
        kept = D
        output = amtl_kernels.tiered_embedding_bag([weight], [N], lookups, offsets)
    rows = table[ROWS][ids].double()
    rows[:, kept:] = 0
    wanted = torch.stack([rows[:3].sum(0), rows[3:3].sum(0), rows[3:5].sum(0), rows[5:].sum(0)])
    torch.testing.assert_close(output.detach().double(), wanted, rtol=1e-5, atol=1e-5)

    delta = torch.randn(4, D, generator=torch.Generator().manual_seed(4))
    output.backward(delta)
    gradient = weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert gradient._indices()[0].tolist() == ROWS.tolist()
    bag = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3])
    per_row = torch.zeros(len(ROWS), D).index_add_(0, ids, delta[bag])
    per_row[:, kept:] = 0
    torch.testing.assert_close(gradient._values(), per_row, rtol=1e-5, atol=1e-5)

    before = table[ROWS]
    optimizer = optim.SGD([weight], lr=0.5)
    optimizer.step()
    torch.testing.assert_close(table[ROWS], before - 0.5 * per_row)
    with torch.no_grad():
        table[ROWS] = before


def test_row_wise_state_beyond_two_to_the_31_elements(table: torch.Tensor) -> None:
    before = table[ROWS]
    grads = torch.ones(len(ROWS), D)
    state = reserved(N, np.float32)
    step = {"optimizer": reference.ROWWISE_ADAGRAD, "hyper": [0.5, 0.0, 0.0, 0.0, 0.0, 1.0]}
    torch.ops.amtl.apply_([table], [ROWS], [grads], [state], **step)
    torch.testing.assert_close(table[ROWS], before - 0.5)
    assert state[ROWS].tolist() == [1.0] * len(ROWS)
    with torch.no_grad():
        table[ROWS] = before
