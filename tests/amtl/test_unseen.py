"""What training has not seen: the rows that nothing trains, and what predictions make of them."""

from __future__ import annotations

import polars as pl
import pytest
import torch
from amtl.data import Encoder, infer_fields
from amtl.data.registry import Source
from amtl.run import methods
from amtl.run.comparison import choices
from amtl.run.config import TrainConfig
from amtl.run.training import Interrupted, start
from amtl.run.unseen import Hiding, settle_unseen

ROWS = 4000


@pytest.fixture(scope="module")
def frame():
    generator = torch.Generator().manual_seed(0)
    shop = (30 * torch.rand(ROWS, generator=generator) ** 2).long()
    premium = torch.rand(ROWS, generator=generator) < 0.5
    tags = [[f"t{i % 7}", f"t{i % 11}"] for i in range(ROWS)]
    logit = shop / 10 - 4 + 2 * premium.double()
    label = (torch.rand(ROWS, generator=generator) < torch.sigmoid(logit)).long()
    columns = {"shop": [f"s{i}" for i in shop.tolist()], "label": label.numpy()}
    return pl.DataFrame({**columns, "premium": premium.numpy(), "tags": tags})


def table_of(frame, fields, min_count=1, **settings):
    encoder = Encoder.fit(frame, infer_fields(frame, fields), min_count)
    given = {"method": "rule", "dim": 8, "budget": 1.0, "options": {}, **settings}
    table = methods.build_table(encoder=encoder, **given)
    if given["method"] != "fixed":
        table.freeze([])
    return encoder, table


def rows_of(table):
    return table.dense_weight() if methods.is_adaptive(table) else table.weight.detach()


def unseen_rows(encoder):
    rows = map(encoder.field_rows, range(len(encoder.names)))
    return [(r, int(r[v.oov_row])) for r, v in zip(rows, encoder.vocabularies, strict=True)]


