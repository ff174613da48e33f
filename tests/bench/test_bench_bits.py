from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import amtl_kernels
from bench import bits


def some(form: str) -> list[bits.Case]:
    """Cases of a form that differ in the number of threads only, of several kinds."""
    every = [case for case in bits.cases() if case.form == form and case.dim == 64]
    return [case for number, case in enumerate(every) if number // 3 % 8 == 0]


@pytest.fixture(autouse=True)
def threads_as_they_were() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_names_tell_cases_apart() -> None:
    every = list(bits.cases())
    assert len({case.name() for case in every}) == len(every) == 2205
    for field, values in (("rule", 5), ("pooled", 4), ("dim", 5), ("dtype", 2), ("threads", 3)):
        assert len({getattr(case, field) for case in every}) == values


@pytest.mark.parametrize("form", bits.FORMS)
def test_results_are_those_of_one_thread_bit_for_bit(form: str) -> None:
    cases = some(form)
    assert len(cases) >= 12
    for _, same in itertools.groupby(cases, lambda case: case._replace(threads=1)):
        assert len({bits.bits(case) for case in same}) == 1


def test_another_order_of_sums_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if amtl_kernels.backend.native is None:
        pytest.skip("the reference answers here: make builds the operators")
    cases = [case for case in some("masked") if case.pooled == "sum" and case.threads == 1]
    native = {case.name(): bits.bits(case) for case in cases}
    with amtl_kernels.use_backend("reference"):
        other = {case.name(): bits.bits(case) for case in cases}
    assert set(bits.compare(native, other)) == set(native)
    for name, found in (("before", native), ("after", other)):
        (tmp_path / name).write_text(json.dumps(found))
    before, after = str(tmp_path / "before"), str(tmp_path / "after")
    assert bits.main(["--compare", before, before]) == 0
    assert bits.main(["--compare", before, after]) == 1
    assert f"{len(cases)} differ" in capsys.readouterr().out
