"""Several tables: the reference's results, in launches and waits that do not grow with them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import call as arguments_of
from kernel_cases import FORMS, in_order
from kernel_cases import Call as Arguments
from test_tables import BAGS, SHAPES, Call, make
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference
from amtl_kernels.triton import implementations, launch, operators, plan
from amtl_kernels.triton.lookup import pool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch_counts import count

OPERATORS, EXPECTED = implementations(), reference.IMPLEMENTATIONS
OFF, RAISE, CLAMP = 0, 1, 2


def uniform(form: str, device: str, **options: Any) -> Call:
    """Sizes of one type in all tables: what one launch asks for."""
    call = make(form, device, **options)
    call.group_dims = [dims.to(torch.int32) for dims in call.group_dims]
    return call


def lookup(call: Call, bounds: int) -> Tensor:
    out: Tensor = OPERATORS["lookup"](*in_order("lookup", call.operator().lookup(bounds)))
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(
    form: str, kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also rows wider than a tile; and no lookup in a single table takes part."""
    mode = "mean" if kind == "mean" else "sum"
    call = uniform(form, device, dtype=dtype, mode=mode, weighted=kind == "weighted", extra=3)
    monkeypatch.setattr(operators, "_one", None)
    for widest, bounds in ((launch.MAX_BLOCK_D, RAISE), (16, OFF)):
        monkeypatch.setattr(launch, "MAX_BLOCK_D", widest)
        got = lookup(call, bounds)
        want = EXPECTED["lookup"](*in_order("lookup", call.operator().lookup(bounds)))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_indices_are_clamped_within_their_table(form: str, device: str) -> None:
    call = uniform(form, device)
    moved = call.indices.clone()
    for t, (rows, _) in enumerate(SHAPES):
        first = int(call.offsets[t * BAGS])
        call.indices[first], moved[first] = rows + 5, rows - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Said once per process.
        got = lookup(call, CLAMP)
    assert torch.equal(got, lookup(replace(call, indices=moved), OFF))
    assert torch.equal(lookup(call, CLAMP), got)


def test_tables_of_no_rows_and_of_different_types(device: str) -> None:
    """A first table without memory; and sizes of different types, which take the long way."""
    empty, full = torch.empty(0, 8, device=device), torch.randn(5, 4, device=device)
    sizes = [torch.empty(0, device=device).int(), torch.tensor([1, 2, 3, 4, 4], device=device)]
    indices = torch.tensor([0, 4, 2], device=device)
    offsets = torch.tensor([0, 0, 0, 1, 3], device=device)
    for dtypes in ((torch.int32, torch.int32), (torch.int32, torch.uint8)):
        typed = [s.to(t) for s, t in zip(sizes, dtypes, strict=True)]
        both = arguments_of(
            [empty, full],
            indices,
            sizes=typed,
            offsets=offsets,
            padding_idx=[-1, -1],
            include_last_offset=True,
        )
        got = OPERATORS["lookup"](*in_order("lookup", both.lookup()))
        want = torch.zeros(2, 12, device=device)
        want[0, 8:9] = full[0, :1]
        want[1, 8:] = full[4] + torch.where(torch.arange(4, device=device) < 3, full[2], 0.0)
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
@pytest.mark.parametrize("form", FORMS)
def test_launches_and_waits(form: str, device: str) -> None:
    call = uniform(form, device, weighted=True).operator()
    found = count(OPERATORS["lookup"], *in_order("lookup", call.lookup(OFF)))
    assert (found.launches, found.waits, found.uploads) == (1, [], []), str(found)
    found = count(OPERATORS["lookup"], *in_order("lookup", call.lookup(RAISE)))
    assert (found.launches, found.waits) == (4, []), str(found)
    found = count(OPERATORS["lookup_backward"], *in_order("lookup_backward", call.backward()))
    assert found.waits == ["tolist"], str(found)
    assert found.launches <= 14, str(found)
    found = count(OPERATORS["lookup_update_"], *in_order("lookup_update_", call.update(2)))
    assert (found.waits, found.uploads) == ([], []), str(found)
    assert found.launches <= 9, str(found)


