"""What is left of trained tables: a line a model, made once."""

from __future__ import annotations

import json

from bench import components, dropin


def test_a_model_is_a_line_that_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(dropin, "EPOCHS", 1)
    out = tmp_path / "out.jsonl"
    given = [str(out), "--sets", "", "--also", "s=synthetic:600:label:shop,city", "--seeds", "1"]
    for _ in range(2):
        components.main([*given, "--dims", "4", "--budgets", "0.3"])
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["job"] == {"set": "s", "seed": 1, "dim": 4, "std": 0.01}
    ways = [(each["basis"], each["bits"]) for each in line["left"]]
    assert ways == [(None, "auto"), (None, 8), ("principal", "auto"), ("principal", None)]
    for each in line["left"]:
        assert 0 < each["stored_bytes"] <= 0.3 * line["dense_bytes"]
        assert abs(each["test_auc"] - line["test_auc"]) < 0.2
