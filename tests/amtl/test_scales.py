"""Numbers beside their embeddings: which columns have them, what they are, what they are for."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import torch
from amtl import load
from amtl.data.encoding import Encoder
from amtl.data.fields import FieldSpec, infer_fields
from amtl.data.registry import Source
from amtl.data.scales import Scale
from amtl.run.config import TrainConfig
from amtl.run.folders import pack_run
from amtl.run.trained import Trained
from amtl.run.training import start
from scipy.special import ndtri
from scipy.stats import rankdata

NAMES = ["count", "many", "few", "hash", "text", "share", "told", "ids"]


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    rng = np.random.default_rng(0)
    n = 900
    count = rng.integers(0, 40, n)
    return pl.DataFrame(
        {
            "count": [None if i % 9 == 0 else int(c) for i, c in enumerate(count)],
            "many": rng.integers(0, 60, n).astype(float),
            "few": rng.integers(0, 10, n),
            "hash": rng.integers(0, 30, n) * 10**8,
            "text": [f"t{i}" for i in count],
            "share": rng.exponential(1.0, n),
            "told": rng.integers(0, 40, n),
            "ids": rng.integers(0, 40, n),
        }
    )


def taken(frame: pl.DataFrame, **options) -> list[FieldSpec]:
    numeric = {"told": "bucket", "ids": "categorical"}
    return infer_fields(frame, NAMES, numeric=numeric, **{"values": True, **options})


def test_numbers_and_whole_numbers_of_many_values_join_their_embeddings(frame):
    assert [f.name for f in taken(frame) if f.value] == ["count", "many", "share", "told"]
    assert not any(f.value for f in taken(frame, values=False))
    assert not any(f.value for f in taken(frame, default_numeric="categorical"))
    alone = taken(frame, default_numeric="standardise")
    assert [f.name for f in alone if f.value] == ["count", "many", "told"]


@pytest.mark.parametrize("telling", ["order", "order most", "itself", "nothing"])
@pytest.mark.parametrize("gaps", [False, True])
def test_ids_that_tell_by_themselves_have_no_numbers(telling, gaps):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 250, 20_000)
    rate = {
        "order": 0.2 + 0.6 * np.arange(250) / 250,
        "order most": 0.1 + 0.6 * np.arange(250) / 250 + 0.3 * rng.random(250),
        # Liked by chance, the later ones somewhat more.
        "itself": 0.1 + 0.6 * rng.random(250) + 0.2 * np.arange(250) / 250,
        "nothing": np.full(250, 0.4),
    }[telling]
    labels = (rng.random(len(ids)) < rate[ids]) * 1.0
    column = pl.Series("x", ids)
    if gaps:
        column = pl.select(pl.when(pl.Series(ids % 7 > 0)).then(column.cast(pl.Float64)))
        column = column.to_series().alias("x")
    (found,) = infer_fields(column.to_frame(), ["x"], labels=labels, values=True)
    kind = "bucket" if telling == "order" else "categorical"
    assert (found.kind, found.value) == (kind, telling != "itself")
    labels[40:] = np.nan
    (found,) = infer_fields(column.to_frame(), ["x"], labels=labels, values=True)
    assert found.value


@pytest.mark.parametrize("name", ["normal", "skewed", "ties"])
def test_a_scale_is_linear_and_by_rank(name):
    rng = np.random.default_rng(1)
    x = {
        "normal": rng.normal(5, 3, 4000),
        "skewed": np.exp(rng.normal(0, 1.5, 4000)),
        "ties": rng.poisson(1.0, 4000).astype(float),
    }[name]
    linear, ranked = Scale.fit(x).apply(x).double().numpy().T
    expected = np.clip((x - x.mean()) / x.std(), -8, 8)
    np.testing.assert_allclose(linear, expected, atol=1e-5)
    exact = ndtri((rankdata(x) - 0.5) / len(x))
    inside = np.abs(exact) < 1.5
    np.testing.assert_allclose(ranked[inside], exact[inside], atol=1e-6 if name == "ties" else 0.03)
    assert (np.diff(ranked[np.argsort(x)]) >= 0).all()


@pytest.mark.parametrize(
    "values", [[], [math.nan], [math.inf, math.nan], [3.0], [3.0, 3.0, 3.0], [-1e308, 1e308]]
)
def test_a_scale_of_next_to_nothing_is_finite(values):
    scale = Scale.fit(np.array(values, dtype=float))
    got = scale.apply(np.array([math.nan, -math.inf, 3.0, math.inf]))
    assert bool(torch.isfinite(got).all()) and got[0].tolist() == [0.0, 0.0]


def test_beyond_what_training_had_nothing_changes_and_one_odd_value_weighs_little():
    beyond, end = Scale.fit(np.arange(100.0)).apply(np.array([150.0, 99.0]))
    assert torch.equal(beyond, end) and 1.5 < end[0] < 2
    x = np.append(np.arange(100.0), 1e9)
    scale = Scale.fit(x)
    far, last, usual = scale.apply(np.array([1e12, 1e9, 50.0]))
    assert torch.equal(far, last) and far[0] == 8.0
    assert abs(float(usual[1])) < 0.1 and float(scale.apply(np.array([90.0]))[0, 1]) > 1


def test_an_encoder_has_scales_of_its_training_rows(frame):
    rows = torch.arange(300)
    encoder = Encoder.fit(frame, taken(frame), rows=rows)
    data = encoder.transform(frame)
    assert data.dense.shape == (frame.height, encoder.num_dense) == (900, 8)
    for i, name in enumerate(["count", "many", "share", "told"]):
        x = frame[name].cast(pl.Float64).fill_null(math.nan).to_numpy()
        expected = Scale.fit(x[:300]).apply(x)
        assert torch.equal(data.dense[:, 2 * i : 2 * i + 2], expected)
    assert torch.equal(data.dense[0, :2], torch.zeros(2))
    again = Encoder.from_tensors(*encoder.to_tensors())
    assert torch.equal(again.transform(frame).dense, data.dense)
    assert again.num_dense == encoder.num_dense


def test_a_number_alone_comes_before_those_beside_embeddings(frame):
    specs = infer_fields(frame, ["share", "count"], numeric={"share": "standardise"}, values=True)
    encoder = Encoder.fit(frame, specs)
    dense = encoder.transform(frame).dense
    assert encoder.num_dense == dense.shape[1] == 3
    assert float(dense[:, 0].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(dense[::9, 1:], torch.zeros(100, 2))


@pytest.mark.parametrize(
    "column",
    [
        pl.Series(["3", "12.0", " 7 ", "", None, "unknown"]),
        pl.Series(["3", "12.0", " 7 ", "", None, "unknown"], dtype=pl.Categorical),
        pl.Series([3.0, 12.0, 7.0, math.nan, None, None]),
    ],
    ids=["text", "categories", "floats"],
)
def test_ids_that_come_in_another_container_have_their_numbers(column):
    train = pl.DataFrame({"x": list(range(20)) * 5})
    encoder = Encoder.fit(train, infer_fields(train, ["x"], values=True))
    got = encoder.transform(pl.DataFrame({"x": column})).dense
    expected = encoder.transform(pl.DataFrame({"x": [3, 12, 7, None, None, None]})).dense
    assert encoder.num_dense == 2 and torch.equal(got, expected)
    assert bool((expected[:3] != 0).any()) and not bool(expected[3:].any())


def test_ids_in_whose_place_dates_come_are_missing():
    train = pl.DataFrame({"x": list(range(20)) * 5})
    encoder = Encoder.fit(train, infer_fields(train, ["x"], values=True))
    dates = pl.DataFrame({"x": pl.Series([1, 2], dtype=pl.Int32).cast(pl.Date)})
    assert torch.equal(encoder.transform(dates).dense, torch.zeros(2, 2))


def test_what_two_numbers_are_apart_is_learned_and_packed(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 400, (2, 4000))
    near = np.clip(a + rng.integers(-20, 21, 4000), 0, None)
    b = np.where(rng.random(4000) < 0.9, near, b)
    frame = pl.DataFrame({"start": a, "end": b, "label": (b > a).astype(int)})
    source = Source("made here", frame, "label")
    config = TrainConfig(
        data="made here",
        label="label",
        method="fixed",
        dim=4,
        race=False,
        embedding_decay=1e-3,
        # Adagrad learns half of that without them.
        table_optimizer="adam",
    )
    aucs = {}
    for values in (True, False):
        metrics = start(
            TrainConfig(**{**config.to_dict(), "values": values}),
            tmp_path / str(values),
            source=source,
        ).run()
        aucs[values] = metrics["test_auc"]
    assert aucs[True] > aucs[False] + 0.1, aucs
    packed = tmp_path / "model.safetensors"
    pack_run(tmp_path / "True", packed)
    opened = load(packed)
    assert isinstance(opened, Trained)
    scores = opened.probabilities(frame[:200])
    assert np.corrcoef(scores, frame["label"][:200])[0, 1] > 0.7
