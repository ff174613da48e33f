from __future__ import annotations

import datetime as dt
import json
import time
import tracemalloc

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from amtl.data.vocabulary import Vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st

ints = st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=60)
small_ints = st.lists(st.one_of(st.none(), st.integers(-3, 3)), max_size=60)
texts = st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=60)


def typed(values: list, kind: str) -> pl.Series:
    return pl.Series("x", values, dtype=pl.String if kind == "str" else pl.Int64)


@settings(max_examples=60)
@given(
    st.one_of(
        ints.map(lambda v: ("int", v)),
        small_ints.map(lambda v: ("int", v)),
        texts.map(lambda v: ("str", v)),
    ),
    st.integers(1, 4),
)
def test_rows_fall_in_count_and_round_trip(case, min_count):
    kind, values = case
    column = typed(values, kind)
    vocab = Vocabulary.build(column, name="x", min_count=min_count)
    assert bool((vocab.counts[:-1] >= vocab.counts[1:]).all())
    assert int(vocab.counts.sum()) == len(values)
    rows = vocab.encode(column)
    assert rows.dtype == torch.int32
    assert torch.equal(torch.bincount(rows.long(), minlength=vocab.size), vocab.counts)
    for row, value in zip(rows.tolist(), values, strict=True):
        rare = values.count(value) < min_count
        assert (row == vocab.oov_row) == rare
        if not rare:
            assert vocab.decode([row]) == [value]


def test_ties_are_ordered_by_value_whatever_the_input_order():
    first = Vocabulary.build(["b", "a", "c", "c"])
    second = Vocabulary.build(["c", "c", "a", "b"])
    assert first.values == second.values == ["c", "a", "b"]
    assert first.oov_row == 3


def test_the_oov_row_comes_after_values_of_its_count():
    vocab = Vocabulary.build([1, 1, 2, 2, 3, 4], min_count=2)
    assert vocab.counts.tolist() == [2, 2, 2]
    assert vocab.oov_row == 2


def test_oov_row_is_placed_by_the_mass_of_rare_values():
    vocab = Vocabulary.build([1] * 5 + [2] * 3 + [3, 4, 5, 6], min_count=2)
    assert vocab.counts.tolist() == [5, 4, 3]
    assert vocab.oov_row == 1
    rows, unknown = vocab.encode_counted([2, 3, 99])
    assert rows.tolist() == [2, 1, 1]
    assert unknown == 2


@pytest.mark.parametrize("known", [[1, 1, 2], [10**15, 10**15, -(10**15)], ["a", "a", "b"]])
def test_unseen_and_missing_values_go_to_the_oov_row(known):
    vocab = Vocabulary.build(known)
    unseen = "zz" if isinstance(known[0], str) else 777
    rows, unknown = vocab.encode_counted([unseen, None, known[0]])
    assert rows.tolist() == [vocab.oov_row, vocab.oov_row, 0]
    assert unknown == 2


def test_missing_values_seen_in_training_have_their_own_row():
    vocab = Vocabulary.build(["a", None, None])
    assert vocab.encode([None, "a", "b"]).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x", "y", "x"]),
        pa.chunked_array([["x"], ["y", "x"]]),
        np.array(["x", "y", "x"]),
        pl.Series(["x", "y", "x"], dtype=pl.Categorical),
    ],
)
def test_kinds_of_string_columns(column):
    assert Vocabulary.build(column).encode(column).tolist() == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.bool])
def test_kinds_of_integer_columns(dtype):
    column = torch.tensor([1, 0, 1], dtype=dtype)
    assert Vocabulary.build(column).encode(column).tolist() == [0, 1, 0]


def test_integers_read_as_text_still_match():
    vocab = Vocabulary.build([7, 7, 8])
    assert vocab.encode(["8", "7", "x"]).tolist() == [1, 0, 2]


def test_numbers_with_a_fraction_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"'price' holds numbers such as 0\.5.*bucket"):
        Vocabulary.build([1.0, 0.5, 1.5], name="price")
    with pytest.raises(ValueError, match="numbers such as inf"):
        Vocabulary.build([1.0, float("inf")])


