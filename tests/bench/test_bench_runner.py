from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable

import pytest
import torch

from bench import binding, machine
from bench.contenders.base import AutogradSession, Contender, Session
from bench.contenders.torch_eager import Bag
from bench.inputs import ROTATIONS, Case, Problem
from bench.oracle import Equations, MismatchError
from bench.plan import Budget
from bench.runner import Runner, interleave

CASE = Case("forward", 200, ("good", "bad"), ("good",), bags=16, bag_size=3, dim=8, threads=1)
SHORT = Budget(0.01, minimal_rounds=4, maximal_rounds=6)


class Good(Bag):
    name = "good"


class Wrong(Contender):
    """Forgets the last lookup of every bag."""

    name = "bad"
    title = "wrong"
    equations = Equations("all")

    def prepare(self, problem: Problem) -> Session:
        def lookup(rotation: int) -> torch.Tensor:
            rows = problem.weight[problem.ids[rotation]].view(-1, 3, 8)
            return rows[:, :2].sum(1)

        return AutogradSession(problem, lookup, [])


class Absent(Bag):
    name = "absent"
    install = "pip install nothing"

    def absent(self) -> str:
        return "not installed"


class Probe(machine.ThreadProbe):
    def __init__(self, *speedups: float) -> None:
        self._speedups = itertools.chain(speedups, itertools.repeat(speedups[-1]))

    def speedup(self, threads: int) -> float:
        return next(self._speedups)


def runner(*contenders: Contender, probe: machine.ThreadProbe | None = None) -> Runner:
    named = {contender.name: contender for contender in contenders}
    return Runner(budget=SHORT, probe=probe, contenders=named)


def test_ours_must_be_right_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []
    monkeypatch.setattr("bench.runner.interleave", lambda *a, **k: timed.append(1))
    wrong = Wrong()
    wrong.ours = True
    with pytest.raises(MismatchError, match="bad: output is off"):
        runner(Good(), wrong).run(CASE)
    assert timed == []


def test_a_wrong_peer_is_named_and_not_timed() -> None:
    result = runner(Good(), Wrong()).run(CASE)
    assert set(result.timings) == {"good"}
    assert "its result is wrong here: bad: output is off" in result.left_out["bad"]


def test_an_absent_contender_is_reported_with_its_install_command() -> None:
    case = dataclasses.replace(CASE, contenders=("good", "absent"))
    the_runner = runner(Good(), Absent())
    result = the_runner.run(case)
    assert set(result.timings) == {"good"}
    assert result.left_out == {"absent": "not installed; pip install nothing"}
    assert the_runner.absent() == result.left_out


def test_a_run_whose_second_thread_does_not_help_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(binding, "allowed_cpus", lambda: [0, 1])
    case = dataclasses.replace(CASE, contenders=("good",), threads=2)
    busy = runner(Good(), probe=Probe(1.9, 1.02))
    busy.attempts = 1
    assert "1.02 times as fast" in busy.run(case).rejected
    quiet_at_last = runner(Good(), probe=Probe(1.0, 1.9, 1.9, 1.9))
    result = quiet_at_last.run(case)
    assert result.rejected == ""
    assert result.thread_speedup == [1.9, 1.9]
    torch.set_num_threads(1)


def test_more_threads_than_cores_leaves_everybody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "allowed_cpus", lambda: [0])
    result = runner(Good()).run(dataclasses.replace(CASE, contenders=("good",), threads=2))
    reason = "the case is for 2 threads, this machine has 1 core(s)"
    assert (result.timings, result.left_out, result.rejected) == ({}, {"good": reason}, "")


def test_one_thread_needs_no_second_core() -> None:
    alone = dataclasses.replace(CASE, contenders=("good",))
    assert runner(Good(), probe=Probe(1.0)).run(alone).rejected == ""


