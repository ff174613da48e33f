from __future__ import annotations

import gc
import gzip
import io
import json
import math
import os
import re
import shlex

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pytest
from amtl.data import libsvm
from amtl.data.readers import read_file, require_columns
from amtl.data.registry import load_source
from amtl.errors import UserError

TABLE = pl.DataFrame({"x": [1, 2, 3], "y": ["a", "b", "c"]})


@pytest.mark.parametrize(
    ("name", "separator"),
    [
        ("a.csv", ","),
        ("a.csv", ";"),
        ("a.csv", "\t"),
        ("a.csv", "|"),
        ("a.tsv", "\t"),
        ("a.tsv", ","),
        ("a.txt", "\t"),
        ("A.CSV", ","),
        ("a.csv.gz", ";"),
    ],
)
def test_text_is_read_alike_whatever_separates_it(tmp_path, name, separator):
    path = tmp_path / name
    text = TABLE.write_csv(separator=separator).encode()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert read_file(path).frame.equals(TABLE)
    assert load_source(str(path)).frame.equals(TABLE)


@pytest.mark.parametrize("sign", ["::", "^", "\x01", "~"])
def test_other_signs_separate_columns_where_no_usual_one_does(tmp_path, sign):
    path = tmp_path / "films.csv"
    rows = [["id", "film", "genres"], ["1", "Heat, 1995", "Crime"], ["2", '"A, b"', "X|Y|Z"]]
    path.write_text("".join(f"{sign.join(row)}\n" for row in rows))
    contents = read_file(path)
    films = {"id": [1, 2], "film": ["Heat, 1995", "A, b"], "genres": ["Crime", "X|Y|Z"]}
    assert contents.frame.to_dict(as_series=False) == films
    assert "columns are separated by" in contents.notes[0]
    path.write_text("a,b\n1::2,3\n4::5,6\n")
    assert read_file(path).frame.rows() == [("1::2", 3), ("4::5", 6)]


@pytest.mark.parametrize("name", ["u.data", "ratings.dat.gz", "clicks.base"])
def test_of_other_names_text_of_even_lines_is_a_table(tmp_path, name):
    path = tmp_path / name
    content = b"196\t242\t3\t881250949\n186\t302\t3\t891717742\n22\t377\t1\t878887116\n"
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_file(path).frame.rows()[1] == (186, 302, 3, 891717742)
    objects = tmp_path / "clicks.log"
    objects.write_bytes(b'{"user": 3}\n{"user": 4}\n')
    assert read_file(objects).frame.to_dict(as_series=False) == {"user": [3, 4]}


def test_names_as_recbole_writes_them_say_what_columns_hold(tmp_path):
    path = tmp_path / "shop.inter"
    header = "user_id:token\titem_id:token\trating:float\ttags:token_seq\tcodes:token_seq\n"
    path.write_text(header + "1\ta\t3.5\tred big\t7\n2\tb\t4\tred\t8\n3\ta\t1\t\t9\n")
    frame = read_file(path).frame
    assert frame.columns == ["user_id", "item_id", "rating", "tags", "codes"]
    assert frame["rating"].to_list() == [3.5, 4.0, 1.0]
    assert frame["tags"].to_list() == [["red", "big"], ["red"], None]
    assert frame["codes"].to_list() == [["7"], ["8"], ["9"]]
    path.write_text("time:of\ty:token\n1\t2\n3\t4\n")
    assert read_file(path).frame.columns == ["time:of", "y:token"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    "lines",
    [
        [" x    y     z", " 1  two  3.50", "20    b    NA", " 3    c  0.25"],
        ['"x" "y" "z"', '1 "two" 3.5', '20 "b" NA', '3 "c" 0.25'],
        ['"x" "y" "z"', '"1" 1 "two" 3.5', '"2" 20 "b" NA', '"17" 3 "c" 0.25'],
    ],
    ids=["aligned", "R", "R with names of rows"],
)
def test_runs_of_spaces_separate_columns_where_nothing_else_does(tmp_path, lines, end):
    (tmp_path / "a.txt").write_bytes(end.join([*lines, ""]).encode())
    read = read_file(tmp_path / "a.txt")
    wanted = {"x": [1, 20, 3], "y": ["two", "b", "c"], "z": [3.5, None, 0.25]}
    assert read.frame.select("x", "y", "z").to_dict(as_series=False) == wanted
    assert read.frame.width == 3 + lines[1].startswith('"1"')
    assert "columns are separated by spaces" in read.notes


