"""Row-wise Adagrad fused into the backward of rows wider than a GPU's warp, against float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, Case, Inputs, build, draw_reals, in_order, join, states, wide
from test_lookup import limited
from torch import Tensor

import amtl_kernels

ROWS, BAGS = 60, 30
F32, BF16 = torch.float32, torch.bfloat16
# One, four and eight columns a thread; the last piece of a row full, and not.
CASES = [(129, F32), (129, BF16), (192, F32), (256, F32), (260, BF16), (1000, BF16), (1024, F32)]
HYPER = [0.1, 1e-3, 0.01, 0.0, 0.0, 1.0]


def inputs_of(backend: Any, dim: int, dtype: torch.dtype, seed: int) -> Inputs:
    """Lookups of which every tenth is of one row.

    No gradient is exactly zero, which is why weights are positive: two of a row in one bag could
    cancel, and the reference reads the kept prefix off the gradient.
    """
    case = Case(
        seed=seed, rows=ROWS, dtype=dtype, lookups=300, pattern="uniform", groups=9, weighted=True
    )
    case = replace(limited(backend, case), dim=dim, bags=BAGS, include_last_offset=True)
    inputs = build(case, backend.device, values=draw_reals)
    inputs.indices[::10] = 7
    assert inputs.per_sample_weights is not None
    inputs.per_sample_weights.abs_().add_(0.5)
    return inputs


def tiers_of(inputs: Inputs) -> list[Tensor]:
    """Blocks of the whole width, of half of it and of 8 columns."""
    dim, parts = inputs.case.dim, inputs.weight.split(20)
    widths = (dim, dim // 2, 8)
    return [part[:, :w].contiguous() for part, w in zip(parts, widths, strict=True)]


def fused_step(form: str, every: list[Inputs]) -> dict[str, Any]:
    """The arguments of a fused step on some tables, each with lookups and bags of its own."""
    call = join(form, every)
    call.bags["padding_idx"] = [3] * len(every)
    if form == "tiered":
        call.tables["blocks"] = [block for inputs in every for block in tiers_of(inputs)]
        call.tables["block_counts"] = [3] * len(every)
    ones = partial(torch.ones, device=every[0].weight.device)
    state = states("rowwise_adagrad", call.tables["blocks"], ones)
    return call.update("rowwise_adagrad", HYPER, state, psw_grad=False)


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value.cpu()]
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def check(backend: Any, arguments: tuple[Any, ...]) -> None:
    """Tables, their states and the mask gradient.

    The plain reference is no fused step: it rounds row gradients to the table's type on their way.
    """
    before = flat(arguments)
    mine, exact = copied(arguments), wide(copied(arguments))
    got = flat([mine, torch.ops.amtl.lookup_update_(*mine)])
    with amtl_kernels.use_backend("reference"):
        want = flat([exact, torch.ops.amtl.lookup_update_(*exact)])
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
@pytest.mark.parametrize("beside", [(), (24,)], ids=["one table", "beside a narrow one"])
def test_wide_rows(
    backend: Any, beside: tuple[int, ...], dim: int, dtype: torch.dtype, form: str
) -> None:
    every = [inputs_of(backend, d, dtype, seed) for seed, d in enumerate((dim, *beside), 1)]
    check(backend, in_order("lookup_update_", fused_step(form, every)))