def test_results_state_bytes_sizes_and_the_share_of_the_ceiling() -> None:
    the_runner = runner(Good())
    the_runner.ceilings = {"1": {"copy": 1e9, "rows": 2e8}}
    case = dataclasses.replace(CASE, contenders=("good",))
    timing = the_runner.run(case).timings["good"]
    assert timing.useful_bytes == 4 * 48 * 8 + 4 * 16 * 8 + 8 * 48
    seconds = timing.summary.median
    assert timing.share == pytest.approx(timing.useful_bytes / seconds / 1e9)
    # Rows at their own rate where ids are uniform, at the copy's where hot ones stay in a cache.
    assert timing.facts["row_bytes"] == 4 * 48 * 8
    least = 4 * 48 * 8 / 2e8 + (4 * 16 * 8 + 8 * 48) / 1e9
    assert timing.facts["ceiling_share"] == pytest.approx(least / seconds, rel=1e-3)
    skewed = the_runner.run(dataclasses.replace(case, distribution="zipf")).timings["good"]
    assert skewed.facts["ceiling_share"] == pytest.approx(skewed.share, rel=1e-3)
    assert timing.facts["kept_over_lookups"] == 1.0
    assert timing.lookups == 48
    assert "floor_bytes" not in timing.facts


def test_lines_have_a_ceiling_of_their_own() -> None:
    the_runner = runner(Good())
    the_runner.ceilings = {"1": {"copy": 1e9, "rows": 2e8, "lines": 1e8}}
    the_runner.cache_bytes, the_runner.sector = 1 << 20, 64
    timing = the_runner.run(dataclasses.replace(CASE, contenders=("good",))).timings["good"]
    streams = 4 * 16 * 8 + 8 * 48
    # Two rows share a line; the cache keeps them.
    assert timing.facts["stream_bytes"] == streams
    lines = timing.facts["line_bytes"]
    assert 32 * timing.facts["distinct_rows"] <= lines <= 64 * timing.facts["distinct_rows"]
    places = timing.facts["places"]
    assert 0 < places <= timing.facts["distinct_rows"]
    further = (256 / 2e8 - 64 / 1e8) / 3
    least = streams / 1e9 + places * 64 / 1e8 + (lines / 64 - places) * further
    assert timing.facts["place_share"] == pytest.approx(least / timing.summary.median, rel=1e-3)
    assert "floor_bytes" not in timing.facts


def test_of_a_gpu_results_state_both_rooflines() -> None:
    the_runner = runner(Good())
    the_runner.cache_bytes = 1 << 20
    case = dataclasses.replace(CASE, contenders=("good",))
    facts = the_runner.run(case).timings["good"].facts
    # A row is a sector; each distinct one passes the cache once.
    assert facts["floor_bytes"] == 32 * facts["distinct_rows"] + 4 * 16 * 8 + 8 * 48
    assert facts["bytes_per_lookup"] == round((4 * 48 * 8 + 4 * 16 * 8 + 8 * 48) / 48, 1)
    assert "floor_share" not in facts and "ceiling_share" not in facts
    the_runner.ceilings = {"1": {"copy": 1e9}}
    timing = the_runner.run(case).timings["good"]
    copied = timing.summary.median * 1e9
    assert timing.facts["floor_share"] == pytest.approx(facts["floor_bytes"] / copied)
    # Of the next case it is another one.
    twice = dataclasses.replace(case, bags=32)
    assert the_runner.run(twice).timings["good"].facts["floor_bytes"] > facts["floor_bytes"]


def test_calls_interleave_and_rotate() -> None:
    log: list[tuple[str, int]] = []

    def call(name: str) -> Callable[[int], object]:
        return lambda rotation: log.append((name, rotation))

    def timer(run: Callable[[], None]) -> float:
        run()
        return 1e-3

    samples = interleave(
        {"a": call("a"), "b": call("b")},
        11,
        budget=Budget(0, minimal_rounds=5, maximal_rounds=5, shortest_sample=0, warm_calls=2),
        timer=timer,
    )
    assert {name: len(values) for name, values in samples.items()} == {"a": 5, "b": 5}
    # Two untimed calls lead each turn, two are timed.
    assert [name for name, _ in log[-24:]] == list("aaaabbbbbbbbaaaaaaaabbbb")
    sets = [rotation for _, rotation in log]
    assert sets == [i % 11 for i in range(len(sets))]


