"""Scoring raw rows: whatever they come in, and whether the model knows their values."""

from __future__ import annotations

import datetime as dt
import os
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import amtl
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from amtl.cli import main
from amtl.data.encoding import Encoder
from amtl.data.fields import FieldSpec, infer_fields
from amtl.data.readers import as_frame, read_file
from amtl.errors import UserError
from amtl.run.config import TrainConfig
from amtl.run.model import build_model
from amtl.run.trained import Trained
from amtl.run.training import start

C = pl.col
FIELDS = ["tags", "prem", "day", "number", "price"]
CONFIG = TrainConfig(
    data="", label="label", fields=FIELDS, method="fixed", dim=4, hidden=[4], epochs=1
)


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    n = 300
    tags = [[str(t) for t in rng.choice(5, k, replace=False)] for k in rng.integers(0, 4, n)]
    frame = pl.DataFrame(
        {
            "tags": tags,
            "prem": [None if i % 50 == 0 else bool(i % 3) for i in range(n)],
            "day": [dt.date(2024, 1, 1) + dt.timedelta(int(d)) for d in rng.integers(0, 9, n)],
            "number": pl.Series([None if i % 7 == 0 else i % 9 for i in range(n)]),
            "price": rng.exponential(1.0, n),
        }
    )
    truth = frame["tags"].list.contains("1") ^ frame["prem"].fill_null(False)
    return frame.with_columns(label=truth ^ pl.Series(rng.random(n) < 0.1))


@pytest.fixture
def model(frame) -> Trained:
    torch.manual_seed(0)
    encoder = Encoder.fit(frame, infer_fields(frame, FIELDS))
    return Trained(CONFIG, encoder, build_model(CONFIG, encoder).eval())


AS_TEXT = {
    "tags": C("tags").list.join("|"),
    "prem": C("prem").cast(pl.String).str.to_titlecase(),
    "day": C("day").cast(pl.Datetime("ms")),
    "number": C("number").cast(pl.Float64).cast(pl.String),
}


def test_other_types_of_the_same_values_give_the_same_predictions(model, frame):
    expected = model.probabilities(frame)
    assert len(expected.unique()) > 50
    for name, other in AS_TEXT.items():
        changed = frame.with_columns(other.alias(name))
        assert changed[name].dtype != frame[name].dtype
        assert torch.equal(model.probabilities(changed), expected), name


def test_the_separator_of_lists_written_as_text_can_be_named(frame):
    specs = infer_fields(frame, ["tags", "prem"], separators={"tags": ";"})
    assert specs[0] == FieldSpec("tags", "bag", ";")
    encoder = Encoder.fit(frame, specs)
    text = frame.with_columns(C("tags").list.join(";"))
    assert encoder.transform(text).unknown == {"tags": 0, "prem": 0}
    assert encoder.transform(text).values == encoder.transform(frame).values
    assert encoder.transform(frame).values["tags"] == int(frame["tags"].list.len().sum())


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("marks", [",.", ".,"])
def test_a_file_of_numbers_written_for_people_is_read_as_one_of_plain_numbers(
    frame, tmp_path, separator, marks
):
    plain = frame.select("number", price=(1e4 * C("price") - 900).round(2))
    swap = str.maketrans(",.", marks)
    written = [f"{price:,.2f}".translate(swap) for price in plain["price"]]
    path = tmp_path / "a.csv"

    def probabilities(table):
        table.write_csv(path, separator=separator)
        return model.probabilities(read_file(path).frame)

    text = plain.with_columns(price=pl.Series(written))
    text.write_csv(path, separator=separator)
    table = read_file(path).frame
    encoder = Encoder.fit(table, infer_fields(table, table.columns))
    assert encoder.fields[1].kind == "bucket"
    config = replace(CONFIG, hidden=[16])
    model = Trained(config, encoder, build_model(config, encoder).eval())
    expected = model.probabilities(text)
    assert len(expected.unique()) > 50
    for rows in (slice(None), slice(3, 4)):
        assert torch.equal(probabilities(text[rows]), expected[rows])
        assert torch.equal(probabilities(plain[rows]), expected[rows])


