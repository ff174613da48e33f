"""What bags of one reach on a GPU that is not here: ``python -m bench.predict``.

Three numbers are counted: the lookups that a multiprocessor holds (from the registers and the
shared memory that the compiler gave the kernel), the loads of one lookup that wait for each other
(from the simulator's count of a warp's loads, those in flight together taken as one), and the bytes
behind the L2 (:func:`bench.traffic.floor`). Two are assumed: the memory's rate, and what a
load takes under load. Nothing says that the instructions themselves, or the L2, keep up.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import amtl_kernels as ak
from bench import traffic
from bench.contenders import CONTENDERS
from bench.inputs import Problem, make_problem
from bench.setting import ROOT, Setting
from bench.suites import gpu_cases

REGISTERS = ROOT / "tests" / "cuda" / "register_ceilings.json"
LATENCY = 600e-9
"""Seconds that a load takes under load: assumed."""
IN_FLIGHT = 4
"""Rows that ``pool_short_kernel`` asks for before it uses one: ``loads_in_flight`` of
``tests/cuda/test_cubins.py`` counts them in the machine code."""
GOAL = 0.7
BLOCK = 256
STAGED = 9216
"""Shared memory of its block."""


@dataclass(frozen=True)
class Card:
    """What a multiprocessor holds, and what it shares with the others."""

    name: str
    architecture: str
    multiprocessors: int
    copy: float  # bytes a second
    l2: int
    sector: int  # bytes that memory moves at least
    registers: int = 65_536
    shared: int = 233_472
    threads: int = 2048
    blocks: int = 32

    def resident_threads(self, registers: int, shared: int) -> int:
        """Threads of a kernel that a multiprocessor holds.

        Args:
            registers: Of a thread, given out in eights.
            shared: Bytes of a block; a kibibyte more is taken for each.
        """
        fits = min(
            self.blocks,
            self.threads // BLOCK,
            self.registers // (-(-registers // 8) * 8 * BLOCK),
            self.shared // (shared + 1024),
        )
        return fits * BLOCK


# The copy rate is the memory's peak: none is faster, so loads count for more than they will.
H100 = Card("H100 SXM", "sm_90", 132, 3.35e12, 50 << 20, 64)


@dataclass(frozen=True)
class Prediction:
    """Of one kind of lookup.

    Attributes:
        kernel: Which.
        threads: That a multiprocessor holds; as many lookups are on their way.
        rounds: Loads of a lookup that wait for each other.
        asked: Bytes a lookup asks for.
        floor: Bytes behind the L2 in sectors of 32, as the suite counts them.
        moved: The same in sectors of the card's memory, and what the kernel reads beside it.
        latency: Nanoseconds a lookup takes where loads alone take time.
        memory: Nanoseconds it takes where bytes alone do.
    """

    kernel: str
    threads: int
    rounds: int
    asked: float
    floor: float
    moved: float
    latency: float
    memory: float

    def share(self, of: float, *, overlaps: bool = False) -> float:
        """Of the copy rate, by some bytes a lookup.

        Args:
            of: Bytes: ``asked`` or ``floor``.
            overlaps: Whether loads wait while others move, as they do where many are on their way;
                else not one does.
        """
        spent = max(self.latency, self.memory) if overlaps else self.latency + self.memory
        return of / self.moved * self.memory / spent

    @property
    def least(self) -> float:
        """The smaller share, by whichever bytes, if nothing overlaps."""
        return min(self.share(self.asked), self.share(self.floor))

    def longest_load(self, share: float) -> float:
        """Seconds that a load may take for both shares to be reached if nothing overlaps."""
        of = min(self.asked, self.floor)
        spent = of / self.moved * self.memory / share
        return (spent - self.memory) / self.latency * LATENCY


def _lookup(problem: Problem, frozen: bool) -> None:
    (ids,), offsets = problem.ids, problem.offsets
    options = {"bounds_check": "off", "include_last_offset": True}
    if frozen:
        width = CONTENDERS["amtl_frozen"].equations.tier_width
        tiers, blocks = problem.tiers(width), problem.blocks(width)
        ak.tiered_embedding_bag(blocks, tiers.ends, tiers.rank[ids], offsets, **options)
    else:
        groups = (problem.row_group, problem.group_dims, problem.group_mask)
        ak.adaptive_embedding_bag(
            problem.weight, ids, offsets, *groups, seed=problem.seed, **options
        )


def waiting_loads(run: Callable[[], None], lookups: int) -> int:
    """Loads of a lookup that wait for each other, in a kernel that the simulator runs.

    Args:
        run: Calls it, with bags of one.
        lookups: Of the call: a multiple of a warp's.
    """
    from amtl_kernels import _tools

    _tools.reset_traffic()
    _tools.configure(track_traffic=True)
    try:
        run()
    finally:
        _tools.configure()
    counted = _tools.traffic()
    warps = lookups // 32
    asked = {name: counted[name]["requests"] // warps for name in ("index", "sizes", "table")}
    # A bag's two ends at once, then the index; the group and then its size.
    return asked["index"] - 1 + asked["sizes"] + asked["table"] // IN_FLIGHT


def predict(problem: Problem, small: Problem, *, frozen: bool, card: Card) -> Prediction:
    """Of lookups in the search phase, or frozen ones.

    Args:
        problem: Bags of one in float32, for the bytes.
        small: The same of fewer, for the simulator.
        frozen: Which.
        card: Where.
    """
    contender = CONTENDERS[f"amtl_{'frozen' if frozen else 'search'}"]
    kernel = f"pool_short_kernel<float, 4, {'Tiered' if frozen else 'Dense'}Table>"
    registers = json.loads(REGISTERS.read_text())[card.architecture][kernel]
    ids = problem.ids[0]
    touched = problem.traffic(ids, contender.equations.dims(problem, ids), mask_gradient=False)
    layout = contender.equations.layout(problem, ids)
    floors = [
        traffic.floor(touched, layout, 1, card.l2, "forward", sector=sector).total
        for sector in (traffic.SECTOR, card.sector)
    ]
    asked = traffic.useful_bytes(touched, "forward")
    floor, moved = (each / touched.lookups for each in floors)
    # Of a bag's offset no count of what work has to move knows.
    moved += problem.offsets.element_size()
    threads = card.resident_threads(registers, STAGED)
    rounds = waiting_loads(lambda: _lookup(small, frozen), small.case.bags)
    return Prediction(
        kernel,
        threads,
        rounds,
        asked / touched.lookups,
        floor,
        moved,
        1e9 * rounds * LATENCY / threads,
        1e9 * moved * card.multiprocessors / card.copy,
    )


def predictions() -> list[Prediction]:
    """Of the suite's lookups of bags of one, search and frozen, on whatever runs the operators."""
    (case,) = (
        each
        for each in gpu_cases()
        if each.work == "forward" and each.pooled and each.bag_size == 1
    )
    here = dataclasses.replace(case, device="cpu", threads=1)
    problem = make_problem(here, rotations=1)
    few = make_problem(dataclasses.replace(here, bags=2048, rows=4096), rotations=1)
    return [predict(problem, few, frozen=frozen, card=H100) for frozen in (False, True)]


