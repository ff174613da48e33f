"""Frequency groups and features, and the exactness of evaluating groups instead of rows."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import amtl
import numpy as np
import pytest
import torch
from amtl.layer.budget import SizeGrid
from amtl.layer.frequency import (
    check_counts,
    check_field_sizes,
    decode_row_map,
    encode_row_map,
    frequency_features,
    frequency_groups,
    log_count_zscores,
    mid_ranks,
    rounded_counts,
)
from amtl.layer.sizes import FreeSizes, make_size_head
from hypothesis import given, settings
from hypothesis import strategies as st

counts_lists = st.lists(st.integers(0, 6) | st.integers(0, 10**12), min_size=1, max_size=60)


@st.composite
def fields_of_counts(draw):
    fields = draw(st.lists(counts_lists, min_size=1, max_size=4))
    if draw(st.booleans()):
        fields = [sorted(f, reverse=True) for f in fields]
    return fields


@settings(max_examples=60)
@given(fields_of_counts())
def test_groups_are_the_distinct_field_count_pairs(fields):
    counts = torch.tensor([c for f in fields for c in f])
    groups = frequency_groups(counts, [len(f) for f in fields])
    of_row = groups.row_group.long()
    assert groups.row_group.dtype == torch.int32
    row_fields = torch.tensor([i for i, f in enumerate(fields) for _ in f])
    assert torch.equal(groups.counts[of_row], counts)
    assert torch.equal(groups.fields[of_row], row_fields)
    pairs = {(i, c) for i, f in enumerate(fields) for c in f}
    assert groups.num_groups == len(pairs)
    order = list(zip(groups.fields.tolist(), (-groups.counts).tolist(), strict=True))
    assert order == sorted(order)
    assert torch.equal(groups.rows_per_group(), torch.bincount(of_row))


@given(st.lists(st.integers(0, 2**55), max_size=30))
def test_rounded_counts_keep_six_bits_and_their_order(values):
    counts = torch.tensor(sorted(values), dtype=torch.int64)
    rounded = rounded_counts(counts)
    assert torch.equal(rounded[counts < 64], counts[counts < 64])
    assert bool(((rounded - counts).abs() <= counts / 64).all())
    assert bool((rounded[1:] >= rounded[:-1]).all())
    assert all(bin(value).rstrip("0").count("1") <= 6 for value in rounded.tolist())
    assert torch.equal(rounded_counts(rounded), rounded)


@pytest.mark.parametrize("parametrization", ["ordinal", "free", "rule"])
def test_only_learned_sizes_take_near_counts_for_one(parametrization):
    counts = torch.arange(20_000)
    table = amtl.AMTLEmbedding(20_000, 4, counts=counts, parametrization=parametrization)
    assert (table.head.num_groups < 400) == (parametrization != "rule")
    of_row = table.head.group_counts[table.row_group.long()]
    expected = counts if parametrization == "rule" else rounded_counts(counts)
    assert torch.equal(of_row[1:], expected[1:])


@settings(max_examples=60)
@given(fields_of_counts())
def test_features_of_groups_equal_features_of_rows(fields):
    counts = torch.tensor([c for f in fields for c in f])
    groups = frequency_groups(counts, [len(f) for f in fields])
    features = frequency_features(
        groups.counts, groups.rows_per_group(), groups.fields, groups.num_fields
    )[groups.row_group.long()]
    row = 0
    for index, field in enumerate(fields):
        values = np.array(field, dtype=np.float64)
        logs = np.log1p(values)
        spread = logs.std()
        for value in values:
            z = (np.log1p(value) - logs.mean()) / spread if len(set(field)) > 1 else 0.0
            below, equal = (values < value).sum(), (values == value).sum()
            rank = (below + (equal - 1) / 2) / (len(field) - 1) if len(field) > 1 else 0.5
            expected = np.array([z, rank, *np.eye(len(fields))[index]])
            np.testing.assert_allclose(features[row].numpy(), expected, atol=2e-5, rtol=2e-5)
            row += 1


def test_features_are_centred_and_bounded():
    counts = torch.tensor([900, 90, 90, 9, 0, 0, 0])
    groups = frequency_groups(counts)
    rows = groups.rows_per_group()
    z = log_count_zscores(groups.counts, rows, groups.fields, 1)
    assert abs(float((z * rows).sum())) < 1e-9
    assert float((z.square() * rows).sum() / rows.sum()) == pytest.approx(1)
    rank = mid_ranks(groups.counts, rows, groups.fields, 1)
    # The top value ranks 1; the three values seen never share the middle of ranks 0..2.
    assert rank.tolist() == pytest.approx([1, 4.5 / 6, 3 / 6, 1 / 6])


def test_gate_takes_both_sides():
    """With an uncentred norm the gate never drops under 1/2 and the twins are not twins."""
    head = FreeSizes(frequency_groups(torch.arange(100)), SizeGrid(4), None)
    assert float(head.gate.min()) < 0.4 < 0.6 < float(head.gate.max())


@pytest.mark.parametrize("parametrization", ["ordinal", "free"])
def test_grouped_evaluation_equals_per_row_evaluation(parametrization):
    torch.manual_seed(0)
    counts = torch.cat([torch.randint(0, 40, (300,)), torch.randint(0, 5, (200,))])
    groups = frequency_groups(counts, [300, 200])
    head = make_size_head(parametrization, groups, SizeGrid(16), 0.3)
    of_row = groups.row_group.long()
    assert head.num_groups < 50
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        by_group = head.branches(head.features, head.gate)[of_row]
        by_row = head.branches(head.features[of_row], head.gate[of_row])
    torch.testing.assert_close(by_group, by_row, rtol=1e-5, atol=1e-5)

    # A head in which every row is a group of its own gives the same sizes.
    alone = make_size_head(parametrization, per_row(counts, [300, 200]), SizeGrid(16), 0.3)
    for mine, theirs in zip(alone.parameters(), head.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    assert alone.num_groups == 500
    torch.testing.assert_close(alone.features, head.features[of_row])
    assert torch.equal(head.sizes()[of_row], alone.sizes())
    assert head.stored_fraction() == alone.stored_fraction()
    torch.testing.assert_close(head().mask[of_row], alone().mask, rtol=1e-4, atol=1e-5)


def per_row(counts, sizes):
    groups = frequency_groups(counts, sizes, row_features=torch.zeros(len(counts), 0))
    assert torch.equal(groups.row_group, torch.arange(len(counts), dtype=torch.int32))
    return groups


def test_row_features():
    counts = torch.tensor([5, 5, 3, 9])
    groups = frequency_groups(counts, [2, 2], row_features=torch.tensor([[1], [2], [3], [4]]))
    assert groups.num_groups == 4 and groups.fields.tolist() == [0, 0, 1, 1]
    head = make_size_head("ordinal", groups, SizeGrid(8), 0.5)
    assert head.features.shape == (4, 5) and head.features[:, 4].tolist() == [1, 2, 3, 4]
    assert head.features[:2, 1].tolist() == [0.5, 0.5]
    for wrong in (torch.zeros(3, 1), torch.zeros(4), torch.full((4, 1), float("nan"))):
        with pytest.raises(ValueError, match="row_features"):
            frequency_groups(counts, None, row_features=wrong)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), max_size=50), st.booleans())
def test_row_map_round_trip(groups, in_order):
    groups = torch.tensor(sorted(groups) if in_order else groups, dtype=torch.int32)
    encoded = encode_row_map(groups)
    assert encoded.numel() <= max(groups.numel(), 1)
    decoded = decode_row_map(encoded, groups.numel())
    assert decoded.dtype == torch.int32 and torch.equal(decoded, groups)


def test_row_map_of_a_sorted_table_is_short():
    groups = torch.arange(10, dtype=torch.int32).repeat_interleave(1000)
    assert encode_row_map(groups).shape == (2, 10)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (None, "torch.bincount"),
        ([[1, 2]], "shape"),
        ([1, 2], r"\[3\]"),
        ([1, -2, 3], "negative"),
        ([1, 2.5, 3], "whole"),
        ([1, float("nan"), 3], "whole"),
        ([True, False, True], "integers"),
    ],
)
def test_bad_counts(counts, message):
    with pytest.raises(ValueError, match=message):
        check_counts(counts, 3)


def test_whole_float_counts_are_taken():
    assert check_counts(torch.tensor([1.0, 2.0]), 2).dtype == torch.int64


def series(values, index):
    """As much of a Series of pandas as is looked at."""
    return SimpleNamespace(index=np.array(index), tolist=lambda: list(values))


@pytest.mark.parametrize(
    "counts",
    [
        Counter([2, 0, 2, 2, 0]),
        {np.int64(2): 3, np.int64(0): 2.0, 1: 0},
        series([3, 2], [2, 0]),
        series([3.0, 2.0, 0.0], [2.0, 0.0, 1.0]),
    ],
)
def test_counts_that_name_their_rows(counts):
    assert check_counts(counts, 3).tolist() == [2, 0, 3]
    layer = amtl.convert(torch.nn.Embedding(3, 4), counts, budget=1.0, bits=None)
    same = amtl.convert(torch.nn.Embedding(3, 4), [2, 0, 3], budget=1.0, bits=None)
    assert torch.equal(layer.row_group, same.row_group)


@pytest.mark.parametrize(
    "counts",
    [
        Counter(["a", "b", "a"]),
        {"a": 1, 2: 3},
        Counter([0, 3]),
        {-1: 1},
        {0.5: 1},
        {True: 1},
        {(0, 1): 2},
        series([3, 2], ["a", "b"]),
        series([3, 2], [1, 3]),
        series([3, 2], [(0, 1), (0, 2)]),
    ],
)
def test_counts_that_name_no_rows_of_the_table(counts):
    with pytest.raises(ValueError, match=r"row numbers 0\.\.2 .*torch\.bincount"):
        check_counts(counts, 3)


def test_a_row_that_is_counted_twice():
    with pytest.raises(ValueError, match=r"more than once.*torch\.bincount"):
        check_counts(series([3, 2], [1, 1]), 3)
    # Each number of a tensor is a key of its own.
    with pytest.raises(ValueError, match=r"more than once.*torch\.bincount"):
        check_counts(Counter(torch.tensor([1, 1])), 3)


def test_no_numbers_at_all():
    with pytest.raises(ValueError, match=r"cannot be read as numbers.*torch\.bincount"):
        check_counts({1, 2, 3}, 3)
    with pytest.raises(ValueError, match=r"cannot be read as numbers.*torch\.bincount"):
        check_counts({0: "many"}, 3)


def test_counts_of_pandas():
    pandas = pytest.importorskip("pandas", reason="needs: pip install pandas")
    ids = pandas.Series([2, 0, 2, 2, 0, 4])
    assert check_counts(ids.value_counts(), 6).tolist() == [2, 0, 3, 0, 1, 0]
    assert check_counts(ids.value_counts().sort_index(), 6).tolist() == [2, 0, 3, 0, 1, 0]
    assert check_counts(pandas.Series([4, 5, 6]), 3).tolist() == [4, 5, 6]
    with pytest.raises(ValueError, match="shape"):
        check_counts(pandas.Series([4, 5]), 3)
    with pytest.raises(ValueError, match=r"other keys, such as \['a'"):
        check_counts(pandas.Series(["a", "b"]).value_counts(), 2)


@pytest.mark.parametrize("sizes", [[3, 3], [0, 5], [-1, 6]])
def test_bad_field_sizes(sizes):
    with pytest.raises(ValueError, match=r"field_sizes|field"):
        check_field_sizes(sizes, 5)
