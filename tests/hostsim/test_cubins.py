"""What nvcc made of the kernels: registers, spills, local memory, widths of loads.

Reads the machine code inside of the built module with ``cuobjdump`` (of the CUDA toolkit or of the
Triton wheel); no GPU and no second compilation. ``python tests/hostsim/test_cubins.py`` writes the
table of register ceilings anew after a change that is meant.
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

import amtl_kernels

TABLE = Path(__file__).with_name("register_ceilings.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# A GPU has 65,536 registers a multiprocessor: with these, four or two blocks of 256 threads fit.
OURS = re.compile(r"\b(\w+_kernel)\b")


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def module_path() -> Path | None:
    spec = find_spec("amtl_kernels._C")
    return Path(spec.origin) if spec is not None and spec.origin else None


def why_not() -> str | None:
    native = amtl_kernels.build_info()["native"]
    if not str(native.get("cuda", "")).startswith("on"):  # type: ignore[attr-defined]
        return "this build has no CUDA kernels: put nvcc on PATH and build with AMTL_CUDA=on"
    if cuobjdump() is None:
        return "no cuobjdump: install the CUDA toolkit, or `pip install triton`, which holds one"
    return None


needs_cubins = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def dump(*options: str) -> str:
    command = [cuobjdump() or "cuobjdump", *options, str(module_path())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


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
    text = dump("--dump-resource-usage")
    found: dict[str, dict[str, dict[str, int]]] = {}
    architecture = ""
    name = ""
    raw = []
    for line in text.splitlines():
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
    assert set(ARCHITECTURES) <= set(found)
    counts = {architecture: len(found[architecture]) for architecture in ARCHITECTURES}
    assert len(set(counts.values())) == 1 and min(counts.values()) > 100
    ptx = dump("--list-ptx")
    assert "sm_100" in ptx, "later cards compile from PTX"


@needs_cubins
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(architecture: str) -> None:
    bad = {
        name: numbers
        for name, numbers in resources()[architecture].items()
        if numbers["LOCAL"] or numbers["STACK"]
    }
    assert not bad


@needs_cubins
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_stay_under_their_ceilings(architecture: str) -> None:
    ceilings = json.loads(TABLE.read_text())[architecture]
    found = {name: numbers["REG"] for name, numbers in resources()[architecture].items()}
    assert set(found) == set(ceilings), "kernels came or went: run this file to update the table"
    above = {name: (n, ceilings[name]) for name, n in found.items() if n > ceilings[name]}
    assert not above


@needs_cubins
@pytest.mark.parametrize("kernel", ["lookup_fwd_kernel", "pool_fwd_kernel", "pool_psw_bwd_kernel"])
def test_tables_are_read_and_written_in_16_byte_vectors(kernel: str) -> None:
    """Every wide instantiation loads rows by 128-bit instructions, several before the first use."""
    symbols = {
        name
        for name in re.findall(r"Function (\S+):", dump("--dump-resource-usage", "-arch", "sm_90"))
        if kernel in name
    }
    names = demangled(tuple(sorted(symbols)))
    wide = [
        symbol
        for symbol, name in names.items()
        if re.search(r"<float, 4|<__half, 8|<bf16, 8", name)
    ]
    assert len(wide) == 6, "three types, dense and tiered"
    for symbol in wide:
        sass = dump("-sass", "-arch", "sm_90", "-fun", symbol)
        instructions = re.findall(r"\b(LDG\S*|STG\S*|LDL\S*|STL\S*)", sass)
        assert sum(i.startswith("LDG.E.128") for i in instructions) >= 4, names[symbol]
        assert not any(i.startswith(("LDL", "STL")) for i in instructions), names[symbol]
        if kernel == "lookup_fwd_kernel":
            assert any(re.match(r"STG\.E\S*\.128", i) for i in instructions), names[symbol]


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
    write_table()
