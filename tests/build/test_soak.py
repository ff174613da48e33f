"""What `make test` leaves out for its time, `make soak` runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLED = re.compile(r'mark\.every\(\d|environ\.get\("AMTL_SOAK"')


def test_every_file_that_is_sampled_is_soaked():
    recipe = re.search(r"^soak:.*?\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert recipe is not None
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"tests/\S+\.py", recipe[0]))
    assert named <= files
    sampled = {name for name in files if SAMPLED.search((ROOT / name).read_text())}
    assert len(sampled) > 5 and sampled <= named
