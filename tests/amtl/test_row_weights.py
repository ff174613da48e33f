"""Rows that count more than others: in training, in every score, and to users."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from amtl.cli import main
from amtl.data.registry import Source
from amtl.data.weights import weighed
from amtl.errors import UserError
from amtl.run import contenders, learner, searching
from amtl.run.config import TrainConfig
from amtl.run.folders import load_inputs, load_trained, pack_run
from amtl.run.learner import Learner
from amtl.run.metrics import auc, auc_error, calming, log_loss, score, score_error
from amtl.run.model import field_evidence
from amtl.run.preparation import prepare
from amtl.run.report import group_results, load_metrics
from amtl.run.teaching import Teacher
from amtl.run.training import start
from sklearn.metrics import roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits

ROWS = 800


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, ROWS), rng.integers(0, 30, ROWS)
    effect = rng.normal(size=40)[user] + rng.normal(size=30)[item]
    return pl.DataFrame(
        {
            "user": [f"u{i}" for i in user],
            "item": [f"i{i}" for i in item],
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-effect))).astype(int),
            "w": rng.choice([0.0, 0.5, 1.0, 4.0], ROWS),
        }
    )


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "weight": "w",
        "dim": 4,
        "batch_size": 128,
        "epochs": 2,
        "validations": 2,
        "hidden": [8],
        "race": False,
    }
    return TrainConfig(**{**base, **changes})


def of(frame: pl.DataFrame) -> Source:
    return Source("made here", frame, "label")


def told(rows: int, seed: int = 0, ties: bool = False):
    """What two models say of some rows, their labels and weights."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(rows) % 3 == 0).float()
    first = torch.randn(rows, generator=generator) + labels
    second = 0.6 * first + 0.4 * torch.randn(rows, generator=generator)
    if ties:
        first, second = (2 * first).round() / 2, (2 * second).round() / 2
    weights = torch.randint(0, 4, (rows,), generator=generator).float()
    return first, second, labels, weights


@pytest.mark.parametrize("ties", [False, True])
def test_a_row_of_weight_2_is_two_rows(ties):
    said, other, labels, weights = told(400, ties=ties)
    again = weights.long()
    many = [each.repeat_interleave(again) for each in (said, other, labels)]
    assert auc(said, labels, weights) == auc(many[0], many[2])
    assert auc(said, labels, weights) == pytest.approx(
        roc_auc_score(labels, said, sample_weight=weights), abs=1e-12
    )
    loss = log_loss(said, labels, weights)
    assert loss == pytest.approx(log_loss(many[0], many[2]), rel=1e-12)
    assert score(0.7, loss, labels, weights) == pytest.approx(score(0.7, loss, many[2]), rel=1e-12)
    sure = calming(4 * said, labels, weights)
    assert 0.1 < sure < 1
    assert sure == pytest.approx(calming(4 * many[0], many[2]), rel=1e-8)


def test_rows_of_no_weight_are_not_there():
    said, other, labels, weights = told(400)
    there = weights > 0
    rest = [each[there] for each in (said, other, labels, weights)]
    for found, expected in (
        (auc_error(said, labels, weights), auc_error(rest[0], *rest[2:])),
        (score_error(said, other, labels, weights), score_error(*rest)),
        (calming(4 * said, labels, weights), calming(4 * rest[0], *rest[2:])),
    ):
        assert found == pytest.approx(expected, rel=1e-12)
    # Nor are they of a class that has fewer than two others.
    alone = torch.where((labels > 0.5) & (torch.arange(400) > 0), 0.0, 1.0)
    assert math.isnan(auc_error(said, labels, alone))
    for none in (1 - labels, labels):
        assert math.isnan(auc(said, labels, none)) and math.isnan(auc_error(said, labels, none))
        assert math.isnan(score_error(said, other, labels, none))


@pytest.mark.parametrize("weight", [1.0, 0.25, 1000.0])
def test_rows_that_all_weigh_the_same_are_as_without_weights(weight):
    said, other, labels, _ = told(200)
    weights = torch.full((200,), weight)
    for found, expected in (
        (auc(said, labels, weights), auc(said, labels)),
        (auc_error(said, labels, weights), auc_error(said, labels)),
        (log_loss(said, labels, weights), log_loss(said, labels)),
        (score(0.7, 0.5, labels, weights), score(0.7, 0.5, labels)),
        (score_error(said, other, labels, weights), score_error(said, other, labels)),
        (calming(4 * said, labels, weights), calming(4 * said, labels)),
    ):
        assert found == pytest.approx(expected, rel=1e-10)


