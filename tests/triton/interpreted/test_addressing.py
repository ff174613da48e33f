"""Row numbers and offsets beyond 32 bits."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import applying, call, in_order

from amtl_kernels import reference
from amtl_kernels.triton import implementations
from amtl_kernels.triton.tables import hash_column, mix_seed

OPERATORS = implementations()


@triton.jit
def hash_kernel(rows_ptr, out_ptr, mixed, Q: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, hash_column(tl.load(rows_ptr + at), mixed, Q))


def test_rows_beyond_32_bits(device: str) -> None:
    """The last tier starts at row 2^40 - 10, so that its base and row * width are near 2^46.

    Only that tier has memory behind it: the rows before it have no columns.
    """
    end, dim = 2**40, 64
    blocks = [torch.empty(end - 10, 0, device=device), torch.randn(10, 32, device=device)]
    indices = torch.tensor([end - 1, end - 10, end - 4, end - 4], device=device)
    grad = torch.randn(4, dim, device=device)
    plain = call(blocks, indices, dims=[dim])
    out = OPERATORS["lookup"](*in_order("lookup", plain.lookup(0)))
    want = torch.nn.functional.pad(blocks[1][indices - (end - 10)], (0, 32))
    assert torch.equal(out, want)

    offsets, psw = torch.arange(4, device=device), torch.ones(4, device=device)
    bags = call(blocks, indices, grad, dims=[dim], offsets=offsets, per_sample_weights=psw)
    arguments = in_order("lookup_backward", bags.backward())
    rows, grads, _, psw_grad = OPERATORS["lookup_backward"](*arguments)
    assert rows[0].numel() == 0
    assert rows[1].tolist() == [0, 6, 9]
    torch.testing.assert_close(grads[1][1], grad[2, :32] + grad[3, :32])
    torch.testing.assert_close(psw_grad, (grad * want).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_size_noise_of_rows_and_seeds_beyond_32_bits(seed: int, device: str) -> None:
    """The hash folds 64-bit rows and seeds; compared on rows that a table can't hold here."""
    rows = torch.randint(0, 2**62, (64,), device=device)
    rows[:4] = torch.tensor([0, 1, 2**31, 2**32 + 5])
    for columns in (1, 7, 64, 1000):
        out = torch.empty(64, dtype=torch.int64, device=device)
        hash_kernel[(1,)](rows, out, mix_seed(seed), Q=columns, BLOCK=64)
        assert torch.equal(out, reference.hash_columns(rows, seed, columns))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs 9 GB; touching that much in CI proves no more"
)
def test_tables_beyond_2_31_elements(device: str) -> None:
    rows, dim = (2**31 // 64) + 100, 64
    weight = torch.zeros(rows, dim, dtype=torch.float16, device=device)
    sizes = torch.full((rows,), dim, dtype=torch.uint8, device=device)
    weight[-1] = torch.arange(dim, device=device)
    indices = torch.tensor([rows - 1, 0], device=device)
    plain = call([weight], indices, sizes=[sizes])
    out = OPERATORS["lookup"](*in_order("lookup", plain.lookup()))
    assert torch.equal(out, weight[indices])
    grads = torch.ones(1, dim, dtype=torch.float16, device=device)
    step = applying([weight], [indices[:1]], [grads], "sgd", [1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    OPERATORS["apply_"](*in_order("apply_", step))
    assert torch.equal(weight[-1], torch.arange(dim, device=device).half() - 1)
    assert not weight[0].any()
