"""Instructions per lookup of the main kernels, counted by callgrind: noise can't fool them.

Each kernel runs at two lengths in one process under valgrind; the difference over the difference
in lookups is free of start-up and call overhead. Valgrind shows the program a processor without
AVX-512, so the AVX2 path and the generic path are guarded, chosen by ``AMTL_CPU_ISA``.
"""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import amtl_kernels
from bench.files import write_aside
from bench.inputs import Case, make_problem
from bench.machine import amtl_build

RECORDED = Path(__file__).with_name("guards.json")
PATHS = ("avx2", "generic")
BOUND = 0.10
_SHORT, _LONG = 1600, 4800
_ROWS, _DIM, _BAG = 20_000, 64, 20

app = typer.Typer(help="Instruction counts per lookup, against the recorded ones.")


class UnavailableError(RuntimeError):
    """Instruction counts can't be had, or not compared, on this machine."""


@dataclass(frozen=True)
class Count:
    """One kernel's count beside the recorded one.

    Attributes:
        path: SIMD path.
        kernel: Name.
        measured: Instructions per lookup.
        recorded: The same, recorded; None where the kernel is new.
    """

    path: str
    kernel: str
    measured: float
    recorded: float | None

    @property
    def risen(self) -> bool:
        """Whether it exceeds the recorded count by more than the bound."""
        return self.recorded is not None and self.measured > self.recorded * (1 + BOUND)


def compiler() -> str:
    """Compiler of the native module, empty where there is none."""
    native = amtl_build().get("native")
    return str(native.get("compiler", "")) if isinstance(native, dict) else ""


def check_available(path: str) -> None:
    """Raises where counts of this path can't be taken here.

    Raises:
        UnavailableError: No valgrind, no native module, or a processor without the path.
    """
    if shutil.which("valgrind") is None:
        raise UnavailableError("valgrind is not installed")
    if not compiler():
        raise UnavailableError("amtl_kernels has no native module here")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if path == "avx2" and not re.search(r"\bavx2\b", flags):
        raise UnavailableError("this processor has no AVX2")