def many(form: str, device: str) -> Arguments:
    """Tables of which one has no rows."""
    g = torch.Generator().manual_seed(9)

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=g).to(device)

    rows = [7, 0, *range(3, 12)]
    dims = [(4, 12, 8)[t % 3] for t in range(len(rows))]
    lengths = draw(4, len(rows), BAGS)
    lengths[1] = 0
    parts = [draw(max(n, 1), int(mine.sum())) for n, mine in zip(rows, lengths, strict=True)]
    indices = torch.cat(parts)
    shapes = list(zip(rows, dims, strict=True))
    described: dict[str, Any] = {}
    if form == "tiered":
        shapes = [(n, w) for m, dim in shapes for n, w in ((m // 2, dim), (-(-m // 2), 4))]
        described = {"block_counts": [2] * len(rows), "dims": dims}
    elif form == "masked":
        described["sizes"] = [draw(d + 1, n, low=1).int() for n, d in shapes]
    else:
        described["row_groups"] = [draw(3, n).int() for n in rows]
        described["sizes"] = [draw(d + 1, 3, 1 + d // 4, low=1).int() for d in dims]
        described["seed"] = 5
    return arguments_of(
        [torch.randn(*shape, generator=g).to(device) for shape in shapes],
        indices,
        torch.randn(BAGS, sum(dims), generator=g).to(device),
        offsets=torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)]),
        per_sample_weights=torch.randn(indices.numel(), generator=g).to(device),
        padding_idx=[(-1, -1, 1)[t % 3] for t in range(len(rows))],
        include_last_offset=True,
        **described,
    )


def compare_with_reference(call: Arguments) -> None:
    """Backward, and a step of each of two optimizers."""
    arguments = in_order("lookup_backward", call.backward())
    compare(OPERATORS["lookup_backward"](*arguments), EXPECTED["lookup_backward"](*arguments))
    for rule in (2, 3):
        results = []
        for operators_ in (OPERATORS, EXPECTED):
            step = call.update(rule)
            with ak.use_backend("reference"):
                more = operators_["lookup_update_"](*in_order("lookup_update_", step))
            results.append([*step["blocks"], *step["state"], *more])
        compare(*results)


@pytest.mark.parametrize("form", FORMS)
def test_more_tables_than_are_compared_at_once(
    form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eleven tables, or 22 tiers, are searched; hot rows and groups lie over several programs."""
    monkeypatch.setattr(plan, "CHUNK", 8)
    monkeypatch.setattr(launch, "INTERPRETED_TILE", 512)
    compare_with_reference(many(form, device))


@pytest.mark.parametrize("form", FORMS)
def test_tables_that_no_pointer_reaches_have_launches_of_their_own(
    form: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables at fractions of an element from each other, if there were any."""
    monkeypatch.setattr(operators, "_are_whole_apart", lambda tensors: len(tensors) < 2)
    monkeypatch.setattr(operators._Call, "together", None)
    call = uniform(form, device, weighted=True, extra=3).operator()
    arguments = in_order("lookup", call.lookup())
    compare(OPERATORS["lookup"](*arguments), EXPECTED["lookup"](*arguments))
    compare_with_reference(call)


def test_a_table_without_rows_is_not_read(device: str) -> None:
    """An index is clamped to its last row, which there is none of."""
    memory = torch.full((48,), 7.0, device=device)
    blocks = [memory[8:].view(5, 8), torch.empty(0, 8, device=device)]
    indices, offsets = torch.tensor([1, 0], device=device), torch.tensor([0, 1, 2], device=device)
    call = operators._Call(blocks, [1, 1], [], [], [], 0, indices, offsets, None, 0, [-1, -1], True)
    out = torch.empty(1, 16, device=device)
    pool(*call.together(out), clamp=True)
    assert out.tolist() == [[7.0] * 8 + [0.0] * 8]


def compare(got: Any, want: Any) -> None:
    """Tensors, or lists of them in lists."""
    if isinstance(got, Tensor):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        return
    for a, b in zip(got, want, strict=True):
        compare(a, b)


def test_a_width_that_a_table_does_not_have(device: str) -> None:
    """Else kernels would write past their output."""
    call = uniform("masked", device).operator()
    call.tables["dims"] = [7, 64, 1, 40]
    with pytest.raises(ValueError, match="table 3: embedding_dim is 40, the table has 33 columns"):
        OPERATORS["lookup"](*in_order("lookup", call.lookup()))