def test_few_rows_are_few_whatever_they_weigh():
    """In perfect order, they are no proof of certainty."""
    labels = (torch.arange(40) < 12).float()
    logits = 20 * (2 * labels - 1)
    expected = calming(logits, labels)
    assert calming(logits, labels, torch.full((40,), 100.0)) == pytest.approx(expected)
    assert calming(logits, labels, torch.ones(40)) == pytest.approx(expected) and expected < 0.5


@pytest.mark.parametrize("sure", [0.7, 3.0])
def test_errors_are_those_of_other_samples(sure):
    """Weights that go with scores: an error that took them for none would be a third less."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.arange(240) < 80).float()
    found = []
    for _ in range(700):
        common, noise, other = torch.randn(3, 240, generator=generator)
        told = labels, torch.exp(0.5 * common + 0.8 * other)
        models = common + labels - 1, sure * (common + labels) + 0.5 * noise
        # In the unit that the weights have in the mean: that theirs is another is not in the error.
        scores = [score(auc(x, *told), log_loss(x, *told), labels) for x in models]
        errors = auc_error(models[0], *told), score_error(*models, *told)
        found.append((auc(models[0], *told), scores[0] - scores[1], *errors))
    area, lead, area_error, lead_error = np.array(found).T
    # A standard deviation of 700 is off by 2.7 %.
    assert np.sqrt((area_error**2).mean()) == pytest.approx(area.std(), rel=0.09)
    assert np.sqrt((lead_error**2).mean()) == pytest.approx(lead.std(), rel=0.09)


def test_one_row_that_outweighs_all_others_has_no_error():
    said, _, labels, _ = told(50)
    weights = torch.full((50,), 1e-30)
    weights[:2] = 1.0
    assert math.isnan(auc_error(said, labels, weights))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0, 4], [0.25, 0, 1]),
        ([0.5, 2.0, 1.0], [0.25, 1, 0.5]),
        ([True, False, True], [1, 0, 1]),
        (["0,5", "1,5", "3"], [1 / 6, 0.5, 1]),
        ([" 1.5", "3 ", "0"], [0.5, 1, 0]),
        ([1e308, 1e308, 0.5e308], [1, 1, 0.5]),
    ],
)
def test_numbers_are_weights_however_they_are_written(values, expected):
    rest, weights = weighed(pl.DataFrame({"w": values, "x": [1, 2, 3]}), "w")
    assert rest.columns == ["x"] and weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, -2.0, -1.0], "weight 'w' is below 0 in 2 rows: .* or leave --weight out"),
        ([1.0, None, 1.0], "weight 'w' is missing in 1 row: each row needs a number of 0 or more"),
        ([1.0, math.nan, None], "missing in 2 rows"),
        (["1", "NA", "2"], "missing in 1 row:"),
        ([None, None, None], "missing in every row"),
        ([1.0, math.inf, 1.0], "infinite in 1 row:"),
        ([0, 0, 0], "weight 'w' is 0 in every row"),
        (["1", "much", "2"], "holds String values such as 'much', where numbers of 0 or more"),
        (["1,234", "2", "3"], "holds String values such as '1,234'.* with a decimal point"),
        (["2017-01-31", "2017-02-01", "2017-02-02"], "holds String values"),
        ([[1], [2], [3]], "holds List"),
    ],
)
def test_what_is_no_weight_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        weighed(pl.DataFrame({"w": values, "x": [1, 2, 3]}, strict=False), "w")


def test_a_column_that_is_missing_is_one_only_to_train():
    frame = pl.DataFrame({"x": [1, 2]})
    with pytest.raises(UserError, match="no column 'w'"):
        weighed(frame, "w")
    assert weighed(frame, "w", trains=False)[1] is None and weighed(frame, None)[1] is None
    with pytest.raises(UserError, match="leave the column out"):
        weighed(pl.DataFrame({"w": [-1, 2]}), "w", trains=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": "label"}, "is the label"),
        ({"fields": ["user", "w"]}, "--fields names 'w'"),
        ({"numeric": {"w": "bucket"}}, "--numeric names 'w'"),
        ({"separators": {"w": "|"}}, "--multi names 'w'"),
        ({"split": "order:w"}, "--split order:w"),
        ({"negatives": "user:item"}, "no meaning with --negatives"),
    ],
)
def test_settings_that_contradict_weights_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        settings(**changes)


def test_settings_of_before_have_no_weight():
    before = settings().to_dict()
    del before["weight"]
    assert TrainConfig.from_dict(before).weight is None


def test_weights_are_1_in_the_mean_of_training_rows_and_no_field(frame):
    # As seconds since 1970 by day and night, of which others would take the hour.
    hours = pl.Series((1_500_000_000 + 3600 * np.arange(ROWS)) * 1.0)
    odd = frame.with_columns(w=hours, label=((hours // 3600) % 24 > 12).cast(pl.Int64))
    as_field = prepare(settings(weight=None), of(odd)).encoder
    assert {"w", "w.hour"} & {spec.name for spec in as_field.decisions}
    task = prepare(settings(), of(odd))
    assert {spec.column for spec in task.encoder.decisions} == {"user", "item"}
    assert float(task.train.weights.mean()) == pytest.approx(1, abs=1e-5)
    whole = torch.cat([part.weights for part in (task.train, task.val, task.test)])
    assert len(whole) == ROWS
    ratio = float(hours.max() / hours.min())
    assert float(whole.max() / whole.min()) == pytest.approx(ratio, rel=1e-6)
    assert "'w' weighs them" in task.notes[0]
    assert prepare(settings(weight=None), of(odd)).train.weights is None


def test_columns_that_a_set_takes_by_itself_leave_the_weights_out(frame):
    named = replace(of(frame), fields=("user", "w"))
    assert prepare(settings(), named).encoder.names == ["user"]


@pytest.mark.parametrize("bags", [False, True])
def test_weights_stay_with_their_rows(frame, bags):
    known = frame.with_columns(x=pl.int_range(1, ROWS + 1), w=pl.int_range(1, ROWS + 1))
    if bags:
        known = known.with_columns(item=pl.concat_list("item", "user"))
    config = settings(fields=["item", "x"], numeric={"x": "standardise"})
    task = prepare(config, of(known))
    for part in (task.train, task.val, task.test):
        batch = part.batch(torch.arange(len(part) - 1, 2, -2))
        assert len(batch.weights) == len(batch.labels) == (len(part) - 2) // 2
        both = torch.stack([batch.weights, batch.dense[:, 0]])
        assert float(torch.corrcoef(both)[0, 1]) == pytest.approx(1, abs=1e-5)


def test_splits_in_which_nothing_weighs_anything_are_refused(frame):
    part = pl.Series(["train", "valid", "test", "train"] * (ROWS // 4))
    for name in ("train", "valid", "test"):
        empty = frame.with_columns(part=part, w=(part != name).cast(pl.Float64))
        long = {"train": "training", "valid": "validation"}.get(name, name)
        with pytest.raises(UserError, match=f"all {(part == name).sum()} rows of the {long} split"):
            prepare(settings(split="column:part"), of(empty))
    one = frame.with_columns(part=part, w=((part != "valid") | (frame["label"] == 1)).cast(pl.Int8))
    with pytest.raises(UserError, match=r"validation split has \d+ rows, all of them positive"):
        prepare(settings(split="column:part"), of(one))


def test_rows_that_weigh_nothing_are_not_counted_as_held_out(frame):
    trainer = start(settings(), source=of(frame))
    val = trainer.task.val
    there = val.weights > 0
    assert 0 < int(there.sum()) < len(val)
    positive = int(val.labels[there].sum())
    assert trainer.held_out["val"] == {"rows": int(there.sum()), "positive": positive}


def test_copies_are_looked_at_without_weights(frame):
    rng = np.random.default_rng(1)
    half = frame[: ROWS // 2].with_columns(price=pl.Series(rng.random(ROWS // 2)))
    twice = pl.concat([half, half.with_columns(w=pl.col("w") + 1)])
    notes = prepare(settings(), of(twice)).notes
    assert any(f"{ROWS // 2} rows are copies" in note for note in notes)


def test_training_minimises_the_weighted_mean(frame):
    learner = Learner(settings(method="fixed"), prepare(settings(), of(frame)))
    task, samples = learner.task, learner._samples()
    batch = task.train.batch(samples)
    with torch.no_grad():
        losses = binary_cross_entropy_with_logits(
            learner.model(batch), batch.labels, reduction="none"
        )
    loss, _ = learner.step()
    assert loss == pytest.approx(float((task.train.weights[samples] * losses).mean()), rel=1e-6)
    assert loss != pytest.approx(float(losses.mean()), rel=1e-3)


def timeless(found):
    """A run's record without what differs from time to time, and without last digits of sums."""
    if isinstance(found, dict):
        skip = ("seconds", "step_ms_median", "crc32", "packed_bytes", "vocabulary_bytes")
        return {name: timeless(value) for name, value in found.items() if name not in skip}
    if isinstance(found, float):
        return float(f"{found:.9g}")
    return [timeless(each) for each in found] if isinstance(found, list) else found