@pytest.mark.parametrize("fields", [["shop", "premium"], ["shop", "tags", "premium"]])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "fixed"},
        {"budget": 1.0},
        {"budget": 0.3},
        {"budget": 0.3, "options": {"bits": 8}},
        {"budget": 0.1, "options": {"bits": 4}},
    ],
)
def test_rows_that_nothing_trains_are_the_mean_of_the_others(frame, fields, settings):
    encoder, table = table_of(frame, fields, **settings)
    if methods.is_adaptive(table) and table.rounding is not None:
        # What is rounded is the mean of what is not.
        table.rounding = None
    before = rows_of(table).clone()
    settle_unseen(table, encoder)
    after, widths, changed = rows_of(table), methods.row_widths(table), 0
    for rows, unseen in unseen_rows(encoder):
        others = rows[rows != unseen]
        expected = before[others].double().mean(0).float()
        expected[widths[unseen] :] = 0
        torch.testing.assert_close(after[unseen], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(after[others], before[others])
        # It has room, as much as the rarest of its field.
        assert widths[unseen] > 0 and widths[unseen] >= widths[others].min()
        changed += not torch.equal(after[unseen], before[unseen])
    assert changed == len(fields)
    again = rows_of(table)
    settle_unseen(table, encoder)
    assert torch.equal(rows_of(table), again)


@pytest.mark.parametrize("in_order", [True, False])
def test_rows_that_something_trains_stay(frame, in_order):
    kept = frame if in_order else frame.with_columns(shop=frame["shop"].sort())
    for settings in ({"min_count": 80}, {"budget": 0.02, "options": {"bits": 4}}):
        fields = ["shop"] if in_order else ["shop", "tags"]
        encoder, table = table_of(kept, fields, **settings)
        before = rows_of(table).clone()
        settle_unseen(table, encoder)
        shop, _ = unseen_rows(encoder)[0]
        assert torch.equal(rows_of(table)[shop], before[shop])
        trained = encoder.vocabularies[0].counts[encoder.vocabularies[0].oov_row] > 0
        merged = (methods.row_widths(table)[shop] == 0).any()
        assert trained if "min_count" in settings else merged


def test_what_cannot_be_averaged_is_left_alone(frame):
    empty = frame.with_columns(shop=pl.lit(None, dtype=pl.String))
    encoder = Encoder.fit(empty[:0], infer_fields(frame, ["shop", "premium"]), 1)
    table = methods.build_table("fixed", encoder, 8)
    before = table.weight.detach().clone()
    settle_unseen(table, encoder)
    assert torch.equal(table.weight, before)
    encoder, table = table_of(frame, ["shop"], options={"bits": 8})
    searching = methods.build_table("rule", encoder, 8, budget=0.3)
    for other in (searching, table.to_integers()):
        before = other.dense_weight().clone()
        settle_unseen(other, encoder)
        assert torch.equal(other.dense_weight(), before)


@pytest.mark.parametrize("method", ["fixed", "amtl"])
def test_an_unseen_value_moves_predictions_to_the_mean(frame, method):
    """Where it was drawn, next to zero, the MLP has never been."""
    source = Source("made here", frame, label="label")
    config = TrainConfig(
        data="made here",
        label="label",
        method=method,
        dim=8,
        epochs=12,
        race=False,
        batch_size=256,
        bits="32" if method == "fixed" else "8",
    )
    trainer = start(config, source=source)
    trainer.run()
    learner, encoder = trainer.learner, trainer.task.encoder
    for rows, unseen in unseen_rows(encoder):
        shown = rows_of(learner.table)[rows]
        others = shown[rows != unseen]
        assert float((shown[rows == unseen] - others.mean(0)).abs().max()) < 0.1
        assert float(others.abs().max()) > 0.3
    rate = float(frame["label"].mean())
    odd = frame.with_columns(shop=pl.lit("new"))
    with torch.no_grad():
        said = torch.sigmoid(learner.model.eval()(encoder.transform(odd).batch(torch.arange(ROWS))))
    assert abs(float(said.mean()) - rate) < 0.12


def later(frame, new=0.4):
    """The rows with a new shop in some of them, and a new owner in half of these."""
    generator = torch.Generator().manual_seed(1)
    drawn = pl.Series(torch.rand(len(frame), generator=generator).numpy())
    return frame.with_columns(
        shop=pl.when(drawn < new).then(pl.lit("new")).otherwise("shop"),
        owner=pl.when(drawn < new / 2).then(pl.lit("new")).otherwise("owner"),
    )


@pytest.fixture(scope="module")
def owned(frame):
    """Shops that have owners, of whom some own many."""
    shop = frame["shop"].str.slice(1).cast(pl.Int64)
    return frame.with_columns(owner=pl.format("o{}", (shop / 4).floor().cast(pl.Int64)))


@pytest.mark.parametrize("fields", [["shop", "premium", "owner"], ["shop", "tags", "owner"]])
def test_as_many_values_are_hidden_as_held_out_rows_lack_and_rare_ones_first(owned, fields):
    encoder = Encoder.fit(owned, infer_fields(owned, fields))
    hiding = Hiding(encoder, encoder.transform(later(owned)))
    batch = encoder.transform(owned).batch(torch.arange(ROWS))
    hidden = hiding.hide(batch.indices, 3)
    assert torch.equal(hiding.hide(batch.indices, 3), hidden)
    assert not torch.equal(hiding.hide(batch.indices, 4), hidden)
    changed = 0
    for name, share in (("shop", 0.4), ("owner", 0.2)):
        field = encoder.names.index(name)
        rows, counts = encoder.field_rows(field), encoder.vocabularies[field].counts
        of_field = torch.isin(batch.indices, rows.to(torch.int32))
        before, now = batch.indices[of_field], hidden[of_field]
        gaps = now == rows[encoder.vocabularies[field].oov_row]
        assert torch.equal(now[~gaps], before[~gaps])
        assert abs(float(gaps.float().mean()) - share) < 0.03
        often = before == rows[counts.argmax()]
        assert gaps[often].float().mean() < share < gaps[~often].float().mean()
        changed += int(gaps.sum())
    assert int((hidden != batch.indices).sum()) == changed, "no other field"


def test_half_of_the_values_are_hidden_at_most(owned):
    encoder = Encoder.fit(owned, infer_fields(owned, ["shop"]))
    indices = encoder.transform(owned).rows
    hidden = Hiding(encoder, encoder.transform(later(owned, 0.95))).hide(indices, 7)
    assert abs(float((hidden != indices).float().mean()) - 0.5) < 0.03


def test_nothing_is_hidden_where_hardly_anything_is_new(owned):
    for new, min_count in ((0.009, 1), (0.4, 300)):
        encoder = Encoder.fit(owned, infer_fields(owned, ["shop"]), min_count)
        hiding = Hiding(encoder, encoder.transform(later(owned, new)))
        indices = encoder.transform(owned).rows
        assert not hiding.fields
        assert hiding.hide(indices, 0) is indices
    assert not Hiding(encoder, encoder.transform(owned[:0])).fields


@pytest.fixture(scope="module")
def turnover():
    """Items that come and go, of owners who tell of labels."""
    generator = torch.Generator().manual_seed(2)
    item = torch.sort((400 * torch.rand(6 * ROWS, generator=generator)).long()).values
    good = torch.rand(400, generator=generator)[item] < 0.5
    logit = 3.0 * (item % 7 < 3) - 1.5 + 2.0 * good
    label = torch.rand(len(item), generator=generator) < torch.sigmoid(logit.double())
    frame = pl.DataFrame(
        {
            "item": [f"i{i}" for i in item.tolist()],
            "owner": [f"o{i % 7}" for i in item.tolist()],
            "time": (item + 60 * torch.rand(len(item), generator=generator)).numpy(),
            "label": label.long().numpy(),
        }
    )
    return Source("made here", frame, label="label")


def hiding(**changes):
    given = {"split": "order:time", "dim": 8, "epochs": 12, "race": False, "batch_size": 512}
    return TrainConfig(data="made here", label="label", **{**given, "hides": True, **changes})


@pytest.mark.parametrize("method", ["fixed", "amtl"])
def test_what_is_known_of_new_items_is_learned_from_hidden_ones(turnover, method):
    """Items that have owners know by themselves what these tell."""
    losses = {}
    for hides in (True, False):
        trainer = start(hiding(method=method, hides=hides), source=turnover)
        losses[hides] = trainer.run()["test_logloss"]
        assert trainer.learner.may_hide
    assert losses[True] < losses[False] - 0.005


def test_a_resumed_run_hides_what_an_uninterrupted_one_does(turnover, tmp_path):
    config = hiding(epochs=3)
    expected = start(config, source=turnover).run()
    stopped = start(config, tmp_path, source=turnover, stop=lambda steps: steps >= 50)
    with pytest.raises(Interrupted):
        stopped.run()
    resumed = start(None, tmp_path, resume=True, source=turnover).run()
    for key in ("test_auc", "test_logloss", "val_auc", "best_epoch"):
        assert resumed[key] == expected[key], key


def test_a_run_tries_hidden_values_and_says_what_it_chose(turnover):
    metrics = start(hiding(hides=None, race=True, epochs=6, bits="8"), source=turnover).run()
    row, chosen = metrics["raced"]["hidden"], metrics["config"]["hides"]
    assert row["name"].startswith("the same, values hidden")
    assert bool(chosen) == row["chosen"]
    assert ("--hide-unseen" in choices(metrics)) == row["chosen"]
