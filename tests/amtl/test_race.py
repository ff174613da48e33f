"""Settings raced on validation, the smaller budget, and the comparison at the end of a run."""

from __future__ import annotations

import dataclasses
import io
import math
import os
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.registry import Source
from amtl.data.splits import split_rows
from amtl.errors import UserError
from amtl.run import comparison, contest, folders, methods, teaching, training
from amtl.run.comparison import TAUGHT
from amtl.run.config import TrainConfig
from amtl.run.contenders import DECAYS, DROPOUT, SHARES, STRONGER, WEAKER
from amtl.run.display import print_comparison
from amtl.run.done import Interrupted
from amtl.run.folders import load_run
from amtl.run.learner import Learner
from amtl.run.metrics import score_error
from amtl.run.model import field_evidence
from amtl.run.preparation import prepare
from amtl.run.progress import Silent
from amtl.run.race import (
    CAPACITY_BITS,
    FLAT,
    FULL,
    Trials,
    candidates,
    field_weights,
    is_open,
    race,
)
from amtl.run.teaching import Teacher
from amtl.run.training import start
from rich.console import Console
from torch.nn.functional import binary_cross_entropy_with_logits

ROWS = 3000
SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")


@pytest.fixture(scope="module")
def source() -> Source:
    """Clicks that `user` and `item` decide; `noise`, 8 rows a value, says nothing."""
    rng = np.random.default_rng(1)
    user, item = rng.zipf(1.3, ROWS) % 200, rng.zipf(1.3, ROWS) % 100
    taste, kind = rng.normal(size=(200, 2)), rng.normal(size=(100, 2))
    logit = 2 * taste[user, 0] + 2 * kind[item, 0] + taste[user, 1] * kind[item, 1]
    frame = pl.DataFrame(
        {
            "user": user,
            "item": item,
            "noise": rng.integers(0, 360, ROWS),
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )
    return Source("made here", frame, "label")


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "dim": 8,
        "budget": 0.25,
        "batch_size": 200,
        "epochs": 4,
        "validations": 2,
        "hidden": [16],
        "seed": 3,
        "bits": "32",
        "embedding_decay": 0.0,
        "values": False,
    }
    return TrainConfig(**{**base, **changes})


@pytest.fixture(scope="module")
def task(source):
    return prepare(settings(), source)


def test_what_is_open_and_what_the_user_settled():
    assert is_open(settings())
    assert is_open(settings(method="rule"))
    assert is_open(settings(bits="auto", table_options={"init_exponent": 1.0}))
    for changes in (
        {"method": "fixed"},
        {"race": False},
        {"table_options": {"init_exponent": 1.0}},
        {"table_options": {"capacity_bits": 2.0}},
        {"table_options": {"parametrization": "free"}},
    ):
        assert not is_open(settings(**changes)), changes


def test_candidates_settle_everything_and_one_is_a_narrow_table(task):
    found = candidates(settings(), [1.0, 2.0, 0.5])
    assert len(found) == len(CAPACITY_BITS) + 1
    assert not any(is_open(config) for config in found.values())
    assert [found[name].table_options.get("field_weights") for name in found][:-1] == [
        [1.0, 2.0, 0.5]
    ] * len(CAPACITY_BITS)
    flat = Learner(found[FLAT], task)
    assert set(methods.row_widths(flat.table).tolist()) == {2}
    assert FLAT not in candidates(settings(budget=0.1), None)


def test_bits_are_raced_where_sizes_are_settled(task):
    found = candidates(settings(bits="auto", budget=0.1), [1.0, 2.0, 0.5])
    assert [(entry.layer_options["bits"], name) for name, entry in found.items()] == [
        (4, "int4, 16 bits a number"),
        (4, "int4, 4 bits a number"),
        (4, "int4, 1 bits a number"),
        (8, "int8, 4 bits a number"),
        (2, "int2, 4 bits a number"),
        (4, FLAT),
    ]
    # All rows get all numbers of 4 and 2 bits, so one candidate each is enough.
    assert list(candidates(settings(bits="auto", budget=0.25), None)) == [
        "int4, 4 bits a number",
        "int8, 4 bits a number",
        "int2, 4 bits a number",
    ]
    law = settings(bits="auto", budget=0.1, table_options={"capacity_bits": 2.0})
    assert list(candidates(law, None)) == ["int8", "int4", "int2", FLAT]
    eight = candidates(settings(bits="8"), [1.0, 2.0, 0.5])
    assert {entry.layer_options["bits"] for entry in eight.values()} == {8}
    for learned in (
        {"table_options": {"parametrization": "ordinal"}},
        {"freeze_at": 3},
        {"method": "fixed"},
    ):
        config = settings(bits="auto", **learned)
        assert not config.raced_bits and config.number_bits is None
    assert settings(bits="auto", dim=5).number_bits == 8


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_fixed_widths_of_few_bits_fit_their_budget(task, bits):
    for share in (0.5, 0.9):
        budget = share * bits / 32
        found = candidates(settings(bits=str(bits), budget=budget, dim=128), None)
        assert FLAT in found
        table = Learner(found[FLAT], task).table
        widths = methods.row_widths(table)
        assert 0.85 * budget < methods.stored_bytes(table) / methods.dense_bytes(table) <= budget
        assert (widths >= found[FLAT].table_options["min_dim"]).all()


