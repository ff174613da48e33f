"""Bad input that is told of late, as on a GPU: the interpreter's memory in place of a GPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import amtl_kernels as ak
from amtl_kernels import _arguments, reference
from amtl_kernels.triton import check

ROWS, DIM = 5, 4


@pytest.fixture(autouse=True)
def late(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As where nothing has run yet when a lookup returns: returns what lets it run."""
    tell = check.raise_found
    monkeypatch.setattr(check._Asked, "_whence", f"\n{_arguments.FOUND_BEFORE}")
    monkeypatch.setattr(check, "raise_found", lambda like: None)
    # The operators ask at their beginning; only `tell` answers here.
    with ak.use_backend("triton"):
        yield lambda: tell(torch.empty(0))


def lookup(indices: list[int], bounds_check: str = "raise", offsets: Any = None) -> torch.Tensor:
    sizes = torch.full((ROWS,), DIM, dtype=torch.int32)
    options: dict[str, Any] = {"bounds_check": bounds_check}
    if offsets is None:
        return ak.masked_embedding(torch.ones(ROWS, DIM), torch.tensor(indices), sizes, **options)
    arguments = (torch.ones(ROWS, DIM), torch.tensor(indices), torch.tensor(offsets), sizes)
    return ak.masked_embedding_bag(*arguments, **options)


def test_an_error_comes_later_and_once(late: Callable[[], None]) -> None:
    out = lookup([1, 9])
    assert torch.equal(out, torch.ones(2, DIM)), "clamped, so that nothing outside is read"
    with pytest.raises(IndexError, match=r"index 9 at position 1 .* of 5 rows") as caught:
        late()
    assert str(caught.value).endswith(f"\n{_arguments.FOUND_BEFORE}")
    late()
    nothing = torch.empty(0, DIM), torch.tensor([0]), torch.empty(0, dtype=torch.int32)
    assert not ak.masked_embedding(*nothing).any(), "no row to clamp to"
    with pytest.raises(IndexError, match=r"index 0 at position 0 .* of 0 rows"):
        late()
    lookup([1], offsets=[0, 3])
    with pytest.raises(ValueError, match="offsets must end within the 1 indices"):
        late()


def test_a_warning_does_too(late: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_warned_clamped", False)
    lookup([1, 9], "clamp")
    with pytest.warns(RuntimeWarning, match="index 9 at position 1 .* was clamped"):
        late()


def test_checks_under_way_have_places_of_their_own(late: Callable[[], None]) -> None:
    """A graph repeats its check for ever, so its place goes to no other check."""
    findings = check._Findings(pinned=False)
    asked = check._Asked(clamps=False, lookups=1, dims=(4,), late=True)
    kept = findings.slot(asked, captured=True)
    others = {findings.slot(asked, captured=False) for _ in range(2 * check.SLOTS)}
    assert len(others) == check.SLOTS - 1 and kept not in others
    for _ in others:
        findings.slot(asked, captured=True)
    with pytest.raises(RuntimeError, match='with bounds_check="off"'):
        findings.slot(asked, captured=True)
