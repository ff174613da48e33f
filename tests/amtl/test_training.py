from __future__ import annotations

import io
import itertools
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from amtl.data.registry import Source, default_batch_size
from amtl.data.splits import split_rows
from amtl.errors import UserError
from amtl.run import methods
from amtl.run.config import OWN, TrainConfig
from amtl.run.done import Interrupted
from amtl.run.folders import load_run, load_trained, pack_run
from amtl.run.learner import Learner
from amtl.run.metrics import calming, score
from amtl.run.model import predict
from amtl.run.preparation import prepare
from amtl.run.progress import Bars, Silent
from amtl.run.trained import size_table
from amtl.run.training import start
from amtl.store.files import read_json
from rich.console import Console

ROWS = 1200


@pytest.fixture(scope="module")
def source() -> Source:
    rng = np.random.default_rng(0)
    user, item = rng.zipf(1.4, ROWS) % 60, rng.zipf(1.4, ROWS) % 40
    taste = rng.normal(size=(60, 3))
    kind = rng.normal(size=(40, 3))
    logit = (taste[user] * kind[item]).sum(1)
    frame = pl.DataFrame(
        {
            "user": user,
            "item": [f"i{i}" for i in item],
            "tags": [["a|b", "b|c", "c", ""][i] for i in rng.integers(0, 4, ROWS)],
            "price": rng.normal(size=ROWS),
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )
    return Source("made here", frame, "label")


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "dim": 8,
        "budget": 0.5,
        "batch_size": 200,
        "epochs": 5,
        "validations": 2,
        "patience": 4,
        "race": False,
        "hidden": [8],
        "table_lr": 0.05,
        "seed": 3,
    }
    return TrainConfig(**{**base, **changes})


def flat(state):
    """Everything in a nested state as comparable leaves."""
    if isinstance(state, dict):
        for key in sorted(state, key=str):
            if "seconds" not in str(key):
                yield from ((f"{key}.{k}", v) for k, v in flat(state[key]))
    elif isinstance(state, (list, tuple)):
        for i, value in enumerate(state):
            yield from ((f"{i}.{k}", v) for k, v in flat(value))
    else:
        yield "", state


def assert_same(first, second):
    a, b = dict(flat(first)), dict(flat(second))
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key


class Drawing(Silent):
    """Draws from the global generator, as dropout would."""

    def step(self, epochs, loss, samples, steps):
        torch.rand(1)


class Recorder(Silent):
    def __init__(self):
        self.notes, self.records, self.steps = [], [], 0

    def note(self, text):
        self.notes.append(text)

    def validation(self, record):
        self.records.append(record)

    def step(self, epochs, loss, samples, steps):
        self.steps += 1


@pytest.mark.parametrize("method", OWN)
def test_a_run_learns_and_records(source, tmp_path, method):
    recorder = Recorder()
    config = settings(method=method, epochs=8)
    metrics = start(config, tmp_path / "run", observer=recorder, source=source).run()
    assert metrics["test_auc"] > 0.55
    assert recorder.steps == 5 * metrics["epochs_run"]
    history = metrics["history"]
    assert recorder.records == history
    # Five steps an epoch, two validations: after the third step and after the last.
    assert [r["step"] for r in history][:4] == [3, 5, 8, 10]
    assert history[0]["loss"] > history[-1]["loss"]
    numbers = sum(metrics["bytes_by_field"].values())
    assert numbers + metrics["step_bytes"] == metrics["stored_bytes"]
    assert (metrics["step_bytes"] > 0) == (metrics["bits"] < 32)
    assert metrics["dense_bytes"] == metrics["rows"] * 8 * 4
    assert read_json(tmp_path / "run" / "metrics.json") == json.loads(json.dumps(metrics))
    if method == "fixed":
        assert {r["phase"] for r in history} == {""}
        assert metrics["stored_fraction"] == 1
    else:
        assert {r["phase"] for r in history} == {"frozen"}, "their sizes are settled"
        assert metrics["stored_fraction"] <= 0.5
        assert all(r["stored_bytes"] <= metrics["dense_bytes"] / 2 for r in history)


