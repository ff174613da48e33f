"""Ranges of numbers in text: `10-15`, `$50K-$75K`, `65+`."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from amtl.data import ranges
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.specs import numbers
from amtl.errors import UserError

MIDDLES = {
    "ages": (["25-29", "<25", ">65", "30 – 34"], [27, 25, 65, 32]),
    "in words": (
        ["5 to 10", "under 5", "10 and over", "at least 7", "8 or more"],
        [7.5, 5, 10, 7, 8],
    ),
    "numbers among them": (["2100 - 2850", "1200", "980.5"], [2475, 1200, 980.5]),
    "salaries": (["$50K-$75K (a guess)", "$100K+", "$60-70K"], [62_500, 100_000, 65_000]),
    "years": (["3-5 Yrs", "10+ Yrs", "0 to 1 Yrs"], [4, 10, 0.5]),
    "R's": (["(39,49]", "[0,9]"], [44, 4.5]),
    "pandas'": (["(0.5, 1.5]", "(1.5, inf]", "(-inf, 0.5]"], [1, 1.5, 0.5]),
    "per cent": (["5-10%", "11-20 %", "30+ %"], [7.5, 15.5, 30]),
    "about": (["~3 km", "4 km"], [3, 4]),
    "words": (["3-5", "not told", "7-9", "ask us"], [4, None, 8, None]),
    "below zero": (["-5 - -3", "-3 - 0"], [-4, -1.5]),
}


@pytest.mark.parametrize("case", MIDDLES)
def test_ranges_are_their_middle(case: str) -> None:
    written, expected = MIDDLES[case]
    column = pl.Series("x", [*written, None, "n/a"])
    found = ranges.find(column)
    assert found is not None
    result = ranges.read(column, found.decimal, found.scaled, found.unit)
    assert result.to_list() == [*expected, None, None]


@pytest.mark.parametrize(
    "written",
    [
        ["12-5", "3-1"],
        ["2018-19", "2019-20"],
        ["2019-01-05", "2019-02-11"],
        ["01-05", "02-07"],
        ["1-2-3", "2-3-4"],
        ["A-1", "A-2"],
        ["3-5", "many", "few", "none at all"],
        ["10:00-12:00"],
        ["5 kg-7 lb", "8-9 kg"],
        ["5", "7"],
    ],
)
def test_what_is_no_range_stays_text(written: list[str]) -> None:
    assert ranges.find(pl.Series(written)) is None


def _rows(rows: int = 4000, by_order: bool = True) -> tuple[pl.DataFrame, np.ndarray]:
    """Salaries as ranges of hundreds of values, and labels that follow their order or each."""
    rng = np.random.default_rng(0)
    low = rng.integers(30, 200, rows)
    high = low + rng.integers(1, 4, rows) * 10
    middle = (low + high) / 2
    rate = (middle - 30) / 200 if by_order else rng.random(1000)[(low * 4 + high) % 1000]
    text = [f"${a}K-${b}K" for a, b in zip(low, high, strict=True)]
    return pl.DataFrame({"salary": text}), (rng.random(rows) < rate).astype(np.float64)


def test_ranges_are_numbers_where_labels_say_so() -> None:
    frame, labels = _rows()
    (spec,) = infer_fields(frame, ["salary"], labels=labels)
    assert (spec.kind, spec.ranges, spec.scaled) == ("bucket", True, True)
    assert "ranges of numbers" in spec.note and "--numeric salary=categorical" in spec.note
    assert numbers(pl.Series("salary", ["$40K-$60K"]), spec).to_list() == [50_000]
    frame, labels = _rows(by_order=False)
    assert infer_fields(frame, ["salary"], labels=labels)[0].kind == "categorical"


def test_few_ranges_are_values() -> None:
    frame, labels = _rows()
    few = frame.with_columns(salary=pl.lit("10-") + pl.Series(np.arange(4000) % 9 + 20).cast(str))
    assert infer_fields(few, ["salary"], labels=labels)[0].kind == "categorical"
    (spec,) = infer_fields(few, ["salary"], numeric={"salary": "bucket"}, labels=labels)
    assert (spec.kind, spec.ranges) == ("bucket", True)


def test_a_model_reads_the_ranges_and_numbers_of_rows_to_score() -> None:
    frame, labels = _rows()
    encoder = Encoder.fit(frame, infer_fields(frame, ["salary"], labels=labels))
    encoder = Encoder.from_tensors(*encoder.to_tensors())
    of_range, of_number, of_text, of_word, missing = (
        encoder.transform(pl.DataFrame({"salary": [value]})).rows
        for value in ("$55K - $65K", 60_000, "60K", "much", None)
    )
    assert of_range.equal(of_number) and of_range.equal(of_text)
    assert of_word.equal(missing) and not of_word.equal(of_text)
    with pytest.raises(UserError, match="such as '5x7'"):
        encoder.transform(pl.DataFrame({"salary": ["5x7"]}))
