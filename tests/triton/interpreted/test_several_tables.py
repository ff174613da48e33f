"""Several tables: the reference's results, in launches and waits that do not grow with them."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, Call, Case, build, call, draw_reals, in_order, join
from test_tables import BAGS, ROWS, make
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference
from amtl_kernels._arguments import Bags, Tables
from amtl_kernels.triton import implementations, launch, operators, plan
from amtl_kernels.triton.lookup import pool

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch_counts import count

OPERATORS, EXPECTED = implementations(), reference.IMPLEMENTATIONS
OFF, RAISE, CLAMP = 0, 1, 2


def uniform(form: str, device: str, **options: Any) -> Call:
    """Sizes of one type in all tables: what one launch asks for."""
    return make(form, device, size_dtype=torch.int32, **options)


def lookup(of: Call, bounds: int) -> Tensor:
    out: Tensor = OPERATORS["lookup"](*in_order("lookup", of.lookup(bounds)))
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_the_reference(
    form: str, kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also rows wider than a tile; and no lookup in a single table takes part."""
    of = uniform(form, device, dtype=dtype, mean=kind == "mean", weighted=kind == "weighted")
    monkeypatch.setattr(operators, "_one", None)
    for widest, bounds in ((launch.MAX_BLOCK_D, RAISE), (16, OFF)):
        monkeypatch.setattr(launch, "MAX_BLOCK_D", widest)
        got = lookup(of, bounds)
        want = EXPECTED["lookup"](*in_order("lookup", of.lookup(bounds)))
        tolerance = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_indices_are_clamped_within_their_table(form: str, device: str) -> None:
    of = uniform(form, device)
    indices = of.bags["indices"]
    moved = indices.clone()
    for t, rows in enumerate(ROWS):
        first = int(of.bags["offsets"][t * BAGS])
        indices[first], moved[first] = rows + 5, rows - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Said once per process.
        got = lookup(of, CLAMP)
    assert torch.equal(got, lookup(replace(of, bags={**of.bags, "indices": moved}), OFF))
    assert torch.equal(lookup(of, CLAMP), got)


def test_tables_of_no_rows_and_of_different_types(device: str) -> None:
    """A first table without memory; and sizes of different types, which take the long way."""
    empty, full = torch.empty(0, 8, device=device), torch.randn(5, 4, device=device)
    sizes = [torch.empty(0, device=device).int(), torch.tensor([1, 2, 3, 4, 4], device=device)]
    indices = torch.tensor([0, 4, 2], device=device)
    offsets = torch.tensor([0, 0, 0, 1, 3], device=device)
    for dtypes in ((torch.int32, torch.int32), (torch.int32, torch.uint8)):
        typed = [s.to(t) for s, t in zip(sizes, dtypes, strict=True)]
        both = call([empty, full], indices, sizes=typed, offsets=offsets)
        got = OPERATORS["lookup"](*in_order("lookup", both.lookup()))
        want = torch.zeros(2, 12, device=device)
        want[0, 8:9] = full[0, :1]
        want[1, 8:] = full[4] + torch.where(torch.arange(4, device=device) < 3, full[2], 0.0)
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
@pytest.mark.parametrize("form", FORMS)
def test_launches_and_waits(form: str, device: str) -> None:
    of = uniform(form, device, weighted=True)
    found = count(OPERATORS["lookup"], *in_order("lookup", of.lookup(OFF)))
    assert (found.launches, found.waits, found.uploads) == (1, [], []), str(found)
    found = count(OPERATORS["lookup"], *in_order("lookup", of.lookup(RAISE)))
    assert (found.launches, found.waits) == (4, []), str(found)
    found = count(OPERATORS["lookup_backward"], *in_order("lookup_backward", of.backward()))
    assert found.waits == ["tolist"], str(found)
    assert found.launches <= 14, str(found)
    found = count(
        OPERATORS["lookup_update_"], *in_order("lookup_update_", of.update("rowwise_adagrad"))
    )
    assert (found.waits, found.uploads) == ([], []), str(found)
    assert found.launches <= 9, str(found)


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_few_bits_share_a_launch_where_they_are_as_many(dtype: torch.dtype, device: str) -> None:
    tables: dict[str, Any] = {
        "blocks": [torch.zeros(5, 8, dtype=dtype, device=device) for _ in range(6)],
        "block_counts": [2, 2, 2],
        "steps": [torch.ones(2, device=device)] * 3,
    }
    where = {"dtype": torch.int64, "device": device}
    bags = {"indices": torch.zeros(12, **where), "offsets": torch.arange(0, 13, 2, **where)}
    found = {}
    for bits in ([4, 4, 4], [4, 8, 4]):
        of = call(**tables, bits=bits, **bags, padding_idx=[-1] * 3)
        found[bits[1]] = count(OPERATORS["lookup"], *in_order("lookup", of.lookup(OFF)))
    # Beside it, step sizes are put side by side.
    assert found[4].kernels == ["pooled_fwd_kernel"]
    assert (found[4].launches, found[4].waits, found[4].uploads) == (2, [], []), str(found[4])
    assert found[8].kernels == ["pooled_fwd_kernel"] * 3


def many(form: str, device: str) -> Call:
    """Tables of which one has no rows."""
    tables = [
        Case(
            seed=9 + t,
            rows=rows,
            dim=(4, 12, 8)[t % 3],
            lookups=14 if rows else 0,
            groups=3,
            columns=1 + t % 3,
            sorted_groups=False,
            bags=BAGS + 1,
            include_last_offset=True,
            weighted=True,
            padding=("none", "none", "last")[t % 3],
            tiers=2,
        )
        for t, rows in enumerate([7, 0, *range(3, 12)])
    ]
    return join(form, [build(case, device, values=draw_reals) for case in tables])


def compare_with_reference(of: Call) -> None:
    """Backward, and a step of each of two optimizers."""
    arguments = in_order("lookup_backward", of.backward())
    compare(OPERATORS["lookup_backward"](*arguments), EXPECTED["lookup_backward"](*arguments))
    for rule in ("rowwise_adagrad", "adam"):
        results = []
        for operators_ in (OPERATORS, EXPECTED):
            step = of.update(rule)
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
    of = uniform(form, device, weighted=True)
    arguments = in_order("lookup", of.lookup())
    compare(OPERATORS["lookup"](*arguments), EXPECTED["lookup"](*arguments))
    compare_with_reference(of)


def test_a_table_without_rows_is_not_read(device: str) -> None:
    """An index is clamped to its last row, which there is none of."""
    memory = torch.full((48,), 7.0, device=device)
    blocks = [memory[8:].view(5, 8), torch.empty(0, 8, device=device)]
    indices, offsets = torch.tensor([1, 0], device=device), torch.tensor([0, 1, 2], device=device)
    bags = Bags(indices, offsets, None, 0, [-1, -1], True)
    call = operators._Call(Tables(blocks, [1, 1]), bags)
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
    of = uniform("masked", device)
    of.tables["dims"] = [7, 64, 1, 41]
    with pytest.raises(ValueError, match="table 3: embedding_dim is 41, the table has 40 columns"):
        lookup(of, RAISE)
