"""Instructions that the calls of a suite take, counted by callgrind: no noise, no caches either.

A change that must not cost time is held against the commit before it:

    PYTHONPATH=. python bench/counts.py after.json [PART OF A NAME ...]
    PYTHONPATH=FOLDER_OF_THE_OTHER_COMMIT python bench/counts.py before.json [PART OF A NAME ...]
    PYTHONPATH=. python bench/counts.py --compare before.json after.json

It counts one call of each of our contenders in the named cases of the suite ``quick``, Python and
PyTorch included, on one thread. Valgrind shows programs a processor without AVX-512, so the AVX2
kernels are counted. Suite and contenders are of the commit that is asked.

More instructions need not be more time. Whether they are is told by pairs of processes, one of
each commit, whose order changes from pair to pair:

    PYTHONPATH=. python bench/counts.py --time FOLDER_OF_THE_OTHER_COMMIT [PART OF A NAME ...]

prints processor time after over before in the mean of the pairs, with a 95 % interval.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.contenders import CONTENDERS
from bench.inputs import Case, make_problem
from bench.suites import SUITES, select

ROWS = 50_000
"""At most, of a table: what a kernel does to a row does not depend on how many there are, and
valgrind is slow."""


PAIRS = 10
"""Of processes."""
_CALLS = 40
"""Timed in a process, in which others of the case are called in between."""


def cases(patterns: list[str], rows: float = ROWS) -> Iterator[Case]:
    """Cases of the suite on tables of so many rows at most, each once."""
    seen = set()
    for case in select(SUITES["quick"](), patterns).cases:
        small = replace(case, rows=int(min(case.rows, rows)), threads=1)
        if small.name not in seen:
            seen.add(small.name)
            yield small


def ours(case: Case) -> list[str]:
    """Contenders of ours that answer a case."""
    held = {name: CONTENDERS[name] for name in case.contenders}
    return [n for n, c in held.items() if c.ours and not (c.absent() or c.refuses(case))]


def count_calls(patterns: list[str]) -> None:
    """Runs under valgrind: one dump a call, then their names."""
    torch.set_num_threads(1)
    toggle: Any = torch._C._valgrind_toggle
    dump: Any = torch._C._valgrind_toggle_and_dump_stats
    names = []
    for case in cases(patterns):
        problem = make_problem(case, rotations=1)
        for name in ours(case):
            session = CONTENDERS[name].prepare(problem)
            session.call(0)
            session.call(0)
            gc.collect()
            gc.disable()
            toggle()
            session.call(0)
            dump()
            gc.enable()
            names.append([case.name, name])
    print(json.dumps(names))


def time_calls(patterns: list[str]) -> None:
    """Prints the median of processor seconds of each call."""
    torch.set_num_threads(1)
    found = {}
    for case in cases(patterns, math.inf):
        problem = make_problem(case)
        sessions = {name: CONTENDERS[name].prepare(problem) for name in ours(case)}
        samples: dict[str, list[float]] = {name: [] for name in sessions}
        for number in range(_CALLS):
            for name, session in sessions.items():
                session.call(number % len(problem.ids))
                started = time.process_time()
                session.call((number + 1) % len(problem.ids))
                samples[name].append(time.process_time() - started)
        found |= {f"{case.name} {name}": statistics.median(each) for name, each in samples.items()}
    print(json.dumps(found))


def time_pairs(before: Path, patterns: list[str]) -> None:
    """Prints after over before, the largest first, with the interval of its logarithm's mean."""
    # The other commit, whose packages the processes that are timed import, may have none.
    from amtl.paper.statistics import half_width

    here = Path(__file__).resolve().parents[1]
    ratios: dict[str, list[float]] = {}
    for pair in range(PAIRS):
        took = {}
        for folder in (before, here) if pair % 2 else (here, before):
            command = [sys.executable, __file__, "--under-clock", *patterns]
            path = os.pathsep.join([str(folder / "python"), str(folder)])
            environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            took[folder] = json.loads(done.stdout.strip().splitlines()[-1])
        for name in took[here].keys() & took[before].keys():
            ratios.setdefault(name, []).append(math.log(took[here][name] / took[before][name]))
        print(f"pair {pair + 1} of {PAIRS}", file=sys.stderr)
    for name, logs in sorted(ratios.items(), key=lambda item: -statistics.fmean(item[1])):
        mean, half = statistics.fmean(logs), half_width(logs)
        assert half is not None
        low, middle, high = map(math.exp, (mean - half, mean, mean + half))
        print(f"{middle:6.3f} ({low:.3f} to {high:.3f})  {name}")


def count(patterns: list[str]) -> dict[str, int]:
    """Instructions of each call."""
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={stem}", sys.executable, __file__, "--under-valgrind"]
        command += patterns
        environment = {**os.environ, "AMTL_CPU_ISA": "avx2", "OMP_NUM_THREADS": "1"}
        environment["PYTHONHASHSEED"] = "0"
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        names = json.loads(done.stdout.strip().splitlines()[-1])
        totals = [stem.with_name(f"callgrind.{i + 1}").read_text() for i in range(len(names))]
    found = [re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE) for text in totals]
    assert all(found), "callgrind wrote no total"
    return {" ".join(name): int(each[1]) for name, each in zip(names, found, strict=True) if each}


def compare(before: Path, after: Path) -> None:
    """Prints after over before, the largest first."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    shared = {name: new[name] / old[name] for name in old.keys() & new.keys()}
    for name, ratio in sorted(shared.items(), key=lambda item: -item[1]):
        print(f"{ratio:6.3f}  {old[name]:>12,} {new[name]:>12,}  {name}")


if __name__ == "__main__":
    if sys.argv[1] == "--under-valgrind":
        count_calls(sys.argv[2:])
    elif sys.argv[1] == "--under-clock":
        time_calls(sys.argv[2:])
    elif sys.argv[1] == "--time":
        time_pairs(Path(sys.argv[2]).resolve(), sys.argv[3:])
    elif sys.argv[1] == "--compare":
        compare(*map(Path, sys.argv[2:4]))
    else:
        Path(sys.argv[1]).write_text(json.dumps(count(sys.argv[2:]), indent=1) + "\n")
