"""What nvcc made of the kernels: registers, spills, local memory, widths of loads.

Reads machine code with ``cuobjdump`` (of the CUDA toolkit or of the Triton wheel): that of the
built module if it has CUDA kernels, else of the one that ``building.py`` makes. No GPU is needed.
Compiling takes minutes an architecture, so `make test` looks at sm_90, and AMTL_SOAK=1 (`make
soak`) at all of them. ``AMTL_SOAK=1 python -m tests.cuda.test_cubins`` writes the table of register
ceilings anew after a change that is meant.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from . import building
from .building import WITH_FLOAT16, has_cuda_kernels

TABLE = Path(__file__).with_name("register_ceilings.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
OURS = re.compile(r"\b(\w+_kernel)\b")


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def architectures() -> tuple[str, ...]:
    """Those that there is machine code for, or will be."""
    if has_cuda_kernels():
        return ARCHITECTURES
    return tuple(f"sm_{each}" for each in building.ARCHITECTURES)


@functools.lru_cache(maxsize=1)
def binaries() -> list[Path]:
    """Files with machine code of every kernel for every architecture of these."""
    if has_cuda_kernels():
        spec = find_spec("amtl_kernels._C")
        assert spec is not None and spec.origin is not None
        return [Path(spec.origin)]
    # Its kernels are CUB's.
    return [path for path in building.built()[1] if path.name != "sort.cu.o"]


def why_not() -> str | None:
    if not has_cuda_kernels() and shutil.which("nvcc") is None:
        return "no CUDA compiler: put nvcc (CUDA 13) on PATH, or build with AMTL_CUDA=on"
    if cuobjdump() is None:
        return "no cuobjdump: install the CUDA toolkit, or `pip install triton`, which holds one"
    return None


needs_cubins = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
of_each = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                name not in architectures(), reason="AMTL_SOAK=1 compiles for it, too"
            ),
        )
        for name in ARCHITECTURES
    ],
)


def dump(*options: str, only: str = "") -> str:
    """What cuobjdump says of all files, or of those with `only` in their names."""
    texts = []
    for path in binaries():
        if only in path.name or len(binaries()) == 1:
            command = [cuobjdump() or "cuobjdump", *options, str(path)]
            texts.append(subprocess.run(command, capture_output=True, text=True).stdout)
    return "\n".join(texts)


@functools.lru_cache(maxsize=1)
def demangled(names: tuple[str, ...]) -> dict[str, str]:
    tool = shutil.which("c++filt")
    assert tool is not None, "c++filt is part of every compiler's binutils"
    plain = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = {}
    for name, text in zip(names, plain, strict=True):
        text = re.sub(r"^void |amtl::|\(anonymous namespace\)::", "", text)
        text = text.replace("(Finish)", "").replace("__nv_bfloat16", "bf16")
        # Up to the arguments; template arguments may hold parentheses of their own.
        match = re.match(r"(\w+)(<.*>)?\(", text)
        short[name] = (match.group(1) + (match.group(2) or "")) if match else text
    return short


@functools.lru_cache(maxsize=1)
def resources() -> dict[str, dict[str, dict[str, int]]]:
    """Architecture to kernel to REG, STACK, LOCAL, SHARED."""
    lines = []
    for path in binaries():
        lines += dump("--dump-resource-usage", only=path.name).splitlines()
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture = ""
    name = ""
    raw = []
    for line in lines:
        if line.startswith("arch = "):
            architecture = line.split("=")[1].strip()
        match = re.match(r"\s*Function (\S+):", line)
        if match:
            name = match.group(1)
        elif "REG:" in line and name:
            numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", line)}
            raw.append((architecture, name, numbers))
    names = demangled(tuple(sorted({name for _, name, _ in raw})))
    for architecture, name, numbers in raw:
        kernel = names[name]
        if "cub" not in name and OURS.search(kernel):
            found.setdefault(architecture, {})[kernel] = numbers
    return found


@needs_cubins
def test_every_architecture_is_there() -> None:
    found = resources()
    assert set(architectures()) <= set(found)
    counts = {architecture: len(found[architecture]) for architecture in architectures()}
    assert len(set(counts.values())) == 1 and min(counts.values()) > 100
    if has_cuda_kernels():
        assert "sm_100" in dump("--list-ptx"), "later cards compile from PTX"


@needs_cubins
@of_each
def test_nothing_spills(architecture: str) -> None:
    bad = {
        name: numbers
        for name, numbers in resources()[architecture].items()
        if numbers["LOCAL"] or numbers["STACK"]
    }
    assert not bad


@needs_cubins
@of_each
def test_registers_stay_under_their_ceilings(architecture: str) -> None:
    ceilings = json.loads(TABLE.read_text())[architecture]
    found = {name: numbers["REG"] for name, numbers in resources()[architecture].items()}
    left_out = () if WITH_FLOAT16 else {name for name in ceilings if "__half" in name}
    assert set(found).union(left_out) == set(ceilings), (
        "kernels came or went: run this file to update the table"
    )
    above = {name: (n, ceilings[name]) for name, n in found.items() if n > ceilings[name]}
    assert not above


@functools.cache
def disassembled(file: str) -> dict[str, str]:
    """Symbols to what a file holds of them on sm_90."""
    if file and len(binaries()) == 1:
        return disassembled("")
    text = dump("-sass", "-arch", "sm_90", only=file)
    blocks = (block.split("\n", 1) for block in text.split("Function : ")[1:])
    return {symbol.strip(): code for symbol, code in blocks}


@needs_cubins
@pytest.mark.parametrize(
    ("kernel", "source"),
    [
        ("lookup_fwd_kernel", "lookup"),
        ("pool_fwd_kernel", "pool"),
        ("pool_short_kernel", "pool"),
        ("pool_psw_bwd_kernel", "pool_psw"),
        ("reduce_lookups_kernel", "reduce_grads"),
        ("reduce_rowwise_kernel", "update_rowwise"),
    ],
)
def test_tables_are_read_and_written_in_16_byte_vectors(kernel: str, source: str) -> None:
    """Every wide instantiation loads rows by 128-bit instructions, several before the first use."""
    code = {name: text for name, text in disassembled(f"{source}.cu.o").items() if kernel in name}
    names = demangled(tuple(sorted(code)))
    wide = [
        symbol
        for symbol, name in names.items()
        if re.search(r"<(float, (float, )?4|__half, (float, )?8|bf16, (float, )?8),", name)
        and "PartialList" not in name
    ]
    assert len(wide) == (6 if WITH_FLOAT16 else 4), "every type, dense and tiered"
    for symbol in wide:
        instructions = re.findall(r"\b(LDG\S*|STG\S*|LDL\S*|STL\S*)", code[symbol])
        assert sum(bool(re.match(r"LDG\.E\S*\.128", i)) for i in instructions) >= 4, names[symbol]
        assert not any(i.startswith(("LDL", "STL")) for i in instructions), names[symbol]
        if kernel == "lookup_fwd_kernel":
            assert any(re.match(r"STG\.E\S*\.128", i) for i in instructions), names[symbol]


def machine_code(kernels: str) -> dict[str, list[tuple[int, str]]]:
    """Kernels whose names match to addresses and instructions on sm_90."""
    found: dict[str, str] = {}
    for path in binaries():
        usage = dump("--dump-resource-usage", only=path.name)
        if re.search(kernels, usage):
            held = disassembled(path.name)
            found |= {name: code for name, code in held.items() if re.search(kernels, name)}
    names = demangled(tuple(sorted(found)))
    return {
        names[symbol]: [
            (int(address, 16), instruction)
            for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
        ]
        for symbol, code in found.items()
    }


def loads_in_flight(code: list[tuple[int, str]]) -> int:
    """The most loads of vectors that are issued, once items are staged, before one is used."""
    most = loads = 0
    waiting: set[int] = set()
    staged = next(i for i, (_, instruction) in enumerate(code) if "STS" in instruction)
    for _, instruction in code[staged:]:
        _, _, operands = instruction.partition(",")
        if waiting & {int(register) for register in re.findall(r"\bR(\d+)", operands)}:
            waiting, loads = set(), 0
        load = re.match(r"(?:@!?P\d+ )?LDG\.E(?:\.EF)?\.(64|128)\S* R(\d+)", instruction)
        if load:
            first = int(load[2])
            waiting |= set(range(first, first + int(load[1]) // 32))
            loads += 1
            most = max(most, loads)
    return most


@needs_cubins
@of_each
def test_reductions_leave_room_for_other_warps(architecture: str) -> None:
    """Three blocks a multiprocessor for sums of rows, four for pooled lookups."""
    limits = {
        "reduce_lookups": 80,
        "reduce_both": 80,
        "reduce_groups": 80,
        "reduce_rowwise": 80,
        "pool_short": 64,
        "pool_fwd": 64,
    }
    found = resources()[architecture]
    assert not {
        name: numbers["REG"]
        for name, numbers in found.items()
        for kernel, limit in limits.items()
        if name.startswith(f"{kernel}_kernel") and numbers["REG"] > limit
    }


@needs_cubins
def test_a_run_ends_in_one_place_and_loads_do_not_wait_for_each_other() -> None:
    """Code that an instruction cache holds; four rows and more on their way at a time."""
    kernels = machine_code("reduce_(lookups|both|rowwise)_kernel|pool_short_kernel")
    for kernel in ("reduce_lookups", "reduce_both", "reduce_rowwise"):
        sizes = {n: code[-1][0] + 16 for n, code in kernels.items() if n.startswith(kernel)}
        assert max(sizes.values()) <= 40 * 1024, max(sizes, key=lambda name: sizes[name])
    for wide in (
        r"reduce_lookups_kernel<\w+, \w+, [48],",
        r"reduce_rowwise_kernel<\w+, [48], LookupList",
        r"pool_short_kernel<\w+, [48],",
    ):
        found = {n: loads_in_flight(code) for n, code in kernels.items() if re.match(wide, n)}
        assert found and min(found.values()) >= 4, found


def write_table() -> None:
    """Ceilings: what is used now, rounded up to the eight registers that hardware allocates."""
    ceilings = {
        architecture: {
            name: (numbers["REG"] + 7) // 8 * 8 for name, numbers in sorted(kernels.items())
        }
        for architecture, kernels in sorted(resources().items())
        if architecture in ARCHITECTURES
    }
    TABLE.write_text(json.dumps(ceilings, indent=1) + "\n")


if __name__ == "__main__":
    reason = why_not()
    if reason:
        sys.exit(reason)
    if architectures() != ARCHITECTURES:
        sys.exit("AMTL_SOAK=1 compiles for every architecture of the table")
    write_table()
