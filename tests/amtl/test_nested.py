"""Structs in files and tables: their fields are columns."""

from __future__ import annotations

import json
import warnings

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from amtl.cli import main
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.readers import as_frame, read_file, require_columns
from amtl.data.writers import write_rows
from amtl.errors import UserError

ROWS = [
    {"user": {"id": 7, "geo": {"cc": "DE"}}, "tags": [{"name": "a"}], "y": 1},
    {"user": {"id": 8, "geo": None}, "tags": [], "y": 0},
    {"user": None, "tags": [{"name": "b"}, {"name": "c"}], "y": 1},
]
FLAT = [(7, "DE", 1), (8, None, 0), (None, None, 1)]
NESTED = pl.DataFrame(ROWS)


@pytest.mark.parametrize("kind", ["ndjson", "json", "parquet", "arrow", "folder"])
def test_fields_of_structs_are_columns_of_a_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "folder":
        path.mkdir()
        NESTED[:2].write_parquet(path / "a.parquet")
        # A part may lack fields, and have others.
        NESTED[2:].with_columns(user=pl.struct(age=pl.lit(None, pl.Int64))).write_parquet(
            path / "b.parquet"
        )
    else:
        name = {"arrow": "write_ipc"}.get(kind, f"write_{kind}")
        getattr(NESTED, name)(path)
    frame = read_file(path).frame
    more = ["user.age"] if kind == "folder" else []
    assert frame.columns == ["user.id", "user.geo.cc", "tags", "y", *more]
    assert frame.select("user.id", "user.geo.cc", "y").rows() == FLAT


def test_missing_structs_have_no_fields_whatever_arrow_holds_there(tmp_path):
    held = pa.StructArray.from_arrays([pa.array([1, 2])], ["id"], mask=pa.array([False, True]))
    pq.write_table(pa.table({"user": held}), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet").frame["user.id"].to_list() == [1, None]
    assert as_frame(pa.table({"user": held}))["user.id"].to_list() == [1, None]


def test_a_struct_without_fields_holds_nothing():
    frame = as_frame(
        pl.DataFrame({"x": [1, 2], "e": [{}, {}]}, schema_overrides={"e": pl.Struct([])})
    )
    assert frame.rows() == [(1, None), (2, None)]


def test_tables_to_score_have_the_same_names():
    for table in (NESTED, NESTED.lazy(), NESTED.to_arrow(), {"user": [r["user"] for r in ROWS]}):
        assert as_frame(table)["user.geo.cc"].to_list() == ["DE", None, None]
    encoder = Encoder.fit(as_frame(NESTED), infer_fields(as_frame(NESTED), ["user.id", "y"]))
    assert encoder.transform(as_frame(NESTED[::-1])).unknown == {"user.id": 0, "y": 0}


@pytest.mark.parametrize(
    "row", [{"user.id": 1, "user": {"id": 2}}, {"a": {"b.c": 1, "b": {"c": 2}}}]
)
def test_a_name_that_is_there_already_is_refused(tmp_path, row):
    (tmp_path / "a.ndjson").write_text(json.dumps(row))
    with pytest.raises(UserError, match=r"a.ndjson' has a column '(user.id|a.b.c)' and a struct"):
        read_file(tmp_path / "a.ndjson")
    with pytest.raises(UserError, match=r"the data has a column .* rename one of them"):
        as_frame(pl.DataFrame([row]))


def test_lists_of_structs_are_left_out_with_the_line_that_helps():
    for fixed in (False, True):
        frame = pl.DataFrame({"my tags": [[{"name": "a", "n": 1}], [{"name": "b", "n": 2}]]})
        if fixed:
            frame = frame.cast({"my tags": pl.Array(frame.schema["my tags"].inner, 1)})
        (field,) = infer_fields(frame, ["my tags"])
        assert field.kind == "unused"
        told, line = field.note.split(", by polars: ")
        assert told == "lists of structs; write lists of one of their fields"
        made = eval(line, {"pl": pl, "frame": frame})
        assert made["my tags"].to_list() == [["a"], ["b"]]
        assert infer_fields(made, ["my tags"])[0].kind == "bag"


def test_the_name_of_a_struct_is_told_to_have_fields():
    with pytest.raises(
        UserError, match=r"'user' \(are 'user.registered_at' and 'user.id' meant\?\)"
    ):
        require_columns(["user.registered_at", "user.id", "username"], ["user"], "the data")


def test_a_struct_is_not_called_lists(tmp_path):
    with pytest.raises(UserError, match=r"'user' holds structs, which \.csv has no form for"):
        write_rows(NESTED.select("user"), tmp_path / "a.csv")


def test_the_command_line_knows_the_flat_names(tmp_path, capsys):
    def run(*words):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = main([str(word) for word in words])
            except SystemExit as error:
                code = error.code
        return code or 0

    data = tmp_path / "a.ndjson"
    rows = [
        {"u": {"id": i % 7, "os": "xy"[i % 2]}, "c": {"click": (i % 7) // 4}} for i in range(400)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    given = ("train", data, "--label", "c.click", "--method", "fixed", "--epochs", 1)
    assert run(*given, "--drop", "u.os", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "u.id" in shown and "u.os" not in shown.partition("splits")[0]
    assert run(*given, "--fields", "u.id,u.os", "--out", tmp_path / "run") == 0
    assert run("pack", tmp_path / "run", "-o", tmp_path / "a.safetensors") == 0
    for model in (tmp_path / "run", tmp_path / "a.safetensors"):
        out = tmp_path / "scores.csv"
        assert run("predict", model, data, "--columns", "u.id", "-o", out) == 0
        assert pl.read_csv(out).columns == ["u.id", "probability"]
        assert run("evaluate", model, data) == 0
    assert "not seen" not in capsys.readouterr().out


def test_keys_that_no_row_to_score_has_are_missing_if_rows_of_training_lacked_them(
    tmp_path, capsys
):
    def run(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return int(stop.value.code or 0)

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    rows = [{"u": i % 7, "y": int(i % 7 < 3)} for i in range(300)]
    for i, row in enumerate(rows):
        row |= {"geo": {"cc": f"c{i % 5}"}, "tags": ["a", "b"][: i % 3]} if i % 4 else {}
    data, out = write("a.ndjson", rows), tmp_path / "scores.csv"
    given = ["--label", "y", "--no-race", "--epochs", "1", "--out", tmp_path / "run"]
    assert run("train", data, *given) == 0
    few = write("few.ndjson", rows[:9:8])
    capsys.readouterr()
    assert run("predict", tmp_path / "run", few, "-o", out) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "has geo.cc, tags: taken as missing, as in rows of the training data" in told
    whole = tmp_path / "whole.csv"
    assert run("predict", tmp_path / "run", data, "-o", whole) == 0
    assert "taken as missing" not in capsys.readouterr().out
    assert pl.read_csv(out)["probability"].to_list() == pytest.approx(
        pl.read_csv(whole)["probability"].gather([0, 8]).to_list()
    )
    assert run("evaluate", tmp_path / "run", write("more.ndjson", rows[:20:4])) == 0
    assert "taken as missing" in " ".join(capsys.readouterr().out.split())
    # What no row of training lacked is needed, and a table has its columns.
    assert run("predict", tmp_path / "run", write("b.ndjson", [{"geo": None}]), "-o", out) == 1
    assert "no column 'u'" in capsys.readouterr().err
    pl.DataFrame({"u": [1]}).write_csv(tmp_path / "c.csv")
    assert run("predict", tmp_path / "run", tmp_path / "c.csv", "-o", out) == 1
    assert "no column" in capsys.readouterr().err
