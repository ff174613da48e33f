"""Row-wise Adagrad fused into the backward of rows wider than a GPU's warp, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Inputs, build, wide
from test_lookup import limited, variant
from torch import Tensor

import amtl_kernels

ROWS, BAGS = 60, 30
F32, BF16 = torch.float32, torch.bfloat16
# One, four and eight columns a thread; the last piece of a row full, and not.
CASES = [(129, F32), (129, BF16), (192, F32), (256, F32), (260, BF16), (1000, BF16), (1024, F32)]
FORMS = ("masked", "adaptive", "tiered")
HYPER = [0.1, 1e-3, 0.01, 0.0, 0.0, 1.0]


def inputs_of(backend: Any, dim: int, dtype: torch.dtype, seed: int = 1) -> Inputs:
    """Lookups of which every tenth is of one row.

    No gradient is exactly zero, which is why weights are positive: two of a row in one bag could
    cancel, and the reference reads the kept prefix off the gradient.
    """
    case = variant(
        seed=seed, rows=ROWS, dim=dim, dtype=dtype, lookups=300, pattern="uniform", groups=9
    )
    case = variant(**{**limited(backend, case).__dict__, "dim": dim})
    case = variant(**{**case.__dict__, "bags": BAGS, "include_last_offset": True, "weighted": True})
    inputs = build(case, backend.device)
    inputs.indices[::10] = 7
    generator = torch.Generator().manual_seed(seed)
    psw = inputs.per_sample_weights
    assert psw is not None
    inputs.grad_bags.copy_(torch.randn(inputs.grad_bags.shape, generator=generator))
    psw.copy_(torch.rand(psw.shape, generator=generator) + 0.5)
    return inputs


def tiers_of(inputs: Inputs) -> tuple[list[Tensor], list[int]]:
    """Blocks of the whole width, of half of it and of 8 columns."""
    dim, ends = inputs.case.dim, [20, 40, ROWS]
    parts = inputs.weight.split(20)
    widths = (dim, dim // 2, 8)
    return [part[:, :w].contiguous() for part, w in zip(parts, widths, strict=True)], ends


def one_table(form: str, inputs: Inputs) -> list[Any]:
    """The arguments of a fused step on one table."""
    bags = (inputs.indices, inputs.offsets)
    psw, rest = inputs.per_sample_weights, (0, 3, True)
    blocks, ends = tiers_of(inputs) if form == "tiered" else ([inputs.weight], [])
    state = [torch.ones(len(block), device=block.device) for block in blocks]
    if form == "tiered":
        mine = (inputs.grad_bags, ends, *bags, psw, inputs.case.dim, *rest, False)
        return [blocks, state, *mine, 2, HYPER]
    first = [inputs.weight, state, inputs.grad_bags, *bags]
    if form == "masked":
        return [*first, inputs.row_dims, psw, *rest, False, 2, HYPER]
    groups = (inputs.row_group, inputs.group_dims)
    return [*first, *groups, psw, *rest, 5, True, False, 2, HYPER]


def several_tables(form: str, every: list[Inputs]) -> list[Any]:
    """The same of several tables, each with lookups and bags of its own."""
    starts = [sum(len(i.indices) for i in every[:t]) for t in range(len(every))]
    ends = [i.offsets[:-1] + start for i, start in zip(every, starts, strict=True)]
    total = sum(len(i.indices) for i in every)
    offsets = torch.cat([*ends, ends[0].new_tensor([total])])
    described: list[Any] = [[i.weight for i in every]]
    if form == "masked":
        described += [[i.row_dims for i in every]]
    elif form == "adaptive":
        described += [[i.row_group for i in every], [i.group_dims for i in every]]
    else:
        tiers = [tiers_of(i) for i in every]
        described = [[b for blocks, _ in tiers for b in blocks], [3] * len(every)]
        described += [[end for _, ends in tiers for end in ends], [i.case.dim for i in every]]
    state = [torch.ones(len(block), device=block.device) for block in described[0]]
    psw = torch.cat([i.per_sample_weights for i in every if i.per_sample_weights is not None])
    grad = torch.cat([i.grad_bags for i in every], 1)
    bags = [torch.cat([i.indices for i in every]), offsets, psw, 0, [3] * len(every)]
    wants = [5, True] if form == "adaptive" else []
    return [*described, state, grad, *bags, *wants, False, 2, HYPER]


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.cpu()]
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def check(backend: Any, op: str, arguments: list[Any]) -> None:
    """Tables, their states and the mask gradient.

    The plain reference is no fused step: it rounds row gradients to the table's type on their way.
    """
    before = flat(arguments)
    mine, exact = copied(arguments), wide(copied(arguments))
    got = flat([mine, getattr(torch.ops.amtl, op).default(*mine)])
    with amtl_kernels.use_backend("reference"):
        want = flat([exact, getattr(torch.ops.amtl, op).default(*exact)])
    rounds = backend.name == "reference" and before[0].dtype == BF16
    for g, w in zip(got, want, strict=True):
        # Sums are of 32 bits whatever the type of the table, the mask gradient's of many terms.
        one, scale = 2e-6, float(w.abs().max()) if w.numel() else 0.0
        if g.dtype == BF16 or rounds:
            one, scale = torch.finfo(BF16).eps, 1.0
        torch.testing.assert_close(g.double(), w.double(), rtol=one, atol=one * scale)
    changed = sum(not torch.equal(a, b) for a, b in zip(before, got[: len(before)], strict=True))
    assert changed >= 2, "a table and its state"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dim", "dtype"), CASES)
def test_one_table(backend: Any, form: str, dim: int, dtype: torch.dtype) -> None:
    arguments = one_table(form, inputs_of(backend, dim, dtype))
    check(backend, f"{form}_embedding_update_", arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dim", "dtype"), CASES)
def test_several_tables(backend: Any, form: str, dim: int, dtype: torch.dtype) -> None:
    """A wide table beside a narrow one."""
    every = [inputs_of(backend, d, dtype, seed) for seed, d in enumerate((dim, 24))]
    check(backend, f"{form}_embedding_bag_tables_update_", several_tables(form, every))