@given(
    st.lists(st.one_of(st.none(), st.integers(-(2**53) + 1, 2**53 - 1)), max_size=40),
    st.sampled_from([pl.Float64, pl.Decimal(20, 0), pl.Decimal(20, 3)]),
)
@settings(max_examples=60)
def test_whole_numbers_held_as_floats_or_decimals_are_those_integers(values, dtype):
    whole = typed(values, "int")
    held = whole.cast(dtype)
    if dtype.is_float():
        held = held.fill_null(float("nan"))
    vocab, other = Vocabulary.build(whole), Vocabulary.build(held)
    assert other.values == vocab.values
    assert torch.equal(vocab.encode(held), vocab.encode(whole))
    assert torch.equal(other.encode(whole), vocab.encode(whole))


@pytest.mark.parametrize(
    ("value", "dtype"), [(2.0**53, pl.Float64), (-(2.0**60), pl.Float64), (2.0**24, pl.Float32)]
)
def test_a_float_that_may_be_several_ids_is_none_of_them(value, dtype):
    column = pl.Series([value, 1.0], dtype=dtype)
    with pytest.raises(ValueError, match=rf"{int(value)} as Float.*integers or text"):
        Vocabulary.build(column)
    vocab = Vocabulary.build([int(value), 1])
    assert vocab.encode_counted(column)[1] == 1
    assert vocab.encode(column)[1] == vocab.encode([1])[0]
    assert vocab.encode_counted(pl.Series([value / 2 + 1], dtype=dtype))[1] == 1


def test_numbers_that_are_no_ids_are_unknown():
    vocab = Vocabulary.build([7, 7, 8])
    assert vocab.encode([7.0, 7.5, float("nan"), 8.0, -0.0]).tolist() == [0, 2, 2, 1, 2]
    assert Vocabulary.build(["7", "8"]).encode([8.0, 7.0]).tolist() == [1, 0]


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([2**63 + 1, 2**63, 2**63 + 1], dtype=pl.UInt64),
        pl.Series([10**25, -(10**25), 10**25], dtype=pl.Int128),
        pl.Series([10**25, -(10**25), 10**25], dtype=pl.Decimal(38, 0)),
        pl.Series([b"\xff", b"a", b"\xff"]),
        pl.Series([dt.timedelta(hours=2), dt.timedelta(1), dt.timedelta(hours=2)]),
        pl.Series([dt.time(2), dt.time(1), dt.time(2)]),
        pl.Series([dt.datetime(2020, 1, 2), dt.datetime(2020, 1, 1), dt.datetime(2020, 1, 2)]),
        pl.Series(["x", "y", "x"], dtype=pl.Enum(["x", "y"])),
    ],
    ids=lambda column: str(column.dtype),
)
def test_other_kinds_of_columns(column):
    vocab = Vocabulary.build(column)
    assert vocab.encode(column).tolist() == [0, 1, 0]
    assert Vocabulary.from_tensors(*vocab.to_tensors()).encode(column).tolist() == [0, 1, 0]


def test_lists_of_whole_floats_are_bags_of_ids():
    vocab = Vocabulary.build(pl.Series([[1.0, 2.0], None, [2.0]]))
    assert vocab.values == [2, 1]
    rows, _, unknown = vocab.encode_bags(pl.Series([[2.0, 2.5]]))
    assert (rows.tolist(), unknown) == ([0, 2], 1)


def test_structs_are_refused():
    with pytest.raises(ValueError, match="'s' is Struct"):
        Vocabulary.build(pl.Series([{"a": 1}]), name="s")


@pytest.mark.parametrize("as_lists", [False, True])
def test_multi_valued_columns_become_bags(as_lists):
    lists = [["A", "B"], ["B"], [], None, ["B", "C", "A"]]
    column = pl.Series(lists, dtype=pl.List(pl.String))
    if not as_lists:
        column = pl.Series([None if v is None else "|".join(v) for v in lists])
    vocab = Vocabulary.build(column, name="genres", separator="|")
    assert vocab.values == ["B", "A", "C"]
    assert vocab.counts.tolist() == [3, 2, 1, 0]
    rows, offsets, unknown = vocab.encode_bags(column)
    assert offsets.tolist() == [0, 2, 3, 3, 3, 6]
    assert rows.tolist() == [1, 0, 0, 0, 2, 1]
    assert unknown == 0
    rows, offsets, unknown = vocab.encode_bags(pl.Series(["Z|A"]))
    assert (rows.tolist(), unknown) == ([3, 1], 1)


