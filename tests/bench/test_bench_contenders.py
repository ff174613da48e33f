"""Every contender runs and computes its equations at a tiny size, or says why it can't."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from bench.contenders import CONTENDERS
from bench.inputs import Case, make_problem
from bench.oracle import MismatchError, Outcome, compare, expected
from bench.traffic import Optimizer, Work

WORK: list[tuple[Work, Optimizer]] = [
    ("forward", "none"),
    ("backward", "none"),
    ("step", "sgd"),
    ("step", "adagrad"),
    ("step", "rowwise_adagrad"),
    ("step", "adam"),
]
SLOW = {"compiled"}
PRODUCT = (
    {
        f"amtl_{form}_{state}"
        for form in ("bag", "bag_bare", "layers", "collection")
        for state in ("search", "frozen", "ordinal")
    }
    | {f"amtl_{form}_fourth" for form in ("bag", "layers")}
    | {"amtl_layers_paper", "amtl_collection_paper", "amtl_collection_free"}
    | {f"amtl_bag_int{bits}_frozen" for bits in (8, 4, 2)}
)


def tiny(work: Work, optimizer: Optimizer, **options: object) -> Case:
    case = Case(
        work, 300, ("x",), (), optimizer=optimizer, bags=32, bag_size=5, dim=16,
        distribution="zipf", threads=1,
    )  # fmt: skip
    return dataclasses.replace(case, **options)  # type: ignore[arg-type]


@pytest.mark.every(4)
@pytest.mark.parametrize(("work", "optimizer"), WORK)
@pytest.mark.parametrize("name", sorted(set(CONTENDERS) - SLOW))
@pytest.mark.parametrize("layout", ["one table", "three tables", "three fields", "not pooled"])
def test_contender(name: str, work: Work, optimizer: Optimizer, layout: str) -> None:
    check(name, work, optimizer, layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SLOW))
@pytest.mark.parametrize("optimizer", ["adagrad", "rowwise_adagrad"])
def test_slow_contender(name: str, optimizer: Optimizer) -> None:
    check(name, "step", optimizer, "one table")


def check(name: str, work: Work, optimizer: Optimizer, layout: str) -> None:
    contender = CONTENDERS[name]
    options: dict[str, object] = {}
    if layout == "three tables":
        options["tables"] = 3
    if layout == "three fields":
        options.update(tables=3, bag_size=1)
    if layout == "not pooled":
        options.update(pooled=False, bag_size=1)
    case = tiny(work, optimizer, **options)
    if contender.absent():
        assert contender.install, f"{name} is absent without saying how to get it"
        return
    if contender.refuses(case):
        return
    problem = make_problem(case)
    before = problem.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = contender.prepare(problem)
        outcome = session.outcome(0)
        compare(
            name,
            outcome,
            expected(problem, 0, contender.equations),
            case.torch_dtype,
            tolerance=contender.tolerance,
        )
        assert torch.equal(problem.weight, before), "outcome() left the weights changed"
        session.call(1)
        session.call(2)
    of_its_own = "frozen" in name or name == "torchrec_fused"
    if work == "step" and not of_its_own:
        assert not torch.equal(problem.weight, before), "a timed step changes the table"


def test_ours_are_compared_in_every_kind_of_work() -> None:
    ours = [contender for contender in CONTENDERS.values() if contender.ours]
    assert {contender.name for contender in ours} >= {"amtl_search", "amtl_frozen"}
    for work, optimizer in WORK:
        for contender in ours:
            assert contender.absent() == ""
            if contender.name in PRODUCT:
                continue
            fused = contender.name.endswith("_fused")
            tables = 2 if "tables" in contender.name else 1
            refused = bool(contender.refuses(tiny(work, optimizer, tables=tables)))
            served_only = contender.row_bits > 0
            assert refused == (work != "forward" if served_only else fused and work != "step")


def test_layers_and_collections_are_compared_where_they_make_sense() -> None:
    answered = {
        (name, work)
        for name in PRODUCT
        for work, optimizer in WORK
        for shape in ({}, {"tables": 3, "bag_size": 1})
        if not CONTENDERS[name].refuses(tiny(work, optimizer, **shape))
    }
    assert answered == {(name, work) for name in PRODUCT for work in ("forward", "step")}


def outcome_of(values: torch.Tensor) -> Outcome:
    return Outcome(values)


def test_compare_sees_one_wrong_row_among_many() -> None:
    want = Outcome(torch.randn(100_000, 8, dtype=torch.float64))
    got = Outcome(want.output.float().clone())
    assert compare("x", got, want, torch.float32) < 1e-6
    got.output[77, 3] += 0.02
    with pytest.raises(MismatchError, match="x: output is off"):
        compare("x", got, want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compare_rejects_nan_missing_parts_and_shapes(dtype: torch.dtype) -> None:
    want = Outcome(torch.ones(10, 4, dtype=torch.float64), update=torch.ones(3, 4))
    good = Outcome(torch.ones(10, 4), update=torch.ones(3, 4))
    assert compare("x", good, want, dtype) == 0
    nan = Outcome(torch.ones(10, 4), update=torch.full((3, 4), float("nan")))
    with pytest.raises(MismatchError, match="update is off"):
        compare("x", nan, want, dtype)
    with pytest.raises(MismatchError, match="no update"):
        compare("x", Outcome(torch.ones(10, 4)), want, dtype)
    with pytest.raises(MismatchError, match="not \\(10, 4\\)"):
        compare("x", Outcome(torch.ones(10, 3)), want, dtype)
