"""Values of small batches are found in vocabularies of any size, as those of large ones are."""

from __future__ import annotations

import time

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data import finding
from amtl.data.finding import Finder
from amtl.data.vocabulary import Vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = {
    "text": (pl.String, [f"user-{number * 7919:x}" for number in range(300)], "user-0x"),
    "wide integers": (pl.Int64, [(-1) ** n * n * 10**15 for n in range(300)], 5),
}


@settings(max_examples=40)
@given(st.sampled_from(sorted(KINDS)), st.lists(st.integers(-3, 299), max_size=12), st.booleans())
def test_few_values_have_the_rows_that_many_have(kind, picked, collide):
    dtype, known, other = KINDS[kind]
    finder = Finder(pl.Series(known, dtype=dtype), pl.Series(range(300), dtype=pl.Int32).reverse())
    values = [None if p == -1 else other if p < 0 else known[p] for p in picked]
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(finding, "_keys", lambda values: np.zeros(len(values), np.uint64))
        rows = finder.rows(pl.Series(values, dtype=dtype))
    assert rows.tolist() == [299 - p if p >= 0 else -1 for p in picked]


@pytest.mark.parametrize("kind", [*sorted(KINDS), "integers as text"])
def test_a_value_is_found_among_many_without_a_pass_over_them(kind):
    number = 300_000
    ids = np.random.default_rng(0).integers(-(2**62), 2**62, number)
    column = pl.Series(ids)
    if kind == "text":
        column = column.cast(pl.String) + "x"
    vocabulary = Vocabulary.build(column)
    asked = column.cast(pl.String) if kind == "integers as text" else column
    assert torch.equal(vocabulary.encode(asked[:5]), vocabulary.encode(asked)[:5])

    def seconds(rows: int) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            vocabulary.encode(asked[:rows])
            times.append(time.perf_counter() - start)
        return min(times)

    # All of the known ones were hashed for one: as long as for a third of them.
    assert seconds(1) < seconds(number // 3) / 10