@settings(max_examples=30)
@given(
    st.one_of(small_ints.map(lambda v: ("int", v)), texts.map(lambda v: ("str", v))),
    st.randoms(use_true_random=False),
)
def test_renumbering_and_storage_keep_the_mapping(case, random):
    kind, values = case
    column = typed(values, kind)
    vocab = Vocabulary.build(column, name="f", separator="|" if kind == "str" else None)
    before = vocab.encode(column)
    new_rows = list(range(vocab.size))
    random.shuffle(new_rows)
    mapping = torch.tensor(new_rows)
    counts = vocab.counts
    vocab.renumber(mapping)
    assert torch.equal(vocab.counts[mapping], counts)
    for copy in (vocab, Vocabulary.from_tensors(*vocab.to_tensors())):
        assert torch.equal(copy.encode(column).long(), mapping[before.long()])
        assert torch.equal(copy.counts, vocab.counts)
        assert (copy.oov_row, copy.separator, copy.name) == (
            vocab.oov_row,
            vocab.separator,
            vocab.name,
        )


@pytest.mark.parametrize(
    ("values", "counts", "oov", "rows"),
    [
        ([1, 2], [3, 2], 0, None),
        ([1, 2], [3, 2, 0], 3, None),
        ([1, 1], [3, 2, 0], 2, None),
        ([1, 2], [3, 2, 0], 2, [0, 2]),
        ([1, 2], [3, 2, 0], 2, [0, -1]),
    ],
)
def test_inconsistent_contents_are_refused(values, counts, oov, rows):
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary(
            "f", values, torch.tensor(counts), oov, None if rows is None else torch.tensor(rows)
        )


def test_renumber_refuses_what_is_no_permutation():
    with pytest.raises(ValueError, match="permutation"):
        Vocabulary.build([1, 2]).renumber(torch.tensor([0, 0, 1]))


@given(
    st.one_of(small_ints.map(lambda v: ("int", v)), texts.map(lambda v: ("str", v))),
    st.randoms(use_true_random=False),
)
def test_values_merged_into_the_unknown_row_leave(case, random):
    kind, values = case
    column = typed(values, kind)
    vocab = Vocabulary.build(column, name="f")
    before, total, oov = vocab.encode(column).long(), int(vocab.counts.sum()), vocab.oov_row
    leaves = [row for row in range(vocab.size) if row != oov and random.random() < 0.5]
    stays = [row for row in range(vocab.size) if row not in leaves]
    random.shuffle(stays)
    mapping = torch.empty(vocab.size, dtype=torch.int64)
    mapping[torch.tensor(stays)] = torch.arange(len(stays))
    if leaves:
        mapping[torch.tensor(leaves)] = int(mapping[oov])
    expected = torch.zeros(len(stays), dtype=torch.int64).index_add(0, mapping, vocab.counts)
    vocab.renumber(mapping)
    assert vocab.size == len(stays) and vocab.oov_row == int(mapping[oov])
    assert torch.equal(vocab.counts, expected) and int(vocab.counts.sum()) == total
    for copy in (vocab, Vocabulary.from_tensors(*vocab.to_tensors())):
        rows, unknown = copy.encode_counted(column)
        assert torch.equal(rows.long(), mapping[before])
        assert unknown == int((rows == copy.oov_row).sum())
        assert len(copy.values) == copy.size - 1


def test_a_million_rows_take_well_under_seconds():
    column = pl.Series(np.random.default_rng(0).zipf(1.2, 1_000_000) % 100_003).cast(pl.String)
    start = time.perf_counter()
    Vocabulary.build(column).encode(column)
    assert time.perf_counter() - start < 5


# The same values in another container


def rows_of(vocab: Vocabulary, column: pl.Series) -> list[int]:
    return vocab.encode(column).tolist()


truths = pl.Series([True, True, False, None, True])
days = pl.Series([dt.date(2024, 1, 2)] * 2 + [dt.date(2024, 1, 1), None])
moments = pl.Series([dt.datetime(2024, 1, 2, 3, 4, 5)] * 2 + [dt.datetime(2024, 1, 2), None])
whole = pl.Series([12, 12, -7, None])