def test_where_few_bits_do_not_fit_numbers_of_32_are_raced(source):
    # Rows of 5 numbers of 4 or 2 bits are no whole bytes, and step sizes outweigh the budget.
    for changes in ({"dim": 5, "budget": 0.3}, {"budget": 0.0003}):
        config = settings(bits="auto", epochs=2, table_optimizer="adam", **changes)
        metrics = start(config, source=source).run()
        names = [row["name"] for row in metrics["raced"]["table"]]
        if changes["budget"] == 0.3:
            assert names[:2] == [FULL, "int8, 4 bits a number"] and metrics["bits"] == 8
        else:
            assert "4 bits a number" in names and metrics["bits"] == 32


def test_evidence_tells_which_fields_matter(source, task):
    learner = Learner(settings(method="fixed", epochs=9, table_lr=0.1), task)
    while learner.epochs < 4:
        learner.step()
    names, evidence = task.encoder.names, field_evidence(learner.model, task.val)
    worth = dict(zip(names, evidence.tolist(), strict=True))
    assert worth["user"] > 0.01 and worth["item"] > 0.01
    assert abs(worth["noise"]) < worth["user"] / 2


@pytest.mark.parametrize("backbone", ["dnn", "deepfm", "dcn", "autoint"])
@pytest.mark.parametrize("at_once", [2**26, 1])
def test_evidence_by_hand(task, backbone, at_once, monkeypatch):
    """Each field's embeddings are replaced by their mean, whatever meets them beside the MLP."""
    monkeypatch.setattr("amtl.run.model._EVIDENCE_NUMBERS", at_once)
    learner = Learner(settings(method="fixed", table_lr=0.1, backbone=backbone, hidden=[8]), task)
    while learner.steps < 5:
        learner.step()
    batch, expected = task.val.batch(torch.arange(len(task.val))), []
    with torch.no_grad():
        embedded = learner.model.eval().embed(batch)
        for field in (None, *range(embedded.shape[1])):
            values = embedded.clone()
            if field is not None:
                values[:, field] = embedded[:, field].mean(0)
            logits = learner.model.score(values, batch.dense).double()
            expected.append(binary_cross_entropy_with_logits(logits, batch.labels.double()))
    expected = torch.stack(expected)
    evidence = field_evidence(learner.model, task.val)
    torch.testing.assert_close(evidence, expected[1:] - expected[0], rtol=1e-3, atol=1e-8)
    assert float(evidence.abs().max()) > 1e-5


@pytest.mark.parametrize(
    ("evidence", "expected"),
    [
        ([0.2, 0.1, 0.3], [1.0, 0.5, 1.5]),
        ([0.4, -1.0], [2 / 1.001, 0.002 / 1.001]),
        ([-0.1, -0.2], None),
        ([math.nan, 0.1], None),
    ],
)
def test_weights_follow_evidence_and_stay_positive(evidence, expected):
    weights = field_weights(torch.tensor(evidence, dtype=torch.float64))
    assert weights == (None if expected is None else pytest.approx(expected))


def test_laps_of_a_long_epoch_take_its_place(source, task, monkeypatch):
    monkeypatch.setattr("amtl.run.learner.LAP", 1000)
    alone = Learner(settings(race=False, epochs=1), task)
    while not alone.finished:
        alone.step()
    # 2,400 samples to train on are three laps of four steps, with two validations each.
    assert [record["step"] for record in alone.history] == [2, 4, 6, 8, 10, 12]
    assert [alone.lap_end(laps) for laps in range(4)] == [0, 4, 8, 12]
    taken, rows = [], []

    def counted(learner):
        taken.append(learner.config.method)
        rows.append(learner.step()[1])

    race(settings(method="rule"), Trials(lambda entry: Learner(entry, task), Silent(), counted))
    # Four settings, then two, for a lap each, and beside them the full table for two.
    assert len(taken) == 4 * 6 + 4 * 2 and taken.count("fixed") == 8
    assert sum(rows) == 8 * 800


