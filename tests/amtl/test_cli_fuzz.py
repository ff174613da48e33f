"""Drawn files and command lines: one line and an exit status, and no error that nobody expected.

AMTL_SOAK=1 draws for tens of minutes.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
import typer
from amtl import cli, failures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
COMMANDS = typer.main.get_command(cli.app).commands
ROWS = 40

words = st.sampled_from(
    [
        *("0", "1", "2", "4", "-1", "0.5", "1e-9", "1e300", "nan", "inf", "-inf", "2**70"),
        *("", " ", "auto", "32", "8", "fixed", "rule", "amtl", "ordinal", "free", "paper"),
        *("random", "order:when", "order:", "when", "user", "item,tags", "user,user", "label"),
        *(
            "[red]",
            "[/]",
            "\x00",
            "é",
            "💥",
            "a b",
            "-",
            "--",
            "=",
            "tags=",
            "tags=;",
            "price=bucket",
        ),
        *("din", "deepfm", "adam", "sgd", "rowwise_adagrad", "99999999999999999999"),
    ]
)
cells = {
    "ids": st.integers(0, 9),
    "wide": st.integers(-(2**63), 2**63 - 1),
    "floats": st.floats(width=32),
    "prices": st.floats(0, 100, width=32),
    "text": st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), max_size=6),
    "bars": st.sampled_from(["a", "a|b", "|", "", "c|c|a"]),
    "flags": st.booleans(),
    "labels": st.integers(0, 1),
}


@st.composite
def frames(draw) -> pl.DataFrame:
    """A column of labels, mostly good ones, and some others, holes and all."""
    rows = draw(st.sampled_from([0, 1, 3, ROWS, ROWS, ROWS, ROWS]))
    kinds = {"label": draw(st.sampled_from(["labels", "labels", "labels", "floats", "text"]))}
    for name in draw(st.sets(st.sampled_from(["user", "item", "tags", "price", "when", "[x]"]))):
        kinds[name] = draw(st.sampled_from(sorted(cells)))
    columns = {}
    for name, kind in kinds.items():
        values = draw(st.lists(cells[kind], min_size=rows, max_size=rows))
        if name != "label" or draw(st.integers(0, 9)) == 0:
            holes = draw(st.sets(st.integers(0, max(rows - 1, 0)), max_size=3))
            values = [None if i in holes else v for i, v in enumerate(values)]
        columns[name] = pl.Series(name, values, strict=False)
    return pl.DataFrame(columns)


@st.composite
def options(draw, command: str) -> list[str]:
    """Some of the command's options, with words that may suit them."""
    known = [p for p in COMMANDS[command].params if p.param_type_name == "option"]
    known = [p for p in known if p.name not in ("help", "out", "resume", "force", "epochs")]
    line: list[str] = []
    if not known:
        return line
    for parameter in draw(st.lists(st.sampled_from(known), max_size=4)):
        line.append(draw(st.sampled_from([*parameter.opts, *parameter.secondary_opts])))
        if not parameter.is_flag:
            line.append(draw(words))
    return line


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder of its own to run in."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def ends(line: list[str]) -> None:
    """Runs a command line and holds it to what every one promises."""
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with streams[0], streams[1], pytest.raises(SystemExit) as stop:
        cli.main(line)
    code, told = stop.value.code or 0, err.getvalue()
    if code == 0:
        assert not told, (line, told)
        return
    assert code in (failures.MISTAKE, failures.USAGE), (line, code, told)
    assert told.startswith("error: ") and told.count("\n") == 1, (line, told)
    assert "not expected here" not in told, (line, told, _log())


def _log() -> str:
    log = Path.cwd() / failures.LOG
    return log.read_text() if log.exists() else ""


@settings(
    max_examples=2000 if SOAK else 25,
    derandomize=not SOAK,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(frame=frames(), line=options("train"), kind=st.sampled_from(["csv", "parquet"]))
def test_training_on_whatever_there_is(frame, line, kind):
    with working_folder() as folder:
        data = folder / f"data.{kind}"
        frame.write_csv(data) if kind == "csv" else frame.write_parquet(data)
        fast = ["--epochs", "1", "--batch-size", "16", "--dim", "4", "--label", "label"]
        ends(["train", str(data), "--out", "run", *fast, *line])
        if (folder / "run" / "metrics.json").exists():
            for command in (["inspect"], ["evaluate"], ["pack", "-o", "m.safetensors"]):
                ends([command[0], "run", *command[1:]])
            ends(["evaluate", "m.safetensors", str(data)])
            ends(["predict", "m.safetensors", str(data), "-o", "scores.csv"])


@settings(max_examples=2000 if SOAK else 40, derandomize=not SOAK)
@given(data=st.data(), command=st.sampled_from(sorted(set(COMMANDS) - {"train", "demo", "paper"})))
def test_other_commands_on_whatever_is_typed(data, command):
    line = data.draw(st.lists(words, max_size=2)) + data.draw(options(command))
    with working_folder():
        Path("file").write_bytes(b"x")
        ends([command, *line])