def spelled(column: pl.Series) -> list[pl.Series]:
    """A column of values as the containers around have it."""
    text = column.cast(pl.String)
    if column.dtype == pl.Boolean:
        return [
            column,
            column.cast(pl.Int8),
            column.cast(pl.Float64),
            text,
            text.str.to_titlecase(),
            text.str.to_uppercase(),
            column.cast(pl.Int8).cast(pl.String),
            column.cast(pl.Float64).cast(pl.String).cast(pl.Categorical),
        ]
    if column.dtype == pl.Int64:
        floats = column.cast(pl.Float64)
        return [column, floats, column.cast(pl.Decimal(20, 2)), text, floats.cast(pl.String)]
    units = [column.cast(pl.Datetime(unit)) for unit in ("ms", "us", "ns")]
    utc = [unit.dt.replace_time_zone("UTC") for unit in units]
    iso = [pl.DataFrame({"x": c}).write_csv().split("\n")[1:-1] for c in (*units, *utc)]
    texts = [pl.Series([t or None for t in column_of]) for column_of in iso]
    pandas = units[0].dt.strftime("%Y-%m-%d %H:%M:%S")
    return [column, *units, *utc, *texts, text, pandas, pandas + "+00:00"]


@pytest.mark.parametrize("column", [truths, days, moments, whole], ids=lambda c: str(c.dtype))
def test_a_vocabulary_of_one_container_knows_the_values_of_others(column):
    columns = spelled(column)
    for trained in columns:
        vocab = Vocabulary.build(trained)
        expected = rows_of(vocab, trained)
        for other in columns:
            assert vocab.encode_counted(other)[1] == 0, (trained, other)
            assert rows_of(vocab, other) == expected, (trained, other)


@settings(max_examples=20)
@given(
    st.lists(st.one_of(st.none(), st.integers(-(2**53) + 1, 2**53 - 1)), max_size=8),
    st.lists(st.one_of(st.none(), st.integers(-(2**53) + 1, 2**53 - 1)), max_size=8),
    st.data(),
)
def test_integers_give_the_rows_they_gave_however_they_are_spelled(known, others, data):
    known = [v for v in known if v is None or abs(v) < 9 * 10**15]
    others = [v for v in known + others if v is None or abs(v) < 9 * 10**15]
    column = typed(others, "int")
    trained = data.draw(st.sampled_from([pl.Int64, pl.String]))
    vocab = Vocabulary.build(typed(known, "int").cast(trained))
    text = pl.Series([None if v is None else f"{v}.0" for v in others], dtype=pl.String)
    expected = vocab.encode_counted(column)
    for other in (text, text.cast(pl.Categorical), column.cast(pl.String)):
        rows, unknown = vocab.encode_counted(other)
        assert (rows.tolist(), unknown) == (expected[0].tolist(), expected[1])
    vocab = Vocabulary.build(text[: len(known)])
    assert vocab.encode(column).tolist() == vocab.encode(text).tolist()


@pytest.mark.parametrize("gap", ["", " ", "\t", "NA", "n/a", "null"])
def test_text_that_stands_for_missing_is_that_where_training_had_integers(gap):
    known = Vocabulary.build(pl.Series([7, 8, None, 7, None, None]))
    rows, unknown = known.encode_counted(pl.Series(["7", gap, " 8 ", "9", None]))
    missing = int(known.encode([None])[0])
    assert rows.tolist() == [*known.encode([7, None, 8]).tolist(), known.oov_row, missing]
    assert unknown == 1
    without = Vocabulary.build(pl.Series([7, 8, 7]))
    assert without.encode_counted(pl.Series(["7", gap]))[1] == 1
    rows = Vocabulary.build(text := pl.Series(["a", gap, None, "a", None])).encode(text)
    assert rows[1] != rows[2]


@settings(max_examples=20)
@given(
    st.lists(st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2100, 1, 1)), max_size=5),
    st.lists(st.dates(dt.date(1970, 1, 1), dt.date(2100, 1, 1)), max_size=5),
)
def test_moments_keep_apart_in_every_spelling(times, dates):
    midnights = [dt.datetime(d.year, d.month, d.day) for d in dates]
    seconds = [t.replace(microsecond=0) for t in times]
    column = pl.Series([*seconds, *midnights], dtype=pl.Datetime("us"))
    vocab = Vocabulary.build(column[::2])
    expected = rows_of(vocab, column)
    for other in spelled(column)[2:]:
        assert rows_of(vocab, other) == expected


def test_spellings_that_training_had_both_of_keep_apart():
    """Versions 1.0 and 10 of a text column: an unseen 1 or 10.0 is no other spelling of them."""
    vocab = Vocabulary.build(["1.0", "1.0", "10", "2.1"])
    assert vocab.encode_counted(["1", "10.0", "2", "2.10"])[1] == 4
    vocab = Vocabulary.build(["true", "True", "false"])
    assert vocab.encode_counted(["TRUE"])[1] == 1
    assert vocab.encode(["FALSE"]).tolist() == vocab.encode(["false"]).tolist()
    assert vocab.encode_counted(["True", "true"])[1] == 0
    assert Vocabulary.build(["007", "7", "x"]).encode_counted(["07", "7.00"])[1] == 1


