"""Backbones: against their formulas in plain loops, and through training, packing, scoring."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from amtl.cli import main
from amtl.data.encoded import Batch
from amtl.data.registry import Source
from amtl.errors import UserError
from amtl.run import methods
from amtl.run.backbones import INTERACTIONS, InterestPooling, interaction
from amtl.run.config import BACKBONES, TrainConfig
from amtl.run.done import Interrupted
from amtl.run.folders import load_run, load_trained, pack_run
from amtl.run.model import build_model
from amtl.run.report import group_results
from amtl.run.training import start

ROWS = 1500
F, D, K, B = 3, 4, 2, 5


@pytest.fixture(scope="module")
def source() -> Source:
    """What a user bought before says as much of the label as user and item do."""
    rng = np.random.default_rng(0)
    user, item = rng.zipf(1.4, ROWS) % 50, rng.zipf(1.4, ROWS) % 40
    taste, kind = rng.normal(size=(50, 3)), rng.normal(size=(40, 3))
    bought = [rng.zipf(1.6, rng.integers(0, 4)) % 12 for _ in range(ROWS)]
    past = rng.normal(size=12)
    logit = (taste[user] * kind[item]).sum(1) + [past[b].sum() for b in bought]
    frame = pl.DataFrame(
        {
            "user": user,
            "item": [f"i{i}" for i in item],
            "bought": ["|".join(f"b{v}" for v in b) for b in bought],
            "price": rng.normal(size=ROWS),
            "label": (rng.random(ROWS) < 1 / (1 + np.exp(-logit))).astype(int),
        }
    )
    return Source("made here", frame, "label")


def settings(**changes) -> TrainConfig:
    base = {
        "data": "made here",
        "label": "label",
        "default_numeric": "standardise",
        "separators": {"bought": "|"},
        "dim": 8,
        "budget": 0.5,
        "batch_size": 200,
        "epochs": 8,
        "validations": 2,
        "race": False,
        "hidden": [8],
        "lr": 1e-2,
        "table_lr": 0.05,
        "init_std": 0.1,
    }
    return TrainConfig(**{**base, **changes})


def test_the_command_line_knows_every_backbone():
    assert tuple(INTERACTIONS) == BACKBONES


@pytest.mark.parametrize("bags", [True, False])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_model_is_exported_for_batches_of_any_size(source, backbone, bags):
    """docs/serving.md, A trained run."""
    if backbone == "din" and not bags:
        pytest.skip("it pools a history")
    drop = [] if bags else ["bought"]
    task = start(settings(backbone=backbone, drop=drop), source=source).task
    model = build_model(settings(backbone=backbone), task.encoder).eval()
    model.table.freeze()
    size, lookups = torch.export.Dim("size", min=2, max=500), torch.export.Dim("lookups", min=2)
    offsets = {0: len(task.encoder.fields) * size} if bags else None
    shapes = Batch({0: lookups if bags else size}, offsets, {0: size}, {0: size})
    batch = task.train.batch(torch.arange(64))
    compiled = torch.export.export(model, (batch,), dynamic_shapes=(shapes,)).module()
    for rows in (torch.arange(3), torch.arange(40, 400)):
        other = task.train.batch(rows)
        assert torch.allclose(compiled(other), model(other), atol=1e-6)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_learns_packs_and_predicts_the_same(source, tmp_path, backbone):
    trainer = start(settings(backbone=backbone), tmp_path / "run", source=source)
    rows = trainer.task.encoder.num_rows
    shapes = [p.shape for p in trainer.learner.model.dense_parameters()]
    assert not any(rows in shape for shape in shapes), "values must cost the table's bytes only"
    before = [p.detach().clone() for p in trainer.learner.model.dense_parameters()]
    metrics = trainer.run()
    assert metrics["test_auc"] > 0.6
    after = trainer.learner.model.dense_parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert metrics["stored_bytes"] <= rows * 8 * 4 / 2
    expected = load_run(tmp_path / "run").logits(source.frame)
    pack_run(tmp_path / "run", tmp_path / "packed.safetensors")
    packed = load_trained(tmp_path / "packed.safetensors")
    assert packed.config.backbone == backbone
    assert torch.equal(packed.logits(source.frame), expected)
    # 16 bits a number, or 8 in matrices and a step size a row, for validation does not mind.
    halves = 2 * sum(p.numel() for p in after)
    few = sum(p.numel() + 4 * len(p) if p.dim() == 2 else 2 * p.numel() for p in after)
    assert metrics["mlp_bytes"] in (few, halves)


@pytest.mark.parametrize("backbone", ["deepfm", "din"])
@pytest.mark.parametrize("method", ["fixed", "rule"])
def test_other_methods_have_backbones_too(source, tmp_path, method, backbone):
    config = settings(backbone=backbone, method=method, epochs=2)
    start(config, tmp_path / "run", source=source).run()
    expected = load_run(tmp_path / "run").logits(source.frame)
    packed = pack_run(tmp_path / "run", tmp_path / "packed.safetensors").logits(source.frame)
    if method == "rule":
        assert torch.equal(packed, expected)
    else:  # nn.EmbeddingBag, which trains, averages in another order than what packs.
        torch.testing.assert_close(packed, expected)


def test_train_pack_and_evaluate_from_the_shell(source, tmp_path, capfd):
    def amtl(*args, code=0):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert (stop.value.code or 0) == code
        return " ".join("".join(capfd.readouterr()).split())

    data, out, file = tmp_path / "d.parquet", tmp_path / "run", tmp_path / "m.safetensors"
    source.frame.write_parquet(data)
    options = ["--backbone", "din", "--dim", "4", "--epochs", "2", "--batch-size", "256"]
    amtl("train", data, "--label", "label", *options, "--out", out)
    amtl("pack", out, "-o", file)
    told = [amtl("evaluate", each, data).partition("the model was trained") for each in (out, file)]
    scored = [text.partition("AUC")[2] for text, _, _ in told]
    assert scored[0] == scored[1] and "log loss" in scored[0]
    more = ["--fields", "user,item", "--out", out, "--force"]
    said = amtl("train", data, "--label", "label", *options, *more, code=1)
    assert "--backbone din needs a field of several values" in said
    assert load_run(out).config.fields == [], "the old run is whole"


@pytest.mark.parametrize("backbone", ["dcn", "din"])
def test_a_resumed_run_equals_an_uninterrupted_one(source, tmp_path, backbone):
    config = settings(backbone=backbone, epochs=3)
    expected = start(config, source=source).run()
    with pytest.raises(Interrupted):
        start(config, tmp_path, source=source, stop=lambda steps: steps == 7).run()
    metrics = start(None, tmp_path, resume=True, source=source).run()
    assert metrics["test_auc"] == expected["test_auc"]
    assert metrics["test_logloss"] == expected["test_logloss"]


def test_what_a_backbone_needs_is_said(source):
    with pytest.raises(UserError, match=r"--backbone 'deep': choose one of dnn, deepfm"):
        settings(backbone="deep")
    with pytest.raises(UserError, match=r"needs a field of several values.*--multi"):
        start(settings(backbone="din", fields=["user", "item"]), source=source)
    with pytest.raises(UserError, match="needs a field of one value"):
        start(settings(backbone="din", fields=["bought"]), source=source)
    for backbone in ("deepfm", "xdeepfm", "widedeep"):
        with pytest.raises(UserError, match=f"--backbone {backbone} needs --dim 2 or more"):
            start(settings(backbone=backbone, dim=1), source=source)


def test_runs_from_before_there_were_backbones(source):
    config = settings().to_dict()
    del config["backbone"]
    assert TrainConfig.from_dict(config).backbone == "dnn"
    run = {"method": "amtl", "dim": 8, "budget": 0.5, "stored_bytes": 8}
    configs = [config, settings().to_dict(), settings(backbone="dcn").to_dict()]
    names = [r.name for r in group_results([{**run, "config": c} for c in configs])]
    assert names == ["AMTL D=8 50%", "dcn, AMTL D=8 50%"]


def test_runs_from_before_have_sums(source, tmp_path):
    before = settings(backbone="deepfm", backbone_means=False, epochs=1)
    start(before, tmp_path / "run", source=source).run()
    expected = load_run(tmp_path / "run").logits(source.frame)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config.pop("backbone_means") is False
    del config["crc32"]
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    old = load_run(tmp_path / "run")
    assert not old.model.interaction.means
    assert torch.equal(old.logits(source.frame), expected)
    packed = pack_run(tmp_path / "run", tmp_path / "packed.safetensors")
    assert torch.equal(load_trained(tmp_path / "packed.safetensors").logits(source.frame), expected)
    assert not packed.model.interaction.means


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "din"])
def test_nothing_runs_away_from_many_fields_at_default_rates(backbone):
    """Two fields of forty tell of the label; with sums log loss was above 2, guessing has .69."""
    rng = np.random.default_rng(0)
    columns = {f"c{i}": rng.integers(0, 300, 4000) for i in range(40)}
    logit = rng.normal(size=300)[columns["c0"]] + rng.normal(size=300)[columns["c1"]]
    label = (rng.random(4000) < 1 / (1 + np.exp(-logit))).astype(int)
    many = Source("forty fields", pl.DataFrame({**columns, "label": label}), "label")
    config = TrainConfig("forty fields", "label", epochs=1, race=False, batch_size=64)
    metrics = start(replace(config, backbone=backbone), source=many).run()
    assert metrics["val_logloss"] < 0.69


def inputs(dim=D):
    torch.manual_seed(0)
    return torch.randn(B, F), torch.randn(B, F, dim), torch.randn(B, K)


def part(name, means=True):
    torch.manual_seed(1)
    made = interaction(name, F, D + INTERACTIONS[name].first_order, K, means)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def first_order(made, own, dense):
    return own.sum(1) / (F if made.means else 1) + (dense * made.dense_weight).sum(1)


@pytest.mark.parametrize("means", [True, False])
def test_wide_and_fm_are_their_means_or_sums(means):
    own, embedded, dense = inputs()
    made = part("widedeep", means)
    torch.testing.assert_close(made(own, embedded, dense), first_order(made, own, dense))
    made = part("deepfm", means)
    pairs = sum(
        (embedded[:, f] * embedded[:, g]).sum(1) for f, g in itertools.combinations(range(F), 2)
    )
    expected = first_order(made, own, dense) + pairs / (F * (F - 1) / 2 * D if means else 1)
    torch.testing.assert_close(made(own, embedded, dense), expected)


def test_of_one_field_there_are_no_pairs():
    made = interaction("deepfm", 1, D + 1, 0)
    embedded = torch.randn(B, 1, D)
    assert torch.equal(made(torch.zeros(B, 1), embedded, torch.zeros(B, 0)), torch.zeros(B))


@pytest.mark.parametrize("means", [True, False])
def test_cross_network_is_its_recursion(means):
    own, embedded, dense = inputs()
    made = part("dcn", means)
    for b in range(B):
        first = torch.cat([*embedded[b], dense[b]])
        x = first
        for weight, bias in zip(made.weights, made.biases, strict=True):
            x = torch.outer(first, x) @ weight / (len(x) if means else 1) + bias + x
        expected = x @ made.out.weight[0]
        torch.testing.assert_close(made(own, embedded, dense)[b], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("means", [True, False])
def test_compressed_interaction_is_its_sum_over_pairs(means):
    own, embedded, dense = inputs()
    made = part("xdeepfm", means)
    x, sums = embedded, []
    for layer in made.layers:
        weight = layer.weight.view(len(layer.weight), x.shape[1], F)
        rows = []
        for h in range(len(weight)):
            row = layer.bias[h].expand(B, D)
            for i, j in itertools.product(range(x.shape[1]), range(F)):
                row = row + weight[h, i, j] * x[:, i] * embedded[:, j]
            rows.append(row)
        x = torch.stack(rows, 1)
        sums.append(x.mean(2) if means else x.sum(2))
    expected = first_order(made, own, dense) + torch.cat(sums, 1) @ made.out.weight[0]
    torch.testing.assert_close(made(own, embedded, dense), expected, rtol=1e-4, atol=1e-3)


def test_field_attention_is_softmax_between_fields():
    own, embedded, dense = inputs()
    made = part("autoint")
    x = embedded
    for layer in made.layers:
        heads = []
        query, key, value, residual = layer(x).split(16, -1)
        for h in range(2):
            q, k, v = (t[:, :, 8 * h : 8 * h + 8] for t in (query, key, value))
            heads.append(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        x = torch.relu(torch.cat(heads, -1) + residual)
    torch.testing.assert_close(
        made(own, embedded, dense), made.out(x.flatten(1)).squeeze(1), rtol=1e-4, atol=1e-3
    )


def test_interest_pooling_weighs_each_value_of_each_bag():
    torch.manual_seed(0)
    pool = InterestPooling(2, 2, D)
    lengths = [1, 1, 3, 0, 1, 1, 0, 2, 1, 1, 1, 1]
    values = torch.randn(sum(lengths), D, requires_grad=True)
    offsets = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], dtype=torch.int32)
    pooled = pool(values, offsets)
    assert pooled.shape == (3, 4, D)
    parts = values.split(lengths)
    for b in range(3):
        singles = [parts[4 * b], parts[4 * b + 1]]
        torch.testing.assert_close(pooled[b, :2], torch.cat(singles))
        query = pool.query(torch.cat(singles).flatten())
        for g in range(2):
            expected = torch.zeros(D)
            for e in parts[4 * b + 2 + g]:
                weight = pool.units[g](torch.cat([e, query, e - query, e * query]))
                expected = expected + weight * e
            torch.testing.assert_close(pooled[b, 2 + g], expected)
    pooled.sum().backward()
    assert values.grad is not None
    assert pool(values[:0], offsets[:0]).shape == (0, 4, D)


def test_first_order_weights_are_the_first_numbers_of_rows(source):
    trainer = start(settings(backbone="widedeep", method="fixed"), source=source)
    model = trainer.learner.model
    torch.nn.init.zeros_(model.mlp[-1].weight)
    torch.nn.init.zeros_(model.mlp[-1].bias)
    batch = trainer.task.train.batch(torch.arange(20))
    expected = model.embed(batch)[:, :, 0].mean(1)
    torch.testing.assert_close(model(batch), expected)
    assert model.mlp[0].in_features == 3 * 7 + trainer.task.encoder.num_dense
    assert methods.table_parameters(model.table)[0].shape[1] == 8
