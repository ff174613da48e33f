"""Several tables: the reference's results, in launches and waits that do not grow with them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tables import BAGS, DIMS, FORMS, SHAPES, Call, make
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference_tables
from amtl_kernels.triton import implementations, launch, plan

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
    assert found.waits == ["tolist"], str(found)
    assert found.launches <= 14, str(found)
    _, arguments = call.update()
    found = count(OPERATORS[f"{op}_update_"], *arguments)
    assert (found.waits, found.uploads) == ([], []), str(found)
    assert found.launches <= 9, str(found)


def many(form: str, device: str) -> tuple[list[Any], list[Any], list[bool], int]:
    """Tables of which one has no rows, in the arguments of their operators.

    Returns what describes them, the lookups, the flags for other gradients, and all columns.
    """
    g = torch.Generator().manual_seed(9)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(device)

    rows = [7, 0, *range(3, 12)]
    dims = [(4, 12, 8)[t % 3] for t in range(len(rows))]
    lengths = draw(4, len(rows), BAGS)
    lengths[1] = 0
    offsets = torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)])
    parts = [draw(max(n, 1), int(mine.sum())) for n, mine in zip(rows, lengths, strict=True)]
    indices = torch.cat(parts)
    psw = torch.randn(indices.numel(), generator=g).to(device)
    padding = [(-1, -1, 1)[t % 3] for t in range(len(rows))]
    bags: list[Any] = [indices, offsets, psw, 0, padding]
    wants = [True]
    tables = zip(rows, dims, strict=True)
    if form == "tiered":
        shapes = [
            (n, w) for rows_, dim in tables for n, w in ((rows_ // 2, dim), (-(-rows_ // 2), 4))
        ]
        ends = [end for n in rows for end in (n // 2, n)]
        described: list[Any] = [shapes, [2] * len(rows), ends, dims]
    else:
        described = [list(tables)]
        if form == "masked":
            described.append([draw(d + 1, n, low=1).int() for n, d in described[0]])
        else:
            described.append([draw(3, n).int() for n in rows])
            described.append([draw(d + 1, 3, 1 + d // 4, low=1).int() for d in dims])
            bags.append(5)
            wants.append(True)
    described[0] = [torch.randn(*shape, generator=g).to(device) for shape in described[0]]
    return described, bags, wants, sum(dims)


@pytest.mark.parametrize("form", FORMS)
def test_more_tables_than_are_compared_at_once(
    form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven tables, or 22 tiers, are searched; hot rows and groups lie over several programs."""
    monkeypatch.setattr(plan, "CHUNK", 8)
    monkeypatch.setattr(launch, "INTERPRETED_TILE", 512)
    described, bags, wants, columns = many(form, device)
    grad = torch.randn(BAGS, columns, device=device)
    op = f"{form}_embedding_bag_tables"
    arguments = [grad, *described, *bags, True, *wants]
    with ak.use_backend("reference"):
        want = reference_tables.IMPLEMENTATIONS[f"{op}_backward"](*arguments)
    compare(OPERATORS[f"{op}_backward"](*arguments), want)
    for rule in (2, 3):
        results = []
        for operators in (OPERATORS, reference_tables.IMPLEMENTATIONS):
            weights = [w.clone() for w in described[0]]
            shapes = [w.shape[:1] if rule == 2 else w.shape for w in weights]
            state = [torch.full(s, 0.1, device=device) for s in shapes for _ in range(rule - 1)]
            step = (rule, [0.1, 1e-3, 0.0, 0.9, 0.99, 3.0])
            with ak.use_backend("reference"):
                more = operators[f"{op}_update_"](
                    weights, *described[1:], state, grad, *bags, *wants, *step
                )
            results.append([*weights, *state, *([more] if isinstance(more, Tensor) else more)])
        compare(*results)


def compare(got: Any, want: Any) -> None:
    """Tensors, or lists of them in lists."""
    if isinstance(got, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        return
    for a, b in zip(got, want, strict=True):
        compare(a, b)
