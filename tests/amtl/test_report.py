from __future__ import annotations

import copy
import io
import json
import re
import shlex
from html.parser import HTMLParser

import pytest
from amtl.cli import main
from amtl.data.fields import FieldSpec
from amtl.errors import UserError, listed
from amtl.run.display import print_decisions
from amtl.run.report import (
    _page,
    baseline,
    group_results,
    load_comparable,
    load_metrics,
    table_rows,
    write_report,
)
from rich.console import Console


def metrics(method="fixed", dim=16, budget=0.4, seed=0, auc=0.7, stored=1000, **config):
    history = [
        {
            "epoch": e + 1.0,
            "stage": int(e > 0),
            "phase": "search" if method != "fixed" and e < 1 else "frozen",
            "loss": 0.6 - 0.01 * e,
            "val_auc": auc - 0.01 + 0.001 * e,
        }
        for e in range(3)
    ]
    entry = {
        "count": [0.0, 5.0, 100.0],
        "size": [1.0, 2.0, 8.0],
        "low": [1, 1, 8],
        "high": [1, 3, 8],
        "rows": [1, 10, 3],
    }
    return {
        "method": method,
        "dim": dim,
        "budget": None if method == "fixed" else budget,
        "seed": seed,
        "test_auc": auc,
        "test_logloss": 0.5,
        "val_auc": auc,
        "best_epoch": 3.0,
        "epochs_run": 3.0,
        "stored_bytes": stored,
        "dense_bytes": 1000,
        "stored_fraction": stored / 1000,
        "rows": 14,
        "bytes_by_field": {"user <b>": stored - 100, "item": 100},
        "rows_by_field": {"user <b>": 10, "item": 4},
        "step_ms_median": {"search": None if method == "fixed" else 9.0, "frozen": 5.0},
        "sizes": {"fields": {"user <b>": entry, "item": entry}, "histogram": {"1": 9, "8": 5}},
        "history": history,
        "config": {
            "data": "/some/where/clicks.parquet",
            "split": "random",
            "seed": seed,
            "method": method,
            "dim": dim,
            "budget": budget,
            "warm_start": None,
            "epochs": 3,
            **config,
        },
        "versions": {"torch": "2"},
    }