@pytest.mark.parametrize(
    "text", ["full name\nAda Byron\nAlan Turing\n", "a b c\n1 2\n3 4 5\n6 7 8\n"]
)
def test_names_of_two_words_and_uneven_lines_are_not_cut_at_spaces(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert read_file(tmp_path / "a.csv").frame.width == 1


@pytest.mark.parametrize("write", ["write_csv", "write_parquet", "write_ndjson", "write_json"])
def test_what_is_piped_in_or_has_no_suffix_is_known_by_what_it_holds(tmp_path, write):
    content = io.BytesIO()
    getattr(TABLE, write)(content)
    (tmp_path / "rows").write_bytes(content.getvalue())
    assert load_source(str(tmp_path / "rows")).frame.equals(TABLE)
    packed = content.getvalue() if write == "write_parquet" else gzip.compress(content.getvalue())
    reading, writing = os.pipe()
    with open(reading, "rb"):
        os.write(writing, packed)
        os.close(writing)
        piped = load_source(f"/dev/fd/{reading}")
    assert piped.frame.equals(TABLE) and piped.name == f"/dev/fd/{reading}"


def test_a_terminal_is_asked_for_no_rows():
    ours, theirs = os.openpty()
    try:
        with pytest.raises(UserError, match="nothing is piped in"):
            read_file(os.ttyname(theirs))
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.parquet", "write_parquet"),
        ("a.ndjson", "write_ndjson"),
        ("a.jsonl", "write_ndjson"),
        ("a.json", "write_ndjson"),
        ("a.json", "write_json"),
        ("a.arrow", "write_ipc"),
        ("a.arrow", "write_ipc_stream"),
        ("a.feather", "write_ipc"),
    ],
)
def test_other_kinds(tmp_path, name, write, packed):
    path = tmp_path / name
    getattr(TABLE, write)(path)
    if packed:
        content = gzip.compress(path.read_bytes())
        path = path.with_name(name + ".gz")
        path.write_bytes(content)
    assert read_file(path).frame.equals(TABLE)


def read(tmp_path, content, name="a.csv"):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(tmp_path / name)


@pytest.mark.parametrize("start", ["sep=;\n", "\ufeffsep=;\r\n", '"sep=;"\r\n', "SEP=;\r"])
def test_a_line_that_names_the_separator_is_no_row(tmp_path, start):
    end = start.strip("\ufeff").partition(";")[2].strip('"')
    contents = read(tmp_path, start + end.join(["x;y, z", "1;a", "2;b"]) + end)
    assert contents.frame.to_dict(as_series=False) == {"x": [1, 2], "y, z": ["a", "b"]}
    assert contents.notes == ("line 1 says what separates columns, and is left out: semicolons",)
    with pytest.raises(
        UserError, match=r"a.csv without line 1': line 3 has 3 columns, the first 2"
    ):
        read(tmp_path, "sep=;\nx;y\n1;2\n1;2;3\n")


def test_decimal_commas(tmp_path):
    assert read(tmp_path, "p;q\n1,5;2\n3;4\n").frame["p"].to_list() == [1.5, 3.0]


@pytest.mark.parametrize("gap", ["NA", "", "nan", "inf", "?"])
def test_decimal_commas_with_gaps(tmp_path, gap):
    contents = read(tmp_path, f"p;q;r;s\n1,5;2;1,5;x\n{gap};4;2.5;y\n-3;5;3;z\n")
    odd = float("inf") if gap == "inf" else None
    assert contents.frame["p"].to_list() == [1.5, odd, -3.0]
    assert contents.frame["r"].to_list() == ["1,5", "2.5", "3"]
    assert contents.notes[1:] == (
        () if gap in ("", "inf") else (f"{gap!r} is a missing number in p",)
    )


def test_spaces_after_separators_are_left_out(tmp_path):
    text = "k, v, t, y\n" + '7, 0.5, "a, b", 1\n' * 99 + " 8, ,c  d, 0\n"
    contents = read(tmp_path, text)
    assert contents.frame.columns == ["k", "v", "t", "y"]
    assert contents.frame.rows()[0] == (7, 0.5, "a, b", 1)
    assert contents.frame.rows()[-1] == (8, None, "c  d", 0)
    assert contents.notes == ("spaces after commas are left out",)
    assert read(tmp_path, gzip.compress(text.encode()), "a.csv.gz").frame.equals(contents.frame)
    assert read(tmp_path, "k,v\n1, 2\n3, 4\n").frame["v"].to_list() == [2, 4]
    assert read(tmp_path, "k; v\n1; 2,5\n3; 4\n").frame["v"].to_list() == [2.5, 4.0]
    assert read(tmp_path, "k,v\n1, a\n3,b\n5, c\n").frame["v"].to_list() == [" a", "b", " c"]
    assert read(tmp_path, "k\t v\n1\t a\n", "a.tsv").frame.rows() == [(1, " a")]