def test_a_model_of_numbers_takes_text_with_leading_zeros_for_them(tmp_path):
    """As files were read before, which such models are of."""
    ids = pl.DataFrame({"x": [7, 8, 9, 7] * 5, "n": range(20)})
    encoder = Encoder.fit(ids, infer_fields(ids, ["x", "n"], numeric={"n": "standardise"}))
    (tmp_path / "a.csv").write_text("x,n\n" + "".join(f"0{x},00{n}\n" for x, n in ids.rows()))
    text = read_file(tmp_path / "a.csv").frame
    assert text.dtypes == [pl.String, pl.String]
    expected, found = encoder.transform(ids), encoder.transform(text)
    assert torch.equal(found.rows, expected.rows) and torch.equal(found.dense, expected.dense)
    assert found.unknown == {"x": 0}


# Kinds of tables


def test_tables_of_all_kinds_give_the_predictions_of_the_polars_table(model, frame):
    pd = pytest.importorskip("pandas")
    expected = model.logits(frame)
    lists = frame.to_dict(as_series=False)
    tables = {
        "lazy": frame.lazy(),
        "arrow": frame.to_arrow(),
        "batch": frame.to_arrow().combine_chunks().to_batches()[0],
        "pandas": frame.to_pandas(),
        "pandas with an index": frame.to_pandas().set_index(np.arange(len(frame))[::-1]),
        "pandas with other columns": pd.DataFrame({**lists, 7: 1.0}),
        "lists": lists,
        "arrays": {name: frame[name].to_numpy() for name in frame.columns},
        "series": {name: frame.to_pandas()[name] for name in frame.columns},
        "tensors": {**lists, "price": torch.from_numpy(frame["price"].to_numpy().copy())},
        "objects": frame.to_dicts(),
        "stream": pa.RecordBatchReader.from_batches(
            frame.to_arrow().schema, frame.to_arrow().to_batches()
        ),
    }
    for kind, table in tables.items():
        assert torch.equal(model.logits(table), expected), kind
    again = model.probabilities(frame.to_pandas())
    assert torch.equal(again, torch.sigmoid(expected))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "rows are .*NoneType; give a DataFrame"),
        ([1], "rows are .*list; give a DataFrame"),
        ([], "rows are .*list; give a DataFrame"),
        (np.zeros((3, 2)), "rows are numpy.ndarray"),
        (torch.zeros(3), "rows are torch.Tensor"),
        (pl.Series([1]), "rows are polars"),
        ("file.csv", "rows are .*str"),
        ({"a": 1}, r"column 'a' is no list of values but int; write \[VALUE\] for that of a sing"),
        ({"a": "xy"}, "column 'a' is no list of values but str"),
        ({"a": [1, "b"]}, "no table can be made of the rows: .*Int64"),
        ({"a": np.array([1, "b"], dtype=object)}, "no table can be made of the rows"),
    ],
)
def test_what_is_no_table_is_a_type_error(rows, message):
    with pytest.raises(TypeError, match=message):
        as_frame(rows)


def test_a_row_of_pandas_is_no_table():
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame({"a": [1, 2], "b": [3, 4]})
    for row in (table.iloc[0], table["a"], table.astype({"b": str}).iloc[0]):
        with pytest.raises(TypeError, match=r"rows are pandas.*Series; give .* row df\.iloc\[\[0"):
            as_frame(row)
    assert as_frame(table.iloc[[0]]).rows() == [(1, 3)]


def test_columns_of_different_lengths_are_told():
    with pytest.raises(UserError, match=r"different lengths.*'b'"):
        as_frame({"a": [1], "b": [1, 2]})


# Values that the model does not know


def warned(call) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught]


def test_a_column_written_in_another_way_is_told_once_with_examples(model, frame):
    assert warned(lambda: model.logits(frame)) == []
    odd = frame.with_columns(
        C("day").dt.strftime("%d.%m.%y"), tags=pl.lit("x;y"), prem=pl.lit("ja")
    )
    told = warned(lambda: model.probabilities(odd))
    assert [text.split("'")[1] for text in told] == ["prem", "day", "tags"]
    assert "300 of 300 values" in told[0]
    assert "such as 'ja' (String), in training such as 1: write the column" in told[0]
    first = odd["day"][0]
    common = frame["day"].value_counts().sort("count", "day", descending=[True, False])["day"][0]
    assert f"such as '{first}' (String), in training such as '{common}'" in told[1]
    assert "such as 'x;y' (String)" in told[2]
    assert warned(lambda: model.logits(odd)) == []


