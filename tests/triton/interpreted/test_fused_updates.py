"""Fused updates: the reference's weights and states, in few launches and without a wait."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Case, Inputs, build
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


def calls(inputs: Inputs, rule: int, state_dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Fresh arguments of every form of a fused update, by a name of the form."""
    c, psw = inputs.case, inputs.per_sample_weights
    weight, blocks = inputs.weight.clone(), [b.clone() for b in inputs.blocks]
    state, tiers = (states_of(t, rule, state_dtype) for t in ([weight], blocks))
    groups = (inputs.row_group, inputs.group_dims)
    end = (rule, HYPER)
    found: dict[str, tuple[Any, ...]] = {}
    for name, grad, offsets, weights, bags in (
        (
            "bag",
            inputs.grad_bags,
            inputs.offsets,
            psw,
            (int(c.mean), inputs.padding_idx, inputs.include_last_offset),
        ),
        ("rows", inputs.grad_flat, None, None, (0, inputs.padding_idx, False)),
    ):
        i, wants = inputs.indices, weights is not None
        found[f"masked_embedding_update_ {name}"] = (
            *(weight, state, grad, i, offsets, inputs.row_dims, weights, *bags, wants),
            *end,
        )
        found[f"adaptive_embedding_update_ {name}"] = (
            *(weight, state, grad, i, offsets, *groups, weights, *bags, c.hash_seed),
            *(name == "bag", wants, *end),
        )
        found[f"tiered_embedding_update_ {name}"] = (
            *(blocks, tiers, grad, inputs.tier_ends, i, offsets, weights, c.dim, *bags, wants),
            *end,
        )
    return found


def as_list(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in as_list(part)]


def wide(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A copy in float64, for a reference that rounds nothing."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        return [one(v) for v in value] if isinstance(value, list) else value

    return tuple(one(a) for a in arguments)


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
    for form in calls(inputs, rule, state_dtype):
        arguments = calls(inputs, rule, state_dtype)[form]
        before = [t.clone() for t in as_list(arguments[0])]
        double = wide(arguments)
        op = form.split()[0]
        got = OPERATORS[op](*arguments)
        with ak.use_backend("reference"):
            want = reference.IMPLEMENTATIONS[op](*double)
        for a, b in zip(
            [*as_list(arguments[0]), *as_list(arguments[1]), *as_list(got)],
            [*as_list(double[0]), *as_list(double[1]), *as_list(want)],
            strict=True,
        ):
            tolerance = max(TOLERANCE[a.dtype], TOLERANCE[state_dtype])
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, msg=form)
        tables = as_list(arguments[0])
        for new, old, kept in zip(tables, before, kept_values(form, inputs, before), strict=True):
            assert torch.equal(new[~kept], old[~kept]), form


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
    for form in calls(inputs, reference.ADAM, torch.float32):
        results = []
        for _ in range(2):
            arguments = calls(inputs, reference.ADAM, torch.float32)[form]
            out = OPERATORS[form.split()[0]](*arguments)
            results.append([*as_list(arguments[0]), *as_list(arguments[1]), *as_list(out)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), form


@pytest.mark.skipif(not launch.INTERPRETED, reason="counted on CPU tensors")
@pytest.mark.parametrize("rule", RULES)
def test_launches_and_waits_of_an_update(
    rule: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No wait and nothing copied to the device: what a CUDA graph needs."""
    monkeypatch.setattr(plan, "CHUNK", 32)
    inputs = build(CASE, device)
    for form, arguments in calls(inputs, RULES[rule], torch.float32).items():
        found = count(OPERATORS[form.split()[0]], *arguments)
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
    form = "masked_embedding_update_ rows"
    weight, _, *rest = calls(inputs, reference.ADAGRAD, torch.float32)[form]
    for state, message in (
        ([], "1 state tensors per table"),
        ([torch.zeros(3, device=device)], "must be contiguous and"),
        ([torch.zeros(CASE.dim, CASE.rows, device=device).t()], "must be contiguous and"),
    ):
        with pytest.raises(ValueError, match=message):
            OPERATORS["masked_embedding_update_"](weight, state, *rest)
    with pytest.raises(ValueError, match="optimizer must be"):
        OPERATORS["masked_embedding_update_"](weight, [], *rest[:-2], 4, HYPER)
    assert torch.equal(weight, inputs.weight)