def test_names_with_spaces_around_are_quoted():
    with pytest.raises(UserError, match=r"its columns are k, ' v', 'w ', x y$"):
        require_columns(["k", " v", "w ", "x y"], ["v"], "the data")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("values", ["7 07 007", "00123 00124 00123", "7 NA 07", "1 2 0012"])
def test_integers_with_leading_zeros_are_text(tmp_path, name, values):
    """In any column, however late; what else begins with a zero is what it was."""
    values = ["9"] * 25_000 + values.split()
    others = f',{"a"},0,-0.5,0.25,01/02/2022,07:30:00,2022-01-01,"b,07,c"'
    for first in (True, False):
        cells = [f"{v}{others}" if first else f"{others[1:]},{v}" for v in values]
        text = ",".join("zabcdefgh") + "\n" + "\n".join(cells)
        text = text if first else text.replace("z,a,b,c,d,e,f,g,h", "a,b,c,d,e,f,g,h,z")
        content = gzip.compress(text.encode()) if name.endswith("gz") else text
        frame, notes = (contents := read(tmp_path, content, name)).frame, contents.notes
        assert frame["z"].to_list() == values
        assert "integers with leading zeros are text: z" in notes or "NA" in values
        kinds = [frame[c].dtype for c in "abcdefgh"]
        assert kinds == [pl.String, pl.Int64, pl.Float64, pl.Float64] + [pl.String] * 4
        assert frame["h"][0] == "b,07,c"
    assert read(tmp_path, "007,1\n8,0\n").frame["c0"].to_list() == ["007", "8"]
    assert read(tmp_path, "0,1\n10,0\n").frame["c0"].to_list() == [0, 10]


def test_a_file_without_a_header(tmp_path):
    contents = read(tmp_path, "1,u7,0.5\n0,u9,0.25\n")
    assert contents.frame.columns == ["c0", "c1", "c2"]
    assert contents.frame.rows() == [(1, "u7", 0.5), (0, "u9", 0.25)]
    assert "no header" in contents.notes[0]


def test_numbers_with_gaps_are_numbers_whatever_stands_for_a_gap(tmp_path):
    text = "i,f,t,m\n1,NA,NA,NA\nNA,0.5,a,?\n3,?,b,NA\n"
    frame, notes = (contents := read(tmp_path, text)).frame, contents.notes
    assert frame["i"].to_list() == [1, None, 3]
    assert frame["i"].dtype == pl.Int64
    assert frame["f"].to_list() == [None, 0.5, None]
    assert frame["t"].to_list() == ["NA", "a", "b"]
    assert frame["m"].to_list() == ["NA", "?", "NA"]
    assert notes == ("'NA', '?' are missing numbers in i, f",)


@pytest.mark.parametrize("gap", ['""', '" "', "<NA>", "-", "(null)", "unknown", "missing"])
def test_what_programs_write_for_a_missing_number_is_one(tmp_path, gap):
    rows = [gap if i % 4 == 0 else f'"{i}.5"' for i in range(40)]
    contents = read(tmp_path, '"p","t"\n' + "".join(f'{p},"a"\n' for p in rows))
    assert contents.frame["p"].to_list() == [None if i % 4 == 0 else i + 0.5 for i in range(40)]
    told = gap.strip('" ')
    assert contents.notes == ((f"{told!r} is a missing number in p",) if told else ())


def test_codes_beside_few_whole_numbers_are_values_of_their_own(tmp_path):
    def column(*cells):
        return read(tmp_path, "p,q\n" + "".join(f"{cell},1\n" for cell in cells * 30))

    answers = [*map(str, range(1, 21)), ""]
    contents = column(*answers * 2, "R", "D")
    assert contents.frame["p"].n_unique() == 23 and contents.notes == ()
    assert column(*answers * 2, "NA").frame["p"].dtype == pl.Int64
    assert column(*answers * 2, "21", "R", "D").frame["p"].dtype == pl.Int64
    assert column(*answers * 2, "2.5", "R", "D").frame["p"].dtype == pl.Float64