def test_of_a_large_validation_split_a_part_is_looked_at(source, monkeypatch):
    whole = prepare(settings(split="order:noise"), source)
    monkeypatch.setattr("amtl.run.preparation.VALIDATED", 100)
    part, again = (prepare(settings(split="order:noise"), source) for _ in range(2))
    assert len(whole.val) == 300 and len(part.val) == len(again.val) == 100
    assert torch.equal(part.val.rows, again.val.rows)
    every, looked_at = ([*map(tuple, task.val.rows.tolist())] for task in (whole, part))
    # Of all of it, and not its first rows, which are the oldest.
    assert set(looked_at) <= set(every) and not set(looked_at) <= set(every[:100])
    assert len(part.train) == len(whole.train) and len(part.test) == len(whole.test)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_given_dropout_is_not_raced(source, share):
    metrics = start(settings(embedding_dropout=share, epochs=2), source=source).run()
    assert metrics["config"]["embedding_dropout"] == share


@pytest.mark.parametrize("method", ["amtl", "rule"])
def test_a_raced_run_can_be_loaded_and_says_what_it_chose(source, tmp_path, method):
    metrics = start(settings(method=method), tmp_path, source=source).run()
    raced = metrics["raced"]
    assert raced["table"][0]["name"] == FULL
    assert sum(row["chosen"] for row in raced["table"]) == 1
    assert (raced["evidence"] is None) == (method == "rule")
    assert "capacity_bits" in metrics["config"]["table_options"]
    assert metrics["stored_fraction"] <= 0.25
    trained = load_run(tmp_path)
    assert methods.stored_bytes(trained.model.table) == metrics["stored_bytes"]
    header, rows = comparison.table(metrics)
    assert [row[0] for row in rows] == [comparison.THIS, FULL, FLAT]
    large = {**metrics, "raced": {**metrics["raced"], "full": None}}
    large["compared"] = [{**metrics, "name": FULL + TAUGHT, "stored_bytes": 123_456_789_012}]
    console = Console(width=80, file=io.StringIO())
    print_comparison(console, large)
    printed = console.file.getvalue()
    assert "123,456,789,012" in printed and f"{metrics['test_logloss']:.4f}" in printed
    assert "…" not in printed
    assert all(len(row) == len(header) for row in rows)


def test_a_race_that_was_stopped_begins_again_and_ends_the_same(source, tmp_path):
    config = settings(method="amtl")
    expected = start(config, source=source).run()
    stopped = start(config, tmp_path, source=source, stop=lambda steps: steps >= 30)
    with pytest.raises(Interrupted, match="race is run again"):
        stopped.run()
    again = start(None, tmp_path, resume=True, source=source).run()
    for key in ("test_auc", "val_auc", "stored_bytes", "raced"):
        assert again[key] == expected[key], key


@pytest.mark.every(2)
@pytest.mark.parametrize("share", [0.5, 0.75, 0.95])
def test_what_was_stopped_after_its_race_ends_the_same(source, tmp_path, share):
    config, asked = settings(epochs=2), []

    def counted(steps):
        asked.append(steps)
        return False

    expected = start(config, source=source, stop=counted).run()
    whole = len(asked)
    last = int(share * whole)
    asked.clear()
    stopped = start(
        config, tmp_path, source=source, stop=lambda steps: counted(steps) or len(asked) > last
    )
    with pytest.raises(Interrupted):
        stopped.run()
    asked.clear()
    again = start(None, tmp_path, resume=True, source=source, stop=counted).run()
    for key in ("test_auc", "val_auc", "stored_bytes", "raced"):
        assert again[key] == expected[key], key
    # But for the race, nothing is trained twice.
    assert len(asked) == whole - last - 1
    assert not folders.trainings(tmp_path)