LEARNED = {"parametrization": "ordinal"}


def overfitting(**changes):
    """Rates at which validation soon gets worse."""
    return settings(**{"epochs": 40, "patience": 3, "table_lr": 0.3, "lr": 0.05, **changes})


@pytest.mark.parametrize("method", OWN)
def test_the_best_moment_is_kept_whatever_the_phase(source, tmp_path, method):
    metrics = start(overfitting(method=method), tmp_path, source=source).run()
    best = max(metrics["history"], key=lambda r: r["score"])
    assert metrics["best_epoch"] == best["epoch"]
    # Up to the rounding of the MLP.
    assert metrics["val_score"] == pytest.approx(best["score"], abs=1e-3)
    assert metrics["val_score"] >= best["score"] - 5e-4
    assert metrics["best_epoch"] < metrics["epochs_run"]
    trained = load_run(tmp_path)
    labels = torch.tensor(source.frame["label"].to_list(), dtype=torch.float32)
    rows = split_rows(source.frame, "random")[1]
    val = trained.encoder.transform(source.frame[rows.numpy()], labels[rows])
    assert trained.evaluate(val)["auc"] == metrics["val_auc"]
    assert trained.evaluate(val)["logloss"] == metrics["val_logloss"]


def test_without_progress_training_turns_back_freezes_slows_down_and_ends(source):
    trainer = start(overfitting(table_options=LEARNED), source=source)
    metrics = trainer.run()
    history = metrics["history"]
    assert metrics["epochs_run"] < 40
    assert [r["phase"] == "frozen" for r in history] == [r["stage"] > 0 for r in history]
    assert sorted({r["stage"] for r in history}) == [0, 1, 2]
    for stage, patience in ((0, 3), (1, 2), (2, 2)):
        records = [r for r in history if r["stage"] == stage]
        assert [r["best"] for r in records[-patience:]] == [False] * patience
    group = trainer.learner.table_optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.3 * 0.01)


@pytest.mark.parametrize(
    ("decay", "found", "stages"),
    [
        (0.0, [0.9, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3], [0] * 5 + [1] * 2 + [2] * 2),
        (1e-4, [0.9, *[0.1] * 8, 0.2, 0.3], [0] * 9 + [1] * 6 + [2] * 5),
        (1e-4, [0.9], [0] * 9 + [1] * 5 + [2] * 5),
    ],
)
def test_with_weight_decay_a_stage_is_held_against_itself(
    source, monkeypatch, decay, found, stages
):
    """A peak that it went back to may be of the steps since the last pass of decay."""
    scores, said = iter(found + [0.05] * 100), {}

    def scripted(self) -> tuple[float, float]:
        # The numbers as they are say what their average does.
        if self.steps not in said:
            said[self.steps] = next(scores)
        return said[self.steps], 0.7

    monkeypatch.setattr(Learner, "scores", scripted)
    # None of them is far behind.
    monkeypatch.setattr("amtl.run.learner._FAR", 1.0)
    config = overfitting(method="fixed", embedding_decay=decay, patience=4)
    learner = start(config, source=source).learner
    while not learner.finished:
        learner.step()
    assert [record["stage"] for record in learner.history] == stages


