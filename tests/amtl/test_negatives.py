"""Files of positive rows only: rows that did not happen are drawn for them."""

from __future__ import annotations

import datetime
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from amtl.cli import main
from amtl.data.negatives import with_negatives
from amtl.errors import UserError
from amtl.run.config import TrainConfig
from amtl.run.folders import load_trained
from amtl.run.preparation import prepare
from amtl.store.files import read_json

ROWS, USERS, ITEMS = 4000, 60, 90


def happened(seed: int = 0) -> pl.DataFrame:
    """Users like items of their own kind, some of which are known to many."""
    rng = np.random.default_rng(seed)
    user = rng.integers(USERS, size=ROWS)
    liked = rng.random(ROWS) < 0.8
    kind = np.where(liked, user % 3, rng.integers(3, size=ROWS))
    item = 3 * (ITEMS / 3 * rng.random(ROWS) ** 2).astype(int) + kind
    start = datetime.datetime(2024, 1, 1)
    return pl.DataFrame(
        {
            "user": [f"u{u}" for u in user],
            "song": item,
            "age": 20 + user % 40,
            "genre": [f"g{k}" for k in kind],
            "price": np.round((1 + item) * rng.uniform(0.95, 1.05, ROWS), 2),
            "place": rng.integers(1, 9, ROWS),
            "when": [start + datetime.timedelta(minutes=m) for m in range(ROWS)],
            "epoch": [1_700_000_000 + 60_000 * int(i) + int(j) for j, i in enumerate(item)],
        }
    ).unique(["user", "song"], maintain_order=True)


def pairs(frame: pl.DataFrame) -> set[tuple[str, int]]:
    return set(frame.select("user", "song").iter_rows())


@pytest.mark.parametrize("count", [1, 3])
def test_each_row_is_followed_by_others_of_its_user(count):
    frame = happened()
    rows, note = with_negatives(frame, f"user:song:{count}" if count > 1 else "user:song")
    labels = rows["label"].to_numpy()
    assert len(rows) == (1 + count) * len(frame) and set(labels) == {0, 1}
    assert labels.reshape(-1, 1 + count)[:, 0].all() and labels.sum() == len(frame)
    assert rows.filter(pl.col("label") == 1).drop("label").equals(frame)
    drawn = rows.filter(pl.col("label") == 0)
    assert not pairs(drawn) & pairs(frame)
    again = pl.concat([frame[[i]] for i in range(len(frame)) for _ in range(count)])
    # The context stays, times among it, though each item has times of its own.
    context = ["user", "age", "place", "when", "epoch"]
    assert drawn.select(context).equals(again.select(context))
    # What is known of an item comes along.
    genre = dict(frame.select("song", "genre").iter_rows())
    assert all(genre[song] == of for song, of in drawn.select("song", "genre").iter_rows())
    price = set(frame.select("song", "price").iter_rows())
    assert set(drawn.select("song", "price").iter_rows()) <= price
    assert f"{len(drawn):,} negative rows" in note and "another song, with its genre, price" in note
    # All items alike, whether many have them or not.
    often = drawn["song"].value_counts()["count"]
    assert len(often) == ITEMS and often.max() < 3 * often.mean()
    assert with_negatives(frame, f"user:song:{count}")[0].equals(rows)


def test_what_gives_drawn_rows_away_is_said():
    rng = np.random.default_rng(0)
    user, item, size = (rng.integers(n, size=ROWS) for n in (400, 40, 3))
    frame = pl.DataFrame(
        {
            "user": user,
            "pizza": item,
            "size": size,
            # Of each of three sizes, hence no single one of a pizza.
            "a price": 10 + 3 * size + 0.1 * (item * 7 % 40),
            # Nothing is wrong with what few have, or one user alone, or nobody twice.
            "city": user % 90,
            "name": [f"n{u}" for u in user],
            "second": np.arange(ROWS),
            "tags": [["x"]] * ROWS,
        }
    )
    _, note = with_negatives(frame, "user:pizza:2")
    assert "% of them hold a value of 'a price' that no row with their pizza has, as 0% of" in note
    assert note.endswith("if it belongs to the pizza, --drop 'a price'") and note.count(";") == 1
    assert ";" not in with_negatives(frame.drop("a price"), "user:pizza:2")[1]