@pytest.fixture
def second_a_step(monkeypatch):
    """Makes a `stop` by which each step takes a second."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def stop(steps):
        clock.now += 1
        return False

    return clock, stop


def test_a_time_limit_is_kept_and_may_be_given_more(source, tmp_path, second_a_step):
    clock, stop = second_a_step
    config = settings()
    whole = start(config, source=source, stop=stop, time_limit=1e9).run()
    assert not whole["cut_short"]
    seconds, clock.now = clock.now, 0.0
    raced = 12 * (4 + 2 + 2)
    limits = (0, 1, raced, raced + 10, 0.6 * seconds, 0.9 * seconds)
    for limit in limits if SOAK else limits[1::2]:
        clock.now, folder = 0.0, tmp_path / f"{limit:g}"
        metrics = start(config, folder, source=source, stop=stop, time_limit=limit).run()
        # What is begun is validated once: the race's learners and what follows, half an epoch.
        assert clock.now <= max(limit, 6 * 5) + 6
        assert metrics["cut_short"] and "time ran out" in " ".join(comparison.verdict(metrics))
        trained = load_run(folder)
        assert methods.stored_bytes(trained.model.table) == metrics["stored_bytes"]
        more = {"resume": True, "time_limit": 1e9}
        before = clock.now
        again = start(None, folder, source=source, stop=stop, **more).run()
        assert not again["cut_short"] and not folders.trainings(folder)
        if limit > raced:
            assert clock.now == seconds, before
            for key in ("test_auc", "val_auc", "stored_bytes", "raced"):
                assert again[key] == whole[key], key


def test_a_comparison_takes_its_time(source, second_a_step):
    clock, stop = second_a_step
    config = settings(epochs=2, compare=True, embedding_decay=None)
    whole = start(config, source=source, stop=stop).run()
    # Cut while tables of full size are trained that a whole run would have kept to compare with.
    for limit in (10, 180):
        clock.now = 0.0
        metrics = start(config, source=source, stop=stop, time_limit=limit).run()
        assert metrics["cut_short"] and not metrics["raced"].get("taught")
        rows = [row for row in metrics["compared"] if row["name"].startswith(FULL)]
        expected = [row for row in whole["compared"] if row["name"].startswith(FULL)]
        assert [row["name"] for row in rows] == [row["name"] for row in expected]
        assert rows[0]["val_auc"] == expected[0]["val_auc"]


def test_a_validation_split_of_one_class_is_said(source):
    rows = split_rows(source.frame, "random")[1].numpy()
    labels = source.frame["label"].to_numpy().copy()
    labels[rows] = 1
    frame = source.frame.with_columns(label=pl.Series(labels))
    with pytest.raises(UserError, match=r"the validation split has .* all of them positive \(of"):
        start(settings(epochs=1), source=Source("made here", frame, "label"))
    labels[:] = 0
    labels[rows[:3]] = 1
    frame = source.frame.with_columns(label=pl.Series(labels))
    with pytest.raises(UserError, match=r"the training split has .* all of them negative \(of"):
        start(settings(epochs=1), source=Source("made here", frame, "label"))


def test_comparing_trains_both_tables_and_warns_where_a_fixed_one_is_better(source):
    # By Adam no rounding of the MLP at the end of a run changes these models.
    given = {"seed": 7, "epochs": 6, "budget": 0.5, "table_optimizer": "adam"}
    watching = Watching()
    metrics = start(settings(compare=True, **given), observer=watching, source=source).run()
    # The run's own table of full size is the one that it is compared with.
    assert [title for title in watching.titles if title.startswith(FULL)] == [
        FULL,
        f"{FULL}, dropout 0.1",
    ]
    assert all(watching.scores.values())
    assert [row["name"] for row in metrics["compared"]] == [FULL, FLAT, FLAT + TAUGHT]
    score = {r["name"]: r["score"] for r in metrics["compared"]}
    assert score[FLAT + TAUGHT] > score[FLAT]
    full = metrics["compared"][0]
    alone = [
        start(settings(method="fixed", embedding_dropout=s, **given), source=source).run()
        for s in (None, DROPOUT)
    ]
    best = max(alone, key=lambda m: m["val_score"])
    assert full["test_auc"] == best["test_auc"]
    assert full["stored_bytes"] == metrics["dense_bytes"]
    fake = {
        **metrics,
        "raced": None,
        "compared": [{**full, "name": FLAT, "dim": 3, "score": metrics["val_score"] + 0.1}],
    }
    assert "--method fixed --dim 3, or" in only(comparison.verdict(fake))
    fake["compared"][0] |= {"name": FLAT + TAUGHT, "distillation": 0.8}
    assert "--method fixed --dim 3 --distillation 0.8, or" in only(comparison.verdict(fake))
    fake["compared"][0] |= {"name": FLAT, "distillation": None, "embedding_decay": 1e-5}
    assert "--dim 3 --embedding-decay 1e-05, or" in only(comparison.verdict(fake))
    less = {"less": {"chosen": True}, "budget": 1.5}
    warned = comparison.verdict({**fake, "raced": less})
    assert "--method fixed --dim 3" in warned[0]
    assert "fewer bytes validated better" in warned[1]
    fake["compared"][0] |= {"score": -0.9}
    assert comparison.verdict(fake) == []
    tiny = {**fake, "stored_bytes": metrics["dense_bytes"] // 64}
    assert "no table of fixed width is as small: one number" in only(comparison.verdict(tiny))
    two = {**tiny, "config": {**metrics["config"], "backbone": "deepfm"}}
    assert "as small: two of 32 bits a row take" in only(comparison.verdict(two))
    scores = {"val_auc": metrics["val_auc"], "score": metrics["val_score"] + 0.002}
    short = {**fake, "raced": {"full": {"name": FULL, **scores}}}
    assert "a larger --budget to lose nothing" in only(comparison.verdict(short))
    # Of a race that took all the time, the yardstick is its own.
    early = {**fake, "compared": [], "raced": {"table": [{"name": FULL, **scores}]}}
    assert not any("full size" in line for line in comparison.verdict(early))
    (told,) = (n for n in comparison.verdict({**early, "cut_short": True}) if "full size" in n)
    assert told.endswith("this data needs a longer --time-limit to lose nothing")
    taught = {"name": FULL + TAUGHT, "distillation": 0.5, **scores} | {"score": 9.0}
    both = {**short, "compared": [taught, {**full, "val_auc": None}]}
    assert "or --method fixed --distillation 0.5," in only(comparison.verdict(both))
    assert comparison.verdict({**short, "method": "fixed"}) == []
    scores["score"] -= 0.0015
    assert comparison.verdict({**fake, "raced": {"full": {"name": FULL, **scores}}}) == []
    # Of a column that tells the label.
    told = {**metrics, "compared": [], "raced": None, "val_auc": 0.9999}
    assert "is rarely true" in only(comparison.verdict(told))
    assert "--drop" in only(comparison.verdict({**told, "method": "fixed"}))
    few = {**told, "held_out": {"val": {"rows": 90, "positive": 30}}, "method": "fixed"}
    assert comparison.verdict({**few, "test_auc": 0.97}) == []
    assert "is rarely true" in only(comparison.verdict({**few, "test_auc": 0.9995}))
    worth = [0.0] * len(metrics["rows_by_field"])
    worth[-1] = 0.25
    raced = {"evidence": worth, "full": None, "less": None, "less_taught": None}
    (line,) = comparison.verdict({**told, "raced": raced, "val_auc": 1.0})
    assert f"above all {list(metrics['rows_by_field'])[-1]!r} (log loss rises by 0.25" in line
    assert "more than once" in line
    tiny = {"val": {"rows": 60, "positive": 9}}
    few = {**told, "held_out": {**metrics["held_out"], **tiny}}
    assert comparison.verdict(few) == []
    # Of a model that learned nothing that holds.
    chance = {**told, "val_auc": 0.5, "test_auc": 0.52, "test_auc_error": 0.011}
    assert "no better than guessing" in only(comparison.verdict(chance))
    assert comparison.verdict({**chance, "test_auc": 0.53}) == []
    later = {**chance, "config": {**metrics["config"], "split": "order:day"}}
    assert only(comparison.verdict(later)).endswith("may be unlike those it was trained on")
    # Files of earlier versions have no score: AUC minus log loss.
    old = {**metrics, "raced": {"full": {"name": FULL, "val_auc": 0.9, "val_logloss": 0.0}}}
    del old["val_score"]
    assert "a larger --budget to lose nothing" in only(comparison.verdict({**old, "compared": []}))


LED = {
    "method": "amtl",
    "val_auc": 0.7,
    "val_score": 0.1,
    "stored_bytes": 800,
    "dense_bytes": 6400,
    "dim": 16,
    "held_out": {"val": {"rows": 900, "positive": 80}},
    "config": settings().to_dict(),
    "raced": None,
}


@pytest.mark.parametrize("name", [FULL, FULL + TAUGHT, FLAT])
@pytest.mark.parametrize(
    ("lead", "error", "positive", "told"),
    [
        (0.08, 0.07, 80, "by 0.0800 ± 0.0700 s.e. in AUC minus log loss: "),
        (0.08, 0.09, 80, ": within the noise of 80 positive rows in validation"),
        (0.08, 0.07, 7, ": within the noise of 7 positive rows in validation"),
        (0.08, 0.07, 893, ": within the noise of 7 negative rows in validation"),
        (0.15, 0.07, 7, "by 0.1500 ± 0.0700 s.e. in AUC minus log loss: "),
        (0.08, math.nan, 1, "by 0.0800 in AUC minus log loss: within the noise of 1 positive row"),
        (0.0005, 0.0001, 80, None),
    ],
)
def test_a_lead_within_the_noise_is_no_advice(name, lead, error, positive, told):
    row = {"name": name, "dim": 2, "val_auc": 0.7, "score": 0.1 + lead, "error": error}
    held = {"val": {"rows": 900, "positive": positive}}
    lines = comparison.verdict({**LED, "held_out": held, "compared": [row]})
    assert bool(lines) == bool(told)
    if told:
        assert told in only(lines)
        advised = "use --method" in lines[0] or "this data needs a larger --budget" in lines[0]
        assert advised == ("within the noise" not in told)


def test_bytes_are_not_to_blame_where_as_many_do_better():
    rows = [{"name": name, "dim": 2, "val_auc": 0.7, "score": 0.2} for name in (FULL, FLAT)]
    whole, narrow = comparison.verdict({**LED, "compared": rows})
    assert "this data needs a longer training (--patience 16) to lose nothing" in whole
    assert "use --method fixed --dim 2" in narrow
    late = comparison.verdict({**LED, "compared": rows, "cut_short": True})
    assert any("needs a longer --time-limit to lose nothing" in line for line in late)


def test_the_noise_of_a_lead_is_that_of_both_models_on_validation(source, task):
    given = settings(compare=True, epochs=2, distillation=0.5)
    trainer = start(given, source=source)
    metrics = trainer.run()
    says, labels = trainer.learner.says(), task.val.labels
    rows = [metrics["raced"]["full"], *metrics["compared"]]
    assert len(rows) > 2 and all(0 < row["error"] < 0.1 for row in rows)
    full = trainer._full
    assert metrics["compared"][0]["error"] == score_error(full.says(), says, labels)
    assert metrics["raced"]["full"]["error"] == pytest.approx(rows[1]["error"], rel=0.01)
    assert metrics["held_out"]["val"] == {"rows": 300, "positive": int(labels.sum())}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits": "auto", "budget": 0.4}, "--no-race --bits 16 spends nearly all"),
        ({"bits": "auto", "budget": 0.1}, "--no-race spends nearly all"),
        ({"bits": "8", "budget": 0.4}, "--no-race --bits 16 spends nearly all"),
        ({"bits": "auto", "budget": 0.2, "dim": 5}, "--no-race spends nearly all"),
        ({"bits": "auto", "budget": 0.05, "dim": 5}, "--no-race spends nearly all"),
        ({"bits": "auto", "budget": 0.7}, "--no-race --bits 32 spends nearly all"),
        ({"bits": "8", "budget": 0.7, "masters": False, "table_optimizer": "sgd"}, None),
    ],
)
def test_what_spends_the_budget_that_fewer_bytes_left(source, changes, told):
    config = settings(epochs=1, **changes)
    raced = {"less": {"chosen": True}, "budget": config.budget}
    fewer = {**LED, "stored_bytes": 64, "raced": raced, "config": config.to_dict()}
    line = only(comparison.verdict(fewer))
    assert f"so the model takes 64 of {6400 * config.budget:,.0f}" in line
    assert ("spends" in line) == bool(told)
    if told:
        assert line.endswith(f"; {told}")
        bits = told.split()[2] if "--bits" in told else config.bits
        asked = dataclasses.replace(config, race=False, bits=bits)
        metrics = start(asked, source=source).run()
        assert 0.9 * config.budget < metrics["stored_fraction"] <= config.budget


def test_an_empty_table_is_told_of():
    (line,) = comparison.verdict({**LED, "stored_bytes": 0})
    assert line.startswith("the table stores nothing, so no id changes a prediction")


WEAK, STRONG, *STRONGEST = (f"{FULL}, weight decay {d:g}" for d in (*DECAYS, *STRONGER))


@pytest.mark.parametrize(
    ("best", "tables"),
    [
        (None, [STRONG, WEAK, FULL, f"{FULL}, dropout 0.1"]),
        (DECAYS[0], [STRONG, WEAK, FULL, f"{WEAK}, dropout 0.1"]),
        (DECAYS[1], [STRONG, WEAK, STRONGEST[0], f"{STRONG}, dropout 0.1"]),
        (STRONGER[0], [STRONG, WEAK, *STRONGEST, f"{STRONGEST[0]}, dropout 0.1"]),
        (STRONGER[1], [STRONG, WEAK, *STRONGEST, f"{STRONGEST[1]}, dropout 0.1"]),
    ],
)
def test_weight_decay_that_serves_the_full_table_is_tried_with_students(
    source, monkeypatch, best, tables
):
    ended, made = contest.outcome, []
    create = Learner.__init__

    def counted(self, config, *args, **kwargs):
        made.append(config)
        create(self, config, *args, **kwargs)

    def outcome(name, learner):
        row = ended(name, learner)
        decay = learner.config.embedding_decay or 0.0
        if not name.startswith(FULL):
            return row
        served = decay <= best if best else not decay
        return {**row, "score": 9.0 + decay if served else -9.0 - decay}

    monkeypatch.setattr(Learner, "__init__", counted)
    monkeypatch.setattr(contest, "outcome", outcome)
    watching, config = Watching(), settings(epochs=2, embedding_decay=None)
    metrics = start(config, observer=watching, source=source).run()
    assert [title for title in watching.titles if title.startswith(FULL)] == tables
    students = [(c.embedding_decay, c.embedding_dropout) for c in made if c.distillation]
    first = [(best, 0.0), (WEAKER * best, DROPOUT)] if best else [(None, DROPOUT)]
    assert students[: len(first)] == first
    assert {decay for decay, _ in students} <= {None, *(decay for decay, _ in first)}
    assert metrics["raced"]["asked"]["embedding_decay"] is None
    chosen = metrics["config"]["embedding_decay"]
    assert (f"--embedding-decay {chosen or 0:g}" in comparison.choices(metrics)) == bool(chosen)


@pytest.mark.parametrize(
    ("changes", "tables"),
    [
        ({"embedding_decay": DECAYS[1]}, [STRONG, f"{STRONG}, dropout 0.1"]),
        ({"embedding_decay": 0.0}, [FULL, f"{FULL}, dropout 0.1"]),
        # Codes alone cannot decay, a full table beside them can.
        ({"masters": False, "table_optimizer": "sgd", "table_lr": 1.0, "bits": "8"}, None),
    ],
)
def test_weight_decay_is_tried_where_it_is_open(source, changes, tables):
    watching = Watching()
    config = settings(**{"epochs": 2, "embedding_decay": None, **changes})
    start(config, observer=watching, source=source).run()
    full = [title for title in watching.titles if title.startswith(FULL)]
    assert full == tables if tables else full[:2] == [STRONG, WEAK]
    if tables is None:
        assert not any("decay" in title for title in watching.titles if "teacher" in title)


def test_a_baseline_says_what_it_was_trained_with(task, monkeypatch):
    """Its teacher's race begins with its settings as they were, decay open again."""
    monkeypatch.setattr(
        comparison, "best_record", lambda learner: {"score": learner.config.embedding_decay or 0}
    )
    entry = settings(method="fixed", epochs=1, race=False, embedding_decay=None)
    made = []

    def make(config, taught=None):
        made.append(config)
        return Learner(config, task, taught=taught)

    best, _ = comparison.train_with_teacher(
        "t", entry, Teacher(), Trials(make, Silent(), Learner.step)
    )
    assert best.config.embedding_decay == max(STRONGER)
    assert comparison.scored(FULL, best)["embedding_decay"] == max(STRONGER)
    students = [(c.embedding_decay, c.embedding_dropout) for c in made if c.distillation]
    assert students[:2] == [(max(STRONGER), 0.0), (WEAKER * max(STRONGER), DROPOUT)]