@pytest.mark.parametrize(
    ("found", "length"),
    [
        # It comes back, a tenth of what it lost and more with every validation.
        ([0.88, 0.60, 0.65, 0.70, 0.74, 0.78, 0.82, 0.85, 0.87], 9 + 4),
        # It swings where it is.
        ([0.88, 0.60, 0.61, 0.60, 0.61, 0.60, 0.61], 5),
        # It creeps, and the 120 validations that are left would bring it half of the way.
        ([0.88, 0.60, *(0.64 + 0.001 * i for i in range(20))], 7),
        # Three times as fast it would arrive.
        ([0.88, 0.60, *(0.64 + 0.003 * i for i in range(20))], 22 + 4),
    ],
)
def test_a_stage_at_smaller_rates_has_time_to_come_back(source, monkeypatch, found, length):
    """With decay all may be lost first; what would come back too late ends."""
    scores = iter([0.9, *[0.1] * 8, *found, *[0.0] * 1000])
    said: dict[int, float] = {}

    def scripted(self) -> tuple[float, float]:
        if self.steps not in said:
            said[self.steps] = next(scores)
        return said[self.steps], 0.7

    monkeypatch.setattr(Learner, "scores", scripted)
    config = overfitting(method="fixed", embedding_decay=1e-4, patience=4, epochs=70)
    learner = start(config, source=source).learner
    while learner.stage < 2:
        learner.step()
    assert [record["stage"] for record in learner.history].count(1) == length


@pytest.mark.parametrize("epochs", [1, 10])
@pytest.mark.parametrize("decay", [0.0, 1e-4])
def test_with_weight_decay_the_last_epochs_have_smaller_rates(source, monkeypatch, epochs, decay):
    """Of a model that gets better all the time, too."""
    rising = iter(range(1000))
    monkeypatch.setattr(Learner, "scores", lambda self: (0.5 + next(rising) * 1e-3, 0.7))
    config = settings(method="fixed", epochs=epochs, validations=20, batch_size=8, race=False)
    learner = start(replace(config, embedding_decay=decay), source=source).learner
    stages = []
    while not learner.finished:
        learner.step()
        stages.append((learner.epochs / epochs, learner.stage))
    for share, stage in stages:
        wanted = 0 if share < 0.79 or not decay else 1 if 0.86 < share < 0.89 else None
        wanted = 2 if decay and share > 0.96 else wanted
        assert wanted in (None, stage)
    assert len(learner.history) == 20 * epochs


def test_a_turn_starts_from_the_best_model(source):
    learner = start(overfitting(table_options=LEARNED), source=source).learner
    while learner.stage == 0:
        learner.step()
    rows = torch.arange(60)
    other = start(overfitting(table_options=LEARNED), source=source).learner
    while other.steps < learner.best["record"]["step"]:
        other.step()
    learner.table.eval(), other.table.eval()

    assert torch.equal(learner.table(rows), other.table(rows))


