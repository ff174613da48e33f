"""Interleaved timing of several contenders in one process: A B C, C B A, A B C, ..."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from bench import binding, machine, plan
from bench.contenders import CONTENDERS, Contender, Session
from bench.inputs import Case, Problem, TraceUnavailableError, make_problem, same_table
from bench.oracle import Equations, MismatchError, compare, expected
from bench.plan import Budget
from bench.results import Comparison, Timing
from bench.traffic import (
    LINE,
    SECTOR,
    Floor,
    Traffic,
    ceiling_seconds,
    floor,
    row_bytes,
    useful_bytes,
)

Call = Callable[[int], object]
Timer = Callable[[Callable[[], None]], float]
Notice = Callable[[float, int], None]

# Two threads that gain less than this have no second core to themselves.
MINIMAL_SPEEDUP = 1.15


_BUDGET = Budget()


def wall_clock(run: Callable[[], None]) -> float:
    """Seconds of one run on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cpu_clock(run: Callable[[], None]) -> float:
    """Processor seconds of one run with one thread: what it would take if nobody else ran.

    For machines that are shared: time spent waiting for a core is left out, cache misses that
    others cause are not.
    """
    start = time.process_time()
    run()
    return time.process_time() - start


def interleave(
    calls: Mapping[str, Call],
    rotations: int,
    *,
    budget: Budget = _BUDGET,
    timer: Timer = wall_clock,
    notice: Notice | None = None,
    periods: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Times calls in turn, so that what disturbs the machine disturbs all of them.

    The order is reversed in every other round. Every call takes the next id set, so a set comes
    back only after ``rotations`` calls, whoever makes them (less what is skipped between two rounds
    so that everybody meets every set). Each turn begins with untimed calls:
    contenders that share a table keep its hot rows in the last cache for each other, and one with a
    table of its own would pay for coming back to it, which nobody does whose program has one table.

    Args:
        calls: Contender to its call; the argument is the id set to use.
        rotations: Number of id sets.
        budget: Bounds.
        timer: Measures a run in seconds.
        notice: Told the finished share of the rounds and the calls made since the last notice.
        periods: Contender to the calls after which its work repeats, where that is not one: each
            sample is of whole periods.

    Returns:
        Seconds per call, one sample a round, the same rounds for everybody.
    """
    turn = 0

    def next_sets(count: int) -> list[int]:
        nonlocal turn
        turn += count
        return [(turn - count + i) % rotations for i in range(count)]

    def lead(call: Call, calls: int) -> None:
        for index in next_sets(calls):
            call(index)

    def timed(call: Call, repeats: int) -> float:
        sets = next_sets(repeats)

        def run() -> None:
            for index in sets:
                call(index)

        return timer(run) / repeats

    estimates = {}
    for name, call in calls.items():
        timed(call, 2)
        estimates[name] = min(timed(call, 1) for _ in range(3))
    leads = {name: budget.leads(estimate) for name, estimate in estimates.items()}
    repeats = {name: budget.repeats(estimate) for name, estimate in estimates.items()}
    for name, period in (periods or {}).items():
        repeats[name] = math.ceil(repeats[name] / period) * period
    made = sum(leads.values()) + sum(repeats.values())
    # A round that began where the last one did would bring everybody the same sets again.
    skipped = next(skip for skip in range(rotations + 1) if math.gcd(made + skip, rotations) == 1)
    each = sum(estimates[name] * (repeats[name] + leads[name]) for name in calls)
    rounds = int(budget.seconds / max(each, 1e-9))
    rounds = min(max(rounds, budget.minimal_rounds), budget.maximal_rounds)

    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in order if number % 2 == 0 else reversed(order):
                lead(calls[name], leads[name])
                samples[name].append(timed(calls[name], repeats[name]))
            turn += skipped
            if notice is not None:
                notice((number + 1) / rounds, made)
    finally:
        if collecting:
            gc.enable()
    return samples


def _ceiling_share(case: Case, timing: Timing, ceilings: Mapping[str, float]) -> float:
    at_random = case.distribution == "uniform"
    rows = float(timing.facts["row_bytes"])
    least = ceiling_seconds(timing.useful_bytes, rows, ceilings, at_random=at_random)
    return float(f"{least / timing.summary.median:.4g}")


@dataclass
class Runner:
    """Runs cases: sets contenders up, checks what they compute, then times them.

    Attributes:
        budget: Of each case.
        ceilings: Measured bandwidths by threads, or of ``"cuda"``, in bytes per second
            (:func:`bench.machine.ceilings`): those of reports.
        attempts: How often a case is tried where the second core turns out to be busy.
        probe: Tells whether threads help at the moment; None trusts the machine.
        contenders: Who can take part.
        timer: Measures a run in seconds; of a case on a GPU, that GPU's clock.
        available: Tells the bytes of memory that are free, on the GPU likewise.
        cache_bytes: Of a GPU's L2, or of a CPU's last cache; not 0: timings also carry the bytes
            that have to pass it.
        sector: What memory moves at least, bytes; of a CPU ``LINE``.
    """

    budget: Budget = _BUDGET
    ceilings: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    attempts: int = 3
    probe: machine.ThreadProbe | None = None
    contenders: Mapping[str, Contender] = field(default_factory=lambda: CONTENDERS)
    timer: Timer = wall_clock
    available: Callable[[], float] = machine.available_bytes
    cache_bytes: int = 0
    sector: int = SECTOR
    _last: Problem | None = None
    _floors: dict[tuple[object, ...], Floor] = field(default_factory=dict)

    def absent(self, asked: Iterable[str] | None = None) -> dict[str, str]:
        """Contenders that this machine lacks, of those asked for or of all: why, how to get them.

        Looking for one may import it, which takes seconds.
        """
        found = {}
        for name in self.contenders if asked is None else asked:
            contender = self.contenders[name]
            reason = contender.absent()
            if reason:
                found[name] = f"{reason}; {contender.install}" if contender.install else reason
        return found

    def forget(self) -> None:
        """Gives back the tables kept for the next case."""
        self._last = None

    def run(self, case: Case, notice: Notice | None = None) -> Comparison:
        """One case.

        What we allocate ourselves lies on the same pages as what everybody is given.

        Raises:
            MismatchError: One of ours computes something else than its equations. A peer that does
                is left out instead, and the result says so.
        """
        before = os.environ.get("AMTL_HUGE_PAGES")
        os.environ["AMTL_HUGE_PAGES"] = str(int(case.huge_pages))
        try:
            return self._run(case, notice)
        finally:
            if before is None:
                del os.environ["AMTL_HUGE_PAGES"]
            else:
                os.environ["AMTL_HUGE_PAGES"] = before

    def _run(self, case: Case, notice: Notice | None) -> Comparison:
        result = Comparison(case.as_dict(), {}, baselines=list(case.baselines))
        on_cpu = case.device == "cpu"
        cores = len(binding.allowed_cpus())
        if on_cpu and case.threads > cores:
            reason = f"the case is for {case.threads} threads, this machine has {cores} core(s)"
            result.left_out = dict.fromkeys(case.contenders, reason)
            return result
        if on_cpu:
            torch.set_num_threads(case.threads)
        chosen, result.left_out = self.choose(case)
        if not chosen:
            return result
        try:
            problem = make_problem(case, reuse=self._last)
        except TraceUnavailableError as error:
            result.rejected = f"the id trace is not here: {error}"
            return result
        self._last = problem
        sessions: dict[str, Session] = {}
        self._floors.clear()
        for contender in chosen:
            name = contender.name
            try:
                sessions[name], difference = self._checked(contender, problem)
            except MismatchError as error:
                if contender.ours:
                    raise
                result.left_out[name] = f"not timed, its result is wrong here: {error}"
                # It may have written where it should not.
                problem.refill()
                continue
            except Exception as error:
                # A peer's trouble with a GPU costs nobody else the measurement.
                if on_cpu or contender.ours:
                    raise
                result.left_out[name] = f"failed here: {type(error).__name__}: {error}"[:400]
                continue
            result.timings[name] = self._timing(contender, problem, difference)
        calls: dict[str, Call] = {name: session.call for name, session in sessions.items()}
        budget = self.budget if on_cpu else self.budget.cold()
        for _ in range(self.attempts):
            before = self._speedup(case)
            samples = interleave(
                calls,
                len(problem.ids),
                budget=budget,
                timer=self.timer,
                notice=notice,
                periods={c.name: c.period for c in chosen if c.name in calls},
            )
            after = self._speedup(case)
            result.thread_speedup = [round(before, 2), round(after, 2)]
            slow = on_cpu and case.threads > 1 and min(before, after) < MINIMAL_SPEEDUP
            result.rejected = (
                f"{case.threads} threads were {min(before, after):.2f} times as fast as one: "
                "other work was running"
                if slow
                else ""
            )
            if not slow:
                break
            time.sleep(1.0)
        for name, values in samples.items():
            timing = result.timings[name]
            timing.samples = values
            ceilings = self.ceilings.get(str(case.threads) if on_cpu else case.device, {})
            if "copy" in ceilings:
                copied = timing.summary.median * ceilings["copy"]
                timing.share = timing.useful_bytes / copied
                if "floor_bytes" in timing.facts:
                    timing.facts["floor_share"] = timing.facts["floor_bytes"] / copied
            if "rows" in ceilings:
                timing.facts["ceiling_share"] = _ceiling_share(case, timing, ceilings)
            if "lines" in ceilings and "places" in timing.facts:
                parts = (timing.facts[key] for key in ("stream_bytes", "line_bytes", "places"))
                least = Floor(*parts).seconds(ceilings) / timing.summary.median
                timing.facts["place_share"] = float(f"{least:.4g}")
        return result

    def _checked(self, contender: Contender, problem: Problem) -> tuple[Session, float]:
        """A session whose result is right, and how far off that is.

        Compared before anything is timed; steps put back what they changed.
        """
        case = problem.case
        # What contenders and equations make themselves lies where everything does.
        place = torch.device(case.device) if case.device != "cpu" else contextlib.nullcontext()
        with place:
            session = contender.prepare(problem)
            wanted = expected(problem, 0, contender.equations)
            outcome = session.outcome(0)
            return session, compare(
                contender.name, outcome, wanted, case.torch_dtype, tolerance=contender.tolerance
            )

    def willing(self, case: Case) -> tuple[list[Contender], dict[str, str]]:
        """Those who are here and have an answer to a case; and why the others don't."""
        chosen, left_out = [], {}
        absent = self.absent(case.contenders)
        for name in case.contenders:
            contender = self.contenders[name]
            reason = absent.get(name) or contender.refuses(case)
            if case.device not in contender.devices:
                reason = "measured on a CPU only"
            if reason:
                left_out[name] = reason
            else:
                chosen.append(contender)
        return chosen, left_out

    def choose(self, case: Case) -> tuple[list[Contender], dict[str, str]]:
        """Those of the willing who fit into memory as it is now; and why the others don't.

        Tables of an earlier case that this one can't take over are given back first.
        """
        chosen, left_out = self.willing(case)
        if self._last is not None:
            self._last.drop_blocks()
            if not same_table(case, self._last.case):
                self.forget()
        gc.collect()
        held = 0.0
        if self._last is not None:
            held = plan.table_bytes(case)
        admission = plan.admit(case, chosen, self.available() + held)
        fitting = [one for one in chosen if one.name not in admission.left_out]
        return fitting, {**left_out, **admission.left_out}

    def _speedup(self, case: Case) -> float:
        if self.probe is None or case.device != "cpu":
            return float(case.threads)
        return self.probe.speedup(case.threads)

    def _floor(self, contender: Contender, problem: Problem, traffic: Traffic) -> Floor:
        """:func:`floor`, which takes seconds, once for contenders that read the same."""
        case, equations = problem.case, contender.equations
        key = (equations.sizes, equations.mask_gradient, equations.tier_width, contender.row_bits)
        # Sizes that somebody brings are its own.
        if type(equations) is not Equations:
            key = (*key, contender.name)
        if key not in self._floors:
            layout = equations.layout(problem, problem.global_ids[0], contender.row_bits)
            asked = (case.bag_size, self.cache_bytes, case.work, case.optimizer)
            self._floors[key] = floor(traffic, layout, *asked, self.sector)
        return self._floors[key]

    def _timing(self, contender: Contender, problem: Problem, difference: float) -> Timing:
        case = problem.case
        ids = problem.global_ids[0]
        dims = contender.equations.dims(problem, ids)
        masked = contender.equations.mask_gradient and case.work != "forward"
        traffic = problem.traffic(ids, dims, mask_gradient=masked)
        traffic = replace(traffic, row_element=contender.row_bits / 8)
        all_rows = problem.row_dims.double().mean().item() / case.dim
        useful = useful_bytes(traffic, case.work, case.optimizer)
        behind = {}
        if self.cache_bytes:
            least = self._floor(contender, problem, traffic)
            if self.sector == LINE:
                behind = {
                    "stream_bytes": least.streams,
                    "line_bytes": least.apart,
                    "places": least.places,
                }
            else:
                behind = {
                    "bytes_per_lookup": round(useful / traffic.lookups, 1),
                    "floor_bytes": least.total,
                }
        return Timing(
            title=contender.title,
            ours=contender.ours,
            samples=[],
            lookups=traffic.lookups,
            useful_bytes=useful,
            error=float(f"{difference:.2g}"),
            facts={
                **behind,
                "row_bytes": row_bytes(traffic, case.work, case.optimizer),
                "distinct_rows": traffic.distinct,
                "kept_over_lookups": round(traffic.lookup_mean / case.dim, 4),
                "kept_over_distinct": round(traffic.distinct_mean / case.dim, 4),
                "kept_over_rows": round(all_rows, 4) if contender.equations.sizes != "all" else 1.0,
            },
        )