class Watching(Silent):
    """Titles in order, and how many validations came under each."""

    def __init__(self):
        self.titles, self.scores = [], {}

    def begin(self, title, steps, done_steps):
        self.titles.append(title)
        self.scores.setdefault(title, 0)

    def score(self, record):
        self.scores[self.titles[-1]] += 1

    validation = score


def only(told):
    (line,) = told
    return line


def test_the_width_of_the_same_bytes():
    assert comparison.narrow_width({"stored_bytes": 800, "dense_bytes": 6400, "dim": 16}) == 2
    assert comparison.narrow_width({"stored_bytes": 790, "dense_bytes": 6400, "dim": 16}) == 2
    assert comparison.narrow_width({"stored_bytes": 80, "dense_bytes": 6400, "dim": 16}) == 0


def test_a_backbone_that_needs_two_numbers_a_row_is_held_against_no_narrower_table():
    for backbone, one, two in (("dnn", 2, 2), ("deepfm", 1, 2), ("dcn", 2, 2)):
        config = settings(backbone=backbone)
        for stored, count in ((400, one), (800, two)):
            sizes = {"stored_bytes": stored, "dense_bytes": 6400, "dim": 16}
            assert len(comparison.baselines(config, sizes)) == count


def test_settings_of_a_race_are_only_what_is_open():
    config = settings(table_options={"twins": False})
    for entry in candidates(config, None).values():
        changed = {
            f.name
            for f in dataclasses.fields(config)
            if getattr(entry, f.name) != getattr(config, f.name)
        }
        assert changed == {"table_options", "race"}
        assert entry.table_options["twins"] is False


