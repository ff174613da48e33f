"""The table of sizes at equal bytes: its runs, and what is made of them."""

from __future__ import annotations

import json

import pytest

from bench import sizes


def record(method, seed, auc, size, **job):
    return {
        "job": {"set": "s", "seed": seed, "method": method, **job},
        "test_auc": auc,
        "test_logloss": 0.5,
        "val_auc": auc,
        "stored_bytes": 100 * size,
        "dense_bytes": 100 * job.get("dim", sizes.DIM) / sizes.DIM,
        "cpu": 1.0,
    }


def test_every_method_meets_its_peers_at_every_budget():
    jobs = sizes.jobs(["s"], [0, 1])
    assert len(jobs) == 2 * (2 + len(sizes.NARROW) + 3 * len(sizes.BUDGETS))
    assert len({json.dumps(job, sort_keys=True) for job in jobs}) == len(jobs)
    assert {job["method"] for job in sizes.jobs(["s"], [0], ["amtl"])} == {"amtl"}


def test_differences_are_paired_by_seed():
    gains = (0.01, 0.02, 0.03)
    records = []
    for seed, gain in enumerate(gains):
        records += [
            record("fixed", seed, 0.7, 1.0, dim=16),
            record("fixed", seed, 0.6 + 0.01 * seed, 0.125, dim=2),
            record("fixed", seed, 0.65, 0.125, dim=16, bits="4"),
            record("amtl", seed, 0.7 + gain, 0.05, budget=0.125),
        ]
    records.append(record("fixed", 9, 0.1, 1.0, dim=16))
    summary = {(e["method"], e["size"]): e for e in sizes.summarise(records)}
    ours = summary["amtl", 0.125]
    against = ours["against"]
    assert against["full"]["mean"] == pytest.approx(0.02) and against["full"]["seeds"] == 3
    # Student's t at two degrees of freedom.
    assert against["full"]["half"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert against["narrow"]["mean"] == pytest.approx(0.11)
    assert against["few_bits"]["mean"] == pytest.approx(0.07)
    assert ours["of_full"] == pytest.approx(0.05)
    shown = sizes.table(list(summary.values()))
    assert "| amtl, ≤ 12.5 % | 0.7200 ± 0.0100 (3)" in shown and "fixed int4, D = 16" in shown


def test_runs_are_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "NARROW", {0.125: 2})
    out, sets = tmp_path / "runs.jsonl", {"s": ("synthetic:300", "label", "")}
    sizes.run_all(out, sets, [0], ["fixed"])
    lines = out.read_text().splitlines()
    assert [json.loads(line)["job"]["dim"] for line in lines] == [16, 2]
    sizes.run_all(out, sets, [0], ["fixed"])
    assert out.read_text().splitlines() == lines
    assert [job["dim"] for job in sizes.jobs(["s"], [0], ["fixed"], [0.03])] == [16]


def test_fixed_tables_have_a_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "TAUGHT", (0.125,))
    out, sets = tmp_path / "runs.jsonl", {"s": ("synthetic:300", "label", "")}
    sizes.run_all(out, sets, [0], ["taught"])
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(run["job"]["dim"], run["job"].get("bits")) for run in runs] == [(16, "4"), (16, None)]
    assert all(run["job"]["taught"] and 0 <= run["test_auc"] <= 1 for run in runs)


