"""amtl pack --budget: principal components of a run of full size, without more training."""

from __future__ import annotations

import io
import json

import numpy as np
import polars as pl
import pytest
import torch
from amtl.errors import UserError
from amtl.run import folders, methods
from amtl.run.config import TrainConfig
from amtl.run.display import print_result
from amtl.run.metrics import auc
from amtl.run.model import predict
from amtl.run.training import start
from rich.console import Console

ROWS, VALUES = 20_000, 400


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Users and shops with one hidden trait each, and lists of tags: tables of few components."""
    draw = np.random.default_rng(0)
    traits = {name: draw.normal(size=VALUES) for name in ("user", "shop")}
    rows = {name: (VALUES * draw.random(ROWS) ** 2).astype(int) for name in traits}
    tags = draw.integers(0, 30, (ROWS, 2))
    said = traits["user"][rows["user"]] * traits["shop"][rows["shop"]] + (tags < 10).sum(1) - 0.7
    label = (draw.random(ROWS) < 1 / (1 + np.exp(-3 * said))).astype(int)
    columns = {name: [f"{name}{v}" for v in found] for name, found in rows.items()}
    columns |= {"tags": [f"a{a}|a{b}" for a, b in tags], "label": label.tolist()}
    path = tmp_path_factory.mktemp("data") / "shops.csv"
    pl.DataFrame(columns).write_csv(path)
    return path


def run_of(data, folder, **changes):
    given = {"dim": 32, "epochs": 12, "method": "fixed", "race": False, "embedding_decay": 1e-4}
    config = TrainConfig(str(data), "label", **{**given, **changes})
    start(config, folder).run()
    return folder


@pytest.mark.parametrize("fields", [["user", "shop"], ["user", "shop", "tags"]])
def test_a_full_table_is_cut_off_to_little(data, tmp_path, fields):
    folder = run_of(data, tmp_path / "run", fields=fields)
    whole = folders.load_run(folder)
    full = methods.dense_bytes(whole.model.table)
    share, path = 0.05, tmp_path / "small.safetensors"
    packed = folders.pack_run(folder, path, budget=str(share))
    assert methods.stored_bytes(packed.model.table) <= share * full
    assert packed.model.table.basis is None
    loaded = folders.from_packed(folders.open_packed(path))
    assert path.stat().st_size < 0.6 * full + 30_000
    # Numbers of rows are new, so rows to score are encoded anew.
    frame = pl.read_csv(data)
    old, new = (
        predict(t.model, t.encoder.transform(frame)) for t in (folders.load_run(folder), loaded)
    )
    truth = torch.tensor(frame["label"].to_list(), dtype=torch.float32)
    assert auc(old, truth) > 0.75
    assert abs(auc(old, truth) - auc(new, truth)) < 0.03
    assert float((old - new).abs().mean()) < 0.35 * float(old.std())
    # Cut off as it is, much more is lost.
    plain = folders.load_run(folder)
    layer = methods.build_table("rule", plain.encoder, 32, budget=share, options={"bits": 8})
    with torch.no_grad():
        methods.table_parameters(layer)[0].copy_(methods.table_parameters(plain.model.table)[0])
    plain.model.table = layer.freeze().eval()
    cut = predict(plain.model, plain.encoder.transform(frame))
    assert float((old - cut).abs().mean()) > 2 * float((old - new).abs().mean())


def test_bits_and_bytes_are_those_asked_for(data, tmp_path):
    folder = run_of(data, tmp_path / "run", fields=["user", "shop"], epochs=2)
    packed = folders.pack_run(folder, tmp_path / "a", budget="4kB", bits=4)
    assert methods.number_bits(packed.model.table) == 4
    assert 3500 < methods.stored_bytes(packed.model.table) <= 4000
    # What holds every number is rounded, and no more.
    packed = folders.pack_run(folder, tmp_path / "b", budget="0.5")
    assert methods.number_bits(packed.model.table) == 8
    rounded = folders.pack_run(folder, tmp_path / "c", bits=8)
    frame = pl.read_csv(data)
    said = [predict(t.model, t.encoder.transform(frame)) for t in (packed, rounded)]
    assert torch.allclose(*said, atol=0.02)


def test_what_cannot_be_cut_off(data, tmp_path):
    folder = run_of(data, tmp_path / "run", method="rule", budget=0.4, bits="32", epochs=1)
    with pytest.raises(UserError, match=r"--budget 0.1 is for tables of full size"):
        folders.pack_run(folder, tmp_path / "a", budget="0.1")
    folder = run_of(data, tmp_path / "full", epochs=1)
    with pytest.raises(UserError, match="--budget"):
        folders.pack_run(folder, tmp_path / "a", budget="none")
    other = run_of(data, tmp_path / "other", fields=["user", "shop"], backbone="deepfm", epochs=1)
    with pytest.raises(UserError, match=r"for runs of --backbone dnn.* this one has deepfm"):
        folders.pack_run(other, tmp_path / "a", budget="0.1")
    with pytest.raises(UserError, match="--budget"):
        folders.pack_run(folder, tmp_path / "a", budget="1B")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, True),
        ({"bits": "8"}, False),
        ({"backbone": "deepfm"}, False),
        ({"method": "rule"}, False),
    ],
)
def test_a_run_says_that_it_may_be_cut_off(data, tmp_path, changes, said):
    folder = run_of(data, tmp_path / "run", fields=["user", "shop"], epochs=1, **changes)
    console = Console(record=True, width=200, file=io.StringIO())
    print_result(console, json.loads((folder / "metrics.json").read_text()), folder)
    assert ("the same with --budget 0.1" in console.export_text()) == said
    if not said:
        with pytest.raises(UserError, match="--budget"):
            folders.pack_run(folder, tmp_path / "a", budget="0.1")
    else:
        folders.pack_run(folder, tmp_path / "a", budget="0.1")