@pytest.mark.parametrize(
    "changes",
    [
        {"race": True, "epochs": 2, "compare": True},
        {"method": "fixed", "distillation": 0.5},
        {"method": "autodim", "budget": 0.6},
        {"method": "optembed", "budget": 0.6},
    ],
    ids=["race", "teacher", "autodim", "optembed"],
)
def test_labels_of_rows_that_weigh_nothing_change_nothing(frame, changes):
    """Not in training, not in what is chosen, nor in any score: all of a run's record."""
    config = settings(fields=["user", "item"], copies_together=False, **changes)
    nothing = pl.col("w") == 0
    flipped = frame.with_columns(
        label=pl.when(nothing).then(1 - pl.col("label")).otherwise("label")
    )
    # Means over none of the rows would be alike, too: rows that weigh anything do change it.
    others = frame.with_columns(
        label=pl.when(pl.col("w") == 4).then(1 - pl.col("label")).otherwise("label")
    )
    found, same, other = (
        timeless(start(config, source=of(each)).run()) for each in (frame, flipped, others)
    )
    assert found["weight"] == "w"
    assert found == same
    assert found["test_auc"] != other["test_auc"]


def test_what_fields_are_worth_goes_by_rows_that_weigh_anything(frame):
    task = prepare(settings(), of(frame))
    learner = Learner(settings(method="fixed", table_lr=0.1), task)
    while learner.steps < 10:
        learner.step()
    val = replace(task.val, weights=(task.val.weights > 0).float())
    there = task.encoder.part(val, torch.nonzero(val.weights).view(-1))
    expected = field_evidence(learner.model, replace(there, weights=None))
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(field_evidence(learner.model, val), expected, rtol=1e-4, atol=1e-9)
    halves = replace(val, weights=val.weights / 2)
    torch.testing.assert_close(
        field_evidence(learner.model, halves), expected, rtol=1e-4, atol=1e-9
    )