def test_one_or_two_rare_texts_among_numbers_are_missing_numbers(tmp_path):
    def column(*odd):
        cells = [*odd, *map(str, range(40 - len(odd)))]
        return read(tmp_path, "p,q\n" + "".join(f"{cell},1\n" for cell in cells))

    contents = column("n.d.", "tbd", "n.d.", "tbd")
    assert contents.frame["p"].dtype == pl.Int64 and contents.frame["p"].null_count() == 4
    assert contents.notes == ("'n.d.', 'tbd' are missing numbers in p",)
    for odd in (["n.d."], ["a"] * 5, ["a", "b", "c"] * 2, ["A1", "A1"]):
        assert column(*odd).frame["p"].dtype == pl.String
    long = [str(10**25), str(10**25 + 1)] * 20
    text = "p,q\n" + "".join(f"{cell},1\n" for cell in [*long, "-"])
    assert read(tmp_path, text).frame["p"].to_list() == [*long, "-"]


def test_spaces_after_numbers_are_left_out(tmp_path):
    contents = read(tmp_path, "p,q,t\n3,1,a \n3 ,2, b\n 4 ,,c\n")
    assert contents.frame.rows() == [(3, 1, "a "), (3, 2, " b"), (4, None, "c")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_are_no_rows(tmp_path, end):
    lines = ["", "u,t,y", "1,a,0", "", '2,"b\n\nc",1', "", ""]
    frame = read(tmp_path, end.join(lines)).frame
    assert frame.rows() == [(1, "a", 0), (2, "b\n\nc", 1)]
    assert read(tmp_path, "y,t\n1,\n0,b\n").frame.rows() == [(1, None), (0, "b")]


def test_lines_that_end_in_cr_are_lines(tmp_path):
    text = TABLE.write_csv().replace("\n", "\r").encode()
    assert read(tmp_path, text).frame.equals(TABLE)
    assert read(tmp_path, gzip.compress(text), "a.csv.gz").frame.equals(TABLE)


def test_a_column_without_a_name_has_one(tmp_path):
    contents = read(tmp_path, '"",x,\n1,5,a\n2,6,b\n')
    assert contents.frame.columns == ["c0", "x", "c2"]
    assert contents.notes == ("columns without a name: c0, c2",)
    with pytest.raises(UserError, match="names 'c0' more than once"):
        read(tmp_path, ",c0\n1,2\n")


def test_a_header_of_numbers_is_told_not_to_be_one(tmp_path):
    frame = read(tmp_path, "2019,2020,target\n3,4,yes\n5,6,no\n").frame
    with pytest.raises(UserError, match="in which no header was found, has no column 'target'"):
        require_columns(frame.columns, ["target"], "the data")


@pytest.mark.parametrize("text", ["a,b\nx,y\n", "2019,b\nx,1\n", "a,2020\n1,2\n", "a,b\n"])
def test_a_header_is_seen(tmp_path, text):
    assert read(tmp_path, text).frame.columns == text.split("\n")[0].split(",")
    assert not read(tmp_path, text).notes


def test_types_that_only_show_late(tmp_path):
    text = "a,b\n" + "1,1\n" * 25_000 + "x,1.5\n"
    frame = read(tmp_path, text).frame
    assert frame["a"][-1] == "x"
    assert frame["b"][-1] == 1.5


@pytest.mark.parametrize("name", ["a.ndjson", "a.json"])
def test_columns_and_types_of_json_that_only_show_late(tmp_path, name):
    late = [{"i": 0.5, "t": "x", "extra": "e"}]
    rows = [json.dumps(row) for row in [{"i": 1, "t": 1}] * 25_000 + late]
    listed = "[" + ",".join(rows) + "]"
    frame = read(tmp_path, listed if name == "a.json" else "\n".join(rows), name).frame
    assert frame.schema == {"i": pl.Float64, "t": pl.String, "extra": pl.String}
    assert frame.rows()[-2:] == [(1.0, "1", None), (0.5, "x", "e")]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a.ndjson", "a.csv.gz"])
def test_utf_16_is_read_as_utf_8_is(tmp_path, name):
    table = TABLE.with_columns(y=pl.Series(["Köln", "Łódź", "東京"]))
    text = table.write_ndjson() if name == "a.ndjson" else table.write_csv(separator="\t")
    content = text.encode("utf-16")
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_file(path).frame.equals(table)


def test_ids_beyond_int64(tmp_path):
    frame = read(tmp_path, f"id,y\n{10**20},1\n{10**20 + 1},0\n").frame
    assert frame["id"].cast(pl.String).to_list() == [str(10**20), str(10**20 + 1)]


@pytest.mark.parametrize("before", [0, 40_000])
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_windows_1252_is_read_and_said(tmp_path, name, before):
    rows = "x,y\n" + "1,b\n" * before + "2,Zürich\n3,5\xa0€ – “naïve”\n"
    path = tmp_path / name
    text = rows.encode("cp1252")
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    read = read_file(path)
    assert read.frame["y"][-2:].to_list() == ["Zürich", "5\xa0€ – “naïve”"]
    assert "as Windows-1252, so that it holds 'Zürich'; if that is wrong: iconv" in read.notes[0]
    path.write_bytes(gzip.compress(rows.encode()) if name.endswith("gz") else rows.encode())
    assert read_file(path).frame.equals(read.frame) and not read_file(path).notes


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Привет", "cp1251"),
        ("你好世界", "gbk"),
        ("こんにちは", "shift_jis"),
        ("Αθήνα", "cp1253"),
        ("\x81 is no sign of it", "latin1"),
    ],
)
def test_of_other_encodings_it_is_said_what_to_do(tmp_path, text, encoding):
    path = tmp_path / "a.csv"
    told = "line 40002 is not UTF-8, nor is the file Windows-1252; .*: iconv -f ENCODING -t UTF-8"
    path.write_bytes(b"a,b\n" + b"1,2\n" * 40_000 + f"1,{text}\n".encode(encoding))
    with pytest.raises(UserError, match=told):
        read_file(path)
    # Two files, one of either kind, put together.
    path.write_bytes(b"a,b\n" + "1,für\n".encode() * 40_000 + "1,für\n".encode("cp1252"))
    with pytest.raises(UserError, match=told):
        read_file(path)


