"""Scores within groups of rows, as of each user."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from amtl.cli import main
from amtl.errors import UserError
from amtl.run import scoring
from amtl.run.folders import load_trained
from amtl.run.metrics import auc, grouped_auc
from sklearn.metrics import roc_auc_score

ROWS = 900


def amtl(*args: object) -> int:
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in args])
    return int(exit.value.code or 0)


def made(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 12, (300,), generator=generator).float()
    labels = (torch.rand(300, generator=generator) < 0.3).float()
    groups = torch.randint(-1, 40, (300,), generator=generator)
    weights = torch.rand(300, generator=generator) * (torch.rand(300, generator=generator) < 0.8)
    return scores, labels, groups, weights


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weighs", [False, True])
def test_the_auc_within_groups_is_the_mean_of_theirs(seed, weighs):
    scores, labels, groups, weights = made(seed)
    if not weighs:
        weights = torch.ones(300)
    values, shares, rows = [], [], 0.0
    for group in range(40):
        mine = (groups == group) & (weights > 0)
        if labels[mine].unique().numel() < 2:
            continue
        w = weights[mine].numpy()
        values.append(roc_auc_score(labels[mine], scores[mine], sample_weight=w))
        shares.append(w.sum())
        rows += w.sum()
    found, count, share = grouped_auc(scores, labels, groups, weights if weighs else None)
    assert found == pytest.approx(np.average(values, weights=shares))
    assert count == len(values)
    assert share == pytest.approx(rows / weights.sum())


def test_knowing_users_alone_is_knowing_nothing_within_them():
    groups = torch.arange(10).repeat_interleave(20)
    labels = ((torch.arange(200) * 7) % 20 < groups).float()
    assert auc(groups.float(), labels) > 0.7
    found, count, share = grouped_auc(groups.float(), labels, groups)
    assert (found, count, share) == (0.5, 9, 0.9)


def test_without_a_group_of_both_classes_there_is_none():
    none = grouped_auc(torch.rand(6), torch.ones(6), torch.arange(6))
    assert math.isnan(none[0]) and none[1:] == (0, 0.0)
    assert grouped_auc(torch.rand(0), torch.ones(0), torch.zeros(0, dtype=torch.int64))[1] == 0
    assert grouped_auc(torch.rand(2), torch.tensor([0.0, 1]), torch.tensor([-1, -1]))[1] == 0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pl.Series(["b", "a", None, "b"]), [1, 0, -1, 1]),
        (pl.Series([7, 2, None, 7], dtype=pl.Int16), [1, 0, -1, 1]),
        (pl.Series([1.5, float("nan"), None, 1.5]), [0, -1, -1, 0]),
        (pl.Series([True, False, True, None]), [1, 0, 1, -1]),
    ],
)
def test_rows_of_one_value_are_a_group(values, expected):
    assert scoring.grouped(pl.DataFrame({"u": values}), "u").tolist() == expected


def test_columns_that_cannot_group_are_refused():
    frame = pl.DataFrame({"tags": [[1], [2]]})
    with pytest.raises(UserError, match="--by tags: that column holds lists"):
        scoring.grouped(frame, "tags")
    with pytest.raises(UserError, match="no column 'user'"):
        scoring.grouped(frame, "user")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("scoring")
    user, item = rng.integers(0, 40, ROWS), rng.integers(0, 30, ROWS)
    effect = rng.normal(size=40)[user] + rng.normal(size=30)[item]
    pl.DataFrame(
        {
            "user": [f"u{i}" for i in user],
            "item": [f"i{i}" for i in item],
            "session": rng.integers(0, 60, ROWS),
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-effect))).astype(int),
        }
    ).write_parquet(folder / "clicks.parquet")
    options = ["--label", "label", "--fields", "user,item", "--dim", "4", "--epochs", "2"]
    data = folder / "clicks.parquet"
    assert amtl("train", data, *options, "--no-race", "--out", folder / "run") == 0
    return folder / "run"


@pytest.mark.parametrize("by", ["user", "session"])
def test_evaluate_tells_of_groups_of_any_column(run, by, capsys):
    trained = load_trained(run)
    split = scoring.of_test_split(trained, by)
    assert split.groups is not None and len(split.groups) == len(split.encoded) == ROWS // 10
    result = trained.evaluate(split.encoded, split.groups)
    assert amtl("evaluate", run, "--by", by) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"AUC within '{by}' {result['grouped_auc']:.4f}, the mean by rows over" in shown
    assert amtl("evaluate", run, run.parent / "clicks.parquet", "--by", by) == 0
    assert f"AUC within '{by}' 0." in " ".join(capsys.readouterr().out.split())


def test_evaluate_says_that_no_value_has_both_classes(run, tmp_path, capsys):
    frame = pl.read_parquet(run.parent / "clicks.parquet").unique("session")
    frame.write_csv(tmp_path / "once.csv")
    assert amtl("evaluate", run, tmp_path / "once.csv", "--by", "session") == 0
    assert "AUC within 'session': none" in " ".join(capsys.readouterr().out.split())
    assert amtl("evaluate", run, "--by", "nobody") == 1
