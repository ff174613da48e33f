"""Methods of the field through the training job and the command line."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import polars as pl
import pytest
import torch
from amtl import cli
from amtl.data.registry import Source
from amtl.errors import UserError
from amtl.peers import PEERS, fields
from amtl.peers.fields import evolved
from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.done import Interrupted
from amtl.run.folders import load_run, pack_run
from amtl.run.learner import Learner
from amtl.run.model import predict
from amtl.run.preparation import prepare
from amtl.run.progress import Silent
from amtl.run.race import Trials
from amtl.run.searching import SearchLearner, search
from amtl.run.training import start

ROWS = 1500


@pytest.fixture(scope="module")
def source() -> Source:
    rng = np.random.default_rng(0)
    user, item = rng.zipf(1.4, ROWS) % 90, rng.zipf(1.4, ROWS) % 60
    taste, kind = rng.normal(size=(90, 3)), rng.normal(size=(60, 3))
    logit = (taste[user] * kind[item]).sum(1)
    frame = pl.DataFrame(
        {
            "user": user,
            "item": [f"i{i}" for i in item],
            "tags": [["a|b", "b|c", "c", ""][i] for i in rng.integers(0, 4, ROWS)],
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )
    return Source("made here", frame, "label")


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "fields": ["user", "item"],
        "dim": 8,
        "budget": 0.5,
        "batch_size": 200,
        "epochs": 3,
        "validations": 2,
        "patience": 2,
        "hidden": [8],
    }
    return TrainConfig(**{**base, **changes})


@pytest.mark.every(3)
@pytest.mark.parametrize("name", PEERS)
def test_a_run_is_kept_within_its_bytes_and_does_not_pack(name, source, tmp_path):
    config = settings(method=name, fields=["user", "item", "tags"])
    trainer = start(config, tmp_path / "a", source=source)
    metrics = trainer.run()
    assert metrics["val_auc"] > 0.5 and metrics["stored_bytes"] <= 0.5 * metrics["dense_bytes"]
    assert methods.server_bytes(trainer.table) == metrics["stored_bytes"]
    loaded = load_run(tmp_path / "a")
    test = prepare(config, source).test
    assert torch.equal(predict(loaded.model, test), predict(trainer.learner.model, test))
    with pytest.raises(UserError, match=rf"{name}.*does not pack"):
        pack_run(tmp_path / "a", tmp_path / "packed.safetensors")


@pytest.mark.parametrize(
    ("name", "at"),
    [("pep", 23), ("magprune", 23), ("autoemb", 23), ("nis", 23), ("esapn", 23), ("alpt", 8)],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(name, at, source, tmp_path):
    config = settings(method=name, patience=20)
    whole = start(config, source=source).run()
    with pytest.raises(Interrupted):
        start(config, tmp_path / "a", source=source, stop=lambda steps: steps == 3).run()
    steps = 0

    def stop(_: int) -> bool:
        nonlocal steps
        steps += 1
        return steps == at

    with pytest.raises(Interrupted):
        start(None, tmp_path / "a", resume=True, source=source, stop=stop).run()
    metrics = start(None, tmp_path / "a", resume=True, source=source).run()
    for key in ("val_auc", "test_auc", "stored_bytes", "epochs_run"):
        assert metrics[key] == whole[key]


def test_a_search_ends_where_the_budget_is_met(source):
    """PEP at a budget that its thresholds reach at once searches for one validation only."""
    seen = []

    class Watching:
        def begin(self, title, steps, done_steps):
            seen.append(title)

        def step(self, epochs, loss, samples, steps):
            seen.append("step")

        def validation(self, record): ...
        def score(self, record): ...
        def note(self, text): ...
        def end(self): ...

    config = settings(method="pep", budget=1.0, table_lr=1e-3)
    start(config, source=source, observer=Watching()).run()
    assert seen[0] == "pep searches"
    searching = seen.index("pep D=8 100%")
    assert searching == 1 + 3  # six steps an epoch, two validations


def test_rows_that_are_not_looked_up_fall_under_pep(source):
    """Adam moves what decay alone pulls as fast as anything else."""
    task = prepare(settings(), source)
    learner = SearchLearner(settings(method="pep"), task)
    unseen = learner.table.facts.counts == 0
    assert bool(unseen.any())
    before = learner.table.weight.detach()[unseen].abs().mean()
    for _ in range(6):
        learner.step()
    assert learner.table.weight.detach()[unseen].abs().mean() < 0.9 * before


@pytest.mark.parametrize("name", [name for name, kind in PEERS.items() if kind.searches])
def test_a_teacher_is_heard_in_both_trainings(name, source):
    config = settings(method=name, epochs=2, distillation=0.5)
    task = prepare(config, source)
    rate = float(task.train.labels.mean())

    trials = Trials(partial(Learner, task=task), Silent(), Learner.step)

    def trained(taught):
        learner = search(trials.taught(taught).make(config), trials)
        assert learner.taught is taught
        while not learner.finished:
            learner.step()
        return learner

    alone, learner = trained(None), trained(torch.full((len(task.train),), rate))
    assert not torch.equal(predict(alone.model, task.val), predict(learner.model, task.val))


def test_an_evolution_is_asked_for_once_and_by_the_validation_split(source, monkeypatch):
    asked = []

    def watched(score, *others):
        def told(widths):
            value = score(widths)
            asked.append((value, widths))
            return value

        return evolved(told, *others)

    monkeypatch.setattr(fields, "evolved", watched)
    options = {"generations": 2}
    trainer = start(settings(method="optembed", budget=0.3, table_options=options), source=source)
    trainer.run()
    assert trainer.table.widths.tolist() == list(max(asked)[1])
    # A narrow row says less: choices differ, and so do AUC and log loss on that split.
    assert len({value for value, _ in asked}) > 5 and all(-1 < value < 1 for value, _ in asked)


def test_what_has_no_meaning_is_refused(source, tmp_path):
    for change in ({"bits": "4"}, {"freeze_at": 3}, {"warm_start": "x"}):
        with pytest.raises(UserError, match="qr"):
            settings(method="qr", **change)
    with pytest.raises(UserError, match=r"--method qr.*nothing"):
        start(settings(method="qr", table_options={"nothing": 1}), source=source)
    with pytest.raises(UserError, match="choose one of amtl, rule, fixed, twins, aml, qr"):
        start(settings(method="nothing"), source=source)
    # Less than any pruned table can be, which shows after its search.
    with pytest.raises(UserError, match="magprune"):
        start(settings(method="magprune", budget=0.001, epochs=1), source=source).run()


def test_product_tables_are_counted_whole(source):
    table = start(settings(method="fixed"), source=source).table
    rows = table.weight.shape[0]
    assert methods.server_bytes(table) == 4 * 8 * rows
    assert methods.row_bits(table).tolist() == [256] * rows
    sized = start(settings(method="rule", race=False, bits="32", budget=0.3), source=source).table
    widths = len(methods.row_widths(sized).unique())
    assert methods.server_bytes(sized) == methods.stored_bytes(sized) + 8 * widths + 4 * 2


def test_the_command_line(source, tmp_path):
    data, out = tmp_path / "clicks.parquet", tmp_path / "run"
    source.frame.write_parquet(data)

    def run(*args):
        with pytest.raises(SystemExit) as done:
            cli.main(list(map(str, args)))
        return done.value.code

    train = ("train", data, "--label", "label", "--epochs", 1, "--dim", 8, "--out", out)
    assert run(*train, "--method", "qr", "--option", "operation=add", "--budget", "0.4") == 0
    config = json.loads((out / "config.json").read_text())
    assert config["method"] == "qr" and config["table_options"] == {"operation": "add"}
    assert run("pack", out, "-o", tmp_path / "x.safetensors") == 1
    assert run("report", out, "-o", tmp_path / "report.html") == 0
    assert run("compare", out) == 0
    assert run(*train, "--force", "--method", "qr", "--option", "operation") == 1
    assert run(*train, "--force", "--method", "amtl", "--option", "width=3") == 1
    assert run(*train, "--force", "--method", "mde", "--bits", "4") == 1
    assert run(*train, "--force", "--method", "aml", "--no-race") == 0
    options = json.loads((out / "config.json").read_text())["table_options"]
    assert options == {"parametrization": "ordinal", "twins": False}
