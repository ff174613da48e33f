"""Where the time of a backward goes: of one that returns its gradients, or of a whole fused step.

Of gradients the goal is that lookup, row gradient and mask gradient take 0.7 of the time that
``F.embedding_bag(sparse=True)`` takes without a mask. Its backward copies a gradient row per lookup
and leaves sorting and adding up to the optimizer; ours sorts and sums. Of a step the goals are
shares of a ceiling (``traffic.py``), which counts neither the sort nor what autograd does.

Each part is timed by itself, interleaved with the whole, and everything twice: with freed memory as
the C library treats it, and kept by it, so that no buffer is fresh from the system.
"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from amtl_kernels.reference import ROWWISE_ADAGRAD
from bench import machine, tables
from bench.contenders import CONTENDERS
from bench.inputs import Case, Problem, make_problem
from bench.plan import Budget
from bench.runner import Timer, cpu_clock, interleave, wall_clock

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# The largest that glibc takes; the row gradient of the goal's case is 21 MB.
_KEPT_BYTES = 32 << 20

TORCH, OURS = "F.embedding_bag, forward + backward", "amtl search, forward + backward"
FBGEMM, STEP = "FBGEMM's step, without a mask", "amtl search, fused step"
FROZEN = "amtl frozen, fused step"
TORCH_LOOKUP, LOOKUP, SORT = "of the first: lookup", "of the second: lookup", "sort"
SUM, MASK, REST = "sizes, sum, row gradient", "mask gradient", "autograd and the rest"
UPDATE = "sizes, sum, update"
_WHOLES = (TORCH, STEP, FROZEN)
_TIER_WIDTH = 4


@dataclass(frozen=True)
class Part:
    """One line.

    Attributes:
        name: What.
        seconds: Of a call, with freed memory as the C library treats it.
        kept: The same with freed memory kept: what is less was spent on fresh pages.
        faults: Fresh pages of a call of its operator, in ``seconds``.
    """

    name: str
    seconds: float
    kept: float
    faults: float


def _backward(grad: Tensor, table: Sequence[object], bags: Sequence[object]) -> Any:
    """The operator of the backward, told whether a mask gradient is wanted."""
    return functools.partial(torch.ops.amtl.lookup_backward, *table, grad, *bags, True)


def _step(
    states: list[Tensor], grad: Tensor, table: Sequence[object], bags: Sequence[object]
) -> Any:
    """The operator of a fused step of row-wise Adagrad, told whether a mask gradient is wanted."""
    step = (states, ROWWISE_ADAGRAD, [1e-3, 1e-8, 0.0, 0.0, 0.0, 1.0])

    def call(mask: bool, psw_grad: bool) -> object:
        wishes = (mask, psw_grad, False)
        return torch.ops.amtl.lookup_update_(*table, grad, *bags, *wishes, *step)

    return call


def _calls(problem: Problem, frozen: bool = False) -> dict[str, Callable[[int], object]]:
    """The whole of both, and what they are made of; an operator does what the one before does."""
    lookup = replace(problem, case=replace(problem.case, work="forward", optimizer="none"))
    ours = "amtl_frozen" if frozen else "amtl_search"
    wholes = [
        (TORCH, "torch", problem),
        (TORCH_LOOKUP, "torch", lookup),
        (OURS, ours, problem),
    ]
    if problem.case.work == "step":
        wholes = [
            (FBGEMM, "fbgemm", problem),
            (FROZEN if frozen else STEP, f"{ours}_fused", problem),
        ]
    calls = {
        title: CONTENDERS[name].prepare(of).call
        for title, name, of in (*wholes, (LOOKUP, ours, lookup))
        if not CONTENDERS[name].absent()
    }

    grad, weight, ids = problem.grad, problem.weight, problem.ids
    blocks, table = [weight], [[], [problem.group_dims], [problem.row_group], problem.seed]
    if frozen:
        blocks, table = problem.blocks(_TIER_WIDTH), [[problem.case.dim], [], [], 0]
        ids = [problem.tiers(_TIER_WIDTH).rank[each] for each in ids]
    made, rows = _backward, SUM
    if problem.case.work == "step":
        # One state for all ids, as an optimizer has it.
        made, rows = functools.partial(_step, [b.new_zeros(len(b)) for b in blocks]), UPDATE
    # Rows of one number, without sizes, leave little more than to sort and to cut into segments.
    narrow = (grad[:, :1].contiguous(), [[weight.new_zeros(len(weight), 1)], [1], [], [], [], 0])
    whole = (grad, [blocks, [len(blocks)], *table])
    parts = [(SORT, _backward, narrow, False), (rows, made, whole, False)]
    if not frozen:
        parts.append((MASK, made, whole, True))
    for title, make, arguments, mask in parts:
        operators = [
            make(*arguments, [each, problem.offsets[:-1], None, 0, [-1], False]) for each in ids
        ]
        calls[title] = functools.partial(_call, operators, mask)
    return calls


def _call(operators: Sequence[Callable[[bool, bool], object]], mask: bool, rotation: int) -> object:
    return operators[rotation](mask, False)


def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = {_MMAP_THRESHOLD: _KEPT_BYTES, _TRIM_THRESHOLD: 2**31 - 1}
    if mallopt is None or not all(mallopt(*option) for option in kept.items()):
        raise RuntimeError("this C library cannot be told to keep freed memory")


def measure(problem: Problem, seconds: float, timer: Timer, frozen: bool = False) -> list[Part]:
    """Times the parts of a backward; from then on this process keeps freed memory.

    Args:
        problem: Of a backward on one table.
        seconds: Of each of the two rounds of timing.
        timer: Measures a run in seconds.
        frozen: Of tables in tiers, which have no masks.

    Returns:
        Lines in the order of the module's titles; those of ours add up to the whole of ours.

    Raises:
        RuntimeError: The C library is not glibc.
    """
    calls = _calls(problem, frozen)
    pages: dict[str, list[int]] = {name: [] for name in calls}

    def counting(name: str, rotation: int) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        calls[name](rotation)
        pages[name].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    def medians() -> dict[str, float]:
        counted = {name: functools.partial(counting, name) for name in calls}
        budget = Budget(seconds)
        samples = interleave(counted, len(problem.ids), budget=budget, timer=timer)
        found = {name: statistics.median(values) for name, values in samples.items()}
        whole = next(title for title in (STEP, FROZEN, OURS) if title in found)
        parts = [LOOKUP, *(title for title in (SORT, SUM, UPDATE, MASK) if title in found)]
        for before, after in reversed(list(pairwise(parts[1:]))):
            found[after] -= found[before]
        found[REST] = found[whole] - sum(found[part] for part in parts)
        return found

    first = medians()
    faults = {name: statistics.fmean(found) for name, found in pages.items()}
    _keep_freed_memory()
    kept = medians()
    return [Part(name, first[name], kept[name], faults.get(name, 0.0)) for name in first]


def report(case: Case, parts: Sequence[Part], clock: str) -> str:
    """Markdown of the lines, with the state of the machine that they were measured on."""
    whole, of = next((part.seconds, part.name) for part in parts if part.name in _WHOLES)
    share = "of F.embedding_bag's" if of == TORCH else "of the step's"
    header = ["part", "ms", share, "ms, freed memory kept", "fresh pages a call"]
    rows = [
        [
            part.name,
            f"{part.seconds * 1e3:.2f}",
            f"{part.seconds / whole:.2f}",
            f"{part.kept * 1e3:.2f}",
            f"{part.faults:.0f}",
        ]
        for part in parts
    ]
    cpu = machine.describe()["cpu"]
    load = os.getloadavg()[0]
    told = f"{tables.describe_case(case.as_dict())}. {cpu}, {clock} clock, load {load:.1f}.\n\n"
    return told + tables.markdown(header, rows)


def run(case: Case, seconds: float, clock: str, frozen: bool = False) -> str:
    """Measures a case of the goal and returns :func:`report`."""
    torch.set_num_threads(case.threads)
    timer = {"wall": wall_clock, "cpu": cpu_clock}[clock]
    return report(case, measure(make_problem(case), seconds, timer, frozen), clock)