@pytest.fixture
def folders(tmp_path):
    runs = [
        metrics(stored=1000),
        metrics(dim=2, auc=0.68, stored=125),
        metrics("rule", budget=0.125, auc=0.71, stored=124),
        *[
            metrics("amtl", budget=0.125, seed=s, auc=0.72 + 0.002 * s, stored=124)
            for s in range(3)
        ],
    ]
    result = []
    for i, run in enumerate(runs):
        folder = tmp_path / f"r{i}"
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(run))
        result.append(folder)
    return result


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.ids, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in ("meta", "path", "use", "image", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


def test_the_report_is_one_self_contained_page(folders, tmp_path):
    out = tmp_path / "report.html"
    write_report(folders, out)
    text = out.read_text()
    checker = Checker()
    checker.feed(text)
    assert len(checker.ids) == len(set(checker.ids))
    for tag, attributes in checker.tags:
        assert tag not in ("script", "link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    for title in (
        "Results",
        "AUC against memory",
        "Kept size against frequency",
        "Training curves",
        "Bytes by field",
    ):
        assert f"<h2>{title}</h2>" in text
    assert text.count("<svg") == 5
    assert "user &lt;b&gt;" in text
    assert "<b>" not in re.sub(r"<div class=card><b>", "", text)
    assert "0.7220 ± 0.0020" in text
    assert "+0.0220" in text
    ids = set(checker.ids)
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= ids


@pytest.mark.parametrize("keep", [[0], [2, 3]])
def test_any_selection_of_runs_has_a_report(folders, tmp_path, keep):
    write_report([folders[i] for i in keep], tmp_path / "r.html")
    assert "<h2>Results</h2>" in (tmp_path / "r.html").read_text()


def test_runs_are_grouped_over_seeds_only():
    base = metrics("amtl")
    other = metrics("amtl", seed=1)
    changed = copy.deepcopy(base)
    changed["config"]["epochs"] = 9
    results = group_results([base, other, changed])
    assert [len(r.runs) for r in results] == [2, 1]
    assert results[0].name != results[1].name
    assert "epochs" in results[1].name


def test_runs_of_before_a_setting_are_told_from_those_that_have_it():
    runs = [metrics("rule", budget=0.5), metrics("rule", budget=0.5, hides=True)]
    names = [result.name for result in group_results(runs)]
    assert names == ["rule D=16 50%, again", "rule D=16 50%, hides True"]


def test_many_columns_are_a_number_in_a_name():
    runs = [metrics(), metrics(), metrics()]
    runs[0]["config"]["fields"] = []
    runs[1]["config"]["fields"] = [f"x{i}" for i in range(40)]
    runs[2]["config"]["fields"] = ["user", "item"]
    names = {result.name.partition(", ")[2] for result in group_results(runs)}
    assert names == {"all fields", "40 fields", "fields user item"}


def test_differences_are_to_the_widest_fixed_table():
    results = group_results(
        [
            metrics(dim=2, auc=0.6, stored=10),
            metrics(auc=0.7),
            metrics("amtl", auc=0.75, stored=400),
        ]
    )
    header, rows = table_rows(results)
    at = header.index("vs full")
    assert [row[at] for row in rows] == ["–", "-0.1000", "+0.0500"]
    assert [row[header.index("of full")] for row in rows] == ["100.0%", "1.0%", "40.0%"]
    header, _ = table_rows(group_results([metrics("amtl")]))
    assert "vs full" not in header


def test_runs_of_different_data_are_told_apart(folders, tmp_path, capsys):
    other = metrics()
    other["config"]["data"] = "elsewhere"
    (folders[0] / "metrics.json").write_text(json.dumps(other))
    first, *rest = (shlex.quote(str(folder)) for folder in folders)
    for command, of_first, of_rest in (
        ("report", " -o report-0.html", " -o report-1.html"),
        ("compare", "", ""),
    ):
        told = (
            f"{command} is about one data set, as AUCs of others do not compare, and these runs "
            "are of 2: "
            f"amtl {command} {first}{of_first}  (elsewhere); "
            f"amtl {command} {' '.join(rest)}{of_rest}  (/some/where/clicks.parquet)"
        )
        with pytest.raises(UserError, match=re.escape(told)):
            load_comparable([tmp_path], command)
    with pytest.raises(UserError, match="report is about one data set"):
        write_report(folders, tmp_path / "r.html")
    with pytest.raises(SystemExit, match="1"):
        main(["compare", str(tmp_path)])
    assert "compare is about one data set" in capsys.readouterr().err


def test_runs_of_different_labels_and_splits_are_told_apart(folders, tmp_path):
    """What is tested is another question, or other rows; fields, seeds and methods may differ."""
    first, *rest = (shlex.quote(str(folder)) for folder in folders)
    for change, what, of_first, of_rest in (
        ({"label": "z"}, "label", "label z", "label y"),
        ({"label_threshold": 4.0}, "label", "label y from 4", "label y"),
        ({"label_positive": "no"}, "label", "label y = no", "label y"),
        ({"label_missing": "drop"}, "label", "label y, missing: drop", "label y"),
        ({"weight": "w"}, "label", "label y, weighted by w", "label y"),
        ({"split_seed": 7}, "split", "split random of seed 7", "split random of seed 0"),
        ({"split": "order:t"}, "split", "split order:t", "split random of seed 0"),
        (
            {"label": "z", "split": "column:p", "split_seed": 3},
            *("label and one split", "label z, split column:p", "label y, split random of seed 0"),
        ),
        ({"fields": ["user"], "split_seed": 0}, "", "", ""),
    ):
        for folder in folders:
            run = json.loads((folder / "metrics.json").read_text())
            run["config"] |= {"label": "y", "label_threshold": None, "split": "random"}
            run["config"] |= {"label_positive": None, "label_missing": None, "split_seed": 0}
            run["config"] |= {"weight": None}
            run["config"] |= change if folder == folders[0] else {}
            (folder / "metrics.json").write_text(json.dumps(run))
        if not what:
            assert len(load_comparable(folders, "compare")) == len(folders)
            continue
        told = (
            f"compare is about one {what}, as AUCs of others do not compare, and these runs are "
            f"of 2: amtl compare {first}  ({of_first}); amtl compare {' '.join(rest)}  ({of_rest})"
        )
        with pytest.raises(UserError, match=f"^{re.escape(told)}$"):
            load_comparable(folders, "compare")


def test_the_report_has_the_shares_of_the_split(folders, tmp_path):
    def shown(split, **more):
        run = metrics(split=split) | more
        (folders[0] / "metrics.json").write_text(json.dumps(run))
        write_report(folders[:1], tmp_path / "r.html")
        return re.search(r"split ([^;]*);", (tmp_path / "r.html").read_text())[1]

    assert shown("column:part", split_rows={"train": 40, "val": 10, "test": 50}) == (
        "column:part 40/10/50"
    )
    assert shown("column:part") == "column:part"
    assert shown("order:t") == "order:t 80/10/10"


def test_what_a_difference_may_be_by_chance_stands_beside_it():
    """Of one run, whose seeds do not tell; and how many rows were tested, and if time ran out."""
    held = {"val": {"rows": 90, "positive": 9}, "test": {"rows": 15_000, "positive": 330}}
    more = {"test_auc_error": 0.0155, "held_out": held, "cut_short": True}
    runs = [{**metrics(), **more}, {**metrics("amtl", stored=200, auc=0.71), **more}]
    results = group_results(runs)
    assert [row[1] for row in table_rows(results)[1]] == [
        "0.7000 ± 0.0155 s.e.",
        "0.7100 ± 0.0155 s.e.",
    ]
    page = _page(results)
    assert "± 0.0155 s.e.: a smaller difference may be chance" in page
    assert "tested on 15,000 rows, 330 of them positive" in page
    assert "Ended by --time-limit: 2 of 2" in page
    # Files from before say nothing of it.
    assert "s.e." not in _page(group_results([metrics(), metrics("amtl", stored=200)]))


def test_a_folder_of_runs_stands_for_its_runs(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    assert load_metrics([tmp_path]) == load_metrics(folders)


def test_unfinished_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="--resume"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "r.html")


def test_seeds_whose_race_chose_differently_are_one_result():
    runs = []
    for seed, (weight, budget, dropout) in enumerate([(1.0, 0.3, None), (2.0, 0.09, 0.1)]):
        options = {"field_weights": [weight], "bits": 4}
        run = metrics("amtl", budget=budget, seed=seed, table_options=options, race=False)
        run["config"] |= {"bits": "auto", "embedding_dropout": dropout, "distillation": dropout}
        asked = {"embedding_dropout": None, "distillation": None}
        run["raced"] = {"given": {}, "budget": 0.3, "asked": asked}
        runs.append(run)
    results = group_results(runs)
    assert [(r.name, len(r.runs)) for r in results] == [("AMTL D=16 30%", 2)]
    decayed = metrics(auc=0.8, embedding_decay=1e-5)
    found = group_results([metrics(), decayed])
    assert [r.name for r in found] == ["fixed D=16", "fixed D=16 decay 1e-05"]
    # Of two tables of full size the better one is what others are held to.
    assert baseline(found) is found[1] and baseline(found[:1]) is found[0]
    few = metrics(bits="4")
    assert [r.name for r in group_results([metrics(), few])] == ["fixed D=16", "fixed D=16 4 bits"]


def test_what_a_race_chose_tells_no_runs_apart():
    runs = []
    for fields, weights in ((["a", "b"], [0.1, 0.2]), (["a"], [0.3])):
        run = metrics("amtl", table_options={"field_weights": weights, "bits": 4}, race=False)
        run["config"] |= {"fields": fields, "bits": "auto"}
        run["raced"] = {"given": {}, "budget": 0.4, "asked": {}}
        runs.append(run)
    names = [result.name for result in group_results(runs)]
    assert names == ["AMTL D=16 40%, fields a b", "AMTL D=16 40%, fields a"]
    # Given by the user, they do, in a few words.
    for run, weights in zip(runs, ([1.0] * 9, [1.0, 2.0]), strict=True):
        run["config"]["fields"] = []
        run["raced"]["given"] = {"field_weights": weights}
    names = [result.name.partition(", ")[2] for result in group_results(runs)]
    assert names == ["field_weights of 9", "field_weights [1.0, 2.0]"]


def test_notes_that_say_the_same_of_many_columns_are_one():
    def told(*names):
        console = Console(file=io.StringIO(), width=200)
        note = "whole numbers held as float64; --numeric {}=bucket takes them as amounts"
        fields = [FieldSpec(name, "categorical", note=note.format(name)) for name in names]
        print_decisions(console, [*fields, FieldSpec("other", "unused", note="left")])
        return console.file.getvalue()

    few, many = told("a", "as", "b"), told(*(f"c{i}" for i in range(12)))
    assert [few.count(f"--numeric {name}=bucket") for name in ("a", "as", "b")] == [1, 1, 1]
    assert "c0, c1, c2, c3, c4, c5, c6, c7 and 4 more" in many and "other" in many
    assert many.count("--numeric COLUMN=bucket") == many.count("--numeric") == 1
    assert listed(["a"] * 8) == ", ".join(["a"] * 8)
    assert listed(["a"] * 9) == ", ".join(["a"] * 8) + " and 1 more"