def test_a_run_has_the_full_table_for_a_teacher_and_shows_its_end(source):
    metrics = start(settings(budget=0.05, table_lr=0.1, epochs=3), source=source).run()
    raced = metrics["raced"]
    assert raced["full"]["name"] == FULL and raced["full"]["epochs"] > 0
    assert len(raced["taught"]) == len(SHARES) + 1
    header, rows = comparison.table(metrics)
    full = next(row for row in rows if row[0] == FULL)
    assert full[header.index("val AUC, end")] != "–"
    chosen = [row["name"] for row in raced["taught"] if row["chosen"]]
    assert len(chosen) <= 1
    share, dropout = (metrics["config"][key] for key in ("distillation", "embedding_dropout"))
    if chosen:
        name = f"{share:.0%} of the labels a teacher's"
        assert share in SHARES and chosen == [name + (", dropout 0.1" if dropout else "")]
    else:
        assert share is None


def test_no_teacher_where_none_is_wanted(source):
    metrics = start(settings(distillation=0.0, epochs=2), source=source).run()
    assert metrics["raced"]["taught"] == [] and metrics["raced"]["full"] is None
    assert metrics["config"]["embedding_dropout"] is None
    given = start(settings(distillation=0.3, epochs=2), source=source).run()
    names = ["30% of the labels a teacher's, dropout 0.1", "30% of the labels a teacher's"]
    assert [row["name"] for row in given["raced"]["taught"]] == names