def test_the_ten_lines_differ_by_the_conversion_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "BITS_OF_LINES", {0.125: (None, 4)})
    monkeypatch.setattr(sizes.dropin, "EPOCHS", 2)
    out, sets = tmp_path / "runs.jsonl", {"s": ("synthetic:300", "label", "")}
    sizes.run_all(out, sets, [0], ["plain", "convert", "compress"], [0.125, 1.0])
    found = {}
    for line in out.read_text().splitlines():
        run = json.loads(line)
        job = run["job"]
        after = "after" if job["method"] == "compress" else job.get("dim")
        found[job.get("budget"), after, job.get("bits")] = run
        assert run["stored_bytes"] <= job.get("budget", 1) * run["dense_bytes"]
    full, narrow = found[None, 16, None], found[None, 2, None]
    assert narrow["stored_bytes"] * 8 == full["stored_bytes"]
    # All of the bytes: the same model, whose rows lie in another order.
    assert found[1.0, None, None]["val_logloss"] == pytest.approx(full["val_logloss"], abs=1e-5)
    assert found[1.0, "after", None]["test_logloss"] == pytest.approx(
        full["test_logloss"], abs=1e-6
    )
    # A trained model that is converted validated as the plain one, and is tested as it is stored.
    assert found[0.125, "after", "4"]["val_logloss"] == full["val_logloss"]
    assert found[0.125, "after", "4"]["test_logloss"] != full["test_logloss"]
    assert found[0.125, None, None]["val_logloss"] != found[0.125, None, "4"]["val_logloss"]
    summary = {
        (e["method"], e["size"]): e for e in sizes.summarise(list(map(json.loads, out.open())))
    }
    against = summary["convert int4", 0.125]["against"]
    assert against["full"]["mean"] == pytest.approx(
        found[0.125, None, "4"]["test_auc"] - full["test_auc"]
    )
    assert against.keys() == {"full", "narrow"}


def test_the_ten_lines_with_weight_decay(tmp_path, monkeypatch):
    """All of the bytes is the same model again, its tables decayed and nothing else."""
    monkeypatch.setattr(sizes, "BITS_OF_LINES", {1.0: (None,)})
    monkeypatch.setattr(sizes.dropin, "EPOCHS", 2)
    out, sets = tmp_path / "runs.jsonl", {"s": ("synthetic:300", "label", "")}
    for decay in (0.0, 10.0):
        training = sizes.dropin.Training(decay=decay)
        sizes.run_all(out, sets, [0], ["plain", "convert"], [1.0], training)
    plain, same, decayed, converted = map(json.loads, out.open())
    assert "decay" not in plain["job"] and decayed["job"]["decay"] == 10.0
    assert decayed["val_logloss"] != plain["val_logloss"]
    assert same["val_logloss"] == pytest.approx(plain["val_logloss"], abs=1e-5)
    assert converted["val_logloss"] == pytest.approx(decayed["val_logloss"], abs=1e-5)
    summary = {e["method"]: e for e in sizes.summarise([plain, same, decayed, converted])}
    against = summary["convert decay 10"]["against"]["full"]["mean"]
    assert against == pytest.approx(converted["test_auc"] - decayed["test_auc"])


def test_the_ten_lines_are_trained_as_options_say(tmp_path, monkeypatch):
    """By another rate, optimizer or batch the plain model is another, and converted the same."""
    monkeypatch.setattr(sizes, "BITS_OF_LINES", {1.0: (None,)})
    monkeypatch.setattr(sizes.dropin, "EPOCHS", 2)
    monkeypatch.setitem(sizes.SETS, "s", ("synthetic:300", "label", ""))
    out, found = tmp_path / "runs.jsonl", set()
    ways = [], ["--rate", "1e-2"], ["--adagrad"], ["--adagrad", "--rate", ".1"], ["--batch", "64"]
    for way in ways:
        given = ["--sets", "s", "--seeds", "0", "--kinds", "plain,convert", "--budgets", "1"]
        sizes.main(["run", str(out), *given, *way])
        plain, converted = list(map(json.loads, out.open()))[-2:]
        assert converted["val_logloss"] == pytest.approx(plain["val_logloss"], abs=1e-5)
        found.add(plain["val_logloss"])
    assert len(found) == len(ways)
    names = {entry["method"] for entry in sizes.summarise(list(map(json.loads, out.open())))}
    assert {"plain adagrad rate 0.1", "convert batch 64", "plain"} <= names


def test_sets_go_by_the_names_that_are_printed(capsys):
    assert sizes.choose_sets("synthetic:easy,nycflights13", []).keys() == {"easy", "nycflights13"}
    with pytest.raises(SystemExit) as done:
        sizes.main(["run", "OUT.jsonl", "--sets", "nowhere"])
    assert done.value.code == 2 and "choose of nycflights13" in capsys.readouterr().err
