"""Files that are compressed, alone in an archive, or called what they are not."""

from __future__ import annotations

import io
import lzma
import zipfile

import polars as pl
import pytest
from amtl.data.readers import Contents, read_file
from amtl.errors import UserError

TABLE = pl.DataFrame({"x": [1, 2, 3], "y": ["a", "b", "c"]})


def read(tmp_path, content, name="a.csv") -> Contents:
    (tmp_path / name).write_bytes(content)
    return read_file(tmp_path / name)


def test_what_xz_compressed_is_read(tmp_path):
    content = lzma.compress(TABLE.write_csv().encode())
    for name in ("a.csv.xz", "a.csv"):
        assert read(tmp_path, content, name).frame.equals(TABLE)
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path, content[:-9], "a.csv.xz")


def zipped(files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return content.getvalue()


@pytest.mark.parametrize("name", ["a.zip", "a.csv.zip", "a.csv"])
def test_a_table_alone_in_an_archive_is_read(tmp_path, name):
    """As sites hand out data, with what macOS and people put beside it."""
    parquet = io.BytesIO()
    TABLE.write_parquet(parquet)
    tables = {"a.csv": TABLE.write_csv(), "b.parquet": parquet.getvalue()}
    for held, content in tables.items():
        files = {"about.md": "x", "data/": "", f"data/{held}": content, f"__MACOSX/._{held}": "x"}
        assert read(tmp_path, zipped(files), name).frame.equals(TABLE)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"train.csv": "a,b\n1,2\n", "test.csv": "a\n1\n"}, "holds train.csv, test.csv: unpack it"),
        ({"about.md": "x"}, "holds about.md: unpack it"),
        ({"a.csv.gz": "x"}, "holds a.csv.gz: unpack it .unzip .*a.zip. and name one file"),
        ({}, "unknown kind '.zip'"),
    ],
)
def test_of_other_archives_it_is_said_what_to_do(tmp_path, files, told):
    with pytest.raises(UserError, match=told):
        read(tmp_path, zipped(files), "a.zip")


def test_a_damaged_archive_is_a_user_error(tmp_path):
    content = zipped({"a.csv": TABLE.write_csv() * 9})
    for damaged in (content[:-30], content[:60] + b"xxxx" + content[64:]):
        with pytest.raises(UserError, match=r"cannot read .*unpack it"):
            read(tmp_path, damaged, "a.zip")


@pytest.mark.parametrize("name", ["part-00000", "a.csv", "a.parquet", "a.dat"])
@pytest.mark.parametrize("write", ["write_parquet", "write_ipc"])
def test_parquet_and_arrow_may_have_any_name(tmp_path, name, write):
    content = io.BytesIO()
    getattr(TABLE, write)(content)
    assert read(tmp_path, content.getvalue(), name).frame.equals(TABLE)


def test_text_that_begins_as_parquet_does_is_text(tmp_path):
    assert read(tmp_path, b"PAR1,PAR2\n1,2\n3,4\n").frame.columns == ["PAR1", "PAR2"]