@pytest.mark.parametrize(
    "changes",
    [
        {"race": False},
        {"method": "fixed", "dim": 2, "budget": 1.0},
        {"method": "fixed", "dim": 16, "budget": 1.0, "embedding_dropout": 0.1},
        {"method": "rule", "table_options": {"capacity_bits": 2}},
    ],
    ids=["no race", "narrow", "full", "settled"],
)
def test_a_given_share_is_taught_without_a_race(source, tmp_path, changes, monkeypatch):
    made = []
    create = Learner.__init__

    def counted(self, config, *args, **kwargs):
        made.append((config.method, config.dim, config.embedding_dropout, config.distillation))
        create(self, config, *args, **kwargs)

    monkeypatch.setattr(Learner, "__init__", counted)
    config = settings(distillation=0.5, epochs=3, **changes)
    trainer = start(config, tmp_path, source=source)
    metrics = trainer.run()
    kind, dim, share = config.method, config.dim, config.embedding_dropout
    wide = 16 if kind == "fixed" else dim
    full = [("fixed", wide, s, None) for s in ((None, DROPOUT) if share is None else (share,))]
    if (kind, dim) == ("fixed", 16):
        full = []  # The model is one itself.
    pupils = [(kind, dim, s, 0.5) for s in ((DROPOUT, 0.0) if share is None else (share,))]
    assert made == [(kind, dim, share, 0.5), *full, *pupils]
    raced = metrics["raced"]
    assert raced["full"]["name"] == FULL and raced["less"] is raced["law"] is None
    assert raced["less_taught"] is None
    chosen = [row["chosen"] for row in raced["taught"]]
    assert len(chosen) == len(pupils)
    if share is None:
        dropout = pupils[chosen.index(True)][2] if any(chosen) else None
        assert metrics["config"]["embedding_dropout"] == dropout
    loaded = load_run(tmp_path)
    assert methods.stored_bytes(loaded.model.table) == metrics["stored_bytes"]
    # A finished run that is gone on with has nothing left to try.
    made.clear()
    again = start(None, tmp_path, resume=True, source=source).run()
    assert again["test_auc"] == metrics["test_auc"] and len(made) == 1