def test_true_is_one_only_where_nothing_but_one_and_zero_is_known():
    for known in ([0, 1, 2], ["0", "1", "x"], ["true", "maybe"]):
        vocab = Vocabulary.build(known)
        odd = pl.Series([False]) if known == ["true", "maybe"] else pl.Series(["false"])
        assert vocab.encode_counted(odd)[1] == 1
    assert Vocabulary.build(["true", "maybe"]).encode_counted(["TRUE", "Maybe"])[1] == 1


@pytest.mark.parametrize(
    ("known", "text"),
    [
        ([2**53, 1], f"{2**53}.0"),
        ([10**16, 1], f"{10**16}.0"),
        ([12, 1], "12.5"),
        ([12, 1], "1e1"),
        ([12, 1], "12,0"),
        (["2024-01-01", "x"], "2024-01-01 00:00:01"),
        (["2024-01-01", "x"], "2024-01-01 00:00:00+01:00"),
        (["2024-01-01", "x"], "01.01.2024"),
    ],
)
def test_what_is_another_value_stays_unknown(known, text):
    assert Vocabulary.build(known).encode_counted([text])[1] == 1


@pytest.mark.parametrize("sign", ["|", ",", ";", "$", "::"])
def test_values_of_a_text_have_no_spaces_around_and_are_not_empty(sign):
    plain = [["t 1", "t2"], ["t2"], [], ["t2", "t3"], []]
    texts = [f"t 1 {sign} t2", f" t2{sign}", f" {sign} ", f"{sign}t2{sign} {sign}t3\t", ""]
    vocab = Vocabulary.build(pl.Series([*texts, None]), separator=sign)
    assert vocab.values == ["t2", "t 1", "t3"]
    rows, offsets, unknown = vocab.encode_bags(pl.Series(texts))
    expected = vocab.encode_bags(pl.Series([sign.join(values) for values in plain]))
    assert torch.equal(rows, expected[0]) and torch.equal(offsets, expected[1]) and not unknown
    assert offsets.diff().tolist() == list(map(len, plain))


def test_a_stored_vocabulary_splits_as_it_did():
    """With values that are empty and have spaces around, of a file that does not say otherwise."""
    trained = Vocabulary("x", ["t1", " t2", ""], torch.tensor([3, 2, 1, 0]), 3, separator="|")
    tensors, meta = trained.to_tensors()
    del meta["trimmed"]
    for _ in range(2):
        stored = Vocabulary.from_tensors(tensors, meta)
        assert stored.encode_bags(["t1| t2|", "t1 "])[0].tolist() == [0, 1, 2, 3]
        tensors, meta = stored.to_tensors()
    again = Vocabulary.from_tensors(*Vocabulary.build(["t1| t2"], separator="|").to_tensors())
    assert again.encode_bags(["t2 |"])[2] == 0


def test_lists_that_are_written_as_text_are_those_lists():
    lists = [["A", "it's, so"], ['say "é"', "A"], [], None, ["B|C"]]
    python = [None if v is None else str(v) for v in lists]
    dumped = [None if v is None else json.dumps(v) for v in lists]
    expected = Vocabulary.build(pl.Series(lists)).encode_bags(pl.Series(lists))
    for known in (python, dumped):
        vocab = Vocabulary.build(known, separator="[]")
        for texts in (python, dumped, lists):
            rows, offsets, unknown = vocab.encode_bags(pl.Series(texts))
            assert torch.equal(rows, expected[0]) and torch.equal(offsets, expected[1])
            assert not unknown
        assert vocab.encode_bags(["[null, \" A \", '', None]"])[1].tolist() == [0, 1]
        assert vocab.encode_bags(["A"])[2] == 0
    vocab = Vocabulary.build(pl.Series([[1, 2], [2], [1]]))
    assert vocab.encode_bags(["[1, 2]", "[2.0]", "[]"])[0].tolist() == [0, 1, 1]


