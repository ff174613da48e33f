from __future__ import annotations

import os

import pytest

from bench import guards


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("AMTL_SOAK", "0") in ("", "0"),
    reason="two minutes a path under valgrind: AMTL_SOAK=1 (make soak) counts instructions",
)
@pytest.mark.parametrize("path", guards.PATHS)
def test_instructions_per_lookup_have_not_risen(path: str) -> None:
    try:
        counts = guards.compare(path)
    except guards.UnavailableError as error:
        pytest.skip(str(error))
    risen = [
        f"{entry.kernel}: {entry.measured} instructions per lookup, recorded {entry.recorded}"
        for entry in counts
        if entry.risen
    ]
    assert not risen, "; ".join(risen)
    assert {entry.kernel for entry in counts} == set(guards.recorded()["paths"][path])


def test_a_rise_beyond_the_bound_is_one() -> None:
    assert guards.Count("avx2", "x", 111.0, 100.0).risen
    assert not guards.Count("avx2", "x", 109.0, 100.0).risen
    assert not guards.Count("avx2", "x", 50.0, 100.0).risen
    assert not guards.Count("avx2", "new", 50.0, None).risen
