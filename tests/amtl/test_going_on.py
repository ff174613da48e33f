"""Runs that go on from other runs, on rows that came since."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from amtl import settings as typed
from amtl.data.encoding import Encoder
from amtl.data.fields import infer_fields
from amtl.data.registry import Source, default_batch_size
from amtl.data.vocabulary import Vocabulary
from amtl.errors import UserError
from amtl.run import methods
from amtl.run.comparison import baselines
from amtl.run.config import TrainConfig
from amtl.run.done import Interrupted
from amtl.run.folders import load_best, load_earlier, load_run
from amtl.run.metrics import auc
from amtl.run.model import predict
from amtl.run.progress import Silent
from amtl.run.training import start

ROWS, NEW = 1200, 600


def made(rows: int, seed: int, users: int = 60) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    user, item = rng.zipf(1.4, rows) % users, rng.zipf(1.4, rows) % 40
    known = np.random.default_rng(9)
    logit = (known.normal(size=(200, 3))[user] * known.normal(size=(40, 3))[item]).sum(1)
    return pl.DataFrame(
        {
            "user": user,
            "item": [f"i{i}" for i in item],
            "tags": [["a|b", "b|c", "c", ""][i] for i in rng.integers(0, 4, rows)],
            "price": rng.normal(size=rows),
            "label": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )


@pytest.fixture(scope="module")
def old() -> pl.DataFrame:
    return made(ROWS, 0)


@pytest.fixture(scope="module")
def new() -> pl.DataFrame:
    return made(NEW, 1, users=90)


def source(frame: pl.DataFrame) -> Source:
    return Source("made here", frame, "label")


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "dim": 8,
        "budget": 0.5,
        "batch_size": 200,
        "epochs": 3,
        "validations": 2,
        "race": False,
        "hidden": [8],
        "seed": 3,
    }
    return TrainConfig(**{**base, **changes})


KINDS = {
    "fixed": {"method": "fixed"},
    "32 bits": {"method": "amtl", "bits": "32"},
    "4 bits": {"method": "amtl", "bits": "4", "budget": 0.125, "embedding_decay": 1e-3},
    "adam": {"method": "rule", "bits": "8", "budget": 0.1, "table_optimizer": "adam"},
    "codes": {"method": "amtl", "bits": "8", "budget": 0.25, "masters": False},
    "deepfm": {"method": "amtl", "bits": "4", "budget": 0.2, "backbone": "deepfm"},
}


class Notes(Silent):
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_same_rows_it_begins_with_the_same_model(old, tmp_path, kind):
    """Numbers, the rest of the model and what optimizers know of them: nothing is lost on the way.

    But for codes without masters, which are rounded anew.
    """
    given = KINDS[kind]
    start(settings(**given), tmp_path / "a", source=source(old)).run()
    trained = load_run(tmp_path / "a")
    says = predict(trained.model, trained.encoder.transform(old))
    trainer = start(
        settings(**given, warm_start=str(tmp_path / "a")),
        source=source(old),
    )
    learner = trainer.learner
    found = predict(learner.model, trainer.task.encoder.transform(old))
    assert torch.allclose(found, says, atol=0.05 if kind == "codes" else 1e-6)
    best = load_best(tmp_path / "a")[3]
    for name in ("table_optimizer", "dense_optimizer"):
        states = [best[name]["state"], getattr(learner, name).state_dict()["state"]]
        for number, state in states[0].items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, states[1][number][key]), (name, number, key)


def test_rows_keep_what_they_are_and_values_that_are_new_begin(old, new, tmp_path):
    start(settings(**KINDS["4 bits"]), tmp_path / "a", source=source(old)).run()
    given = settings(**KINDS["4 bits"], warm_start=str(tmp_path / "a"))
    notes = Notes()
    trainer = start(given, tmp_path / "b", source=source(new), observer=notes)
    encoder, earlier = trainer.task.encoder, load_earlier(tmp_path / "a")
    assert encoder.num_rows > earlier.encoder.num_rows
    assert set(earlier.encoder.vocabularies[0].values) < set(encoder.vocabularies[0].values)
    widths = methods.row_widths(trainer.table)
    trainer.learner.table.thaw(trainer.learner.table_optimizer)
    weight = methods.table_parameters(trainer.learner.table)[0]
    state = trainer.learner.table_optimizer.state[weight]["sum"]
    rows = dict(zip(*(each.tolist() for each in earlier.matched(encoder)), strict=True))
    for row in range(encoder.num_rows):
        if row in rows:
            kept = int(widths[row])
            assert torch.equal(weight[row, :kept].detach(), earlier.weight[rows[row], :kept])
        else:
            assert not state[row].any() and 0 < weight[row].abs().max() < 0.1
    assert len(rows) == earlier.encoder.num_rows
    metrics = start(given, tmp_path / "b", source=source(new), observer=notes).run()
    first = metrics["history"][0]
    assert (first["step"], first["loss"]) == (0, None)
    assert metrics["val_score"] >= first["score"]
    assert any(f"{len(rows):,} rows from" in each for each in notes.said)
    # A run that goes on is gone on from.
    again = replace_start(given, tmp_path / "b")
    assert start(again, source=source(made(400, 5))).run()["rows"] >= metrics["rows"]


def replace_start(config, folder):
    return TrainConfig.from_dict({**config.to_dict(), "warm_start": str(folder)})


def test_rows_weigh_what_their_own_column_says(old, new, tmp_path):
    def weighed(frame):
        return source(frame.with_columns(w=(pl.col("price") * 3).round().abs()))

    start(settings(weight="w"), tmp_path / "a", source=weighed(old)).run()
    given = settings(weight="w", warm_start=str(tmp_path / "a"))
    metrics = start(given, tmp_path / "b", source=weighed(pl.concat([old, new]))).run()
    alone = start(given, source=weighed(new)).run()
    assert (metrics["test_auc"], metrics["weight"]) == (alone["test_auc"], "w")
    plain = start(replace(given, weight=None, fields=["user", "item"]), source=weighed(new))
    assert plain.task.train.weights is None


def test_it_is_compared_with_a_full_table_that_goes_on_too(old, new, tmp_path):
    start(settings(), tmp_path / "a", source=source(old)).run()
    given = settings(warm_start=str(tmp_path / "a"), compare=True, embedding_dropout=0.0)
    compared = start(given, source=source(new)).run()["compared"]
    assert [row["name"] for row in compared] == ["full size", "fixed width"]
    full, narrow = baselines(given, {"dense_bytes": 800, "dim": 8, "stored_bytes": 400}).values()
    assert (full.warm_start, narrow.warm_start) == (given.warm_start, None)


def test_sizes_that_are_learned_are_learned_anew(old, new, tmp_path):
    given = {"table_options": {"parametrization": "ordinal"}, "freeze_at": 4, "epochs": 2}
    start(settings(**given), tmp_path / "a", source=source(old)).run()
    warm = settings(**given, warm_start=str(tmp_path / "a"))
    trainer = start(warm, source=source(new))
    assert not trainer.learner.frozen
    history = trainer.run()["history"]
    assert [record["phase"] for record in history][:: len(history) - 1] == ["search", "frozen"]


def test_a_table_that_goes_on_is_trained_by_smaller_steps(old, new, tmp_path):
    start(settings(), tmp_path / "a", source=source(old)).run()
    warm = start(settings(warm_start=str(tmp_path / "a")), source=source(new)).learner
    cold = start(settings(), source=source(new)).learner
    rates = [each.table_optimizer.param_groups[0]["lr"] for each in (warm, cold)]
    assert rates[0] == pytest.approx(rates[1] / 10)
    assert warm.dense_optimizer.param_groups[0]["lr"] == cold.dense_optimizer.param_groups[0]["lr"]


def test_what_it_has_had_of_a_file_that_grows_is_left_out(old, new, tmp_path):
    grown, more = pl.concat([old, new]), pl.concat([old, new, made(300, 4)])
    start(settings(), tmp_path / "a", source=source(old)).run()
    given = settings(warm_start=str(tmp_path / "a"))
    metrics = start(given, tmp_path / "b", source=source(grown)).run()
    alone = start(given, source=source(new)).run()
    assert metrics["config"]["skip_rows"] == ROWS
    assert [r["score"] for r in metrics["history"]] == [r["score"] for r in alone["history"]]
    trainer = start(replace_start(given, tmp_path / "b"), source=source(more))
    assert trainer.config.skip_rows == ROWS + NEW
    assert any("300 are new" in note for note in trainer.task.notes)
    for batch_size in (default_batch_size(36 * ROWS), 999):
        longer = replace(given, batch_size=batch_size)
        longer = load_earlier(tmp_path / "a").continued(
            longer, source(pl.concat([old, *[new] * 70]))
        )
        assert longer.skip_rows == ROWS
        expected = 999 if batch_size == 999 else default_batch_size(35 * ROWS)
        assert longer.batch_size == expected
    # Resuming knows of it, and so does the test split.
    with pytest.raises(Interrupted):
        start(given, tmp_path / "c", source=source(grown), stop=lambda steps: steps == 3).run()
    resumed = start(None, tmp_path / "c", source=source(grown), resume=True).run()
    assert resumed["test_auc"] == metrics["test_auc"]
    grown.write_parquet(tmp_path / "grown.parquet")
    trained = load_run(tmp_path / "b")
    trained.config.data = str(tmp_path / "grown.parquet")
    test = trained.test_split()
    assert auc(predict(trained.model, test), test.labels) == metrics["test_auc"]


def test_rows_that_it_knows_are_no_validation(old, new, tmp_path):
    start(settings(), tmp_path / "a", source=source(old)).run()
    given = {"warm_start": str(tmp_path / "a")}
    with pytest.raises(UserError, match="another --split-seed"):
        start(settings(split_seed=1, **given), source=source(old))
    said = []
    for had in (0.3, 0.7):
        notes = Notes()
        trainer = start(settings(**given, epochs=1), source=source(new), observer=notes)
        trainer.task.earlier.val_auc = had
        trainer.run()
        said.append(next(each for each in notes.said if "has a validation AUC of" in each))
    assert "had 0.3000 in its own training" in said[0] and "scores are too good" in said[0]
    assert "too good" not in said[1]


def test_what_cannot_be_gone_on_from(old, tmp_path):
    start(settings(), tmp_path / "a", source=source(old)).run()
    given = {"warm_start": str(tmp_path / "a")}
    with pytest.raises(UserError, match="--dim 8"):
        start(settings(dim=4, **given), source=source(old))
    with pytest.raises(UserError, match="tags"):
        start(settings(**given), source=source(old.drop("tags")))
    with pytest.raises(UserError, match="would replace the run"):
        start(settings(**given), tmp_path / "b" / ".." / "a", source=source(old))
    start(settings(method="qr", budget=0.5), tmp_path / "q", source=source(old)).run()
    with pytest.raises(UserError, match="qr is there to be compared with"):
        start(settings(warm_start=str(tmp_path / "q")), source=source(old))


def test_the_rest_of_the_model_begins_anew_where_it_is_another(old, new, tmp_path):
    start(settings(), tmp_path / "a", source=source(old)).run()
    given = {"warm_start": str(tmp_path / "a")}
    mlps = []
    for changes in ({}, {"hidden": [16]}):
        notes = Notes()
        trainer = start(settings(**given, **changes), source=source(new), observer=notes)
        mlps.append(trainer.learner.model.mlp[0].weight.detach())
        assert ("the rest of the model begins anew" in " ".join(notes.said)) == bool(changes)
    assert torch.equal(mlps[0], load_best(tmp_path / "a")[2].mlp[0].weight)


def test_a_backbone_goes_on_with_the_sums_or_means_that_it_had(old, new, tmp_path):
    given = {"epochs": 1, "backbone": "deepfm"}
    start(settings(**given, backbone_means=False), tmp_path / "a", source=source(old)).run()
    for backbone, means in (("deepfm", False), ("widedeep", True)):
        warm = settings(epochs=1, backbone=backbone, warm_start=str(tmp_path / "a"))
        trainer = start(warm, source=source(new))
        assert trainer.config.backbone_means is trainer.learner.model.interaction.means is means


def test_settings_are_those_of_the_run_but_for_what_is_typed():
    earlier = TrainConfig("old", "y", bits="4", budget=0.1, race=False, embedding_decay=1e-4)
    earlier.table_options = {"capacity_bits": 1.0, "field_weights": [1.0, 2.0]}
    earlier.distillation, earlier.fields, earlier.skip_rows = 0.5, ["a", "b"], 7
    config = TrainConfig("new", "y", warm_start="old", budget=0.3, lr=1e-3, epochs=5, batch_size=64)
    config.table_options = {"capacity_bits": 4.0}
    found = typed.going_on(config, earlier, ["data", "warm_start", "budget", "capacity_bits"])
    assert (found.data, found.warm_start, found.budget) == ("new", "old", 0.3)
    assert (found.bits, found.epochs, found.lr) == ("4", earlier.epochs, earlier.lr)
    assert (found.race, found.distillation, found.skip_rows) == (False, 0.0, 0)
    assert found.batch_size == config.batch_size != earlier.batch_size
    assert (found.fields, found.embedding_decay) == (["a", "b"], 1e-4)
    assert found.table_options == {"capacity_bits": 4.0, "field_weights": [1.0, 2.0]}
    other = TrainConfig("new", "y", method="rule", warm_start="old", table_lr=0.5)
    found = typed.going_on(other, earlier, ["method", "table_lr"])
    assert (found.method, found.race, found.fields, found.table_lr) == (
        "rule",
        True,
        ["a", "b"],
        0.5,
    )
    earlier.weight, earlier.label_positive = "w", "yes"
    found = typed.going_on(other, earlier, ["method", "label_positive"])
    assert (found.weight, found.label_positive) == ("w", None)
    for name in ("fields", "drop", "numeric", "values", "multi"):
        with pytest.raises(UserError, match=f"--{name} has no effect with --warm-start"):
            typed.going_on(config, earlier, [name])


@pytest.mark.parametrize(
    ("known", "later", "values", "counts"),
    [
        ([1, 1, 1, 2, 2, 5], [2, 2, 7, 7, 7, 7, 7], {1: 3, 2: 4, 5: 1, 7: 5}, 0),
        # In other containers, and with what is no integer.
        ([1, 1, 2], ["1", "2", "3", "x", None], {1: 3, 2: 2, 3: 1, None: 1}, 1),
        (["a", "b", None], ["b", "", "c", "c"], {"a": 1, "b": 2, "c": 2, None: 2}, 0),
        (["a", "b"], ["", "a"], {"a": 2, "b": 1, None: 1}, 0),
        (["01", "02"], [3, 3], {"01": 1, "02": 1, "3": 2}, 0),
    ],
)
def test_vocabularies_grow(known, later, values, counts):
    before = Vocabulary.build(pl.Series(known, strict=False), name="f")
    kept = before.counts.clone()
    after = before.extended(pl.Series(later, strict=False))
    found = {v: int(after.counts[after.encode([v])[0]]) for v in after.values}
    assert found == values
    assert int(after.counts[after.oov_row]) == counts
    order = after.counts.tolist()
    assert order == sorted(order, reverse=True)
    assert torch.equal(before.counts, kept)
    again = Vocabulary.from_tensors(*after.to_tensors())
    assert again.values == after.values and torch.equal(again.counts, after.counts)


def test_vocabularies_of_several_values_grow():
    before = Vocabulary.build(["a|b", "b"], name="tags", separator="|")
    after = before.extended(["b|c", "", None, "c | d"], bags=True, min_count=2)
    assert dict(
        zip(after.values, after.counts[after.encode(after.values)].tolist(), strict=True)
    ) == {
        "b": 3,
        "c": 2,
    }
    assert int(after.counts[after.oov_row]) == 2
    assert after.encode_bags(["c|b"])[2] == 0


def test_numbers_are_taken_as_they_were(old, new):
    fields = ["user", "price", "tags"]
    specs = infer_fields(old, fields, numeric={"price": "bucket"}, labels=None)
    before = Encoder.fit(old, specs)
    shifted = new.with_columns(pl.col("price") + 3)
    after = before.extended(shifted, rows=torch.arange(100))
    assert after.names == before.names
    kept, found = before.transform(shifted), after.transform(shifted)
    f = before.names.index("price")
    price = [
        encoder.vocabularies[f].decode(data.rows[:, f] - encoder.field_offsets[f])
        for encoder, data in ((before, kept), (after, found))
    ]
    assert price[0] == price[1] and len(set(price[1])) > 1
    # As often as buckets of then are seen now.
    own = [encoder.vocabularies[f] for encoder in (before, after)]
    now = torch.bincount(kept.rows[:100, f] - before.field_offsets[f], minlength=own[0].size)
    for value in own[0].values:
        (then,), (later,) = (vocabulary.encode([value]) for vocabulary in own)
        assert own[1].counts[later] == own[0].counts[then] + now[then]
    assert found.unknown["user"] < kept.unknown["user"]
    assert int(after.counts().sum()) == int(before.counts().sum()) + 200 + int(
        before.transform(shifted[:100]).values["tags"]
    )
