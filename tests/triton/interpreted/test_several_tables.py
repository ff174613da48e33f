"""Several tables: one launch looks all of them up, and the waits do not grow with their number."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tables import BAGS, DIMS, FORMS, SHAPES, Call, make

import amtl_kernels as ak
from amtl_kernels import reference_tables
from amtl_kernels.triton import implementations, launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch_counts import count

OPERATORS = implementations()
OFF, RAISE, CLAMP = 0, 1, 2


def uniform(form: str, device: str, **options: Any) -> Call:
    """Sizes of one type in all tables: what one launch asks for."""
    call = make(form, device, **options)
    call.group_dims = [dims.to(torch.int32) for dims in call.group_dims]
    return call


def forward(call: Call, bounds: int) -> tuple[str, list[Any]]:
    op, tables, masks, bags = call.operator()
    return op, [*tables, *masks, *bags, bounds]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(
    form: str, kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also rows wider than a tile; and no single-table lookup takes part."""
    mode = "mean" if kind == "mean" else "sum"
    call = uniform(form, device, dtype=dtype, mode=mode, weighted=kind == "weighted", extra=3)
    monkeypatch.setattr(reference_tables, f"{form}_embedding_bag_tables", None)
    for widest, bounds in ((launch.MAX_BLOCK_D, RAISE), (16, OFF)):
        monkeypatch.setattr(launch, "MAX_BLOCK_D", widest)
        op, arguments = forward(call, bounds)
        got = OPERATORS[op](*arguments)
        with ak.use_backend("reference"):
            want = getattr(torch.ops.amtl, op)(*arguments)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_indices_are_clamped_within_their_table(form: str, device: str) -> None:
    call = uniform(form, device)
    moved = call.indices.clone()
    for t, (rows, _) in enumerate(SHAPES):
        first = int(call.offsets[t * BAGS])
        call.indices[first], moved[first] = rows + 5, rows - 1
    op, arguments = forward(call, CLAMP)
    _, plain = forward(replace(call, indices=moved), OFF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Said once per process.
        got = OPERATORS[op](*arguments)
    assert torch.equal(got, OPERATORS[op](*plain))
    assert torch.equal(OPERATORS[op](*arguments), got)


def test_tables_of_no_rows_and_of_different_types(device: str) -> None:
    """A first table without memory; and sizes of different types, which take the long way."""
    empty, full = torch.empty(0, 8, device=device), torch.randn(5, 4, device=device)
    sizes = [torch.empty(0, device=device).int(), torch.tensor([1, 2, 3, 4, 4], device=device)]
    indices = torch.tensor([0, 4, 2], device=device)
    offsets = torch.tensor([0, 0, 0, 1, 3], device=device)
    for dtypes in ((torch.int32, torch.int32), (torch.int32, torch.uint8)):
        typed = [s.to(t) for s, t in zip(sizes, dtypes, strict=True)]
        arguments = ([empty, full], typed, indices, offsets, None, 0, [-1, -1], RAISE)
        got = OPERATORS["masked_embedding_bag_tables"](*arguments)
        want = torch.zeros(2, 12, device=device)
        want[0, 8:9] = full[0, :1]
        want[1, 8:] = full[4] + torch.where(torch.arange(4, device=device) < 3, full[2], 0.0)
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
@pytest.mark.parametrize("form", FORMS)
def test_launches_and_waits(form: str, device: str) -> None:
    call = uniform(form, device, weighted=True)
    op, arguments = forward(call, OFF)
    found = count(OPERATORS[op], *arguments)
    assert (found.launches, found.waits, found.uploads) == (1, [], []), str(found)
    op, arguments = forward(call, RAISE)
    found = count(OPERATORS[op], *arguments)
    assert (found.launches, found.waits) == (3, ["tolist"]), str(found)

    op, tables, masks, bags = call.operator()
    grad = torch.ones(BAGS, sum(DIMS if form == "tiered" else [dim for _, dim in SHAPES]))
    wants = [True] * (len(masks) + 1)
    found = count(OPERATORS[f"{op}_backward"], grad, *tables, *bags, True, *wants)
    assert found.waits == ["tolist", "tolist"], str(found)
    assert found.launches <= 13 * len(SHAPES) + 4, str(found)
    _, arguments = call.update()
    found = count(OPERATORS[f"{op}_update_"], *arguments)
    assert (found.waits, found.uploads) == (["tolist"], []), str(found)
    assert found.launches <= 12 * len(SHAPES) + 3, str(found)
