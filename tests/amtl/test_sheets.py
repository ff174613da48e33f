"""Sheets of Excel: what a stranger's file holds, and what it says without the reader."""

from __future__ import annotations

import datetime
import sys
import zipfile
from xml.sax.saxutils import escape

import numpy as np
import polars as pl
import pytest
from amtl.cli import app
from amtl.data.readers import read_file
from amtl.errors import UserError
from typer.testing import CliRunner

_MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_LINKS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_PACKAGE = "http://schemas.openxmlformats.org/package/2006"
_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml"
_STYLES = (
    f'<styleSheet xmlns="{_MAIN}"><fonts count="1"><font/></fonts><fills count="1"><fill/></fills>'
    '<borders count="1"><border/></borders><cellStyleXfs count="1"><xf/></cellStyleXfs>'
    '<cellXfs count="2"><xf numFmtId="0"/><xf numFmtId="22" applyNumberFormat="1"/></cellXfs>'
    "</styleSheet>"
)


def cell(value: object) -> str:
    """XML of a cell; moments are days since 1899-12-30, as Excel has them."""
    if value is None:
        return "<c/>"
    if isinstance(value, bool):
        return f'<c t="b"><v>{int(value)}</v></c>'
    if isinstance(value, datetime.datetime):
        days = (value - datetime.datetime(1899, 12, 30)) / datetime.timedelta(days=1)
        return f'<c s="1"><v>{days}</v></c>'
    if isinstance(value, str):
        return f'<c t="inlineStr"><is><t>{escape(value)}</t></is></c>'
    return f"<c><v>{value}</v></c>"


def write(path, sheets, hidden=()):
    """A workbook of sheets, each a list of rows."""
    numbers = range(1, len(sheets) + 1)
    parts = "".join(
        f'<Override PartName="/xl/worksheets/sheet{i}.xml" ContentType="{_TYPE}.worksheet+xml"/>'
        for i in numbers
    )
    listed = "".join(
        f'<sheet name="{name}" sheetId="{i}" r:id="rId{i}"'
        + (' state="hidden"/>' if name in hidden else "/>")
        for i, name in enumerate(sheets, 1)
    )
    links = "".join(
        f'<Relationship Id="rId{i}" Type="{_LINKS}/worksheet" Target="worksheets/sheet{i}.xml"/>'
        for i in numbers
    )
    styles = f'<Relationship Id="rId0" Type="{_LINKS}/styles" Target="styles.xml"/>'
    book = f'<Relationship Id="a" Type="{_LINKS}/officeDocument" Target="xl/workbook.xml"/>'
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {
            "[Content_Types].xml": f'<Types xmlns="{_PACKAGE}/content-types">'
            '<Default Extension="rels" ContentType="application/xml"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{_TYPE}.sheet.main+xml"/>'
            f"{parts}</Types>",
            "_rels/.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
            f"{book}</Relationships>",
            "xl/workbook.xml": f'<workbook xmlns="{_MAIN}" xmlns:r="{_LINKS}">'
            f"<sheets>{listed}</sheets></workbook>",
            "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{_PACKAGE}/relationships">'
            f"{links}{styles}</Relationships>",
            "xl/styles.xml": _STYLES,
        }.items():
            file.writestr(name, content)
        for i, rows in zip(numbers, sheets.values(), strict=True):
            body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
            text = f'<worksheet xmlns="{_MAIN}"><sheetData>{body}</sheetData></worksheet>'
            file.writestr(f"xl/worksheets/sheet{i}.xml", text)


@pytest.fixture
def reader():
    return pytest.importorskip("fastexcel", reason="needs: pip install -e .[excel]")


def test_types_gaps_and_names(tmp_path, reader):
    morning = datetime.datetime(2024, 1, 5, 6, 0)
    day = datetime.datetime(2024, 1, 5)
    head = ["id", "price", "", "when", "day", "code", "label"]
    rows = [[i, i / 4, "x", morning, day, f"00{i}", i % 2 == 0] for i in range(1500)]
    late = [1500, None, None, None, None, "x", True], [None] * 7
    write(tmp_path / "a.xlsx", {"empty": [], "data": [head, *rows, *late], "notes": [["of"]]})
    found = read_file(tmp_path / "a.xlsx")
    assert found.frame.schema == {
        "id": pl.Int64,
        "price": pl.Float64,
        "c2": pl.String,
        "when": pl.Datetime("ms"),
        "day": pl.Date,
        "code": pl.String,
        "label": pl.Boolean,
    }
    assert found.frame.height == 1501
    assert found.frame["when"][0] == morning
    assert found.frame["code"][3] == "003"
    assert found.frame.row(-1)[0] == 1500
    assert found.notes == (
        "the sheet 'data' is read; save another as a file of its own: notes",
        "columns without a name: c2",
    )


