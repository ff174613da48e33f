"""Dot products: the benchmark runs, and its table says what the runs do."""

from __future__ import annotations

import pytest
import torch
from amtl.paper.records import read

from bench import factors, sequences


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"USERS": 300, "ITEMS": 150, "BUDGETS": (0.3,)}.items():
        monkeypatch.setattr(factors, name, value)
    monkeypatch.setattr(sequences, "ITEMS", 150)


@pytest.mark.parametrize("task", factors.TASKS)
def test_it_runs_and_nothing_is_lost_in_8_bits(task, tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    given = [str(out), "--seeds", "1", "--tasks", task, "--samples", "6000", "--epochs", "4"]
    factors.main(given)
    factors.main(given)
    (record,) = read(out)
    plain, converted, compressed = record["models"]
    assert plain["kind"] == "plain" and plain["score"] > 0
    for other in (converted, compressed):
        assert other["score"] == pytest.approx(plain["score"], abs=0.02)
        # Attention keeps its 32 bits, and is most of a model of so few items.
        assert 0.25 < other["share"] < (0.9 if task == "sequences" else 0.6)
    assert f"| {task} | converted, 30 % |" in capsys.readouterr().out


def test_tables_by_adagrad_are_named_so(tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    given = [str(out), "--seeds", "1", "--tasks", "ratings", "--samples", "6000", "--epochs", "2"]
    factors.main(given)
    factors.main([*given, "--adagrad", "--rate", "0.5"])
    by_adam, by_adagrad = (record["models"][0]["score"] for record in read(out))
    assert by_adam != by_adagrad
    assert "| ratings, adagrad True, rate 0.5 | plain |" in capsys.readouterr().out


def test_differences_are_those_of_a_seed():
    records = []
    for seed, scores in enumerate([(1, 1.5), (2, 2.25)]):
        kinds = zip(("plain", "converted"), (1.0, 0.3), scores, strict=True)
        found = [{"kind": k, "budget": b, "score": score, "share": 0.5} for k, b, score in kinds]
        records.append({"job": {"task": "ratings", "seed": seed}, "models": found})
    lines = factors.table(records)
    assert lines[-1] == "| ratings | converted, 30 % | 1.8750 (+0.5000, +0.2500) | 50.0 % |"


def test_a_better_order_of_items_is_a_higher_recall():
    data = factors.Data("retrieval", 0, 6000)
    model = factors.Factors(factors.USERS, factors.ITEMS)
    before = data.metric(model, 2)
    with torch.no_grad():
        model.item_bias.weight[:, 0] = torch.bincount(data.items, minlength=factors.ITEMS).float()
    assert data.metric(model, 2) > before


def test_sequences_are_told_by_what_follows_what():
    """The item that comes next is found more often by a trained model than by popularity."""
    data = sequences.Sequences(0, 30_000)
    model = data.model().eval()
    popular = data.counts()["item"].topk(sequences.TOP).indices
    by_count = torch.isin(data.taken[:, 2 + sequences.LENGTH], popular).float().mean()
    assert data.metric(model, 2) < by_count
    assert factors.train(data, model, 8, 0) > by_count + 0.05