def test_a_first_line_longer_than_the_sample_may_end_it_within_a_letter(tmp_path):
    path = tmp_path / "a.csv"
    for shift in range(2):
        names = ["x" * shift + "ü" * 40_000, "y"]
        path.write_text(",".join(names) + "\n1,2\n3,4\n")
        assert read_file(path).frame.columns == names


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.sav", b"x", "unknown kind .*, .xlsx "),
        ("a.parquet", b"not parquet", "cannot read"),
        ("a.parquet", b"", "cannot read"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n\n", "is empty"),
        ("a.csv", b"a,b,a\n1,2,3\n", "names 'a' more than once"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16")[:-1], "cannot read.*utf-16"),
        (
            "a.csv",
            b'a,b\n1,2\n"1\n",2\n1,2,3\n',
            "cannot read.*line 5 has 3 columns, the first 2; put a value that holds commas in",
        ),
        (
            "a.csv",
            b'y#a#c\n1#2#"x, y"\n0#3#z\n',
            r"line 2 has 2 columns, the first 1, .* by commas, tabs, semicolons or bars: .*tr '#'",
        ),
        ("a.csv", b"y==a==c\n1==2==x, y\n0==3==z\n", r"line 2 .*: sed 's/==/\\t/g' FILE"),
        ("a.txt", b"y\x02c\n1\x02x,y\n0\x02z\n", r"line 2 .*: tr '\\002' '\\t' < FILE"),
        ("notes.md", b"# A title\n\nText, with commas.\nMore.\n- this\n", "unknown kind '.md'"),
        ("empty.dat", b"", "unknown kind '.dat'"),
        ("a.csv", b"names\nA, B\nC\n", "commas, tabs.*if there is one column, put a value that"),
        ("a.csv", b"y,b,c\n1,2,3\n0,5\n1\n0,,\n", r"line 3 has 2 .* first 3 \(2 lines are too sh"),
        ("a.csv", b'y,b\n1,"2\n3"\n0\n', "line 4 has 1 columns, the first 2; delete it, or end it"),
        ("a.csv", b"# of 2024\na,b\n1,2\n3,4\n", "it begins with a comment; .*sed '/"),
        ("a.tsv", b'a\tb\n1\tc\n2\tc "q\n3\td\n', "line 3 has a quotation mark without its"),
        ("a.tsv", b'a\tb\n1\t"c\n2\td\n3\te\n', "line 2 has a quotation mark without its"),
        ("a.csv.gz", b"not gzip", "cannot read"),
        ("a.ndjson", b"{]", "cannot read.*line 1 is no JSON object; mend it"),
        ("a.ndjson", b'{"a":1}\n\n[2]\n', "line 3 is no JSON object"),
        ("a.ndjson", b'{"a":1}\n{"a":null}\n{"a":[1]}\n', "'a' holds values and, in line 3, lists"),
        ("a.ndjson", b'{"u":{"a":1}}\n{"u":{"a":[1]}}\n', "'u.a' holds values and, in line 2, l"),
        ("a.ndjson", b'{"a":true}\n{"a":1}\n', "'a' holds booleans and, in line 2, values; write"),
        ("a.json", b'[{"a":1}', "cannot read"),
        ("a.json", b'[{"a":1}, ["a", 1]]', "item 2 of the list is no object such as"),
        ("a.libsvm", b"1 1:1\nspam 2:1\n", "line 2: 'spam 2:1'"),
        ("a.libsvm", b"1 1:1\n\n# note\n0 2:x\n", "line 4: '0 2:x'"),
        ("a.libfm", b"1 0:3:1\n", "line 1"),
        ("a.svm", b"# nothing\n", "holds no sample"),
    ],
)
def test_unreadable_files_say_what_to_do(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content, name)