def text(found: Sequence[Prediction]) -> str:
    """What there is to read."""
    load = f"{LATENCY * 1e9:.0f} ns a load"
    lines = [f"{H100.name}, {H100.copy / 1e12:.2f} TB/s, {load}; bags of one of 64 floats"]
    for each in found:
        lines += [
            "",
            each.kernel,
            f"  {each.threads} threads a multiprocessor, {each.rounds} loads wait for each other",
            f"  bytes a lookup: asked {each.asked:.0f}, floor {each.floor:.0f}, "
            f"moved {each.moved:.0f}",
            f"  ns a lookup and multiprocessor: loads {each.latency:.1f}, bytes {each.memory:.1f}",
        ]
        for name, of in (("asked", each.asked), ("floor", each.floor)):
            least, most = (each.share(of, overlaps=overlaps) for overlaps in (False, True))
            lines.append(
                f"  {name}: {least:.0%} of the copy rate if nothing overlaps, {most:.0%} if all"
            )
        longest = 1e9 * each.longest_load(GOAL)
        lines.append(f"  {GOAL:.0%} of it, whatever overlaps, up to {longest:.0f} ns a load")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Prints them; 1 if one is below the goal."""
    Setting(True, Path()).backend("cuda")
    found = predictions()
    print(text(found), end="")
    return int(min(each.least for each in found) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
