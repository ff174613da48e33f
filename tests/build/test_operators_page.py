"""The page of operators walks through files, and names in them, that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("amtl_kernels", "csrc", "python/amtl", "tests", "bench")
SUFFIXES = (".cpp", ".cu", ".cuh", ".h", ".inl", ".py")


def expanded(name: str) -> list[str]:
    """`a/b.{h,cpp}` as `a/b.h` and `a/b.cpp`."""
    braces = re.search(r"\{(.*?)\}", name)
    if not braces:
        return [name]
    head, tail = name[: braces.start()], name[braces.end() :]
    return [f"{head}{part}{tail}" for part in braces[1].split(",")]


def paths(page: str) -> list[tuple[str, str]]:
    """Files and folders that the page names, each with the name in it that follows `::`, or ''."""
    found = []
    for quoted in re.findall(r"`([^`\s]+)`", page):
        name, _, inside = quoted.partition("::")
        top = name.split("/")[0]
        if name.endswith(SUFFIXES) or re.search(r"\.\{[\w,]+\}$", name) or top in FLOORS:
            found += [(path, inside) for path in expanded(name)]
    return found


def files(path: str) -> list[Path]:
    """What a path from the root means; one that names no room is in any of the floors."""
    if path.split("/")[0] in {floor.split("/")[0] for floor in FLOORS}:
        return sorted(ROOT.glob(path))
    return [file for floor in FLOORS for file in (ROOT / floor).glob(f"**/{path}")]


def missing(page: str) -> list[str]:
    absent = []
    for path, inside in paths(page):
        here = files(path)
        if not (here and any(not inside or inside in file.read_text("utf-8") for file in here)):
            absent.append(f"{path}::{inside}" if inside else path)
    return absent


def test_every_path_named_exists() -> None:
    page = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    assert len(paths(page)) > 50
    assert missing(page) == []


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("`csrc/cuda/gone.cu`", ["csrc/cuda/gone.cu"]),
        ("`csrc/torch/arguments.{h,py}`", ["csrc/torch/arguments.py"]),
        ("`gone.py`, `optim.py`, `torch.ops.amtl`", ["gone.py"]),
        ("`_checks.py::_GONE`, `csrc/cpu/simd_*.h`", ["_checks.py::_GONE"]),
    ],
)
def test_what_is_gone_is_told(text: str, absent: list[str]) -> None:
    assert missing(text) == absent
