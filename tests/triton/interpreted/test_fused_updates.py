"""Fused updates: the reference's weights and states, in few launches and without a wait."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, RULES, Case, Inputs, build, draw_reals, in_order, states, wide
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference
from amtl_kernels.triton import implementations, launch, plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch_counts import count

OPERATORS = implementations()
HYPER = [0.1, 1e-3, 0.01, 0.9, 0.99, 3.0]
CASE = Case(
    seed=5,
    rows=40,
    dim=17,
    lookups=60,
    size_dtype=torch.uint8,
    groups=5,
    columns=3,
    sorted_groups=False,
    bags=9,
    weighted=True,
    padding="first",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def calls(
    inputs: Inputs, rule: str, state_dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Any]]:
    """Fresh arguments of every form of a fused update, by a name of the form."""
    found: dict[str, dict[str, Any]] = {}
    g, device = torch.Generator().manual_seed(0), inputs.weight.device
    for form, pooled in itertools.product(FORMS, (True, False)):
        call = inputs.call(form, pooled)
        state = states(
            rule,
            call.tables["blocks"],
            lambda shape: torch.rand(shape, generator=g).to(device, state_dtype),
        )
        masks = pooled and form == "adaptive"
        arguments = call.update(rule, HYPER, state, mask_grad=masks)
        found[f"{form} {'bag' if pooled else 'rows'}"] = arguments
    return found


def run(arguments: dict[str, Any]) -> list[Tensor]:
    """What an update changes and returns."""
    out = OPERATORS["lookup_update_"](*in_order("lookup_update_", arguments))
    return [*arguments["blocks"], *arguments["state"], *out]


def expected(arguments: dict[str, Any]) -> list[Tensor]:
    """The same of a reference that rounds nothing."""
    double = wide(arguments)
    with ak.use_backend("reference"):
        out = torch.ops.amtl.lookup_update_(*in_order("lookup_update_", double))
    return [*double["blocks"], *double["state"], *out]


def kept_values(form: str, inputs: Inputs, like: list[Tensor]) -> list[Tensor]:
    """True where a table's value may change: in a kept prefix of a row that is looked up."""
    rows = torch.zeros(inputs.case.rows, dtype=torch.bool, device=inputs.weight.device)
    looked_up = inputs.indices[inputs.indices != inputs.padding_idx]
    rows[looked_up.long()] = True
    if form.startswith("tiered"):
        starts = [0, *inputs.tier_ends[:-1]]
        parts = zip(starts, inputs.tier_ends, like, strict=True)
        return [rows[a:b, None].expand(b - a, t.shape[1]) for a, b, t in parts]
    every = torch.arange(inputs.case.rows, device=rows.device)
    sizes = inputs.row_dims.long()
    if form.startswith("adaptive"):
        dims, seed = inputs.group_dims, inputs.case.hash_seed
        sizes = reference._adaptive_sizes(every, inputs.row_group, dims, seed, inputs.case.dim)
    columns = torch.arange(inputs.case.dim, device=rows.device)
    return [rows[:, None] & (columns < sizes[:, None])]


def check(case: Case, rule: str, device: str, state_dtype: torch.dtype = torch.float32) -> None:
    # Gradients have no zeros: the reference ends a kept prefix at the last value that is none.
    inputs = build(case, device, values=draw_reals)
    for form, arguments in calls(inputs, rule, state_dtype).items():
        before = [t.clone() for t in arguments["blocks"]]
        want = expected(arguments)
        for a, b in zip(run(arguments), want, strict=True):
            tolerance = max(TOLERANCE[a.dtype], TOLERANCE[state_dtype])
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=form)
        kept = kept_values(form, inputs, before)
        for new, old, mine in zip(arguments["blocks"], before, kept, strict=True):
            assert torch.equal(new[~mine], old[~mine]), form


@pytest.fixture
def small_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of three lookups and small tiles: hot rows, groups over several programs."""
    monkeypatch.setattr(plan, "CHUNK", 3)
    monkeypatch.setattr(launch, "INTERPRETED_TILE", 256)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pattern", ["zipf", "one row"])
def test_hot_rows(rule: str, pattern: str, small_passes: None, device: str) -> None:
    check(dataclasses.replace(CASE, pattern=pattern), rule, device)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tables(rule: str, dtype: torch.dtype, device: str) -> None:
    """With state in float32 and in the table's own type; D = 40 and 20 take vectors of 8 and 4."""
    for dim, state in ((40, torch.float32), (20, torch.float32), (40, dtype)):
        case = dataclasses.replace(CASE, dtype=dtype, dim=dim, lookups=40, weighted=False)
        check(case, rule, device, state)


@pytest.mark.parametrize("rule", RULES)
def test_rows_wider_than_a_tile(
    rule: str, small_passes: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row-wise Adagrad sums gradients twice, in one program; the others share a row."""
    monkeypatch.setattr(launch, "MAX_BLOCK_D", 16)
    check(dataclasses.replace(CASE, dim=33, lookups=15, padding="none"), rule, device)


def test_means_that_leave_out_padding(device: str) -> None:
    mean = dataclasses.replace(CASE, mean=True, weighted=False, include_last_offset=True)
    check(mean, "adagrad", device)


def test_nothing_to_do(device: str) -> None:
    """No lookups, no bags, and lookups of the padding row only."""
    for change in ({"lookups": 0}, {"bags": 0}, {"rows": 1}):
        check(dataclasses.replace(CASE, **change), "adam", device)


def test_steps_repeat_bit_for_bit(small_passes: None, device: str) -> None:
    inputs = build(dataclasses.replace(CASE, lookups=30), device, values=draw_reals)
    both = (calls(inputs, "adam") for _ in range(2))
    for first, second in zip(*(mine.values() for mine in both), strict=True):
        for a, b in zip(run(first), run(second), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
@pytest.mark.parametrize("rule", RULES)
def test_launches_and_waits_of_an_update(
    rule: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait and nothing copied to the device: what a CUDA graph needs."""
    monkeypatch.setattr(plan, "CHUNK", 32)
    inputs = build(CASE, device)
    for form, arguments in calls(inputs, rule).items():
        found = count(OPERATORS["lookup_update_"], *in_order("lookup_update_", arguments))
        most = 7 + (2 if form.startswith("adaptive") and "bag" in form else 0) + ("bag" in form)
        assert not found.waits and not found.uploads, f"{form}: {found}"
        assert found.launches <= most, f"{form}: {found}"


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
def test_launches_and_waits_of_a_backward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait, for the number of distinct rows; none where no row gradient is asked for."""
    monkeypatch.setattr(plan, "CHUNK", 32)
    inputs = build(CASE, device)
    for op, arguments in inputs.backwards():
        found = count(OPERATORS[op], *arguments)
        flags = [a for a in arguments if isinstance(a, bool)]
        wants_rows = flags[1]
        assert len(found.waits) == int(wants_rows), f"{op}: {found}"
        assert found.launches <= 12, f"{op}: {found}"


def test_bad_state_is_refused(device: str) -> None:
    inputs = build(CASE, device)
    arguments = calls(inputs, "adagrad")["masked rows"]
    for state, message in (
        ([], "has 1 state tensors, and at most"),
        ([torch.zeros(3, device=device)], "must be contiguous and"),
        ([torch.zeros(CASE.dim, CASE.rows, device=device).t()], "must be contiguous and"),
    ):
        with pytest.raises(ValueError, match=message):
            run(arguments | {"state": state})
    with pytest.raises(ValueError, match="optimizer must be"):
        run(arguments | {"state": [], "optimizer": 4})
    assert torch.equal(arguments["blocks"][0], inputs.weight)