def test_titles_above_the_names_are_left_out(tmp_path, reader):
    above = [["Report of 2024", None, None], [None] * 3]
    names, rows = ["y", "who", "price"], [[i % 2, f"u{i}", i / 4] for i in range(50)]
    write(tmp_path / "a.xlsx", {"of all": [*above, names, *rows]})
    found = read_file(tmp_path / "a.xlsx")
    assert found.frame.columns == names
    assert found.frame.rows() == [tuple(row) for row in rows]
    assert found.notes == ("what is above the names of the columns is left out: 'Report of 2024'",)


def test_text_that_comes_after_a_thousand_numbers_is_kept(tmp_path, reader):
    rows = [[i % 50] for i in range(1500)] + [["refused"]] * 9
    write(tmp_path / "a.xlsx", {"a": [["x"], *rows, ["twice"], ["thrice"]]})
    assert read_file(tmp_path / "a.xlsx").frame["x"].to_list()[-2:] == ["twice", "thrice"]
    write(tmp_path / "b.xlsx", {"a": [["x"], *rows]})
    found = read_file(tmp_path / "b.xlsx")
    assert found.frame["x"].dtype == pl.Int64
    assert found.frame["x"].null_count() == 9
    assert found.marks == {"x": ("refused",)}


def test_hidden_sheets_wait_for_visible_ones(tmp_path, reader):
    write(tmp_path / "a.xlsx", {"lookup": [["k"], [1]], "data": [["x"], [2]]}, hidden=["lookup"])
    found = read_file(tmp_path / "a.xlsx")
    assert found.frame.to_dict(as_series=False) == {"x": [2]}
    assert found.notes == ()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([["a", "b", "a"], [1, 2, 3]], "names 'a' more than once; rename one"),
    ],
)
def test_sheets_that_are_refused(tmp_path, reader, rows, message):
    write(tmp_path / "a.xlsx", {"a": rows})
    with pytest.raises(UserError, match=message):
        read_file(tmp_path / "a.xlsx")


def test_a_file_that_is_no_workbook(tmp_path, reader):
    (tmp_path / "a.xlsx").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"cannot read .*a.xlsx"):
        read_file(tmp_path / "a.xlsx")


def test_without_the_reader_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastexcel", None)
    write(tmp_path / "a.xlsx", {"a": [["x"], [1]]})
    with pytest.raises(UserError, match="pip install fastexcel; or save the sheet as CSV"):
        read_file(tmp_path / "a.xlsx")


def test_a_model_of_a_sheet_scores_text(tmp_path, reader):
    rng = np.random.default_rng(0)
    city, amount = rng.integers(0, 4, 400), rng.integers(0, 500, 400) / 4
    label = (rng.random(400) < np.where(city == 1, 0.8, 0.3)).astype(int)
    rows = [[f"c{c}", float(a), int(y)] for c, a, y in zip(city, amount, label, strict=True)]
    write(tmp_path / "a.xlsx", {"a": [["city", "amount", "y"], *rows]})
    frame = pl.DataFrame(rows, schema=["city", "amount", "y"], orient="row")
    frame.write_csv(tmp_path / "a.csv")
    scores = []
    run = CliRunner()
    train = ["--label", "y", "--no-race", "--epochs", "2", "--out", str(tmp_path / "run")]
    assert run.invoke(app, ["train", str(tmp_path / "a.xlsx"), *train]).exit_code == 0
    for name in ("a.xlsx", "a.csv"):
        out = str(tmp_path / f"{name}.scores.csv")
        asked = ["predict", str(tmp_path / "run"), str(tmp_path / name), "-o", out]
        assert run.invoke(app, asked).exit_code == 0
        scores.append(pl.read_csv(out)["probability"])
    assert scores[0].equals(scores[1])
