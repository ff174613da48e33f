from __future__ import annotations

import datetime as dt
import decimal
import json
import re
import shlex

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data import moments
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields, numbers
from amtl.data.labels import label_note, labelled, read_labels
from amtl.data.lists import WORDS
from amtl.data.splits import split_rows
from amtl.errors import UserError
from amtl.settings import parse_columns

N = 4000
rng = np.random.default_rng(0)
MOMENTS = [dt.datetime(2020, 1, 1) + dt.timedelta(minutes=7 * i) for i in range(N)]


def spec(values, **options):
    series = pl.Series("x", values, strict=False)
    return infer_fields(pl.DataFrame({"x": series}), ["x"], **options)[0]


def with_gaps(values):
    return np.where(np.arange(len(values)) % 9 == 0, np.nan, values.astype(float))


IDS = {
    "an int column with gaps": with_gaps(rng.integers(1, 900, N)),
    "ids of seven digits": rng.integers(1_000_000, 9_999_999, 500)[rng.integers(0, 500, N)] * 1.0,
    "long-tailed ids": with_gaps(rng.permutation(3000)[np.minimum(rng.zipf(1.3, N), 3000) - 1]),
    "ids and a far sentinel": np.where(rng.random(N) < 0.1, 1e9, rng.integers(0, 900, N)),
    "negative ids": -1.0 * rng.integers(0, 900, N),
    "ratings": 1.0 * rng.integers(1, 6, N),
    "decimals": [decimal.Decimal(int(i)) for i in rng.integers(0, 900, N)],
}
AMOUNTS = {
    "prices": np.round(rng.lognormal(6, 1, N)),
    "counts": np.floor(rng.exponential(300, N)),
    "seconds": 1.6e9 + rng.integers(0, 10**8, N),
}


@pytest.mark.parametrize("name", IDS)
def test_whole_numbers_held_as_floats_are_ids_and_said_to_be(name):
    field = spec(IDS[name])
    assert field.kind == "categorical"
    assert "--numeric x=bucket" in field.note
    assert spec(IDS[name], numeric={"x": "bucket"}).kind == "bucket"


def test_two_numbers_are_no_amounts_and_nothing_is_said_of_them():
    field = spec(with_gaps(rng.integers(0, 2, N)))
    assert (field.kind, field.note) == ("categorical", "")
    assert spec(with_gaps(rng.integers(0, 3, N))).note


@pytest.mark.parametrize("name", AMOUNTS)
def test_whole_numbers_that_are_amounts_stay_numbers_and_are_said_to(name):
    field = spec(AMOUNTS[name])
    assert field.kind == "bucket"
    assert "--numeric x=categorical" in field.note
    assert spec(AMOUNTS[name], numeric={"x": "categorical"}).kind == "categorical"


def whole(values):
    return pl.Series("x", np.asarray(values).astype(np.int64))


def drawn(values, rows=30_000, steep=1.0):
    """Some values are popular, and which ones has nothing to do with their size."""
    share = np.arange(1, len(values) + 1) ** -steep
    return whole(rng.choice(rng.permutation(values), rows, p=share / share.sum()))