def count(path: str) -> dict[str, float]:
    """Instructions per lookup of every kernel on one SIMD path.

    Raises:
        UnavailableError: See :func:`check_available`.
        RuntimeError: The run under valgrind failed.
    """
    check_available(path)
    with tempfile.TemporaryDirectory() as folder:
        stem = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={stem}", sys.executable, "-m", "bench.guards"]
        environment = {**os.environ, "AMTL_CPU_ISA": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            tail = "\n".join(done.stderr.splitlines()[-12:])
            raise RuntimeError(f"valgrind ended with {done.returncode}:\n{tail}")
        names: list[str] = json.loads(done.stdout.strip().splitlines()[-1])
        totals = [_total(stem.with_name(f"callgrind.{i + 1}")) for i in range(2 * len(names))]
    return {
        name: round((totals[2 * i + 1] - totals[2 * i]) / (_LONG - _SHORT), 2)
        for i, name in enumerate(names)
    }


def _total(path: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"callgrind wrote no total to {path.name}")
    return int(found.group(1))


def _kernels() -> dict[str, Callable[[int], Callable[[], object]]]:
    """Name to a maker of a call over that many lookups; built in the process under valgrind."""
    case = Case(
        "backward", _ROWS, ("amtl_search",), (), dim=_DIM, bags=_LONG // _BAG, bag_size=_BAG,
        distribution="zipf", threads=1,
    )  # fmt: skip
    problem = make_problem(case, rotations=1)
    tiers = problem.tiers(4)
    blocks = problem.blocks(4)
    ids = problem.ids[0]
    op = torch.ops.amtl

    def search(lookups: int) -> Callable[[], object]:
        return functools.partial(
            amtl_kernels.adaptive_embedding_bag, problem.weight, ids[:lookups],
            problem.offsets[: lookups // _BAG], problem.row_group, problem.group_dims,
            problem.group_mask, seed=1,
        )  # fmt: skip

    def masked(lookups: int) -> Callable[[], object]:
        return functools.partial(
            amtl_kernels.masked_embedding_bag, problem.weight, ids[:lookups],
            problem.offsets[: lookups // _BAG], problem.row_dims,
        )  # fmt: skip

    def frozen(lookups: int) -> Callable[[], object]:
        return functools.partial(
            amtl_kernels.tiered_embedding_bag, blocks, tiers.ends, tiers.rank[ids[:lookups]],
            problem.offsets[: lookups // _BAG], embedding_dim=_DIM,
        )  # fmt: skip

    def gather(lookups: int) -> Callable[[], object]:
        return functools.partial(
            amtl_kernels.masked_embedding, problem.weight, ids[:lookups], problem.row_dims
        )

    def search_backward(lookups: int) -> Callable[[], object]:
        bags = lookups // _BAG
        return functools.partial(
            op.lookup_backward, [problem.weight], [1], [], [problem.group_dims],
            [problem.row_group], 1, problem.grad[:bags], ids[:lookups], problem.offsets[:bags],
            None, 0, [-1], False, True, True, False,
        )  # fmt: skip

    def frozen_backward(lookups: int) -> Callable[[], object]:
        bags = lookups // _BAG
        return functools.partial(
            op.lookup_backward, blocks, [len(blocks)], [_DIM], [], [], 0, problem.grad[:bags],
            tiers.rank[ids[:lookups]], problem.offsets[:bags], None, 0, [-1], False, True, False,
            False,
        )  # fmt: skip

    def rowwise_adagrad(lookups: int) -> Callable[[], object]:
        rows = torch.arange(lookups)
        grads = torch.ones(lookups, _DIM)
        state = torch.zeros(_ROWS)
        step = (2, [0.01, 1e-8, 0.0, 0.0, 0.0, 1.0])
        return functools.partial(op.apply_, [problem.weight], [rows], [grads], [state], *step)

    return {
        "search bag forward": search,
        "masked bag forward": masked,
        "frozen bag forward": frozen,
        "masked gather forward": gather,
        "search bag backward": search_backward,
        "frozen bag backward": frozen_backward,
        "row-wise Adagrad, per row": rowwise_adagrad,
    }


def _main() -> None:
    """Runs under valgrind: two dumps a kernel, then the names."""
    torch.set_num_threads(1)
    kernels = _kernels()
    toggle: Any = torch._C._valgrind_toggle
    dump: Any = torch._C._valgrind_toggle_and_dump_stats
    # A collection in the middle of a count was worth 60 instructions a lookup.
    gc.disable()
    with torch.no_grad():
        for make in kernels.values():
            for lookups in (_SHORT, _LONG):
                call = make(lookups)
                call()
                toggle()
                call()
                dump()
    print(json.dumps(list(kernels)))


def recorded() -> dict[str, Any]:
    """The recorded counts."""
    content: dict[str, Any] = json.loads(RECORDED.read_text())
    return content


def compare(path: str) -> list[Count]:
    """Counts of one path beside the recorded ones.

    Raises:
        UnavailableError: Nothing comparable is recorded for this machine.
    """
    known = recorded()
    if known["architecture"] != platform.machine():
        raise UnavailableError(f"counts are recorded for {known['architecture']}")
    if path not in known["paths"]:
        raise UnavailableError(f"no counts are recorded for the {path} path")
    here = compiler()
    if here and here.split(".")[0] != known["compiler"].split(".")[0]:
        raise UnavailableError(f"counts are recorded for {known['compiler']}, this is {here}")
    before = known["paths"][path]
    return [Count(path, name, value, before.get(name)) for name, value in count(path).items()]


@app.command()
def check() -> None:
    """Counts every path and exits with 1 where a count rose by more than 10 %."""
    failed = False
    with concurrent.futures.ThreadPoolExecutor() as pool:
        futures = {path: pool.submit(compare, path) for path in PATHS}
    for path, future in futures.items():
        try:
            counts = future.result()
        except UnavailableError as error:
            typer.echo(f"{path}: skipped: {error}")
            continue
        for entry in counts:
            before = "new" if entry.recorded is None else f"recorded {entry.recorded:g}"
            state = "ROSE" if entry.risen else "ok"
            typer.echo(f"{path:8} {entry.kernel:28} {entry.measured:9.1f} {before:>18}  {state}")
            failed |= entry.risen
    if failed:
        raise typer.Exit(1)


@app.command()
def record(
    out: Annotated[Path, typer.Option(help="Where the counts are written.")] = RECORDED,
) -> None:
    """Records the counts of this build as the ones to hold."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        paths = dict(zip(PATHS, pool.map(count, PATHS), strict=True))
    content = {
        "unit": "instructions per lookup, 64 wide, bags of 20, Zipf ids",
        "architecture": platform.machine(),
        "compiler": compiler(),
        "bound": BOUND,
        "paths": paths,
    }
    write_aside(out, json.dumps(content, indent=1) + "\n")
    typer.echo(f"{out}")


if __name__ == "__main__":
    _main()
