"""Fused updates: the reference's weights and states, in few launches and without a wait."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, Case, Inputs, build, in_order, wide
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference
from amtl_kernels.triton import implementations, launch, plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch_counts import count

OPERATORS = implementations()
RULES = {
    "sgd": reference.SGD,
    "adagrad": reference.ADAGRAD,
    "rowwise": reference.ROWWISE_ADAGRAD,
    "adam": reference.ADAM,
}
HYPER = [0.1, 1e-3, 0.01, 0.9, 0.99, 3.0]
CASE = Case(
    seed=5,
    rows=40,
    dim=17,
    lookups=60,
    pattern="zipf",
    dtype=torch.float32,
    index_dtype=torch.int64,
    size_dtype=torch.uint8,
    groups=5,
    columns=3,
    sorted_groups=False,
    bags=9,
    include_last_offset=False,
    mean=False,
    weighted=True,
    padding="first",
    tiers=3,
    hash_seed=11,
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def states_of(tables: list[Tensor], rule: int, dtype: torch.dtype) -> list[Tensor]:
    number = {reference.SGD: 0, reference.ADAM: 2}.get(rule, 1)
    g = torch.Generator().manual_seed(0)
    return [
        torch.rand(t.shape[:1] if rule == reference.ROWWISE_ADAGRAD else t.shape, generator=g).to(
            t.device, dtype
        )
        for t in tables
        for _ in range(number)
    ]


def calls(inputs: Inputs, rule: int, state_dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Fresh arguments of every form of a fused update, by a name of the form."""
    found: dict[str, dict[str, Any]] = {}
    for form, pooled in itertools.product(FORMS, (True, False)):
        arguments = inputs.call(form, pooled).update(rule)
        state = states_of(arguments["blocks"], rule, state_dtype)
        changes = {"state": state, "hyper": HYPER, "mask_grad": pooled and form == "adaptive"}
        found[f"{form} {'bag' if pooled else 'rows'}"] = arguments | changes
    return found


def run(arguments: dict[str, Any]) -> list[Tensor]:
    """What an update changes and returns."""
    out = OPERATORS["lookup_update_"](*in_order("lookup_update_", arguments))
    return [*arguments["blocks"], *arguments["state"], *out]


def expected(arguments: dict[str, Any]) -> list[Tensor]:
    """The same of a reference that rounds nothing."""
    double = {name: wide(value) for name, value in arguments.items()}
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


def draw(case: Case, device: str) -> Inputs:
    """Gradients without zeros: the reference ends a kept prefix at the last value that is none."""
    inputs = build(case, device)
    g = torch.Generator(device).manual_seed(1)
    inputs.grad_bags.normal_(generator=g)
    inputs.grad_flat.normal_(generator=g)
    if inputs.per_sample_weights is not None:
        inputs.per_sample_weights.normal_(generator=g)
    return inputs


def check(case: Case, rule: int, device: str, state_dtype: torch.dtype = torch.float32) -> None:
    inputs = draw(case, device)
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
    check(dataclasses.replace(CASE, pattern=pattern), RULES[rule], device)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tables(rule: str, dtype: torch.dtype, device: str) -> None:
    """With state in float32 and in the table's own type; D = 40 and 20 take vectors of 8 and 4."""
    for dim, state in ((40, torch.float32), (20, torch.float32), (40, dtype)):
        case = dataclasses.replace(CASE, dtype=dtype, dim=dim, lookups=40, weighted=False)
        check(case, RULES[rule], device, state)


@pytest.mark.parametrize("rule", RULES)
def test_rows_wider_than_a_tile(
    rule: str, small_passes: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row-wise Adagrad sums gradients twice, in one program; the others share a row."""
    monkeypatch.setattr(launch, "MAX_BLOCK_D", 16)
    check(dataclasses.replace(CASE, dim=33, lookups=15, padding="none"), RULES[rule], device)


def test_means_that_leave_out_padding(device: str) -> None:
    mean = dataclasses.replace(
        CASE, mean=True, weighted=False, include_last_offset=True, lookups=60, pattern="zipf"
    )
    check(mean, reference.ADAGRAD, device)


def test_nothing_to_do(device: str) -> None:
    """No lookups, no bags, and lookups of the padding row only."""
    for change in ({"lookups": 0}, {"bags": 0}, {"rows": 1}):
        check(dataclasses.replace(CASE, **change), reference.ADAM, device)


def test_steps_repeat_bit_for_bit(small_passes: None, device: str) -> None:
    inputs = draw(dataclasses.replace(CASE, lookups=30), device)
    both = (calls(inputs, reference.ADAM, torch.float32) for _ in range(2))
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
    for form, arguments in calls(inputs, RULES[rule], torch.float32).items():
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
    arguments = calls(inputs, reference.ADAGRAD, torch.float32)["masked rows"]
    for state, message in (
        ([], "1 state tensors per table"),
        ([torch.zeros(3, device=device)], "must be contiguous and"),
        ([torch.zeros(CASE.dim, CASE.rows, device=device).t()], "must be contiguous and"),
    ):
        with pytest.raises(ValueError, match=message):
            run(arguments | {"state": state})
    with pytest.raises(ValueError, match="optimizer must be"):
        run(arguments | {"state": [], "optimizer": 4})
    assert torch.equal(arguments["blocks"][0], inputs.weight)
