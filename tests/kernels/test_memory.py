"""Large tables: a backward's peak memory, and rows beyond 2^31 elements.

The tables are mappings of which a few pages are touched, so that 20 GB of addresses cost nothing.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import amtl_kernels as ak

PEAK = """
import resource, sys, torch
import amtl_kernels as ak

def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

rows, dim, lookups = 10_000_000, 64, 50_000
weight = torch.empty(rows, dim).requires_grad_()
sizes = torch.full((rows,), dim // 2, dtype=torch.uint8)
group = torch.zeros(rows, dtype=torch.int32)
dims = torch.full((1,), dim // 2, dtype=torch.int32)
mask = torch.zeros(1, dim, requires_grad=True)
indices = torch.randint(0, 200_000, (lookups,))

def step() -> None:
    weight.grad = None
    if sys.argv[1] == "masked":
        out = ak.masked_embedding(weight, indices, sizes)
    else:
        out = ak.adaptive_embedding(weight, indices, group, dims, mask)
    out.sum().backward()
    assert weight.grad.is_sparse

with torch.no_grad():
    weight[:200_000] = 0.5
warm = indices
indices = indices[:100]
step()
indices = warm
before = peak()
step()
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["masked", "adaptive"])
def test_backward_allocates_nothing_of_the_tables_size(kind: str) -> None:
    """Of a table of 10M x 64 (2.56 GB), 50k lookups may cost their own gradients and some sorting.

    Output, incoming gradient, its copy and row gradients are 12.8 MB each.
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), kind],
        check=True,
        capture_output=True,
        text=True,
    )
    extra = int(run.stdout)
    assert extra < 80e6, f"{extra / 1e6:.0f} MB"


PEAK_OF_CODES = """
import resource, torch
import amtl_kernels as ak

def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

rows, dim = 10_000_000, 64
block = torch.empty(rows, dim, dtype=torch.uint8)
optimizer = ak.optim.RowwiseAdagrad([block], lr=0.1)
options = {"steps": torch.ones(1), "bits": 8, "optimizer": optimizer}

def step(lookups: int) -> None:
    indices = torch.randint(0, 200_000, (lookups,))
    ak.tiered_embedding([block], [rows], indices, **options).sum().backward()

block[:200_000] = 128
# The first step makes the state, a number a row.
step(100)
before = peak()
step(50_000)
print(peak() - before)
"""


def test_updates_of_codes_allocate_nothing_of_the_tables_size() -> None:
    """As floats, the rows that are updated alone would be 12.5 MB, the table 2.56 GB."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK_OF_CODES)],
        check=True,
        capture_output=True,
        text=True,
    )
    extra = int(run.stdout)
    assert extra < 60e6, f"{extra / 1e6:.0f} MB"


@pytest.mark.no_poison
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_rows_beyond_two_to_the_31_elements(index_dtype: torch.dtype) -> None:
    rows, dim = 80_000_000, 64
    weight = torch.empty(rows, dim)
    chosen = torch.tensor([5, 33_554_431, 33_554_432, 67_108_865, rows - 1])
    weight[chosen] = torch.arange(5 * dim, dtype=torch.float32).reshape(5, dim)
    weight.requires_grad_()
    sizes = torch.full((rows,), 40, dtype=torch.uint8)
    group = torch.zeros(rows, dtype=torch.int32)
    dims = torch.tensor([40], dtype=torch.int32)
    mask = torch.zeros(1, dim, requires_grad=True)
    indices = chosen[[4, 0, 1, 2, 3, 4]].to(index_dtype)
    want = weight.detach()[indices.long()]
    want[:, 40:] = 0

    out = ak.masked_embedding(weight, indices, sizes)
    assert torch.equal(out, want)
    out = ak.adaptive_embedding(weight, indices, group, dims, mask)
    assert torch.equal(out, want)
    out.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad._indices()[0], chosen)
    grads = torch.zeros(5, dim)
    grads[:, :40] = torch.tensor([1.0, 1, 1, 1, 2])[:, None]
    assert torch.equal(weight.grad._values(), grads)
    assert mask.grad is not None
    assert torch.equal(mask.grad[0], weight.detach()[indices.long()].sum(0))

    ak.optim.SGD([weight], lr=1.0).step()
    assert weight[rows - 1, 0] == 4 * dim - 2
    assert weight[rows - 1, 40] == 4 * dim + 40


@pytest.mark.no_poison
def test_outputs_beyond_two_to_the_31_elements_of_tiers() -> None:
    first, second = torch.empty(40_000_000, 64), torch.empty(90_000_000, 32)
    first[-1], second[0], second[-1] = 1.0, 2.0, 3.0
    ends = [40_000_000, 130_000_000]
    indices = torch.tensor([39_999_999, 40_000_000, 129_999_999])
    blocks = [first.requires_grad_(), second.requires_grad_()]
    out = ak.tiered_embedding(blocks, ends, indices)
    assert out[:, 0].tolist() == [1, 2, 3]
    assert out[:, 63].tolist() == [1, 0, 0]
    out.sum().backward()
    assert first.grad is not None and second.grad is not None
    assert first.grad._indices().tolist() == [[39_999_999]]
    assert second.grad._indices().tolist() == [[0, 89_999_999]]


def test_huge_pages_leave_values_alone() -> None:
    table = torch.arange(3 << 20, dtype=torch.float32).reshape(-1, 64)
    address, before = table.data_ptr(), table.clone()
    assert ak.advise_huge_pages(table) in (True, False)
    assert table.data_ptr() == address
    assert torch.equal(table, before)
    assert not ak.advise_huge_pages(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="contiguous"):
        ak.advise_huge_pages(table.t())


# In a process of its own: memory that another test gave back may have been asked for before.
_ADVICE = """
import os, re
from pathlib import Path
import torch
import amtl_kernels as ak

def advised(table):
    middle = table.data_ptr() + table.numel() * table.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if found:
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is nowhere in memory")

large = ak.empty_table(1_000_000, 16)
plain = torch.empty(1_000_001, 16)
os.environ["AMTL_HUGE_PAGES"] = "0"
off = ak.empty_table(1_000_002, 16)
print(advised(large), advised(plain), advised(off))
"""


def test_large_tables_ask_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMTL_HUGE_PAGES", raising=False)
    run = subprocess.run([sys.executable, "-c", _ADVICE], capture_output=True, text=True)
    assert run.stdout.split() == ["True", "False", "False"], run.stderr
    small = ak.empty_table(3, 5, dtype=torch.bfloat16)
    assert small.shape == (3, 5) and small.dtype == torch.bfloat16
