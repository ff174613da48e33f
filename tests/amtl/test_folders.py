"""Folders of files that are read as one table, and what these may differ in."""

from __future__ import annotations

import polars as pl
import pytest
from amtl.data.readers import read_file
from amtl.data.registry import load_rows, load_source
from amtl.errors import UserError

TABLE = pl.DataFrame({"x": [1, 2, 3], "y": ["a", "b", "c"]})


def test_a_folder_of_parquet(tmp_path):
    with pytest.raises(UserError, match=r"no \.parquet file"):
        read_file(tmp_path)
    TABLE[:2].write_parquet(tmp_path / "a.parquet")
    TABLE[2:].write_parquet(tmp_path / "b.parquet")
    assert read_file(tmp_path).frame.equals(TABLE)


def test_the_text_files_of_a_folder_are_parts_of_one_table(tmp_path):
    (tmp_path / "a.csv").write_text("x,y,z\n1,a,\n-,b,\n")
    (tmp_path / "b.csv").write_text("z;x;y\n0,5;2.5;c\n")
    read = read_file(tmp_path)
    rows = [(1, "a", None), (None, "b", None), (2.5, "c", 0.5)]
    assert read.frame.rows() == rows and read.frame.columns == ["x", "y", "z"]
    assert "2 files were read as one: a.csv, b.csv" in read.notes
    (tmp_path / "test.csv").write_text("x,z\n1,0\n")
    with pytest.raises(UserError, match=r"other columns \(y\), so .*: name one of them"):
        read_file(tmp_path)
    (tmp_path / "test.csv").rename(tmp_path / "test.json")
    with pytest.raises(UserError, match="of several kinds"):
        read_file(tmp_path)


def test_parts_of_a_folder_may_differ_in_what_makes_no_difference(tmp_path):
    a = pl.DataFrame({"u": [1, 2], "c": [None, None], "k": ["x", "y"], "y": [0, 1]})
    b = pl.DataFrame({"k": ["z"], "y": [1], "c": ["q"], "u": [2**40]})
    b = b.cast({"k": pl.Categorical})
    a.cast({"u": pl.Int32}).write_parquet(tmp_path / "a.parquet")
    b.write_parquet(tmp_path / "b.parquet")
    rows = [(1, None, "x", 0), (2, None, "y", 1), (2**40, "q", "z", 1)]
    assert read_file(tmp_path).frame.rows() == rows
    pl.DataFrame({"u": ["7"]}).write_parquet(tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"'u' is Int32 in '.*a.parquet' and String in '.*d.par"):
        read_file(tmp_path)


def test_a_folder_of_folders_has_what_these_say(tmp_path):
    for i, folder in enumerate(["n=1/day=2024-01-01", "n=2/day=a%20b", "n=2/_temporary/day=x"]):
        (tmp_path / folder).mkdir(parents=True)
        TABLE[i : i + 1].write_parquet(tmp_path / folder / "p.parquet")
    frame = read_file(tmp_path).frame
    assert frame.columns == ["x", "y", "n", "day"]
    assert frame.rows() == [(1, "a", 1, "2024-01-01"), (2, "b", 2, "a b")]


def test_what_a_folder_is_called_is_read_like_what_is_called_in_it(tmp_path):
    folder = tmp_path / "clicks" / "n=1" / "day=2024-01-02"
    folder.mkdir(parents=True)
    TABLE.write_parquet(folder / "p.parquet")
    rows = read_file(tmp_path / "clicks")
    assert rows.notes == ("by the names of folders, and needed to score: day, n",)
    for one_day in (folder, folder / "p.parquet", folder.parent):
        frame = read_file(one_day).frame
        assert frame.select(rows.frame.columns).equals(rows.frame)


def test_a_damaged_file_of_a_folder_is_named(tmp_path):
    TABLE.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-3])
    with pytest.raises(UserError, match=r"cannot read '.*/b\.parquet': Parquet magic bytes"):
        read_file(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read '.*/b\.parquet'.* others are read"):
        read_file(tmp_path)


def test_what_some_files_of_a_folder_lack_is_said(tmp_path):
    for day in range(4):
        frame = TABLE if day < 2 else TABLE.drop("y")
        frame.write_parquet(tmp_path / f"{day}.parquet")
    said = (
        "2 of 4 files have no column 'y', which is missing in their rows: 2.parquet to 3.parquet",
    )
    assert read_file(tmp_path).lacking == said
    source = load_source(str(tmp_path))
    assert source.notes == said
    assert load_rows(str(tmp_path), [])[1] == list(said)


@pytest.mark.parametrize(
    "day, other",
    [
        (pl.Datetime("us"), pl.Datetime("us", "UTC")),
        (pl.Datetime("us", "Europe/Berlin"), pl.Datetime("us", "UTC")),
    ],
)
def test_moments_with_and_without_a_zone_are_of_two_types(tmp_path, day, other):
    for name, dtype in (("a", day), ("b", other)):
        column = pl.Series("when", [0], dtype=pl.Int64).cast(dtype)
        column.to_frame().write_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"'when' is Datetime.* in '.*a\.parquet' and Datetime"):
        read_file(tmp_path)


def test_ids_that_pandas_made_floats_on_one_day_are_ids(tmp_path):
    pl.DataFrame({"u": [1, 7], "price": [1, 2]}).write_parquet(tmp_path / "a.parquet")
    later = pl.DataFrame({"u": [float("nan"), 3.0, None], "price": [1.5, 2, 3]})
    later.write_parquet(tmp_path / "b.parquet")
    frame = read_file(tmp_path).frame
    assert frame["u"].dtype == pl.Int64 and frame["u"].to_list() == [1, 7, None, 3, None]
    assert frame["price"].to_list() == [1, 2, 1.5, 2, 3]


@pytest.mark.parametrize("kind", ["csv", "ndjson"])
def test_days_of_text_are_folders_too(tmp_path, kind):
    for day in (1, 2):
        folder = tmp_path / "clicks" / f"day=2024-01-0{day}" / "hour=7"
        folder.mkdir(parents=True)
        (folder / "_SUCCESS").touch()
        getattr(TABLE[day - 1 : day], f"write_{kind}")(folder / f"part-0.{kind}")
    read = read_file(tmp_path / "clicks")
    assert read.frame.rows() == [(1, "a", "2024-01-01", 7), (2, "b", "2024-01-02", 7)]
    assert read.notes[-1] == "by the names of folders, and needed to score: day, hour"
    for one_day in (folder, folder / f"part-0.{kind}"):
        frame = read_file(one_day).frame
        assert frame.select(read.frame.columns).rows() == [(2, "b", "2024-01-02", 7)]


def test_a_day_of_json_may_lack_a_key_as_an_object_may(tmp_path):
    TABLE.write_ndjson(tmp_path / "a.ndjson")
    TABLE.drop("y").write_ndjson(tmp_path / "b.ndjson")
    read = read_file(tmp_path)
    assert read.frame["y"].to_list() == ["a", "b", "c", None, None, None] and read.objects
    assert read.lacking == (
        "1 of 2 files have no column 'y', which is missing in their rows: b.ndjson",
    )