@pytest.mark.parametrize("sign", [" ", "#", ":", "="])
def test_a_column_that_is_missing_may_be_one_that_was_not_taken_apart(tmp_path, sign):
    frame = read(tmp_path, f"y{sign}a\n1{sign}2\n0{sign}3\n").frame
    with pytest.raises(UserError, match=r"no column 'y'.* commas, tabs, semicolons or bars"):
        require_columns(frame.columns, ["y"], "the data")
    with pytest.raises(UserError, match=r"columns are a$"):
        require_columns(["a"], ["y"], "the data")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_that_is_one_object_says_how_to_write_rows(tmp_path, indent):
    rows = [{"x": i, "y": "a"} for i in range(3000)]
    columns = {name: {str(i): row[name] for i, row in enumerate(rows)} for name in "xy"}
    split = {"columns": ["x", "y"], "index": [0], "data": [[0, "a"]]}
    for content in (columns, split):
        with pytest.raises(UserError, match=r"orient='records', lines=True\)$") as error:
            read(tmp_path, json.dumps(content, indent=indent), "a.json")
        assert len(str(error.value)) < 500
    features = [{"type": "Feature", "properties": row, "geometry": None} for row in rows]
    for content in (
        {"count": 3000, "results": rows},
        {"it's": rows},
        {"schema": {"fields": [], "pandas_version": "1"}, "data": rows},
        {"type": "FeatureCollection", "features": features},
    ):
        (tmp_path / "FILE").write_text(json.dumps(content, indent=indent))
        with pytest.raises(UserError, match="is a list of objects; write that list alone") as error:
            read(tmp_path, (tmp_path / "FILE").read_bytes(), "a.ndjson")
        assert len(str(error.value)) < 500
        command = shlex.split(str(error.value).partition("python -c ")[2])[0]
        done = {"json": json, "open": lambda name, mode="r": (tmp_path / name).open(mode)}
        exec(command.partition("; ")[2], done)
        gc.collect()
        assert read_file(tmp_path / "rows.json").frame.rows() == [(i, "a") for i in range(3000)]
    one = json.dumps({"x": 1, "basket": [{"item": 2}]}, indent=indent)
    assert read(tmp_path, f"[{one}]", "a.json").frame["x"].to_list() == [1]


def test_one_object_is_one_row(tmp_path):
    assert read(tmp_path, '\n{"x": 1, "y": [2]}\n', "a.json").frame.rows() == [(1, [2])]
    with pytest.raises(UserError, match="one object on several lines; write an object a line"):
        read(tmp_path, '{"x": 1,\n "y": 2}', "a.json")


@pytest.mark.parametrize("as_list", [True, False])
def test_json_may_hold_what_python_writes_for_missing_numbers(tmp_path, as_list):
    rows = [{"x": x, "t": "NaN, or -Infinity"} for x in (1.5, math.nan, math.inf, -math.inf, 2)]
    text = json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows))
    found = read(tmp_path, text, "a.json").frame
    assert found["x"].to_list() == [1.5, None, None, None, 2]
    assert set(found["t"]) == {"NaN, or -Infinity"}


CELLS = pl.DataFrame(
    {
        "y": ["1", "0", "1"],
        "where": ["59.28", "-158.6", "7"],
        "feet": ["66", "", "-12"],
        "gap": ["NA", "1.5", None],
        "code": ["007", "12", "8"],
        "long": ["1234567890123456789", "1", ""],
        "who": ["ann", "7", "8"],
    }
)
MORE = pl.Series("more", [["1", "2"], ["3"], []])


@pytest.mark.parametrize("write", ["write_ndjson", "write_json", "write_parquet", "write_ipc"])
def test_where_all_is_text_numbers_are_what_they_are_in_csv(tmp_path, write):
    """As programs write it that made rows of the cells of a CSV file."""
    getattr(CELLS, write)(tmp_path / "a.json")
    CELLS.write_csv(tmp_path / "a.csv")
    found, expected = (read_file(tmp_path / name) for name in ("a.json", "a.csv"))
    assert found.frame.equals(expected.frame)
    assert found.frame.schema["feet"] == pl.Int64
    assert found.marks == expected.marks
    assert found.notes == tuple(n for n in expected.notes if "leading zeros" not in n)


