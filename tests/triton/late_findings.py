"""Bad input that is told of after the call it came with: what a GPU does, and what stands for it.

``tell`` is whatever tells: a later call, ``synchronize``, or what a test puts in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import amtl_kernels as ak
from amtl_kernels import _arguments, reference

ROWS, DIM = 5, 4


def lookup(device: str, indices: list[int], *, offsets: Any = None, **options: Any) -> torch.Tensor:
    """A lookup in a table of ones, in bags if there are offsets."""
    table = torch.ones(ROWS, DIM, device=device)
    sizes = torch.full((ROWS,), DIM, dtype=torch.int32, device=device)
    ids = torch.tensor(indices, device=device)
    if offsets is None:
        return ak.masked_embedding(table, ids, sizes, **options)
    starts = torch.tensor(offsets, device=device)
    return ak.masked_embedding_bag(table, ids, starts, sizes, **options)


def errors_come_later_and_once(device: str, tell: Callable[[], object]) -> None:
    """Of an index, a table without rows, offsets."""
    out = lookup(device, [1, 9])
    ones = torch.ones(2, DIM, device=device)
    assert torch.equal(out, ones), "clamped, so that nothing outside is read"
    with pytest.raises(IndexError, match=r"index 9 at position 1 .* of 5 rows") as caught:
        tell()
    assert str(caught.value).endswith(f"\n{_arguments.FOUND_BEFORE}")
    tell()
    none = torch.empty(0, DIM, device=device)
    sizes = torch.empty(0, dtype=torch.int32, device=device)
    zero = torch.tensor([0], device=device)
    assert not ak.masked_embedding(none, zero, sizes).any(), "no row to clamp to"
    with pytest.raises(IndexError, match=r"index 0 at position 0 .* of 0 rows"):
        tell()
    lookup(device, [1], offsets=[0, 3])
    with pytest.raises(ValueError, match="offsets must end within the 1 indices"):
        tell()


def a_clamped_index_is_told_of_later(
    device: str, tell: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a warning, and by none before ``tell``."""
    monkeypatch.setattr(reference, "_warned_clamped", False)
    out = lookup(device, [1, 9], bounds_check="clamp")
    assert torch.equal(out, torch.ones(2, DIM, device=device))
    assert not reference._warned_clamped
    with pytest.warns(RuntimeWarning, match="index 9 at position 1 .* was clamped"):
        tell()