def test_samples_are_of_whole_periods() -> None:
    """Or a median would leave out what is done once in several calls."""
    made = {"a": 0, "b": 0}
    counted: list[tuple[int, int]] = []

    def call(name: str) -> Callable[[int], object]:
        def counting(rotation: int) -> None:
            made[name] += 1

        return counting

    def timer(run: Callable[[], None]) -> float:
        before = dict(made)
        run()
        counted.append((made["a"] - before["a"], made["b"] - before["b"]))
        return 1e-3

    budget = Budget(0, minimal_rounds=4, maximal_rounds=4, warm_calls=1, shortest_sample=0)
    calls = {"a": call("a"), "b": call("b")}
    samples = interleave(calls, 11, budget=budget, timer=timer, periods={"b": 4})
    # Behind the estimates, a sample of each a round.
    assert set(counted[-8:]) == {(1, 0), (0, 4)}
    assert samples["b"] == [1e-3 / 4] * 4


@pytest.mark.parametrize("contenders", range(1, 15))
def test_every_contender_meets_every_set(contenders: int) -> None:
    assert ROTATIONS >= 11
    met: dict[int, set[int]] = {name: set() for name in range(contenders)}
    # As many rounds as there are sets in either order, and the two calls of the slowest.
    interleave(
        {str(name): met[name].add for name in met},
        ROTATIONS,
        budget=Budget(0, 2 * ROTATIONS, 2 * ROTATIONS, shortest_sample=0, warm_calls=1),
        timer=lambda run: (run(), 1.0)[1],
    )
    assert all(sets == set(range(ROTATIONS)) for sets in met.values())


def test_every_round_begins_with_another_id_set() -> None:
    firsts = []

    def call(rotation: int) -> None:
        firsts.append(rotation)

    # Five calls to estimate with, then rounds of two, which divides the number of sets.
    budget = Budget(0, minimal_rounds=4, maximal_rounds=4, warm_calls=1, shortest_sample=0)
    interleave({"a": call}, 4, budget=budget, timer=lambda run: (run(), 1.0)[1])
    assert sorted(firsts[5::2]) == [0, 1, 2, 3]


def test_long_calls_are_led_by_one() -> None:
    budget = Budget()
    assert (budget.leads(1e-3), budget.repeats(1e-3)) == (4, 4)
    assert (budget.leads(4e-3), budget.repeats(4e-3)) == (2, 2)
    assert (budget.leads(1.0), budget.repeats(1.0)) == (1, 1)
    assert (budget.leads(1e-5), budget.repeats(1e-5)) == (4, 40)


def test_short_calls_are_timed_several_at_a_time() -> None:
    made = 0

    def call(rotation: int) -> None:
        nonlocal made
        made += 1

    def timer(run: Callable[[], None]) -> float:
        nonlocal made
        before = made
        run()
        return (made - before) * 1e-5

    samples = interleave(
        {"a": call},
        3,
        budget=Budget(0, minimal_rounds=2, maximal_rounds=2, shortest_sample=1e-3),
        timer=timer,
    )
    assert samples["a"] == pytest.approx([1e-5, 1e-5])
    assert made == 2 + 3 + 2 * (4 + 100)


def test_machine_description_names_no_host() -> None:
    described = machine.describe()
    assert described["cores"] >= 1
    assert described["versions"]["torch"] == torch.__version__
    text = repr(described).lower()
    assert os.uname().nodename.lower() not in text
    assert str(binding.allowed_cpus())


def test_children_get_every_processor() -> None:
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    assert binding.run_python(["-c", code]).strip() == str(binding.allowed_cpus())
    with pytest.raises(RuntimeError, match="no such thing"):
        binding.run_python(["-c", "raise SystemExit('no such thing')"])