def test_a_column_without_values_is_told(model, frame):
    empty = frame.with_columns(price=pl.lit(None, dtype=pl.Float64))
    (told,) = warned(lambda: model.logits(empty))
    assert "column 'price': 300 of 300 values" in told and "Here they are missing: " in told


@pytest.mark.parametrize(
    ("change", "told"),
    [(C("price") * 100 + 50, "above"), (C("price") / 1e4, "at most"), (C("price") * 1.1, None)],
)
def test_numbers_beyond_nearly_all_of_training_are_told_of_once(model, frame, change, told):
    rows = frame.with_columns(change.alias("price"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for start in range(0, 120, 20):
            model.probabilities(rows[start : start + 20])
        assert not said
        for _ in range(2):
            model.probabilities(rows)
    said = [str(each.message) for each in said]
    assert len(said) == (told is not None)
    if told:
        assert f"column 'price': 300 of 300 numbers are {told} " in said[0]
        assert "if their unit is another one" in said[0]


@pytest.mark.parametrize("text", [False, True])
def test_ids_that_are_new_are_told_to_be_read_as_numbers(frame, text):
    ids = frame.with_columns(id=pl.int_range(300) % 20)
    specs = infer_fields(ids, ["id", "prem"], values=True)
    assert (specs[0].kind, specs[0].value) == ("categorical", True)
    encoder = Encoder.fit(ids, specs)
    model = Trained(CONFIG, encoder, build_model(CONFIG, encoder).eval())
    new = ids.with_columns(C("id") + 100)
    new = new.with_columns(C("id").cast(pl.String)) if text else new
    (told,) = warned(lambda: model.logits(new))
    assert "300 of 300 values were not seen in training" in told
    assert ", so predictions know it by its number only. Here" in told
    (told,) = warned(
        lambda: Trained(CONFIG, encoder, model.model).logits(new.with_columns(id=pl.lit("u1")))
    )
    assert ", so predictions do without it. Here" in told


def test_new_values_that_are_written_alike_are_told_to_be_new(model, frame):
    (told,) = warned(lambda: model.logits(frame.with_columns(C("day").dt.offset_by("9y"))))
    assert "written alike, they are new ones" in told and "train with --drop day" in told
    assert "write the column" not in told


def test_a_row_at_a_time_is_encoded_as_all_of_them_are(model, frame, monkeypatch):
    """What was asked for before is remembered, by its value and type, until rows move."""
    frame = frame.drop("label").head(60)
    mixed = frame.with_columns(number=C("number").cast(pl.Float64), prem=C("prem").cast(pl.Int8))
    for rows in (frame, mixed, frame.with_columns(C("number").cast(pl.String)), frame):
        whole = model.logits(rows)
        for _ in range(2):
            alone = torch.cat([model.logits(rows[i]) for i in range(len(rows))])
            assert torch.allclose(alone, whole, atol=1e-6)
    new = torch.arange(model.encoder.num_rows).flip(0)
    model.encoder.transform(mixed[3]).renumber(new)
    assert torch.allclose(model.logits(mixed[3]), whole[3], atol=1e-6)
    with torch.no_grad():
        weight = next(model.model.table.parameters())
        weight.copy_(weight[new])
    model.encoder.renumber(new)
    assert torch.allclose(model.logits(mixed[3]), whole[3], atol=1e-6)
    calls = []
    monkeypatch.setattr(model.encoder, "_field", lambda f, frame: calls.append(f))
    model.logits(mixed[3])
    assert not calls


def test_a_value_that_is_none_is_refused_again_and_again(model, frame):
    for _ in range(3):
        with pytest.raises(UserError, match="price"):
            model.logits(frame[0].with_columns(price=pl.lit("dear")))
    rows = [frame[0].with_columns(price=pl.lit(float(i))) for i in range(20)]
    model.encoder._requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amtl.data.encoding._REMEMBERED", 7)
        for row in rows:
            model.logits(row)
    assert len(model.encoder._requests["price"]) <= 7


def test_values_of_small_batches_are_counted_up(model, frame):
    odd = frame.with_columns(prem=pl.lit("ja"))
    told = [bool(warned(lambda i=i: model.logits(odd[i : i + 10]))) for i in range(0, 120, 10)]
    assert told == [i == 4 for i in range(12)]


def test_values_half_of_which_are_known_are_no_other_container(model, frame):
    half = frame.with_columns(prem=pl.when(pl.int_range(300) % 5 > 0).then(pl.lit("ja")))
    assert warned(lambda: model.logits(half)) == []


def test_a_column_whose_values_are_new_by_nature_is_not_told(frame):
    ids = frame.with_columns(id=pl.int_range(300))
    rows = pl.DataFrame({"id": range(1000, 1300), "prem": frame["prem"]})
    specs = [FieldSpec("id"), FieldSpec("prem")]

    def told(min_count, tested, **more):
        encoder = Encoder.fit(ids, specs, min_count=min_count)
        metrics = {"unknown_test_values": {"id": tested}, **more}
        model = Trained(CONFIG, encoder, build_model(CONFIG, encoder).eval(), metrics)
        return len(warned(lambda: model.logits(rows)))

    assert told(min_count=1, tested=0) == 1
    assert told(min_count=1, tested=30) == 0
    assert told(min_count=2, tested=0) == 0
    # What counts is the share of the test split, whatever share of the rows that is.
    even = {"split_rows": {"train": 300, "val": 30, "test": 300}}
    assert told(min_count=1, tested=140, **even) == 1
    assert told(min_count=1, tested=160, **even) == 0


@pytest.fixture(scope="module")
def packed(frame, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("containers")
    frame.write_parquet(folder / "rows.parquet")
    settings = {**CONFIG.to_dict(), "data": str(folder / "rows.parquet")}
    start(TrainConfig.from_dict(settings), folder / "run").run()
    return folder


def evaluated(capsys, *args) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, args)])
    assert not stop.value.code
    return " ".join(capsys.readouterr().out.split())