def test_text_of_numbers_stays_text_beside_columns_of_other_types(tmp_path):
    """But in JSON, which has no types of columns."""
    frame = CELLS.with_columns(MORE)
    frame.write_parquet(tmp_path / "a.parquet")
    frame.write_ndjson(tmp_path / "a.json")
    assert read_file(tmp_path / "a.parquet").frame.equals(frame)
    assert read_file(tmp_path / "a.json").frame.schema["where"] == pl.Float64
    assert read_file(tmp_path / "a.json").frame["more"].equals(MORE)


TITLED = "y,who,what it cost\n1,ann,2.5\n0,bob,\n1,,1\n"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "above",
    ["Report", "Report,,", "Report\n", "\nReport,,\nof 2024,,", '"Costs, all"', ",of all,\n,,"],
)
def test_titles_above_the_names_are_left_out(tmp_path, above, separator, end):
    """As programs that write reports have them, with the commas of the columns or without."""
    expected = read(tmp_path, TITLED).frame
    quoted, sep = above.startswith('"'), separator
    text = (above if quoted else above.replace(",", sep)) + "\n" + TITLED.replace(",", sep)
    found = read(tmp_path, text.replace("\n", end))
    assert found.frame.equals(expected)
    assert "what is above the names of the columns is left out: '" in found.notes[0]