def test_who_has_nearly_all_items_gets_fewer():
    frame = pl.DataFrame({"user": [1] * 9 + [2], "song": [*range(9), 9]})
    rows, _ = with_negatives(frame, "user:song:2")
    drawn = rows.filter(pl.col("label") == 0)
    assert set(drawn.filter(user=1)["song"]) == {9}
    assert len(drawn.filter(user=1)) == 18 and 9 not in drawn.filter(user=2)["song"]


def test_lists_of_an_item_come_along_and_missing_values_count_as_one():
    frame = pl.DataFrame(
        {
            "user": ["a", "a", "b", "b", None, None],
            "song": [1, 2, 1, 3, 4, None],
            "tags": [["x"], ["y", "z"], ["x"], [], ["w"], None],
            "deep": [[["x"]]] * 6,
        }
    )
    rows, note = with_negatives(frame, "user:song:3")
    tags = dict(zip(frame["song"], frame["tags"].to_list(), strict=True))
    assert all(tags[song] == of for song, of in rows.select("song", "tags").iter_rows())
    assert "with its tags" in note


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("user", "USER:ITEM or USER:ITEM:COUNT"),
        ("user:", "USER:ITEM or USER:ITEM:COUNT"),
        ("user:user", "USER:ITEM or USER:ITEM:COUNT"),
        ("user:song:0", "USER:ITEM or USER:ITEM:COUNT"),
        ("user:tune:4", "no column 'tune'"),
        ("user:one", "holds 1 value"),
        ("one:song", "every one of 1 users has all"),
        ("user:list", "holds lists"),
    ],
)
def test_what_cannot_be_drawn_is_told(text, told):
    frame = happened().with_columns(pl.lit(1).alias("one"), pl.concat_list("song").alias("list"))
    with pytest.raises(UserError, match=told):
        with_negatives(frame, text)


def test_labels_of_the_file_are_in_the_way_unless_they_say_nothing():
    frame = happened()
    ones = frame.with_columns(pl.lit(1).alias("label"))
    assert with_negatives(ones, "user:song")[0]["label"].mean() == 0.5
    with pytest.raises(UserError, match="leave --negatives out, or rename"):
        with_negatives(
            frame.with_columns(pl.Series("label", [0, 1] * 9000)[: len(frame)]), "user:song"
        )


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def test_a_run_trains_on_them_and_is_evaluated_on_them(tmp_path, capsys):
    path, later, out = tmp_path / "plays.csv", tmp_path / "later.csv", tmp_path / "run"
    happened().write_csv(path)
    happened(1).write_csv(later)
    assert run("train", path) != 0
    assert "--negatives USER:ITEM draws others" in " ".join(capsys.readouterr().err.split())
    # Each song has times of its own, by which drawn ones are known: see `_giveaways`.
    fast = ["--no-race", "--epochs", 12, "--batch-size", 128, "--drop", "epoch", "--out", out]
    assert run("train", path, "--negatives", "user:song:2", *fast) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "negative rows were drawn" in told and "label label" in told
    metrics = read_json(out / "metrics.json")
    assert 0.7 < metrics["test_auc"] < 0.95
    trained = load_trained(out)
    assert trained.evaluate(trained.test_split())["auc"] == pytest.approx(metrics["test_auc"])
    assert run("evaluate", out, later) == 0
    rows = 3 * len(happened(1))
    assert f"{rows:,} rows" in " ".join(capsys.readouterr().out.split())
    labelled = pl.read_csv(later).with_columns((pl.col("song") % 2).alias("label"))
    labelled.write_csv(later)
    for words in ([], ["--label", "label"]):
        assert run("evaluate", out, later, *words) == 0
        assert f"{len(labelled):,} rows" in " ".join(capsys.readouterr().out.split())
    assert run("predict", out, later, "--out", tmp_path / "scores.csv") == 0
    assert len(pl.read_csv(tmp_path / "scores.csv")) == len(happened(1))


def test_users_are_ids_though_drawn_rows_leave_nothing_for_labels_to_say_of_them(tmp_path):
    rng = np.random.default_rng(0)
    plays = {"user": np.repeat(np.arange(500), 3), "song": rng.integers(0, 90, 1500)}
    pl.DataFrame(plays).write_csv(tmp_path / "plays.csv")
    config = TrainConfig(data=str(tmp_path / "plays.csv"), label="label", negatives="user:song")
    assert [spec.kind for spec in prepare(config).encoder.fields] == ["categorical"] * 2
    as_numbers = replace(config, numeric={"user": "bucket"})
    assert prepare(as_numbers).encoder.fields[0].kind == "bucket"
