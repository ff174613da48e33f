"""Numbers with a unit behind them, and thousands set apart in other countries' ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.notation import find, read
from amtl.data.specs import FieldSpec, numbers
from amtl.errors import UserError

DAY = 86_400.0
READ = {
    "a fraction": (["25.3 kg", "12 kg", " 7kg "], "kg", [25.3, 12.0, 7.0]),
    "a comma": (["25,3 kg", "12 kg"], "kg", [25.3, 12.0]),
    "no space": (["1248CC", "998cc"], "CC", [1248.0, 998.0]),
    "gaps": (["74 bhp", "null bhp", "82.5 bhp"], "bhp", [74.0, None, 82.5]),
    "pandas": (["5 days 06:59:00", "0 days 00:00:01.5"], "seconds", [457_140.0, 1.5]),
    "a plural": (["7 days", "1 day", "-3 days"], "days", [7.0, 1.0, -3.0]),
    "two words": (["1,200.5 sq ft", "980 sq ft"], "sq ft", [1200.5, 980.0]),
    "degrees": (["40 °C", "-1.5 °C"], "°C", [40.0, -1.5]),
    "inches": (['15.6"', '14"'], '"', [15.6, 14.0]),
    "hours and minutes": (["2h 5m", "5m", "19h", "1h30m"], "seconds", [7500, 300, 68_400, 5400]),
    "long words": (
        ["2 hours 5 minutes", "1 hour, 1 second", "90 min."],
        "seconds",
        [7500, 3601, 5400],
    ),
    "ages": (
        ["1 year", "3 weeks", "2 days", "1 month"],
        "seconds",
        [365.25 * DAY, 21 * DAY, 2 * DAY, 30.4375 * DAY],
    ),
    "files": (["12.5 kB", "3 MB", "500 B", "2KiB"], "bytes", [12_500.0, 3e6, 500.0, 2048.0]),
    "a comma, files": (["1,5 MB", "300 kB"], "bytes", [1.5e6, 3e5]),
    "heights": (["5'11\"", "6 ft"], "metres", [1.8034, 1.8288]),
    "short times": (["20ms", "3m"], "seconds", [0.02, 180.0]),
    "sizes": (["5MB", "10MB"], "MB", [5.0, 10.0]),
    "weights": (["500 g", "1.2 kg"], "grams", [500.0, 1200.0]),
}


@pytest.mark.parametrize("case", READ)
def test_numbers_with_units_are_read(case: str) -> None:
    written, unit, expected = READ[case]
    column = pl.Series("x", [*written, None, "n/a"])
    found = find(column)
    assert found is not None and (found.unit, found.doubt) == (unit, "")
    assert f"the unit {unit}" in found.marks or f"units, converted to {unit}" in found.marks
    result = read(column, found.decimal, found.scaled, found.unit)
    expected = pl.Series(expected, dtype=pl.Float64, strict=False)
    np.testing.assert_allclose(result[: len(written)].to_numpy(), expected.to_numpy(), rtol=1e-12)
    assert result[len(written) :].null_count() == 2


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["42 Lac", "₹1.40 Cr."], None),
        (["42 Lac", "1.40 Cr", "3 crores"], [42e5, 1.4e7, 3e7]),
        (["$2.5 million", "$300 thousand", "$1,250"], [2.5e6, 3e5, 1250.0]),
        (["2,5 Mio €", "1 Mrd €"], [2.5e6, 1e9]),
        (["3 Lacoste", "4 Lacoste"], [3.0, 4.0]),
        (["12 Cr", "13 Dr"], None),
    ],
)
def test_words_stand_for_thousands_and_more(
    written: list[str], expected: list[float] | None
) -> None:
    found = find(pl.Series(written))
    assert (found is None) == (expected is None)
    if found and expected:
        assert not found.doubt and ("words for" in found.marks) == (max(expected) > 4)
        result = read(pl.Series(written), found.decimal, found.scaled, found.unit)
        assert result.to_list() == expected
    # As models had them for which such a word was a unit.
    assert read(pl.Series(["42 Lac"]), ".", unit="Lac").to_list() == [42.0]


@pytest.mark.parametrize(
    "written",
    [
        ["12A", "14B", "15C"],
        ["12A", "14A"],
        ["4711DE", "4712DE"],
        ["21st", "22nd"],
        ["24th", "25th"],
        ["3 Jan", "14 Feb"],
        ["12 Main St", "9 High St"],
        ["23.4 kmpl", "18 km/kg"],
        ["3 kg", "5 litres"],
        ["00123 kg", "12 kg"],
        ["2h 5kg", "5m 3s"],
        ["1 234", "2 345"],
        ["3 kg", "heavy"],
        ["$3 kg", "$4 kg"],
        ["kg", "g"],
    ],
)
def test_what_is_no_number_with_a_unit_stays_text(written: list[str]) -> None:
    assert find(pl.Series("x", written)) is None


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["CHF 1'234.50", "CHF 12"], [1234.5, 12.0]),
        (["1 234,50 €", "12,00 €"], [1234.5, 12.0]),
        (["1 234 567,5", "-12,25"], [1_234_567.5, -12.25]),
        (["1\u202f234,50", "12,00"], [1234.5, 12.0]),
        (["1'234", "2’345’678"], [1234.0, 2_345_678.0]),
        (["1\u00a0234", "12"], [1234.0, 12.0]),
        (["US$4,128.00", "US$3"], [4128.0, 3.0]),
        (["₹ 12,500.5", "₹ 3"], [12_500.5, 3.0]),
        (["Rs. 350", "Rs. 20"], [350.0, 20.0]),
        (["12,50 zł", "3 zł"], [12.5, 3.0]),
    ],
)
def test_thousands_and_currencies_of_other_countries(
    written: list[str], expected: list[float]
) -> None:
    found = find(pl.Series("x", written))
    assert found is not None and found.marks and not found.doubt
    column = pl.Series("x", written)
    assert read(column, found.decimal, found.scaled, found.unit).to_list() == expected


THOUSANDS = range(1001, 99_999, 4567)


@pytest.mark.parametrize(
    ("mark", "form", "more", "sure"),
    [
        (",", "{}", ["12", "980"], True),
        (".", "{}", ["12", "-3"], True),
        (",", "US$ {}", [], True),
        (".", "{} €", [], True),
        (",", "{} kg", ["7 kg"], True),
        (",", "{}", [], False),
        (",", "{} %", [], False),
        (",", "{}", ["1200"], False),
        (",", "{}", ["1.234"], False),
    ],
)
def test_thousands_are_told_from_decimals(
    mark: str, form: str, more: list[str], sure: bool
) -> None:
    plain = [f"{number:,}".replace(",", mark) for number in THOUSANDS]
    column = pl.Series("x", [form.format(text) for text in plain] + more)
    found = find(column)
    assert found is not None and bool(found.doubt) != sure
    if sure:
        result = read(column, found.decimal, found.scaled, found.unit)
        assert result[: len(plain)].to_list() == list(map(float, THOUSANDS))
    # Of a few numbers, or with one digit before them all, nobody can say.
    assert find(column[:3]) is None or find(column[:3]).doubt  # type: ignore[union-attr]
    fuel = pl.Series("x", [f"{1 + i / 1000:.3f} €".replace(".", mark) for i in range(1, 90)])
    assert find(fuel).doubt  # type: ignore[union-attr]


def test_different_units_are_told_of() -> None:
    written = [f"{i / 10} {'kmpl' if i % 3 else 'km/kg'}" for i in range(60)]
    (field,) = infer_fields(pl.DataFrame({"x": written}), ["x"])
    assert field.kind == "categorical"
    assert "'0.0 km/kg' and '0.1 kmpl', cannot be compared" in field.note


def data(rows: int = 2000) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    weight = pl.Series("weight", rng.integers(10, 500, rows) / 10).cast(pl.String) + " kg"
    term = pl.Series("term", rng.choice([36, 60], rows)).cast(pl.String) + " months"
    return pl.DataFrame({"weight": weight, "term": term})


def test_a_column_of_them_is_a_number_and_is_read_so_again() -> None:
    frame = data()
    weight, term = infer_fields(frame, frame.columns, values=True)
    assert (weight.kind, weight.unit, weight.value) == ("bucket", "kg", True)
    assert "the unit kg" in weight.note and "--numeric weight=categorical" in weight.note
    # Of few values each is one of its own.
    assert (term.kind, term.unit, term.note) == ("categorical", "", "")
    (told,) = infer_fields(frame, ["term"], numeric={"term": "standardise"})
    assert (told.kind, told.unit) == ("standardise", "months")
    (kept,) = infer_fields(frame, ["weight"], numeric={"weight": "categorical"})
    assert (kept.kind, kept.unit) == ("categorical", "")

    encoder = Encoder.fit(frame, [weight, term])
    rows = encoder.transform(frame)
    again = Encoder.from_tensors(*encoder.to_tensors())
    assert again.fields == [replace(weight), replace(term)]
    plain = frame.with_columns(pl.col("weight").str.strip_suffix(" kg").cast(pl.Float64))
    for other in (frame, plain, frame.with_columns(pl.col("weight").str.to_uppercase())):
        scored = again.transform(other)
        assert scored.rows.equal(rows.rows) and scored.dense.equal(rows.dense)


def test_a_word_for_nothing_needs_a_unit_to_stand_before() -> None:
    for spec in (FieldSpec("x", "bucket"), FieldSpec("x", "bucket", decimal=".")):
        with pytest.raises(UserError, match="'none here' where numbers are needed"):
            numbers(pl.Series("x", ["3.5", "none here"]), spec)


def test_another_unit_than_training_had_is_refused() -> None:
    spec = FieldSpec("weight", "bucket", decimal=".", unit="kg")
    for written in (["12.5 lb", "3 lb"], ["12 kg", "3 lb"], ["12 kg", "500 g"]):
        with pytest.raises(UserError, match=r"weight.*(lb|g)' where numbers in kg are needed"):
            numbers(pl.Series("weight", written), spec)
    assert numbers(pl.Series("weight", ["2,500.5 kg", "3"]), spec).to_list() == [2500.5, 3.0]
    times = FieldSpec("took", "bucket", decimal=".", unit="seconds")
    for bare in ([125, 3], ["125", "3"], ["2h", "3"]):
        with pytest.raises(UserError, match="numbers with their units, which training had conv"):
            numbers(pl.Series("took", bare), times)
    assert numbers(pl.Series("took", ["3 days", "1h 1s", None]), times).fill_nan(
        None
    ).to_list() == [
        3 * DAY,
        3601.0,
        None,
    ]