@pytest.mark.parametrize(
    "text", ["id,,\n1,b,c\n4,e,f\n", "id,,\nb,b,c\nd,e,f\n", "id,,\nb,c,\nd,,\n"]
)
def test_what_is_above_may_be_the_names(tmp_path, text):
    assert read(tmp_path, text).frame.columns == ["id", "c1", "c2"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_names_of_rows_need_no_name_of_their_own(tmp_path, separator, end):
    """As R's `write.table` writes a table."""
    text = '"y","who"\n"1",1,"ann"\n"2",0,"bob, junior"\n"3",1,"eve"\n"4",1,"ann"\n'
    text = text.replace(", junior", "") if separator == "," else text
    text = re.sub(r",(?! )", separator, text).replace("\n", end)
    for begin in ("", "\ufeff"):
        found = read(tmp_path, begin + text)
        assert found.frame.columns == ["c0", "y", "who"]
        assert found.frame["c0"].to_list() == [1, 2, 3, 4]
        assert found.frame["y"].to_list() == [1, 0, 1, 1]
        assert "columns without a name: c0" in found.notes


def test_lines_but_the_first_may_end_in_a_separator(tmp_path):
    found = read(tmp_path, "y,who\n1,ann,\n0,bob,\n1,ann,\n").frame
    assert found.columns == ["y", "who", "c2"]
    assert found["y"].to_list() == [1, 0, 1] and found["c2"].null_count() == 3


@pytest.mark.parametrize("names", ["y,who", "y"])
@pytest.mark.parametrize(
    "rows",
    [
        "1,a,b\n1,c,d\n2,c,d\n3,e,f\n",
        "1,a,b\n2,c\n3,d\n",
        "1,0,b\n2,0,d\n3,1,d\n4,1,f\n",
        '"1","0","b"\n"2","0","d"\n"3","1","d"\n"4","1","f"\n',
    ],
)
def test_other_lines_that_are_too_long_are_named(tmp_path, names, rows):
    with pytest.raises(UserError, match=r"line 2 has 3 columns, the first [12]"):
        read(tmp_path, f"{names}\n{rows}")


def test_a_line_that_is_wrong_below_titles_is_named_as_in_the_file(tmp_path):
    with pytest.raises(UserError, match="from line 3 on': line 102 has 4 columns, the first 3"):
        read(tmp_path, "Report\n\ny,a,b\n" + "1,2,3\n" * 100 + "1,2,3,4\n" + "1,2,3\n" * 9)


@pytest.mark.parametrize("name", ["a.csv", "a.ndjson", "a.libsvm", "a.parquet", "a.csv.gz"])
@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files_are_known_by_their_first_bytes(tmp_path, name, codec):
    plain = io.BytesIO()
    if "csv" in name:
        TABLE.write_csv(plain)
    elif "json" in name:
        TABLE.write_ndjson(plain)
    elif "parquet" in name:
        TABLE.write_parquet(plain)
    else:
        plain.write(b"1 3:1 7:1\n0 7:1\n")
    expected = read(tmp_path, plain.getvalue(), name.removesuffix(".gz")).frame
    with pa.output_stream(tmp_path / name, compression=codec) as stream:
        stream.write(plain.getvalue())
    assert read_file(tmp_path / name).frame.equals(expected)


def test_libsvm_rows_of_any_length_are_bags(tmp_path):
    text = "1 3:1 7:1  # first\n-1\n\n+1 7:1 900000000000:1\n"
    for name in ("a.libsvm", "a.svm", "a.txt"):
        contents = read(tmp_path, text, name)
        assert contents.label == "label"
        assert contents.frame["label"].to_list() == [1, -1, 1]
        assert contents.frame["features"].to_list() == [[3, 7], [], [7, 900_000_000_000]]
    packed = gzip.compress(text.encode())
    assert read(tmp_path, packed, "a.libsvm.gz").frame.equals(contents.frame)


def test_libfm_of_a_table_is_that_table(tmp_path):
    text = "5 0:1 10:1 20:0.5\n3 11:1 2:1 20:0.25\n1 0:1 12:1 20:1\n"
    contents = read(tmp_path, text, "a.libfm")
    assert contents.frame.columns == ["label", "f0", "f1", "f2"]
    assert contents.frame["f0"].to_list() == [0, 2, 0]
    assert contents.frame["f1"].to_list() == [10, 11, 12]
    assert contents.frame["f2"].to_list() == [0.5, 0.25, 1.0]
    assert "1 of them numbers" in contents.notes[0]


def test_libsvm_of_few_numbers_is_a_column_each(tmp_path):
    frame = read(tmp_path, "1 1:0.5 3:2\n0 3:1.5\n", "a.libsvm").frame
    assert frame.to_dict(as_series=False) == {
        "label": [1, 0],
        "x1": [0.5, 0.0],
        "x3": [2.0, 1.5],
    }


def test_libsvm_of_many_numbers_keeps_what_is_there(tmp_path):
    lines = [f"1 {i}:0.5 {i + 1}:0" for i in range(300)]
    contents = read(tmp_path, "\n".join(lines), "a.libsvm")
    assert contents.frame["features"].to_list() == [[i] for i in range(300)]
    assert "values are ignored" in contents.notes[0]


def test_plain_text_is_not_taken_for_libsvm():
    assert not libsvm.looks_like("a b\n1 2\n")
    assert not libsvm.looks_like("1\n2\n")
    assert not libsvm.looks_like("time,x\n12:30,1\n")
    assert libsvm.looks_like("1 12:30\n")


def test_a_hundred_thousand_lines_take_seconds(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 1000, (100_000, 10))
    text = "\n".join("1 " + " ".join(f"{i}:1" for i in row) for row in ids.tolist())
    assert read(tmp_path, text, "a.libsvm").frame["features"].to_list() == ids.tolist()


@pytest.mark.parametrize(
    "name",
    ["a.parquet", "a.arrow", "a.csv", "a.ndjson", "a.json", "a.libsvm", "a.csv.gz"],
)
def test_damage_is_a_user_error_or_not_seen(tmp_path, name):
    rng = np.random.default_rng(0)
    n = 60
    frame = pl.DataFrame({"user": rng.integers(0, 9, n), "p": rng.random(n), "t": ["a|b"] * n})
    path = tmp_path / name
    if "parquet" in name:
        frame.write_parquet(path)
    elif "arrow" in name:
        frame.write_ipc(path)
    elif "json" in name:
        frame.write_json(path) if name == "a.json" else frame.write_ndjson(path)
    else:
        rows = "".join(f"1 {u}:1 {20 + u}:0.5\n" for u in frame["user"])
        text = (rows if "svm" in name else frame.write_csv()).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    whole = path.read_bytes()
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            at = int(rng.integers(0, len(data) + 1))
            kind = rng.integers(0, 3)
            if kind == 0:
                data[at : at + 1] = rng.bytes(1)
            elif kind == 1:
                del data[at : at + int(rng.integers(1, 40))]
            else:
                data[at:at] = rng.choice([b",", b"\n", b'"', b"nan", b":", b"\x00", b"9" * 30])
        path.write_bytes(data)
        try:
            read_file(path)
        except UserError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["arr_dely"], "no column 'arr_dely' (is 'arr_delay' meant?); its columns are"),
        (["Carrier", "zzz"], "no column 'Carrier', 'zzz' (is 'carrier' meant?); its columns are"),
        (["price"], "no column 'price' (is ' Price ' meant?)"),
        (["zzz"], "no column 'zzz'; its columns are arr_delay, carrier, ' Price '"),
    ],
)
def test_columns_that_are_nearly_named_so_are_asked_for(wanted, told):
    with pytest.raises(UserError) as error:
        require_columns(["arr_delay", "carrier", " Price "], wanted, "the data")
    assert told in str(error.value)