def test_a_teacher_is_the_one_that_validates_best_by_weights(frame):
    """One is right about rows that weigh anything, the other about the many that weigh nothing."""
    many = frame.with_columns(w=pl.when(pl.int_range(ROWS) % 4 == 0).then(1.0).otherwise(0.0))
    task = prepare(settings(), of(many))
    right, wrong = (
        (2 * part.labels - 1) * (2 * (part.weights > 0) - 1)
        for part in (task.val, replace(task.val, weights=1 - task.val.weights.clamp(max=1)))
    )

    class Says:
        def __init__(self, said):
            self.task, self.said = task, said

        def says(self):
            return self.said

    train = torch.full((len(task.train),), 3.0)
    teacher = Teacher(lambda learner: train if learner.said is right else -train)
    for said in (wrong, right):
        teacher.add(Says(said))
    assert torch.equal(teacher.labels(), torch.sigmoid(train))


def test_what_compares_models_weighs_rows(frame, monkeypatch):
    """Also where that decides and is not on record."""
    weighed = []

    def listen(module, name, real):
        def heard(*given):
            weighed.append((module, len(given) == 4 and given[-1] is not None))
            return real(*given)

        monkeypatch.setattr(module, name, heard)

    for module in (contenders, learner):
        listen(module, "score_error", score_error)
    listen(searching, "score", score)
    for changes in ({"race": True, "epochs": 1}, {"method": "optembed", "budget": 0.6}):
        start(settings(**changes), source=of(frame)).run()
    assert {module for module, _ in weighed} == {contenders, learner, searching}
    assert all(with_weights for _, with_weights in weighed)