def test_real_lists_are_taken_as_they_are():
    lists = [["a\\b", '"q"', "'s'"], ["c:\\new", '"q"'], ["a\\b"]]
    python, dumped = [str(v) for v in lists], [json.dumps(v) for v in lists]
    own = Vocabulary.build(pl.Series(lists)).encode_bags(pl.Series(lists))
    for trained in (python, dumped, pl.Series(lists)):
        vocab = Vocabulary.build(trained, separator="[]")
        for scored in (python, dumped, pl.Series(lists)):
            rows, offsets, unknown = vocab.encode_bags(scored)
            assert torch.equal(rows, own[0]) and torch.equal(offsets, own[1]) and not unknown
        assert vocab.first_unknown(pl.Series([["a\\b"], ["'s"]]), bags=True) == "'s"


def test_spaces_around_listed_values_are_found_in_either_form():
    lists = [[" lead", "x"], ["x", "trail "], ["x"]]
    forms = [pl.Series(lists), [str(v) for v in lists], [json.dumps(v) for v in lists]]
    for trained in forms:
        vocab = Vocabulary.build(trained, separator=None if trained is forms[0] else "[]")
        rows = [vocab.encode_bags(scored) for scored in forms]
        assert all(torch.equal(r[0], rows[0][0]) and r[2] == 0 for r in rows)
    apart = Vocabulary.build(pl.Series([[" x", "x"], ["x"]]))
    assert apart.encode_bags(["[' x', 'x', 'x ']"])[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("min_count", [1, 2])
def test_an_empty_text_is_missing_where_only_that_is_known(min_count):
    vocab = Vocabulary.build(["a", None, "b", None, "a", "b"], min_count=min_count)
    missing = int(vocab.encode([None])[0])
    tensors, meta = vocab.to_tensors()
    for known in (vocab, Vocabulary.from_tensors(tensors, meta)):
        for column in (pl.Series(["", "a", "z"]), pl.Series(["", "a", "z"], dtype=pl.Categorical)):
            rows, unknown = known.encode_counted(column)
            assert rows.tolist() == [missing, int(known.encode(["a"])[0]), known.oov_row]
            assert unknown == 1
        assert known.first_unknown(pl.Series(["", "z"])) == "z"
    assert Vocabulary.build(["a", "b"]).encode_counted([""])[1] == 1
    # Where it was a value of its own, it is no missing one, though it was rare.
    rare = Vocabulary.build(["a", "a", None, None, ""], min_count=2)
    tensors, meta = rare.to_tensors()
    for known in (rare, Vocabulary.from_tensors(tensors, meta)):
        assert known.encode([""]).tolist() == [known.oov_row]


def test_text_is_split_where_training_had_lists():
    lists = pl.Series([["A", "B"], ["B"], [], None, ["B", "C", "A"]])
    numbers = pl.Series([[1, 2], [2], [], None, [2, 3, 1]])
    for trained, sign in ((lists, "|"), (numbers, "|"), (lists, ";")):
        own = None if sign == "|" else sign
        vocab = Vocabulary.build(trained, separator=own)
        text = trained.cast(pl.List(pl.String)).list.join(sign)
        for column in (text, text.cast(pl.Categorical)):
            for found, expected in zip(
                vocab.encode_bags(column), vocab.encode_bags(trained), strict=True
            ):
                assert found == expected if isinstance(found, int) else torch.equal(found, expected)
    assert Vocabulary.build(numbers).encode_bags(pl.Series(["1.0|2.0"]))[2] == 0


def test_text_stays_whole_where_a_listed_value_holds_the_separator():
    vocab = Vocabulary.build(pl.Series([["A|B", "C"], ["A|B"]]))
    rows, offsets, unknown = vocab.encode_bags(pl.Series(["A|B", "C"]))
    assert (rows.tolist(), offsets.tolist(), unknown) == ([0, 1], [0, 1, 2], 0)


def test_many_texts_are_stored_and_read_without_an_object_for_each():
    texts = pl.Series("id", [f"{i * 2654435761:019d}é" for i in range(100_000)] + ["", None])
    vocabulary = Vocabulary.build(texts)
    tracemalloc.start()
    try:
        tensors, meta = vocabulary.to_tensors()
        again = Vocabulary.from_tensors(tensors, meta)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert torch.equal(again.encode(texts), vocabulary.encode(texts))
    # Joined, encoded and copied; with an object of Python for each it would be twelve times.
    assert peak < 5 * tensors["bytes"].nbytes
    tensors["lengths"] = tensors["lengths"] + 1
    with pytest.raises(ValueError, match="larger than"):
        Vocabulary.from_tensors(tensors, meta)