def test_freeze_at_counts_steps_and_overrules_validation(source):
    metrics = start(overfitting(method="amtl", freeze_at=37), source=source).run()
    assert [r["phase"] for r in metrics["history"] if r["step"] <= 37][-1] == "search"
    assert {r["phase"] for r in metrics["history"] if r["step"] > 37} == {"frozen"}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_epoch_rate_loss_and_auc(source, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # of a dumb one rich draws no bars
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    config = settings(epochs=12, patience=1, table_options=LEARNED)
    start(config, observer=Bars(console), source=source).run()
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    for text in ("epoch  3.00", "loss 0.", "val AUC 0.", "log loss 0.", "search", "*"):
        assert text in shown
    bar = re.search(r"epoch \d+\.\d .*\d+k rows/s ≤ [-\d:]+ AUC 0\.\d{4}", shown)
    assert (bar is not None) == terminal


def test_a_log_says_how_far_a_long_run_is(monkeypatch):
    clock = itertools.count(0.0, 25.0)
    monkeypatch.setattr("amtl.run.progress.time.perf_counter", lambda: next(clock))
    console = Console(file=io.StringIO(), width=80)
    bars = Bars(console)
    bars.begin("choosing among 6 settings", 10, 0)
    for _ in range(8):
        bars.step(0.1, 0.5, 5000, 1)
    # A step takes 25 seconds: a line each time more than a minute has passed.
    assert console.file.getvalue().splitlines() == [
        "  choosing among 6 settings ...",
        "  choosing among 6 settings  step 3 of 10, 0k rows/s, at most 3 min left, val AUC –",
        "  choosing among 6 settings  step 6 of 10, 0k rows/s, at most 2 min left, val AUC –",
    ]


@pytest.mark.parametrize("optimizer", methods.TABLE_OPTIMIZERS)
def test_every_table_optimizer_passes_the_freeze(source, optimizer):
    config = settings(method="rule", table_optimizer=optimizer, epochs=3)
    metrics = start(config, source=source).run()
    assert np.isfinite(metrics["test_logloss"])


@pytest.mark.parametrize("optimizer", methods.TABLE_OPTIMIZERS)
def test_the_backward_updates_the_table_as_a_step_would(source, monkeypatch, optimizer):
    changes = {"table_optimizer": optimizer, "method": "amtl", "freeze_at": 11}
    config = settings(**changes, table_options=LEARNED)
    trainer = start(config, source=source)
    fused = trainer.run()
    learner = trainer.learner
    # Also after turning back to the best model, which makes optimizers anew.
    assert learner.table.fused_optimizer is learner.table_optimizer
    samples, before = torch.arange(50), learner.table.dense_weight()
    learner.model.train()
    learner.model(learner.task.train.batch(samples)).sum().backward()
    assert not torch.equal(learner.table.dense_weight(), before)
    monkeypatch.setattr(methods, "fuse", lambda table, optimizer: None)
    plain = start(config, source=source)
    stepped = plain.run()
    assert plain.learner.table.fused_optimizer is None
    for key in ("test_auc", "test_logloss", "val_auc", "val_logloss"):
        assert fused[key] == pytest.approx(stepped[key], abs=1e-4), key
    assert fused["stored_bytes"] == stepped["stored_bytes"]


def test_only_touched_rows_change(source):
    options = {**LEARNED, "min_dim": 1}
    trainer = start(settings(method="amtl", table_options=options), source=source)
    weight = methods.table_parameters(trainer.table)[0]
    before = weight.detach().clone()
    samples = torch.arange(50)
    touched = trainer.task.train.batch(samples).indices.unique()
    trainer.learner._train_step(samples)
    changed = torch.nonzero((weight.detach() != before).any(1)).view(-1)
    assert set(changed.tolist()) <= set(touched.tolist())
    assert len(changed)
    assert weight.grad is None


OVERFIT = {"epochs": 40, "patience": 2, "table_lr": 0.3, "lr": 0.05, "table_options": LEARNED}


@pytest.mark.parametrize(
    ("method", "stops", "changes"),
    [
        ("fixed", [3], {}),
        ("rule", [10, 11], {}),
        ("amtl", [4, 10, 13], {"freeze_at": 11}),
        ("amtl", [4, 13, 31], OVERFIT),
        ("amtl", [4, 13], {"embedding_dropout": 0.3}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(source, tmp_path, method, stops, changes):
    config = settings(method=method, **changes)
    whole = start(config, tmp_path / "whole", source=source, observer=Drawing())
    expected = whole.run()
    final = whole.state()
    out = tmp_path / "parts"
    trainer = start(
        config, out, source=source, observer=Drawing(), stop=lambda steps: steps >= stops[0]
    )
    for next_stop in [*stops[1:], None]:
        with pytest.raises(Interrupted):
            trainer.run()
        trainer = start(
            None,
            out,
            resume=True,
            source=source,
            observer=Drawing(),
            stop=lambda steps, at=next_stop: at is not None and steps >= at,
        )
    metrics = trainer.run()
    assert_same(final, trainer.state())
    for key in ("test_auc", "test_logloss", "val_auc", "best_epoch", "stored_bytes", "sizes"):
        assert metrics[key] == expected[key], key


def test_a_finished_run_resumes_to_its_own_result(source, tmp_path):
    expected = start(settings(), tmp_path, source=source).run()
    again = start(None, tmp_path, resume=True, source=source).run()
    assert again["test_auc"] == expected["test_auc"]


def test_a_model_is_no_surer_than_validation_has_it(source):
    """Its order stays, and so does what is on record of it, by which it is compared with others."""
    trainer = start(settings(epochs=8), source=source)
    trainer.run()
    learner, split = trainer.learner, trainer.task.val
    says = predict(learner.model, split)
    area, loss = learner.scores(3 * says)
    scores = {"val_auc": area, "val_logloss": loss, "score": score(area, loss, split.labels)}
    learner.best["record"].update(scores)
    record = dict(learner.best["record"])
    with torch.no_grad():
        for parameter in learner.model.mlp[-1].parameters():
            parameter.mul_(3)
    learner.said = None
    assert learner.calm() and learner.best["record"] == record
    factor = calming(3 * says, split.labels)
    assert 0.1 < factor < 0.6
    torch.testing.assert_close(predict(learner.model, split), 3 * factor * says)
    assert learner.round_dense()
    for name, found in scores.items():
        assert learner.best["record"][name] == pytest.approx(found, abs=0.01)
    assert calming(predict(learner.model, split), split.labels) == pytest.approx(1, abs=0.02)


def test_resuming_without_a_run_is_a_user_error(source, tmp_path):
    with pytest.raises(UserError, match="without --resume begins it"):
        start(None, tmp_path, resume=True, source=source)


def test_seeds_repeat_and_differ(source):
    runs = [start(settings(seed=s, epochs=2), source=source).run() for s in (1, 1, 2)]
    assert runs[0]["test_auc"] == runs[1]["test_auc"]
    assert runs[0]["test_auc"] != runs[2]["test_auc"]


def test_dropout_changes_training_and_repeats(source):
    shares = (0.0, 0.4, 0.4)
    runs = [start(settings(epochs=2, embedding_dropout=s), source=source).run() for s in shares]
    assert runs[1]["test_auc"] == runs[2]["test_auc"]
    assert runs[0]["test_auc"] != runs[1]["test_auc"]


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("bits", ["auto", "32"])
@pytest.mark.parametrize("fields", [["user", "item"], ["user", "item", "tags", "price"]])
def test_packed_models_predict_the_same(source, tmp_path, method, fields, bits):
    config = settings(
        method=method, fields=fields, default_numeric="standardise", epochs=3, bits=bits
    )
    metrics = start(config, tmp_path / "run", source=source).run()
    trained = load_run(tmp_path / "run")
    packed = pack_run(tmp_path / "run", tmp_path / "model.safetensors")
    expected = trained.probabilities(source.frame)
    if method == "fixed":
        torch.testing.assert_close(packed.probabilities(source.frame), expected)
    else:
        assert torch.equal(packed.probabilities(source.frame), expected)
    assert methods.stored_bytes(packed.model.table) == metrics["stored_bytes"]
    assert packed.metrics["test_auc"] == metrics["test_auc"]
    rows = split_rows(source.frame, "random")[2]
    labels = torch.tensor(source.frame["label"].to_list(), dtype=torch.float32)
    test = trained.encoder.transform(source.frame[rows.numpy()], labels[rows])
    assert trained.evaluate(test)["auc"] == metrics["test_auc"]
    numbers = sum(e["bytes"] for e in size_table(packed))
    assert numbers + metrics["step_bytes"] == metrics["stored_bytes"]
    result = packed.evaluate(packed.encoder.transform(source.frame, labels))
    assert result["rows"] == ROWS
    if metrics["bits"] < 32:
        with pytest.raises(UserError, match="leave the type of the embeddings out"):
            pack_run(tmp_path / "run", tmp_path / "half.safetensors", torch.float16)
        return
    half = pack_run(tmp_path / "run", tmp_path / "half.safetensors", torch.float16)
    assert methods.stored_bytes(half.model.table) * 2 == metrics["stored_bytes"]
    torch.testing.assert_close(half.probabilities(source.frame), expected, rtol=0, atol=5e-3)


def test_damaged_packed_files_are_refused(source, tmp_path):
    start(settings(epochs=3), tmp_path / "run", source=source).run()
    path = tmp_path / "model.safetensors"
    pack_run(tmp_path / "run", path)
    whole = path.read_bytes()
    for content in (b"", whole[:200], whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            load_trained(path)
    with pytest.raises(UserError, match="there is no file"):
        load_trained(tmp_path / "none.safetensors")
    for name in ("rows.csv", "rows.csv.gz", "rows.parquet"):
        (tmp_path / name).write_text("a,label\n1,0\n")
        with pytest.raises(UserError, match=f"{name} is a table, no model: first the run or"):
            load_trained(tmp_path / name)


def test_a_run_stopped_before_the_freeze_packs_its_best_moment(source, tmp_path):
    trainer = start(settings(), tmp_path / "run", source=source, stop=lambda steps: steps >= 7)
    with pytest.raises(Interrupted):
        trainer.run()
    packed = pack_run(tmp_path / "run", tmp_path / "model.safetensors")
    trained = load_run(tmp_path / "run")
    assert torch.equal(packed.probabilities(source.frame), trained.probabilities(source.frame))
    assert methods.stored_bytes(packed.model.table) <= methods.dense_bytes(trained.model.table) / 2


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": 0.0},
        {"budget": 1.5},
        {"epochs": 0},
        {"freeze_at": -1},
        {"table_lr": -1.0},
        {"embedding_dropout": 1.0},
        {"embedding_dropout": -0.1},
        {"embedding_decay": -1e-5},
        {"embedding_decay": float("nan")},
        {"embedding_decay": 1e-5, "table_optimizer": "sgd", "bits": "8", "masters": False},
    ],
)
def test_settings_are_checked(changes):
    with pytest.raises(UserError, match="--"):
        settings(**changes)


def test_settings_round_trip_and_newer_ones_are_refused():
    config = settings(table_options={"init_exponent": 1.0})
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(UserError, match="newer"):
        TrainConfig.from_dict({**config.to_dict(), "telepathy": True})


DECAYING = {
    "fixed": {"method": "fixed"},
    "searching": {"table_options": {"parametrization": "ordinal"}, "bits": "32"},
    "frozen": {"bits": "4"},
    "a peer": {"method": "qr"},
}


@pytest.mark.parametrize("kind", DECAYING)
def test_weight_decay_reaches_rows_that_are_not_looked_up(kind, source, monkeypatch):
    monkeypatch.setattr(methods, "DECAY_EVERY", 2)
    config = settings(**DECAYING[kind], batch_size=5, table_lr=1e-3, embedding_decay=1e-3)
    task = prepare(config, source)

    def trained(config, steps):
        learner = Learner(config, task)
        parameters = methods.table_parameters(learner.table)
        before = torch.cat([p.detach().flatten() for p in parameters])
        for _ in range(steps):
            learner.step()
        return before, torch.cat([p.detach().flatten() for p in parameters])

    without = replace(config, embedding_decay=0.0)
    before, twice = trained(without, 2)
    assert torch.equal(trained(config, 2)[1], twice)
    plain, after = trained(without, 3)[1], trained(config, 3)[1]
    untouched = (plain == before) & (before != 0)
    assert 50 < int(untouched.sum()) < len(before) - 50
    # Nothing has held them against decay so far.
    assert not after[untouched].any()
    touched = (plain != before) & (plain != 0)
    assert bool((after[touched] != plain[touched]).any())


@pytest.mark.parametrize("kind", [k for k in DECAYING if k != "a peer"])
def test_a_run_with_weight_decay_goes_on_and_is_packed(kind, source, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "DECAY_EVERY", 4)
    config = settings(**DECAYING[kind], embedding_decay=1e-3, epochs=2)
    whole = start(config, source=source).run()
    trainer = start(config, tmp_path / "run", source=source, stop=lambda steps: steps >= 7)
    with pytest.raises(Interrupted):
        trainer.run()
    metrics = start(None, tmp_path / "run", resume=True, source=source).run()
    for key in ("val_auc", "test_auc", "stored_bytes", "epochs_run"):
        assert metrics[key] == whole[key]
    without = start(replace(config, embedding_decay=0.0), source=source).run()
    assert metrics["val_auc"] != without["val_auc"]
    packed = pack_run(tmp_path / "run", tmp_path / "model.safetensors")
    trained = load_run(tmp_path / "run")
    assert torch.equal(packed.probabilities(source.frame), trained.probabilities(source.frame))


def test_whose_turn_it_is_to_learn_goes_along_with_a_state(source):
    options = {"parametrization": "ordinal", "learns_every": 3}
    config = settings(table_options=options, bits="32", batch_size=50, mask_lr=0.1)
    task = prepare(config, source)
    learner, other = Learner(config, task), Learner(config, task)

    def numbers(learner):
        return methods.mask_parameters(learner.table)[0].detach().clone()

    for _ in range(5):
        learner.step()
    other.load_state(pickle.loads(pickle.dumps(learner.state())))
    before = numbers(learner)
    for turn in (False, True):
        for each in (learner, other):
            torch.set_rng_state(learner.rng)
            each.step()
        assert torch.equal(numbers(learner), numbers(other))
        assert torch.equal(numbers(learner), before) != turn
        before = numbers(learner)


def test_few_held_out_rows_of_a_class_are_told_of_once(source):
    labels = np.zeros(ROWS, int)
    for part, count in zip(split_rows(source.frame, "random"), (100, 7, 1), strict=True):
        labels[part[:count].numpy()] = 1
    rare = Source("made here", source.frame.with_columns(label=pl.Series(labels)), "label")
    recorder = Recorder()
    metrics = start(settings(epochs=1), observer=recorder, source=rare).run()
    told = "only 7 positive rows of 120 in validation, 1 positive row of 120 in test: differences"
    assert [note.startswith(told) for note in recorder.notes].count(True) == 1
    assert metrics["held_out"]["test"] == {"rows": 120, "positive": 1}
    assert metrics["split_rows"] == {"train": 960, "val": 120, "test": 120}


def test_a_diverging_run_says_so(source):
    with pytest.raises(UserError, match="lower --table-lr"):
        start(settings(method="fixed", lr=1e30, table_lr=1e30), source=source).run()


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        (100, 64),
        (10_000, 64),
        (19_000, 128),
        (30_000, 256),
        (100_000, 1024),
        (327_346, 2048),
        (1_000_209, 8192),
    ],
)
def test_default_batch_size_makes_about_a_hundred_steps(rows, size):
    assert default_batch_size(rows) == size


def test_two_processes_do_not_train_into_one_folder(source, tmp_path):
    out = tmp_path / "run"

    def other_run(steps: int) -> bool:
        for more in ({"config": settings(seed=4)}, {"config": None, "resume": True}):
            again = start(**more, out=out, source=source)
            with pytest.raises(UserError, match=r"training into .*run: wait .*another --out"):
                again.run()
        return True

    first = start(settings(), out, source=source, stop=other_run)
    with pytest.raises(Interrupted):
        first.run()
    assert read_json(out / "config.json")["seed"] == 3
    # What ended, however it did, is in nobody's way.
    start(settings(seed=4, epochs=1), out, source=source).run()
    assert load_run(out).config.seed == 4


def test_a_column_that_weighs_rows_by_its_name_is_told_to_be_a_field(source):
    weights = pl.Series(np.random.default_rng(1).choice([1.0, 10.0], ROWS))
    weighed = replace(source, frame=source.frame.with_columns(sample_weight=weights))
    (told,) = prepare(settings(), weighed).notes
    assert told.startswith("'sample_weight' is taken as a field") and "--drop sample_weight" in told
    assert "--weight sample_weight weighs the rows by it" in told
    (told,) = prepare(settings(weight="sample_weight"), weighed).notes
    assert "taken as a field" not in told
    for quiet in (settings(drop=["sample_weight"]), settings(fields=["user", "sample_weight"])):
        assert not prepare(quiet, weighed).notes