CENTS = np.random.default_rng(4).lognormal(9.5, 1.3, 30_000)
INCOMES = np.random.default_rng(5).lognormal(10.5, 0.6, 30_000)
INTEGER_AMOUNTS = {
    "cents": whole(CENTS),
    "cents, few": whole(CENTS[:900]),
    "cents, each its own": whole(CENTS[:2000] * 10),
    "incomes in tens": whole(np.round(INCOMES, -1)),
    "incomes, half of them in thousands": whole(
        [round(x, -3 if i % 2 else 0) for i, x in enumerate(INCOMES)]
    ),
    "balances": whole(np.where(rng.random(30_000) < 0.08, 0, CENTS / 10 - 300)),
    "cents with gaps": whole(CENTS).set(pl.Series(np.arange(30_000) % 9 == 0), None),
}
INTEGER_IDS = {
    "dense": drawn(np.arange(5000)),
    "seldom": drawn(np.arange(20_000), steep=0.2),
    "sampled": drawn(rng.choice(10**7, 5000, replace=False)),
    "hashed": drawn(rng.integers(-(2**63), 2**63 - 1, 3000)),
    "hashed, unsigned": drawn(rng.integers(0, 2**63 - 1, 3000)).cast(pl.UInt64) + 2**63,
    "growing, with new ones": whole(np.arange(30_000) // 4 + rng.integers(0, 900, 30_000)),
    "thinning out": drawn((8e8 * rng.beta(0.5, 3, 9000)).astype(int), steep=0.8),
    "mostly of films before 2010": drawn([*range(1, 8900, 2), *rng.integers(25_000, 190_000, 900)]),
    "by popularity": whole(np.minimum(rng.zipf(1.3, 30_000), 3000)),
    "by popularity, without end": whole(np.minimum(rng.zipf(1.3, 30_000), 2**40)),
    "counts": whole(rng.exponential(300, N)),
    "years": whole(rng.integers(1920, 2020, 1500)),
}


@pytest.mark.parametrize("name", INTEGER_AMOUNTS)
def test_integers_that_cannot_be_ids_are_numbers_and_are_said_to_be(name):
    field = spec(INTEGER_AMOUNTS[name])
    assert field.kind == "bucket"
    assert field.note.startswith("integers that thin out upward with gaps, as amounts do, ")
    assert "--numeric x=categorical" in field.note
    assert spec(INTEGER_AMOUNTS[name], default_numeric="standardise").kind == "standardise"
    assert spec(INTEGER_AMOUNTS[name], numeric={"x": "categorical"}).kind == "categorical"


@pytest.mark.parametrize("name", INTEGER_IDS)
def test_integers_that_may_be_ids_are_ids_and_few_rows_of_each_are_told(name):
    field = spec(INTEGER_IDS[name])
    rows = len(INTEGER_IDS[name]) / INTEGER_IDS[name].n_unique()
    assert field.kind == "categorical"
    assert bool(field.note) == (rows < 20)
    assert not field.note or field.note == (
        f"integers, {rows:.1f} rows a value; --numeric x=bucket takes it as a number"
    )
    told = spec(INTEGER_IDS[name], default_numeric="standardise")
    assert told.kind == "categorical" and "--numeric x=standardise" in told.note


def clicks(rates, seed=0):
    return (np.random.default_rng(seed).random(len(rates)) < rates) * 1.0


# Of 1.5 rows a value, or few rows of all, nothing can be told of the single ones.
@pytest.mark.parametrize("name", sorted({*INTEGER_IDS} - {"seldom", "counts"}))
def test_ids_stay_ids_whose_labels_are_their_own(name):
    column = INTEGER_IDS[name]
    code = np.unique(column.to_numpy(), return_inverse=True)[1]
    # And the later ones are liked better.
    liked = np.random.default_rng(1).random(code.max() + 1)[code]
    rates = 0.2 + 0.2 * code / code.max() + 0.4 * liked
    assert spec(column, labels=clicks(rates)).kind == "categorical"


SPREAD = whole(np.random.default_rng(6).integers(0, 20_000, 30_000))
RATES = 0.2 + 0.6 * SPREAD.to_numpy() / 20_000


@pytest.mark.parametrize(
    "held", ["integers", "floats", "digits", "digits with gaps", "unique", "unique digits"]
)
def test_labels_that_follow_the_order_make_numbers(held):
    column, rates = SPREAD, RATES
    if held == "floats":
        column = column.cast(pl.Float64)
    elif "unique" in held:
        # Spread over a range of 30 times as many.
        column = whole(np.random.default_rng(7).choice(600_000, 20_000, replace=False))
        rates = 0.2 + 0.6 * column.to_numpy() / 600_000
    labels, values = clicks(rates), column.to_numpy()
    if "digits" in held:
        column = column.cast(pl.String).str.zfill(7)
    if "gaps" in held:
        column = column.scatter([3, 4, 5, 6], ["", "NA", None, "-5"])
    before = spec(column).kind
    assert before == ("unused" if "unique" in held else "categorical")
    field = spec(column, labels=labels)
    assert field.kind == "bucket" and "near which labels are alike: a number" in field.note
    assert spec(column, labels=labels, default_numeric="standardise").kind == "standardise"
    assert spec(column, labels=labels, default_numeric="categorical").kind != "bucket"
    assert spec(column, labels=labels, numeric={"x": "categorical"}).kind == "categorical"
    # Rows that do not train have no say, nor has chance.
    labels[values % 97 > 0] = np.nan
    labels[np.flatnonzero(~np.isnan(labels))[40:]] = np.nan
    assert spec(column, labels=labels).kind == before


CITIES = np.array(["köln", "bonn", "ulm", "jena"])


def cities(told_apart=0.0):
    """Cities in several spellings, and labels that follow them, or their spelling, too."""
    rng = np.random.default_rng(3)
    city, way = rng.integers(0, 4, 4000), rng.integers(0, 3, 4000)
    ways = (str.upper, str.title, lambda text: f" {text} ")
    texts = [ways[w](text) for text, w in zip(CITIES[city], way, strict=True)]
    return pl.Series("x", texts), clicks(0.1 + 0.15 * city + told_apart * (way == 0))


def test_spellings_that_tell_nothing_are_one_value():
    column, labels = cities()
    field = spec(column, labels=labels)
    assert field.folded and "12 texts are 4 but for case and spaces" in field.note
    encoder = Encoder.fit(column.to_frame(), [field])
    assert encoder.field_sizes == [5]
    again = Encoder.from_tensors(*encoder.to_tensors())
    scored = pl.DataFrame({"x": ["KöLN", "köln ", "Köln", "bern"]})
    rows = again.transform(scored).rows[:, 0].tolist()
    assert len(set(rows[:3])) == 1 and rows[3] != rows[0]
    assert again.transform(scored.cast(pl.Categorical)).rows[:, 0].tolist() == rows
    assert not spec(column).folded
    assert not spec(column, labels=labels, numeric={"x": "categorical"}).folded


def test_spellings_that_labels_tell_apart_are_values_of_their_own():
    column, labels = cities(told_apart=0.2)
    field = spec(column, labels=labels)
    assert not field.folded and not field.note
    # Ids of mixed case are hardly ever the same but for that.
    rng = np.random.default_rng(4)
    letters = np.array(list("abcdefghABCDEFGH"))
    ids = pl.Series("x", ["".join(letters[rng.integers(0, 16, 8)]) for _ in range(500)] * 4)
    assert not spec(ids, labels=clicks(np.full(2000, 0.3))).folded


@pytest.mark.parametrize(
    ("values", "rows", "kind"),
    [
        (1440, 30_000, "bucket"),
        (200, 30_000, "bucket"),
        (200, 50_000, "categorical"),
        (60, 9_000, "categorical"),
    ],
)
def test_hundreds_of_values_of_some_rows_may_be_numbers(values, rows, kind):
    """A minute of the day is no id where labels rise and fall with it."""
    column = whole(np.random.default_rng(6).integers(0, values, rows))
    code = column.to_numpy()
    labels = clicks(0.4 + 0.3 * np.sin(2 * np.pi * code / values))
    assert spec(column, labels=labels).kind == kind
    liked = np.random.default_rng(8).random(values)[code]
    assert spec(column, labels=clicks(liked)).kind == "categorical"
    many = whole(np.tile(np.arange(1440), 250))
    labels = clicks(0.4 + 0.3 * np.sin(2 * np.pi * many.to_numpy() / 1440))
    assert spec(many, labels=labels).kind == "categorical"


def test_values_that_rarely_come_again_and_tell_nothing_are_numbers():
    """A counter of seconds would be most of the table, and of no use on rows to come."""
    noise = clicks(np.full(len(SPREAD), 0.3))
    field = spec(SPREAD, labels=noise)
    assert field.kind == "bucket" and "of which single ones tell nothing of labels" in field.note
    assert spec(SPREAD.cast(pl.Float64), labels=noise).kind == "bucket"
    assert spec(SPREAD, labels=noise, numeric={"x": "categorical"}).kind == "categorical"
    assert spec(whole(SPREAD.to_numpy() // 4), labels=noise).kind == "bucket"
    popular = drawn(np.arange(20_000), rows=20_000)
    assert 2 < len(popular) / popular.n_unique() < 8
    assert spec(popular, labels=noise[:20_000]).kind == "categorical"
    # Of many rows a value, of single ones that tell, of few rows, and without labels ids stay ids.
    often = whole(SPREAD.to_numpy() // 8)
    assert spec(often, labels=noise).kind == "categorical"
    liked = np.random.default_rng(1).random(20_000)[SPREAD.to_numpy()] < 0.3
    assert spec(SPREAD, labels=clicks(0.1 + 0.8 * liked)).kind == "categorical"
    few = np.where(np.arange(len(SPREAD)) < 150, noise, np.nan)
    assert spec(SPREAD, labels=few).kind == spec(SPREAD).kind == "categorical"


def test_popular_ids_are_no_neighbourhood():
    """Most of what is near one of them is itself."""
    rng = np.random.default_rng(3)
    share, rates = np.full(4000, 0.2 / 3945), np.full(4000, 0.3)
    share[:55], rates[:55] = 0.8 / 55, rng.choice([0.15, 0.45], 55)
    rows = rng.choice(4000, 20_000, p=share)
    ids = rng.permutation(4000)[rows] * 7
    assert spec(whole(ids), labels=clicks(rates[rows])).kind == "categorical"


@pytest.mark.parametrize("held", ["moments", "text"])
def test_moments_of_which_some_come_again_are_numbers_where_labels_say_so(held):
    late = np.random.default_rng(3).integers(0, 1500, 4500)
    when = pl.Series("x", 1_704_067_200_000_000 + late * 7 * 3_600_000_000).cast(pl.Datetime("us"))
    column = when.dt.to_string("%d.%m.%Y %H:%M") if held == "text" else when
    field = spec(column, labels=clicks(0.2 + 0.6 * late / 1500))
    assert field.kind == "bucket" and field.note.startswith("dates or times, 3.")
    assert "--split order:x" in field.note
    assert numbers(column, field).rank().to_list() == pl.Series(late).rank().to_list()
    own = np.random.default_rng(1).random(1500)[late]
    assert spec(column, labels=clicks(own)).kind == "categorical"


def test_many_rows_are_judged_by_all_those_of_some_values():
    """Of every third row no value would come again."""
    rows = np.random.default_rng(3).integers(0, 400_000, 450_000)
    liked = np.random.default_rng(1).random(400_000)[rows] < 0.3
    assert spec(whole(rows), labels=clicks(0.3 + 0.15 * liked)).kind == "categorical"
    assert spec(whole(rows), labels=clicks(np.full(len(rows), 0.3))).kind == "bucket"


def test_rows_that_are_numbered_in_the_order_of_their_labels_are_no_numbers():
    labels = np.repeat([0.0, 1.0], N // 2)
    assert spec(np.arange(N), labels=labels).kind == "unused"


def test_integers_on_both_sides_of_zero_are_numbers():
    assert spec(rng.integers(-60, 61, N)).kind == "bucket"
    # One value for what is missing, a few codes, and hashes of 32 bits.
    assert spec(np.where(rng.random(N) < 0.1, -1, rng.integers(0, 90, N))).kind == "categorical"
    assert spec(rng.integers(-5, 6, N)).kind == "categorical"
    assert spec(drawn(rng.integers(-(2**31), 2**31, 3000))).kind == "categorical"


@pytest.mark.parametrize(("rows", "buckets"), [(60, 8), (4000, 13), (30_000, 64)])
def test_few_rows_make_few_buckets(rows, buckets):
    frame = pl.DataFrame({"x": np.random.default_rng(0).random(2 * rows)})
    trains = torch.arange(rows) * 2
    encoder = Encoder.fit(frame, infer_fields(frame, ["x"]), rows=trains)
    assert len(encoder.transform(frame).rows.unique()) == buckets


def test_numbers_with_a_fraction_need_no_word():
    assert (spec(rng.random(N)).kind, spec(rng.random(N)).note) == ("bucket", "")
    assert spec([decimal.Decimal(int(i)) / 4 for i in range(9)]).kind == "bucket"
    assert spec([1.0, float("inf"), 2.5]).kind == "bucket"
    assert spec([1.0, float("inf"), 2.0]).kind == "bucket"


def test_ids_that_a_float_has_merged_are_no_ids():
    field = spec(2.0**60 + 1024 * np.arange(40))
    assert field.kind == "bucket"
    assert "integers or text" in field.note
    frame = pl.DataFrame({"x": 2.0**60 + 1024 * np.arange(40)})
    with pytest.raises(UserError, match="integers or text"):
        Encoder.fit(frame, infer_fields(frame, ["x"], numeric={"x": "categorical"}))


@pytest.mark.parametrize(
    ("value", "kind", "note"),
    [
        (None, "unused", "holds nothing in the rows that train"),
        ("a", "unused", "always 'a' in the rows that train"),
        (["a"], "bag", ""),
        ([], "bag", ""),
    ],
)
@pytest.mark.parametrize("later", [1, 40])
def test_what_only_later_rows_hold_is_left_out(value, kind, note, later):
    """A field that was introduced last week: no row of it is trained."""
    other = ["b"] if isinstance(value, list) else "b"
    frame = pl.DataFrame({"x": [*[value] * (N - later), *[other] * later]})
    labels = np.arange(N) % 2.0
    labels[-later:] = np.nan
    (field,) = infer_fields(frame, ["x"], labels=labels)
    assert (field.kind, field.note) == (kind, note)
    labels[-1] = 1.0
    (field,) = infer_fields(frame, ["x"], labels=labels)
    assert field.kind != "unused"
    (field,) = infer_fields(frame, ["x"])
    assert field.kind != "unused"


@pytest.mark.parametrize(
    ("values", "kind", "note"),
    [
        (["a"] * N, "unused", "always 'a'"),
        ([None] * N, "unused", "holds nothing"),
        ([float("nan")] * N, "bucket", ""),
        (["a", None] * (N // 2), "categorical", ""),
        (list(range(N)), "unused", "--numeric x=bucket"),
        ([f"k{i}" for i in range(N)], "unused", "--numeric x=categorical"),
        ([*range(N - 1), 0], "unused", "3,999 values in 4,000 rows: next to nothing to learn"),
        ([None, *range(N - 1)], "unused", "--numeric x=categorical keeps it"),
        ([*range(N * 9 // 10), *[0] * (N // 10)], "categorical", "integers, 1.1 rows a value"),
        (MOMENTS, "bucket", "4,000 dates or times, 1.0 rows each, taken as numbers"),
        (MOMENTS, "bucket", "--split order:x trains on the earlier rows"),
        (MOMENTS[:999], "categorical", "999 dates or times, each its own; --numeric x=bucket"),
        (MOMENTS[:999], "categorical", "--split order:x trains on the earlier rows"),
        (
            [dt.time(i // 60 % 24, i % 60) for i in range(999)],
            "categorical",
            "takes it as a number",
        ),
        ([int(m.timestamp()) for m in MOMENTS[:999]], "categorical", "times since 1970, each its"),
        ([int(m.timestamp() * 1e3) for m in MOMENTS], "unused", "--split order:x trains"),
        (
            [int(m.timestamp()) // 8 for m in MOMENTS[:999]],
            "categorical",
            "1.0 rows a value; --num",
        ),
        ([f"{m:%Y-%m-%d}" for m in MOMENTS], "categorical", ""),
        ([f"{m:%Y-%m-%d %H}:00" for m in MOMENTS], "categorical", "--numeric x=bucket"),
        (
            [f"{m:%b %d %Y %H}:00" for m in MOMENTS[:999]],
            "categorical",
            "117 dates or times, each its own; --numeric x=bucket takes it as a number; --split",
        ),
        ([f"{m:%d.%m.%Y %H:%M}" for m in MOMENTS], "bucket", "--split order:x trains"),
        (
            [*MOMENTS[:1500], *MOMENTS[:1500]],
            "bucket",
            "1,500 dates or times, 2.0 rows each, taken",
        ),
        ([*MOMENTS[:1500], *MOMENTS[:1500]], "bucket", "--numeric x=categorical for ids; --split"),
        (MOMENTS[:900] * 3, "categorical", "900 dates or times, each its own; --numeric x=bucket"),
        ([int(m.timestamp()) for m in MOMENTS[:1500]] * 2, "bucket", "since 1970, 2.0 rows each"),
        (
            [f"{m:%d.%m.%Y %H:%M}" for m in MOMENTS[:1500]] * 2,
            "bucket",
            "1,500 dates or times, 2.0",
        ),
        ([dt.time(i // 60, i % 60) for i in range(1440)] * 2, "bucket", "1,440 dates or times, 2."),
        (list(range(500)), "categorical", "integers, 1.0 rows a value; --numeric x=bucket"),
        (list(range(50)) * 9, "categorical", ""),
        ([[[1]], [[2]]], "unused", "no ids"),
        ([{"a": 1}, {"a": 2}], "unused", "no ids"),
        ([[0.5], [1.5]], "unused", "lists of numbers"),
        ([[1.0, 2.0], None], "bag", ""),
        (["a|b", "b|c", "c|a", "a|c", "b"], "bag", "--multi x="),
        (["a|b", "b|c", "c", ""], "categorical", ""),
        ([True, False], "categorical", ""),
        ([b"\xff", b"\xfe"], "categorical", ""),
        ([dt.date(2020, 1, 1), dt.date(2020, 1, 2)], "categorical", ""),
        ([dt.timedelta(1), dt.timedelta(2)], "categorical", ""),
        ([dt.time(1), dt.time(2)], "categorical", ""),
    ],
)
def test_other_columns(values, kind, note):
    field = spec(values)
    assert field.kind == kind
    assert note in field.note
    assert bool(note) == bool(field.note)


def test_moments_stay_ids_where_numbers_shall_be():
    values = MOMENTS[:1500] * 2
    assert spec(values, default_numeric="categorical").kind == "categorical"
    assert spec(values, default_numeric="standardise").kind == "standardise"


def test_moments_as_text_are_read_as_numbers():
    values = [f"{m:%d.%m.%Y %H:%M}" for m in MOMENTS[:1500]] * 2
    frame = pl.DataFrame({"x": values, "y": [m.timestamp() for m in MOMENTS[:1500]] * 2})
    text, seconds = infer_fields(frame, ["x", "y"])
    found = numbers(frame["x"], text)
    assert found.rank().to_list() == numbers(frame["y"], seconds).rank().to_list()


@pytest.mark.parametrize(
    ("texts", "seconds"),
    [
        (["20:24:53", "1:02:03.5", None, "123:10:05"], [73493, 3723.5, None, 443405]),
        (["8:05 PM", "12:30 am", ""], [72300, 1800, None]),
        (["12:00:00 AM", "12:00:01 PM"], [0, 43201]),
        (["12:34", "1:02"], [45240, 3720]),
        (["75:10", "1:02"], [4510, 62]),
        (["10:75"], None),
        (["13:05 PM"], None),
        (["3:1", "2:2"], None),
        (["12:34", "12:34 PM"], None),
        (["12:34", "12:34:56"], None),
    ],
)
def test_times_of_day_and_durations_are_read(texts, seconds):
    column = pl.Series("x", texts)
    forms = moments.find(column)
    assert len(forms) == (seconds is not None)
    if seconds is not None:
        found = moments.read(column, forms[0]).to_list()
        assert found == [None if s is None else round(s * 10**6) for s in seconds]
    # A day of which none knows the date comes before no other.
    assert not moments.find(column, ordered=True)


@pytest.mark.parametrize("kind", ["text", "duration", "time"])
def test_times_are_numbers_where_labels_say_so(kind):
    """Three rows a value."""
    late = np.random.default_rng(3).integers(0, 1500, 4500)
    texts = [f"{m // 60}:{m % 60:02d}" for m in late.tolist()]
    column = {
        "text": pl.Series("x", texts),
        "duration": pl.Series("x", late.astype("timedelta64[s]").astype("timedelta64[us]")),
        "time": pl.Series("x", [dt.time(m // 60, m % 60) for m in (late % 1440).tolist()]),
    }[kind]
    field = spec(column, labels=clicks(0.2 + 0.6 * (late % 1440 > 700)))
    assert field.kind == "bucket" and field.note.startswith("times or durations, ")
    assert "--split" not in field.note
    found = numbers(column, field).rank().to_list()
    assert found == pl.Series(late % 1440 if kind == "time" else late).rank().to_list()
    assert spec(column, labels=clicks(np.full(4500, 0.3))).kind == "categorical"


TAGS = [f"t{tag}" for tag in range(40)]


@pytest.mark.parametrize("separator", [";", ",", " "])
@pytest.mark.parametrize("rows", [900, N])
def test_what_looks_joined_is_told_of_and_left_whole(separator, rows):
    """Of text that is no key, and of so many values that nothing is learned of one."""
    values = [separator.join(rng.choice(TAGS, 4, replace=False)) for _ in range(rows)]
    field = spec(values)
    assert field.kind == ("categorical" if rows == 900 else "unused")
    assert f"--multi {shlex.quote(f'x={separator}')} takes them apart" in field.note
    assert field.note.startswith(repr(values[0])[:20])
    apart = spec(values, separators={"x": separator})
    assert apart.kind == "bag" and not apart.note


def _in(value, digits, letter):
    return f"{decimal.Decimal(str(value)).scaleb(-digits):f}{letter}"


AMOUNT = np.round(np.random.default_rng(1).normal(2e4, 1.5e4, N), 2)
WRITTEN = {
    "thousands separators": [f"{v:,}" for v in AMOUNT],
    "thousands separators and a decimal comma": [
        f"{v:,.2f}".translate(str.maketrans(",.", ".,")) for v in AMOUNT
    ],
    "a decimal comma": [str(v).replace(".", ",") for v in AMOUNT],
    "thousands separators and the sign $": [f"${v:,}" for v in np.abs(AMOUNT)],
    "a decimal comma and the sign €": [f"{v} €".replace(".", ",") for v in AMOUNT],
    "the sign %": [f"{v}%" for v in AMOUNT],
    "the sign USD": [f"USD {v}" for v in AMOUNT],
    "a decimal comma and the sign EUR": [f"{v} EUR".replace(".", ",") for v in AMOUNT],
    "thousands separators and parentheses for what is below zero": [
        f"({-v:,})" if v < 0 else f"{v:,}" for v in AMOUNT
    ],
    "the sign $ and parentheses for what is below zero": [
        f"(${-v})" if v < 0 else f"${v}" for v in AMOUNT
    ],
    "thousands as K": [_in(v, 3, "K") for v in AMOUNT],
    "thousands as K and millions as M and the sign €": [
        f"€{_in(v, 6, 'M')}" if i % 2 else f"€{_in(v, 3, 'K')}" for i, v in enumerate(AMOUNT)
    ],
    "a decimal comma and thousands as k and millions as M": [
        _in(v, 6 if i % 2 else 3, "M" if i % 2 else "k").replace(".", ",")
        for i, v in enumerate(AMOUNT)
    ],
    "thousands as K or k and the sign USD": [
        f"{_in(v, 3, 'k' if i % 3 else 'K')} USD" for i, v in enumerate(AMOUNT)
    ],
    "thousands separators and the minus sign behind": [
        f"{-v:,}-" if v < 0 else f"{v:,}" for v in AMOUNT
    ],
}
OTHERWISE = [
    AMOUNT,
    [str(v) for v in AMOUNT],
    [f"{v:,}" for v in AMOUNT],
    [f"¥ {v}" for v in AMOUNT],
]


@pytest.mark.every(8)
@pytest.mark.parametrize("treatment", ["bucket", "standardise"])
@pytest.mark.parametrize("gap", [None, "NA", "", "inf", "-inf"])
@pytest.mark.parametrize("marks", WRITTEN)
def test_numbers_written_for_people_are_numbers(marks, gap, treatment):
    """In training, and whatever they are written like in the rows that are scored."""
    a = pl.Series("a", [1, 2] * (N // 2))
    written = pl.Series("x", [gap, *WRITTEN[marks][1:]], dtype=pl.String)
    frame = pl.DataFrame([written, a])
    specs = infer_fields(frame, ["x", "a"], default_numeric=treatment)
    assert specs[0].kind == treatment
    assert specs[0].note == (
        f"numbers with {marks}, read as numbers; --numeric x=categorical keeps the text"
    )
    told = infer_fields(frame, ["x"], numeric={"x": treatment})[0]
    assert (told.kind, told.decimal, told.note) == (treatment, specs[0].decimal, "")
    assert spec(written, numeric={"x": "categorical"}).kind == "categorical"
    encoder = Encoder.from_tensors(*Encoder.fit(frame, specs).to_tensors())
    expected = encoder.transform(frame)
    # 4,000 rows make 13 buckets, by two of the other column.
    least = 24 if treatment == "bucket" else 60
    assert len(torch.cat([expected.rows, expected.dense], 1).unique(dim=0)) > least
    for other in (written.cast(pl.Categorical), *OTHERWISE):
        column = pl.Series("x", other, strict=False)
        if marks == "thousands separators and the sign $":
            column = column if column.dtype == pl.Categorical else pl.Series("x", np.abs(AMOUNT))
        found = encoder.transform(pl.DataFrame([column, a])[1:])
        assert torch.equal(found.rows, expected.rows[1:])
        assert torch.equal(found.dense, expected.dense[1:])
    for few in (written[1:4], written[9:10]):
        found = encoder.transform(pl.DataFrame([few, a[: len(few)]]))
        assert not found.unknown["a"] and torch.isfinite(found.dense).all()
    with pytest.raises(UserError, match="'x' holds String values such as 'cheap'"):
        encoder.transform(frame.with_columns(pl.lit("cheap").alias("x")))


def test_scales_are_known_in_single_rows_where_training_had_them():
    values = ["900", "5k", "1.5M", "2B", "NA", "(3k)"]
    field = spec(values)
    assert (field.kind, field.decimal, field.scaled) == ("bucket", ".", True)
    assert "thousands as k and millions as M and billions as B and parentheses" in field.note
    expected = [900.0, 5e3, 1.5e6, 2e9, None, -3e3]
    assert numbers(pl.Series("x", values), field).fill_nan(None).to_list() == expected
    for value, number in zip(values, expected, strict=True):
        assert numbers(pl.Series("x", [value]), field).fill_nan(None).to_list() == [number]
    assert spec(["2B", "1B"]).kind == spec(["$1.5k", "$3"]).kind == "bucket"
    with pytest.raises(UserError, match="String values such as '5k' where numbers are needed"):
        numbers(pl.Series("x", ["7", "5k"]), spec(["$7", "$8"]))
    with pytest.raises(UserError, match="no number in 1 rows, such as 'free'; leave empty"):
        spec(["$1.5k", "$3k", "free"], numeric={"x": "bucket"})


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([f"{i / 8}" for i in range(-40, 40)], "bucket"),
        ([f"{i}.50" for i in range(30)] + ["", "NA", "7"], "bucket"),
        ([f"{i}" for i in range(80)], "categorical"),
        ([f"3.{i}" for i in range(20)], "categorical"),
        ([f"3.{i}.1" for i in range(80)], "categorical"),
        ([f"{i / 8}" for i in range(80)] + ["none of these"], "categorical"),
    ],
)
def test_text_of_plain_numbers_with_fractions_is_numbers(values, kind):
    """As tables have it whose columns are all of text; versions are few, or none."""
    frame = pl.DataFrame({"x": [*values, None] * 2})
    (found,) = infer_fields(frame, ["x"])
    assert found.kind == kind
    if kind == "bucket":
        assert found.note.startswith("text of plain numbers, read as such; --numeric x=categorical")
        encoder = Encoder.fit(frame, [found])
        plain = frame.select(pl.col("x").cast(pl.Float64, strict=False))
        assert encoder.transform(plain).rows.equal(encoder.transform(frame).rows)
        (kept,) = infer_fields(frame, ["x"], numeric={"x": "categorical"})
        assert kept.kind == "categorical"


def test_plain_numbers_need_no_notation_in_a_file():
    assert (
        "decimal"
        not in Encoder.fit(
            frame := pl.DataFrame({"x": [1, 2]}), infer_fields(frame, ["x"])
        ).to_tensors()[1]["fields"][0]
    )


@pytest.mark.parametrize(
    ("values", "note", "told"),
    [
        (["1,234", "2,345"], "'1,234' may be 1234 or 1.234: write the column with a decimal", None),
        (["12,7", "3,15"], "'12,7' may be one number or several: --numeric x=bucket reads it", ","),
        (["100,200,300", "7"], "'100,200,300' may be one number or several", "."),
        (["$1,234", "$500"], "'$1,234' may be 1234 or 1.234", None),
        (["1,5", "1.5"], "", None),
        (
            ["$5", "€5"],
            "numbers with different currency or per cent signs, such as '$5' and '€5', ",
            None,
        ),
        (["5%", "6"], "'5%' and '6', cannot be compared, so they stay text; convert", None),
        (["$5", "€five"], "", None),
        (["01,02", "03,04"], "", None),
        (["(1.5)", "(2.5)"], "", None),
        (["1.5-", "2.5-"], "", None),
        (["(1.5", "2.5"], "", None),
        (["1.5)", "2.5"], "", None),
        (["(-1.5)", "2.5"], "", None),
        (["-1.5-", "2.5"], "", None),
        (["(1.5)-", "2.5"], "", None),
        (["1.5", "USD 2.5"], "such as '1.5' and 'USD 2.5', cannot be", None),
        (["$12.00", "€3,10", "(£7.5)"], "such as '$12.00', '€3,10' and '(£7.5)'", None),
        (["ABC 1.5", "ABC 2.5"], "", None),
        (["12", "14", "14B"], "", None),
        (["5m", "10m"], "", None),
        (["5k", "10k"], "", None),
        (["5K%", "10K%"], "", None),
        (["1.5kg", "2K"], "", None),
        (["1e3K", "2K"], "", None),
        (["€1,234K", "€5K"], "'€1,234K' may be 1.234e+06 or 1234: write the column", None),
        (["1.5", "2.5"], "", "."),
        (["007", "12", "0501"], "", "."),
        (["007", "1.5"], "", None),
    ],
)
def test_numbers_that_are_not_sure_stay_text(values, note, told):
    assert spec(values).kind == "categorical"
    assert note in spec(values).note and bool(note) == bool(spec(values).note)
    if told:
        assert spec(values, numeric={"x": "bucket"}).decimal == told
        return
    with pytest.raises(UserError, match="the column is String, no number") as error:
        spec(values, numeric={"x": "bucket"})
    for remedy in ("decimal point, and nothing between thousands", "convert all to one sign"):
        assert (remedy in str(error.value)) == (remedy in spec(values).note)


def test_what_keeps_a_column_from_being_numbers_is_named():
    values = [*map(str, range(400)), "new", "old", "1a", "x"] * 5
    note = spec(values).note
    assert note.startswith("most values are numbers, but not 'new', 'old', '1a' and 1 more; ")
    with pytest.raises(UserError, match="no number in 20 rows, such as 'new', 'old', '1a'; leave"):
        spec(values, numeric={"x": "bucket"})
    assert not spec([*map(str, range(400)), *"abcdefgh" * 30, *(f"h{i}" for i in range(200))]).note
    assert spec([*map(str, range(400)), "-"], numeric={"x": "bucket"}).kind == "bucket"


@pytest.mark.parametrize("name", ["Einkommen €", "a b", "it's"])
def test_hints_are_quoted_for_the_shell(name):
    for values in (
        range(N),
        np.round(AMOUNT),
        AMOUNT.astype(str),
        MOMENTS,
        ["a|b", "b|c", "c|a", "a|c"],
    ):
        series = pl.Series(name, list(values))
        note = infer_fields(series.to_frame(), [name])[0].note
        hints = re.findall(r"--(?:numeric|multi|split) (.*?)(?=$|--)", note)
        assert hints and all(name in shlex.split(hint)[0] for hint in hints)


def dump_of_numpy(tags):
    """As NumPy 2 shows its numbers and strings in a list, and pandas writes them."""
    kind = np.int64 if all(isinstance(tag, int) for tag in tags) else np.str_
    return str([kind(tag) for tag in tags])


@pytest.mark.parametrize("dump", [str, json.dumps, dump_of_numpy])
@pytest.mark.parametrize("one", ["{}", "t{}", "it's {}"])
def test_lists_that_are_written_as_text_are_bags(dump, one):
    lists = [rng.choice(40, k, replace=False).tolist() for k in rng.integers(0, 4, N)]
    lists = [[int(i) if one == "{}" else one.format(i) for i in tags] for tags in lists]
    column = pl.Series("x", [None, *map(dump, lists)])
    field = spec(column)
    assert (field.kind, field.separator) == ("bag", "[]")
    assert field.note.startswith("lists such as ") and "--multi x= keeps them whole" in field.note
    told = spec(column, separators={"x": ","})
    assert (told.kind, told.separator) == ("bag", "[]")
    assert spec(column, separators={"x": ""}).kind == "categorical"
    for specs in ([field], [told]):
        encoder = Encoder.from_tensors(*Encoder.fit(column.to_frame(), specs).to_tensors())
        assert encoder.num_rows == 41
    assert not spec(["[deleted]", "[0.5]", "[a"] * N).note


def test_spaces_around_values_make_no_other_values():
    for sign, kind in (("|", "bag"), (",", "categorical")):
        values = [f"{sign} ".join(rng.choice(TAGS, 4)) + sign for _ in range(900)]
        field = spec(values)
        assert field.kind == kind and "--multi x=" in field.note
        field = spec(values, separators={"x": sign})
        frame = pl.DataFrame({"x": values})
        assert Encoder.fit(frame, [field]).num_rows == len(TAGS) + 1


def test_names_and_sentences_do_not_look_joined():
    people = [f"{a} {b}son" for a in TAGS for b in TAGS][:900]
    places = [f"town {i}, state {i % 50}" for i in range(900)]
    for values in (people, places, ["a;b", "c;d", "e"] * N):
        assert not spec(values).note


def test_bars_in_few_rows_join_nothing():
    some = ["red", "blue", "red|blue", "blue|red"]
    for bars, kind in ((1, "categorical"), (9, "categorical"), (10, "bag")):
        field = spec([*(["red", "blue"] * 500)[bars:], *(some[2:] * bars)[:bars]])
        assert field.kind == kind, bars
    assert "--multi 'x=|' takes them apart" in spec([*["red", "blue"] * 499, *some[2:]]).note
    assert spec(["red", "blue", "red|blue", "blue|red"]).kind == "categorical"
    subjects = [f"about the {i % 700} and {i % 500}" for i in range(6000)]
    field = spec([*subjects, *[f"{subjects[i]} | {subjects[i + 1]}" for i in range(6)]])
    assert (field.kind, field.note) == ("categorical", "")


@pytest.mark.parametrize("separator", [";", ",", " "])
def test_lists_of_numbers_look_joined_though_there_are_more_of_them_than_rows(separator):
    values = [separator.join(map(str, rng.integers(0, 3000, 4))) for _ in range(N // 2)]
    assert f"--multi {shlex.quote(f'x={separator}')} takes them apart" in spec(values).note


def test_a_separator_that_is_nowhere_is_told_of():
    values = ["a;b", "b;c", None] * 9
    assert spec(values, separators={"x": ";"}).note == ""
    field = spec(values, separators={"x": " "})
    assert field.separator == " "
    assert field.note.startswith("no value holds the separator ' ', so each is one; --multi 'x=;'")
    assert spec(list(range(9)), separators={"x": " "}).note == ""


def test_numbers_beyond_any_id_need_no_word():
    field = spec(np.where(rng.random(N) < 0.5, 1e300, -1e300) * rng.random(N))
    assert (field.kind, field.note) == ("bucket", "")


def test_what_the_user_says_is_not_guessed():
    assert spec(list(range(N)), numeric={"x": "categorical"}).kind == "categorical"
    assert spec(["a|b", "b|c"] * N, separators={"x": ""}).kind == "categorical"
    assert spec(list(range(N)), numeric={"x": "standardise"}).note == ""
    with pytest.raises(UserError, match="names 'x' twice"):
        infer_fields(pl.DataFrame({"x": [1]}), ["x", "x"])


def test_columns_left_out_have_no_rows_and_are_remembered():
    frame = pl.DataFrame({"a": [1, 2, 1], "b": ["x"] * 3})
    encoder = Encoder.fit(frame, infer_fields(frame, ["a", "b"]))
    assert encoder.names == ["a"]
    assert [d.kind for d in encoder.decisions] == ["categorical", "unused"]
    assert encoder.transform(frame.drop("b")).rows.shape == (3, 1)
    with pytest.raises(UserError, match="'b' always 'x'"):
        Encoder.fit(frame, infer_fields(frame, ["b"]))


def test_a_file_of_other_types_is_read_as_the_training_file_was():
    ids = pl.DataFrame({"x": [7.0, 8.0, None, 7.0, 9.0]})
    encoder = Encoder.fit(ids, infer_fields(ids, ["x"]))
    known = encoder.transform(ids).rows[:, 0].tolist()
    for same in (
        [7, 8, None, 7, 9],
        ["7", "8", None, "7", "9"],
        [7.0, 8.0, float("nan"), 7.0, 9.0],
    ):
        other = pl.DataFrame({"x": pl.Series(same, strict=False)})
        assert encoder.transform(other).rows[:, 0].tolist() == known
    assert encoder.transform(pl.DataFrame({"x": [7.5, 2.0**60, 7.0]})).unknown == {"x": 2}


def test_dates_and_times_are_numbers_where_that_is_asked_for():
    times = pl.Series("x", [*MOMENTS[:100], None])
    same = [
        times,
        times.dt.cast_time_unit("ns"),
        times.cast(pl.String),
        times.dt.to_string("iso:strict"),
    ]
    for treatment in ("bucket", "standardise"):
        for column in same:
            frame = column.to_frame().with_columns(a=pl.lit("a"))
            specs = infer_fields(frame, ["x", "a"], numeric={"x": treatment, "a": "categorical"})
            encoder = Encoder.fit(frame, specs)
            expected = encoder.transform(frame)
            used = expected.dense if treatment == "standardise" else expected.rows[:, :1]
            # 101 rows make 8 buckets, and one of what is missing.
            assert len(used.unique()) == (9 if treatment == "bucket" else 101)
            for other in same:
                found = encoder.transform(other.to_frame().with_columns(a=pl.lit("a")))
                assert torch.equal(found.rows, expected.rows)
                assert torch.equal(found.dense, expected.dense)
    days = times.dt.date()
    assert numbers(days).drop_nans().equals(numbers(days.cast(pl.String)).drop_nans())
    for column in (pl.Series("x", [dt.time(1)]), pl.Series("x", [dt.timedelta(1)])):
        assert infer_fields(column.to_frame(), ["x"], numeric={"x": "bucket"})[0].kind == "bucket"
    text = pl.Series("x", ["2020-01-01", "soon"])
    with pytest.raises(UserError, match="no number"):
        infer_fields(text.to_frame(), ["x"], numeric={"x": "bucket"})
    with pytest.raises(UserError, match="such as 'soon' where numbers"):
        numbers(text)


@pytest.mark.parametrize("treatment", ["bucket", "standardise"])
@pytest.mark.parametrize(
    "form",
    [
        *("%b %d %Y", "%d.%m.%Y", "%m/%d/%Y %I:%M %p", "%d/%b/%Y:%H:%M:%S +0000", "%d-%b-%y"),
        *("%a, %d %b %Y %H:%M:%S +0000", "%a, %-d %b %Y %H:%M GMT", "%a %b %e %H:%M:%S UTC %Y"),
    ],
)
def test_dates_as_people_write_them_are_numbers_where_that_is_asked_for(form, treatment):
    """The form is that of training: rows to score need not tell days from months."""
    days = [dt.datetime(2020, 1, 1) + dt.timedelta(i, 420 * i) for i in range(160)]
    times = pl.Series("x", days).dt.truncate("1m" if "M" in form else "1d")
    a = pl.Series("a", ["a", "b"] * (len(times) // 2))
    frame = pl.DataFrame([times.dt.strftime(form).set(pl.Series(a.is_first_distinct()), "NA"), a])
    specs = infer_fields(frame, ["x", "a"], numeric={"x": treatment})
    assert (specs[0].kind, specs[0].note) == (treatment, "")
    encoder = Encoder.from_tensors(*Encoder.fit(frame, specs).to_tensors())
    plain = encoder.transform(pl.DataFrame([times, a])[2:])
    # 160 rows make 8 buckets, by two of the other column.
    least = 14 if treatment == "bucket" else 60
    assert len(torch.cat([plain.rows, plain.dense], 1).unique(dim=0)) > least
    for column in (frame["x"], frame["x"].cast(pl.Categorical), times.cast(pl.String)):
        found = encoder.transform(pl.DataFrame([column, a])[2:])
        assert torch.equal(found.rows, plain.rows) and torch.equal(found.dense, plain.dense)
        few = encoder.transform(pl.DataFrame([column, a])[2:3])
        assert torch.equal(few.rows, plain.rows[:1]) and torch.equal(few.dense, plain.dense[:1])
    odd = frame[-2:].with_columns(x=pl.Series(["soon", frame["x"][-1]]))
    with pytest.raises(UserError, match="'x' holds String values such as 'soon' where moments as"):
        encoder.transform(odd)


def test_moments_of_mail_are_those_of_their_zones():
    texts = [
        "Fri, 03 Jan 2025 03:08:39 +0200",
        "Fri,3 Jan 2025 01:08:39 GMT",
        "3 Jan 2025 01:08:39 -0000",
        "Thu, 02 Jan 2025 17:08:39 -0800 (PST)",
        "Thu,  2 Jan 2025 20:08:39 EST",
        "Thu Jan  2 20:08:39 EST 2025",
        "Fri Jan  3 01:08:39 UTC 2025",
        "Fri Jan 03 01:08:39 +0000 2025",
    ]
    assert (field := spec(texts, numeric={"x": "bucket"})).moment == "%d %B %Y %H:%M:%S %#z"
    for some in (texts, *([text] for text in texts)):
        assert numbers(pl.Series("x", some), field).unique().to_list() == [1735866519e6]
    assert moments.find(pl.Series(["Fri, 03 Jan 2025 03:08 +0200"])) == [field.moment]
    by_half = pl.Series(["Fri Jan 10 07:10:54 PM UTC 2025"])
    assert moments.read(by_half, *moments.find(by_half)).to_list() == [1736536254 * 10**6]
    assert not moments.find(pl.Series(["Fri, 03 Jan 2025 03:08:39 XYZ"]))


def test_dates_whose_days_may_be_months_are_told():
    values = ["01/02/2022", "01/03/2022"]
    told = "'01/02/2022' may be %m/%d/%Y or %d/%m/%Y; write it as YYYY-MM-DD"
    with pytest.raises(UserError, match=f"--numeric x=bucket: .*{told}"):
        spec(values, numeric={"x": "bucket"})
    assert (
        "moment"
        not in Encoder.fit(
            frame := pl.DataFrame({"x": [1, 2]}), infer_fields(frame, ["x"])
        ).to_tensors()[1]["fields"][0]
    )


def test_free_text_that_is_left_out_may_be_split_into_words():
    def left_out(name, values):
        field = infer_fields(pl.DataFrame({name: values}), [name])[0]
        assert (field.kind == "unused") == (not field.note.startswith("1,000 dates"))
        return field.note

    lines = [f"a line about {i} and {7 * i}" for i in range(1000)]
    for name in ("text", "it's a text", "text $x"):
        note = left_out(name, lines)
        option, rest = note.partition("--multi ")[2], " splits it into words"
        assert note.endswith(rest)
        (typed,) = shlex.split(option.removesuffix(rest))
        said = parse_columns([], [typed])["separators"]
        field = infer_fields(pl.DataFrame({name: lines}), [name], separators=said)[0]
        assert (field.kind, field.separator) == ("bag", WORDS)
        assert not field.note
    for values in (
        [f"key{i}" for i in range(1000)],
        [f"{m:%Y-%m-%d %H:%M}" for m in MOMENTS[:1000]],
        [f"{m:%d %b %Y %H:%M}" for m in MOMENTS[:1000]],
    ):
        assert "--multi" not in left_out("text", values)
    joined = left_out("x", [" ".join(rng.choice(TAGS, 4, replace=False)) for _ in range(N)])
    assert joined.count("--multi") == 1


def test_messages_are_short_whatever_a_column_holds():
    wide = pl.DataFrame({"x": [{f"field {i}": i for i in range(400)}] * 9, "y": [0, 1, 1] * 3})
    long = pl.DataFrame({"x": ["z" * 4000, "y" * 4000]})
    many = pl.DataFrame({f"{'column' * 9} {i}": [1] for i in range(400)})
    numeric = {"x": "bucket"}
    for call in (
        lambda: infer_fields(wide, ["x"], numeric=numeric),
        lambda: Encoder.fit(wide, infer_fields(wide, ["x"])),
        lambda: read_labels(wide, "x"),
        lambda: infer_fields(long, ["x"], numeric=numeric),
        lambda: numbers(long["x"]),
        lambda: infer_fields(many, ["x"]),
        lambda: infer_fields(wide, many.columns),
        lambda: split_rows(pl.concat([long] * 9), "order:x"),
        lambda: split_rows(pl.concat([long] * 9), "column:x"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert len(str(error.value)) <= 500


def test_text_where_numbers_were():
    frame = pl.DataFrame({"p": rng.random(50), "q": rng.random(50), "a": [1, 2] * 25})
    specs = infer_fields(frame, ["p", "q", "a"], numeric={"q": "standardise"})
    encoder = Encoder.fit(frame, specs)
    for column in ("p", "q"):
        odd = frame.with_columns(pl.lit("cheap").alias(column))
        with pytest.raises(UserError, match=f"{column!r} holds String values such as 'cheap'"):
            encoder.transform(odd)
    odd = frame.with_columns(pl.lit(float("inf")).alias("q"))
    assert bool(torch.isfinite(encoder.transform(odd).dense).all())


@pytest.mark.parametrize("gap", ["NA", "n/a", " NA ", "", "?", None])
@pytest.mark.parametrize("treatment", ["bucket", "standardise"])
def test_a_column_of_nothing_but_marks_of_missing_is_missing(gap, treatment):
    """Where training had numbers, plain ones as well as written for people."""
    a = pl.Series("a", ["a", "b"] * 25)
    for values in (rng.random(50), WRITTEN["thousands separators and the sign $"][:50]):
        frame = pl.DataFrame([pl.Series("x", values), a])
        specs = infer_fields(frame, ["x", "a"], default_numeric=treatment)
        encoder = Encoder.fit(frame, specs)
        empty = encoder.transform(frame.with_columns(x=pl.lit(None, pl.Float64)))
        found = encoder.transform(frame.with_columns(x=pl.lit(gap, pl.String)))
        assert torch.equal(found.rows, empty.rows) and torch.equal(found.dense, empty.dense)
        assert found.unknown == empty.unknown


@pytest.mark.parametrize(
    ("values", "positives"),
    [
        (["yes", "no", "yes"], [1, 0, 1]),
        (["Click", "NoClick", "NoClick"], [1, 0, 0]),
        (["not clicked", "clicked", "clicked"], [0, 1, 1]),
        (["True", "False", "True"], [1, 0, 1]),
        (["Yes", "no", "yes", "No "], [1, 0, 1, 0]),
        (["Yes", "No ", "No "], [1, 0, 0]),
        (["1", "false", "0", "true", "TRUE"], [1, 0, 0, 1, 1]),
        (["un_der", "der"], [0, 1]),
        (["Inactive", "Active", "unactive"][1:], [1, 0]),
        (["1", "0", "1"], [1, 0, 1]),
        ([-1, 1, -1], [0, 1, 0]),
        (["-1", "+1", "+1"], [0, 1, 1]),
        ([1, 2, 2], [0, 1, 1]),
        ([1.0, 2.0, 1.0], [0, 1, 0]),
    ],
)
def test_obvious_pairs_of_labels(values, positives):
    frame = pl.DataFrame({"y": values})
    assert read_labels(frame, "y").tolist() == positives
    plain = set(values) in ({"1", "0"}, {0, 1})
    assert ("positive" in label_note(frame, "y")) != plain


@pytest.mark.parametrize(
    ("values", "threshold", "positive", "message"),
    [
        ([0, 1, 2], None, None, "--label-threshold X calls"),
        ([1, 1, 1], None, None, "always 1"),
        ([-1, -1], None, None, "always -1"),
        (["yes", "yes"], None, None, "always 'yes'"),
        ([0, None, 1], None, None, "missing in 1 rows"),
        ([0.0, float("nan"), 1.0], None, None, "missing in 1 rows"),
        ([4.0, float("nan"), 1.0], 3.0, None, "missing in 1 rows; --label-missing drop leaves"),
        ([None, None], None, None, "missing in every row; name another"),
        (["yes", "no ", "  "], None, None, "missing in 1 rows; --label-missing drop leaves"),
        (["a", "b", "c"], None, None, "--label-positive VALUE"),
        (["good", "bad"], None, None, "--label-positive VALUE"),
        (["now", "w"], None, None, "holds 2 texts such as 'now', 'w'; --label-positive VALUE"),
        (["under", "der"], None, None, "--label-positive VALUE"),
        (["yes", "no", "1"], None, None, "several spellings; write it as one, by polars"),
        (["yes", "no", "0"], None, None, "--label-positive VALUE"),
        (["yes", "no", "NA"], None, None, "'NA' in 1 rows, by its look missing.*--label-missing"),
        (["1", "NA", "0", "NA"], None, None, "'NA' in 2 rows, by its look missing"),
        (["a", "b"], 1.0, None, "--label-positive VALUE"),
        ([1, 2, 3], 9.0, None, "always 0 with --label-threshold 9"),
        (["a", "b"], None, "c", "no such value.*'a', 'b'"),
        ([1, 2, 3], None, "x", "no such value"),
        ([True, False], None, "x", "no such value"),
        ([1, 2], 1.0, "1", "not both"),
        ([[1], [0]], None, None, "another column with --label"),
        ([dt.date(2020, 1, 1)], None, None, "another column with --label"),
        ([], None, None, "no rows"),
    ],
)
def test_labels_that_cannot_be_used(values, threshold, positive, message):
    with pytest.raises(UserError, match=message):
        read_labels(pl.DataFrame({"y": values}), "y", threshold, positive)


def test_spaces_around_a_label_are_no_part_of_it():
    frame = pl.DataFrame({"y": ["good ", "bad", "  ", "good"], "x": [1, 2, 3, 4]})
    kept, labels = labelled(frame, ("y", None, "good ", "drop"))
    assert labels.tolist() == [1, 0, 1] and kept["x"].to_list() == [1, 2, 4]
    assert read_labels(frame, "y", positive="good").tolist() == [1, 0, 0, 1]


def test_labels_that_say_yes_in_several_ways_are_mended_by_the_line_that_is_told():
    frame = pl.DataFrame({"y": ["Yes", "TRUE", "no", "0", " yes"]})
    with pytest.raises(UserError, match=r"holds 5 texts .* yes and no in several spell") as error:
        read_labels(frame, "y")
    assert "--label-positive" not in str(error.value)
    line = str(error.value).partition("by polars: ")[2]
    mended = eval(line, {"pl": pl, "frame": frame})
    assert read_labels(mended, "y").tolist() == [1, 1, 0, 0, 1]
    for values in (["yes", "no", "perhaps"], ["yes", "true", "on"]):
        with pytest.raises(UserError, match="--label-positive VALUE says which one is positive"):
            read_labels(pl.DataFrame({"y": values}), "y")


@pytest.mark.parametrize(
    ("values", "threshold", "positive"),
    [
        ([None, 0, 1, None], None, None),
        ([1.0, None, float("nan"), 0.0], None, None),
        ([False, None, True], None, None),
        (["yes", "NA", "no", None], None, None),
        (["", "3", "?", "5"], 4, None),
        (["bad", "good", "NA", "fair"], None, "good"),
        ([2, None, 7, 9], None, "7"),
    ],
)
def test_rows_without_a_label(values, threshold, positive):
    """Left out, or negative; what the others are is as it would be without them."""
    frame = pl.DataFrame({"y": values, "row": range(len(values))})
    has = [v not in (None, "", "NA", "?") and v == v for v in values]
    for missing in ("drop", "negative"):
        labelling = "y", threshold, positive, missing
        kept, labels = labelled(frame, labelling)
        found = dict(zip(kept["row"].to_list(), labels, strict=True))
        clean = frame.filter(pl.Series(has))
        want = dict(zip(clean["row"], read_labels(clean, "y", threshold, positive), strict=True))
        assert {row: label for row, label in found.items() if has[row]} == want
        others = {row: label for row, label in found.items() if not has[row]}
        assert others == ({} if missing == "drop" else dict.fromkeys(others, 0.0))
        assert len(others) == (0 if missing == "drop" else has.count(False))
        assert f"{has.count(False)} rows without one" in label_note(frame, *labelling)
    with pytest.raises(UserError, match="drop or negative is needed"):
        read_labels(frame, "y", threshold, positive, "zero")


def test_one_value_and_none():
    frame = pl.DataFrame({"click": ["yes", None, "yes"]})
    assert read_labels(frame, "click", missing="negative").tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(UserError, match="always"):
        labelled(frame, ("click", None, None, "drop"))
    with pytest.raises(UserError, match="'click' is always 'no'; both"):
        read_labels(pl.DataFrame({"click": ["no", None, "no"]}), "click", None, "no", "drop")
    with pytest.raises(UserError, match="'click' is always 0; both"):
        read_labels(pl.DataFrame({"click": [0, None, 0]}), "click", missing="negative")


@pytest.mark.parametrize(
    ("values", "threshold", "positive"),
    [
        ([0, 1, 1], None, None),
        ([False, True, True], None, None),
        ([3, 4, 5], 4, None),
        (["3", "4", "5"], 4, None),
        ([3.0, 4.5, 4.5], None, "4.5"),
        (["bad", "good", "good"], None, "good"),
        ([True, False, False], None, "False"),
    ],
)
def test_labels(values, threshold, positive):
    labels = read_labels(pl.DataFrame({"y": values}), "y", threshold, positive)
    assert labels.tolist() == [0.0, 1.0, 1.0]
    assert labels.dtype == torch.float32


@pytest.mark.parametrize(("width", "buckets"), [(10, 256), (1000, None)])
def test_labels_may_ask_for_finer_buckets(width, buckets):
    """Whose labels change from one small range to the next, as those of codes of places do."""
    g = np.random.default_rng(0)
    codes = g.integers(0, 2500, 24_000)
    likes = g.random(2500 // width + 1)
    labels = (g.random(24_000) < likes[codes // width]).astype(float)
    frame = pl.DataFrame({"code": codes + g.random(24_000)})
    (spec,) = infer_fields(frame, ["code"], labels=labels)
    assert (spec.kind, spec.buckets) == ("bucket", buckets)
    assert Encoder.fit(frame, [spec]).field_sizes[0] == (buckets or 64) + 1


@pytest.mark.parametrize(("sharp", "buckets"), [(True, 64), (False, 13)])
def test_few_rows_make_as_many_buckets_where_labels_have_sharp_limits(sharp, buckets):
    g = np.random.default_rng(0)
    hormone = g.lognormal(size=4000)
    rate = 1 / (1 + np.exp(2 * np.log(hormone)))
    if sharp:
        rate = np.where((hormone > 0.65) & (hormone < 2.1), 0.05, 0.95)
    labels = (g.random(4000) < rate).astype(float)
    frame = pl.DataFrame({"hormone": hormone})
    (spec,) = infer_fields(frame, ["hormone"], labels=labels)
    assert Encoder.fit(frame, [spec]).field_sizes[0] == buckets + 1