def test_a_method_that_trains_twice_takes_no_teacher(source):
    with pytest.raises(UserError, match=r"--method pep .* takes no teacher"):
        start(settings(method="pep", distillation=0.3), source=source).run()


def test_a_teacher_is_the_mean_of_the_models_that_help(task, monkeypatch):
    logits = {"good": 2.0, "better": 3.0, "bad": -2.0}

    class Model:
        def __init__(self, name):
            self.model, self.task, self.ended = name, task, 0

        def says(self):
            self.ended += 1
            return said(self.model, task.val)

    noise = torch.randn(2, len(task.val), generator=torch.Generator().manual_seed(0))

    def said(name, data):
        clean = logits[name] * (data.labels - 0.5)
        if data is task.val and name != "bad":
            clean = clean + 2 * noise[int(name == "better")]
        return clean

    monkeypatch.setattr(teaching, "predict", said)
    teacher, models = Teacher(), [Model(name) for name in logits]
    for model in models:
        teacher.add(model)
    assert [model.ended for model in models] == [1, 1, 1]
    expected = torch.sigmoid(2.5 * (task.train.labels - 0.5))
    torch.testing.assert_close(teacher.labels(), expected)


def test_labels_are_mixed_with_the_teachers(task):
    config = settings(method="fixed", distillation=0.25)
    taught = torch.rand(len(task.train), generator=torch.Generator().manual_seed(1))
    learner, plain = Learner(config, task, taught=taught), Learner(config, task)
    batch = task.train.batch(learner._samples())
    with torch.no_grad():
        labels = 0.75 * batch.labels + 0.25 * taught[learner._samples()]
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            learner.model(batch), labels
        )
    assert learner.step()[0] == pytest.approx(float(expected), rel=1e-6)
    # Nobody taught this one.
    with torch.no_grad():
        hard = torch.nn.functional.binary_cross_entropy_with_logits(
            plain.model(batch), batch.labels
        )
    assert plain.step()[0] == pytest.approx(float(hard), rel=1e-6)
