"""Sums cut over lanes, programs and passes, and rows wider than a tile."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, Inputs, assert_agrees, build, cases, expected, in_order

from amtl_kernels.triton import implementations, launch, lookup, plan

OPERATORS = implementations()

HOT = Case(
    seed=3,
    rows=40,
    dim=17,
    lookups=120,
    groups=5,
    columns=3,
    sorted_groups=False,
    bags=9,
    weighted=True,
    padding="first",
)


def check(inputs: Inputs, forwards: bool = True) -> None:
    calls = [*inputs.backwards()]
    if forwards:
        calls += inputs.forwards()
    for op, arguments in calls:
        assert_agrees(OPERATORS[op](*arguments), expected(op, arguments), inputs.case, op)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as small as on a GPU or smaller, so that small inputs take many programs."""
    monkeypatch.setattr(launch, "INTERPRETED_TILE", 128)


@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [
        ("zipf", torch.float32),
        ("zipf", torch.bfloat16),
        ("one row", torch.float32),
        ("distinct", torch.float32),
    ],
)
def test_hot_rows_are_summed_in_two_passes(
    pattern: str,
    dtype: torch.dtype,
    small_tiles: None,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces of three lookups: rows of many pieces, blocks of one group, groups of many blocks."""
    monkeypatch.setattr(plan, "CHUNK", 3)
    case = dataclasses.replace(HOT, pattern=pattern, dtype=dtype, lookups=80)
    check(build(case, device), forwards=False)


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cases(40, 17), chunk=st.integers(1, 9))
def test_any_chunk_gives_the_reference(
    case: Case, chunk: int, small_tiles: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK", chunk)
    check(build(dataclasses.replace(case, rows=min(case.rows, 37)), device), forwards=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_wider_than_a_tile(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several column blocks per row, the last one partly empty."""
    monkeypatch.setattr(launch, "MAX_BLOCK_D", 16)
    monkeypatch.setattr(plan, "CHUNK", 3)
    for dim in (16, 17, 40):
        check(build(dataclasses.replace(HOT, dim=dim, dtype=dtype, lookups=20), device))


def test_long_bags_share_lanes(device: str) -> None:
    case = dataclasses.replace(HOT, lookups=300, bags=2, rows=37, dim=8)
    assert case.lookups // case.bags >= 64
    check(build(case, device))
    mean = build(dataclasses.replace(case, weighted=False, padding="none"), device)
    for padding in (-1, 3):
        offsets = torch.tensor([0, 256], device=device)
        given = mean.call("masked", True, offsets=offsets, pooling=1, padding_idx=[padding])
        arguments = in_order("lookup", given.lookup())
        got, want = OPERATORS["lookup"](*arguments), expected("lookup", arguments)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_tile_size_cannot_change_a_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the autotuner may choose between has equal results."""
    inputs = build(dataclasses.replace(HOT, weighted=False), device)
    inputs.weight.normal_()
    lookups = [inputs.call("masked", pooled).lookup() for pooled in (False, True)]
    calls = [("lookup", in_order("lookup", arguments)) for arguments in lookups]
    answers = []
    monkeypatch.setenv("AMTL_TRITON_AUTOTUNE", "0")
    spaces = (launch.WIDE_SPACE, launch.NARROW_SPACE)
    for i, tile in enumerate((32, 256, 4096)):
        monkeypatch.setattr(launch, "INTERPRETED_TILE", tile)
        for tuned, space in zip((lookup._gather, lookup._pooled), spaces, strict=True):
            monkeypatch.setattr(tuned, "space", space[i : i + 1])
        answers.append([OPERATORS[op](*arguments) for op, arguments in calls])
    for other in answers[1:]:
        for first, again in zip(answers[0], other, strict=True):
            assert torch.equal(first, again)


def test_float64_goes_to_the_reference(device: str) -> None:
    inputs = build(HOT, device, torch.float64)
    check(inputs)