def test_weights_that_are_all_the_same_give_the_run_without(frame):
    # The size of the loss matters to SGD, as it does not to Adagrad and Adam.
    config = settings(fields=["user", "item"], method="fixed", table_optimizer="sgd", table_lr=1.0)
    runs = [
        start(replace(config, weight=weight), source=of(frame.with_columns(w=pl.lit(3)))).run()
        for weight in ("w", None)
    ]
    for name in ("test_auc", "test_auc_error", "test_logloss", "val_auc", "val_logloss"):
        assert runs[0][name] == pytest.approx(runs[1][name], rel=1e-5)
    assert (runs[0]["weight"], runs[1]["weight"]) == ("w", None)


def test_runs_of_before_are_compared_with_those_that_weigh_nothing(frame, tmp_path):
    for seed in range(2):
        config = settings(weight=None, method="fixed", epochs=1, seed=seed)
        start(config, tmp_path / str(seed), source=of(frame)).run()
    before, now = load_metrics([tmp_path / "0", tmp_path / "1"])
    del before["weight"], before["config"]["weight"]
    assert len(group_results([before, now])) == 1


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in args])
    return int(stop.value.code or 0)


def text(capsys) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_runs_and_packed_files_weigh_rows_where_a_file_has_weights(frame, tmp_path, capsys):
    folder, data, bare = tmp_path / "run", tmp_path / "all.csv", tmp_path / "bare.csv"
    frame.write_csv(data)
    frame.drop("w").write_csv(bare)
    train = ["train", data, "--label", "label", "--weight", "w"]
    assert run(*train, "--dry-run") == 0
    assert "rows count as 'w' weighs them" in text(capsys)
    fast = ["--no-race", "--dim", 4, "--epochs", 1, "--batch-size", 128, "--out", folder]
    assert run(*train, *fast) == 0
    told = text(capsys)
    assert "rows count as 'w' weighs them" in told and "weighted by 'w', as all scores are" in told
    assert load_inputs(folder)[0].weight == "w"
    packed = tmp_path / "packed.safetensors"
    pack_run(folder, packed)
    trained = load_trained(packed)
    labels = torch.tensor(frame["label"].to_list()).float()
    logits = trained.logits(frame)
    assert torch.equal(trained.logits(frame.drop("w")), logits)
    weights = torch.tensor(frame["w"].to_list()).float()
    found = trained.evaluate(trained.encoder.transform(frame, labels, weights))
    there = weights > 0
    assert found["rows"] == int(there.sum()) and found["positive"] == int(labels[there].sum())
    assert found["auc"] == auc(logits, labels, weights)
    assert found["auc_error"] == auc_error(logits, labels, weights)
    assert found["logloss"] == log_loss(logits, labels, weights)
    assert found["positive_rate"] == pytest.approx(float((labels * weights).sum() / weights.sum()))
    bare_area = auc(logits, labels)
    assert abs(bare_area - found["auc"]) > 1e-3
    for model in (folder, packed):
        assert run("evaluate", model, data) == 0
        told = text(capsys)
        assert f"800 rows, weighted by 'w' AUC {found['auc']:.4f}" in told
        assert f"positive {found['positive_rate']:.1%}" in told and "no column" not in told
        assert run("evaluate", model, bare) == 0
        told = text(capsys)
        assert f"800 rows AUC {bare_area:.4f}" in told
        assert "has no column 'w', which weighs rows in training: all rows weigh the same" in told
        assert run("evaluate", model) == 0
        told = text(capsys)
        metrics = load_trained(folder).metrics
        assert f"80 rows, weighted by 'w' AUC {metrics['test_auc']:.4f}" in told
        assert run("predict", model, bare, "-o", tmp_path / "said.csv") == 0
        capsys.readouterr()
        said = pl.read_csv(tmp_path / "said.csv")["probability"].to_numpy()
        np.testing.assert_allclose(said, torch.sigmoid(logits), rtol=1e-5)
    assert run("train", data, "--label", "label", "--weight", "v", "--resume", "--out", folder) == 0
    assert "not applied, since the run has other values: --weight" in text(capsys)
    assert run("report", folder, "-o", tmp_path / "report.html") == 0
    assert "positive, weighted by &#x27;w&#x27;" in (tmp_path / "report.html").read_text()
