"""Chains of runs, day after day, on a file of a few rows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from amtl.paper.records import read

from bench import days


@pytest.fixture
def file(tmp_path):
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 40, 1500), rng.integers(0, 30, 1500)
    says = rng.normal(size=40)[user] + rng.normal(size=30)[item] + rng.logistic(size=1500)
    columns = {"user": user, "item": item, "at": rng.permutation(1500), "y": (says > 0).astype(int)}
    path = tmp_path / "rows.parquet"
    pl.DataFrame(columns).write_parquet(path)
    return path


def test_every_day_is_trained_on_in_every_way(file, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    given = ["run", str(out), "--sets", "", "--seeds", "1"]
    given += ["--also", f"rows={file}:y:at:user,item"]
    days.main(given)
    (record,) = list(read(out))
    assert record["job"] == {"set": "rows", "seed": 1}
    assert [each["day"] for each in record["days"]] == [d for d in (1, 2, 3, 4) for _ in days.HOW]
    found = {(each["day"], each["how"]): each for each in record["days"]}
    assert len(found) == 16 and all(0.4 < each["auc"] < 1 for each in found.values())
    assert "cpu" not in found[2, "as it is"] and found[2, "warm"]["cpu"] > 0
    assert found[2, "alone"]["auc"] != found[2, "warm"]["auc"] != found[2, "as it is"]["auc"]
    days.main(given)
    assert len(list(read(out))) == 1
    days.main(["table", str(out)])
    shown = capsys.readouterr().out
    mean = np.mean([found[day, "warm"]["auc"] - found[day, "anew"]["auc"] for day in (1, 2, 3, 4)])
    assert "| rows | warm (4) | " in shown and f" | {mean:+.4f} ± " in shown


def test_days_are_in_order_of_time():
    frame = pl.DataFrame({"at": range(103)})
    pieces = days.parts(frame)
    assert [len(piece) for piece in pieces] == [51, 10, 11, 10, 10, 11]
    assert pl.concat(pieces)["at"].to_list() == list(range(103))