def test_evaluate_gives_the_same_for_the_same_rows_as_text(packed, frame, capsys):
    run = packed / "run"
    expected = evaluated(capsys, run, packed / "rows.parquet").partition("AUC")[2]
    assert "not seen" not in expected
    text = frame.with_columns(*(other.alias(name) for name, other in AS_TEXT.items()))
    text.write_csv(packed / "rows.csv")
    assert evaluated(capsys, run, packed / "rows.csv").partition("AUC")[2] == expected
    assert (
        amtl.load(run).encoder.transform(text).unknown
        == amtl.load(run).encoder.transform(frame).unknown
    )


def test_evaluate_tells_of_columns_written_in_another_way(packed, frame, capsys):
    frame.with_columns(C("tags").list.join("|"), prem=pl.lit("[ja]")).write_csv(packed / "odd.csv")
    told = evaluated(capsys, packed / "run", packed / "odd.csv")
    assert "column 'prem': 300 of 300 values were not seen in training" in told
    assert "such as '[ja]' (String), in training such as 1: write" in told
    assert "column 'tags'" not in told
    assert "not seen" not in evaluated(capsys, packed / "run")


def test_evaluate_tells_of_rows_that_the_model_was_trained_on(packed, frame, capsys):
    seen = "the model was trained on most of these rows"
    assert seen in evaluated(capsys, packed / "run", packed / "rows.parquet")
    assert seen not in evaluated(capsys, packed / "run")
    frame[:-1].write_parquet(packed / "fewer.parquet")
    assert seen not in evaluated(capsys, packed / "run", packed / "fewer.parquet")


def in_a_fork(work: Callable[[], object]) -> str:
    """What went wrong in a forked process, nothing if it came to its end within ten seconds."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if not process:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            work()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(process, 0)
    with os.fdopen(read) as file:
        return file.read() if status == 0 else f"ended by signal {status}"


def test_a_forked_worker_says_that_it_has_no_threads_to_score_with(model, frame, packed):
    expected = model.probabilities(frame)
    for work in (lambda: model.probabilities(frame), lambda: amtl.load(packed / "run")):
        assert in_a_fork(work).startswith("RuntimeError: this process was forked from one that had")
    assert torch.equal(model.probabilities(frame), expected)
