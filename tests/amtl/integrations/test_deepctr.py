"""Models of deepctr-torch: train, convert, train, freeze, predict, save, load."""

from __future__ import annotations

import gc
import weakref

import amtl
import numpy as np
import pytest
import torch
from amtl.integrations import deepctr

pytest.importorskip("deepctr_torch", reason="needs: pip install -e .[deepctr]")

from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat
from deepctr_torch.models import DCN, DIN, WDL, AutoInt, DeepFM, xDeepFM

SAMPLES, LONGEST = 96, 4


def columns(history=False, shared="item"):
    """Users, items whose table a sequence feature may share, tags with zeros as padding."""
    tags = SparseFeat("tags", 12, embedding_dim=8)
    columns = [
        SparseFeat("user", 40, embedding_dim=8),
        SparseFeat("item", 30, embedding_dim=8),
        DenseFeat("price", 1),
        VarLenSparseFeat(
            SparseFeat("hist_item", 30, embedding_dim=8, embedding_name=shared),
            maxlen=LONGEST,
            length_name="seq_length",
        ),
    ]
    return columns if history else [*columns, VarLenSparseFeat(tags, maxlen=3, combiner="sum")]


def data(seed=0):
    rng = np.random.default_rng(seed)
    x = {
        "user": rng.zipf(1.5, SAMPLES) % 40,
        "item": rng.zipf(1.5, SAMPLES) % 30,
        "price": rng.random(SAMPLES),
        "hist_item": rng.zipf(1.5, (SAMPLES, LONGEST)) % 30,
        "seq_length": rng.integers(1, LONGEST + 1, SAMPLES),
        "tags": rng.integers(0, 12, (SAMPLES, 3)),
    }
    return x, rng.integers(0, 2, SAMPLES).astype(np.float32)


def build(kind, **options):
    hidden = {"dnn_hidden_units": (8, 4), "l2_reg_embedding": 1e-2, "init_std": 0.1, **options}
    if kind is DIN:
        return DIN(columns(history=True), ["item"], **hidden)
    # These two count tables where they mean features, so nothing can be shared.
    shared = None if kind in (xDeepFM, AutoInt) else "item"
    return kind(columns(shared=shared), columns(shared=shared), **hidden)


def fed(model, x):
    """A new dict each time: `fit` and `predict` write into theirs."""
    return {name: x[name] for name in model.feature_index}


def fit(model, x, y, epochs=2):
    model.fit(fed(model, x), y, batch_size=32, epochs=epochs, verbose=0, shuffle=False)


def compiled(model):
    model.compile("adam", "binary_crossentropy")
    return model


@pytest.mark.parametrize("collection", [False, None])
@pytest.mark.parametrize("kind", [DeepFM, DCN, xDeepFM, AutoInt, DIN, WDL])
def test_a_model_from_training_to_loading(kind, collection, tmp_path):
    x, y = data()
    model = compiled(build(kind))
    fit(model, x, y)
    trained = model.embedding_dict["item"].weight
    state = model.optim.state[trained]
    tables = set(model.embedding_dict)
    weights = torch.cat([t.weight for t in model.embedding_dict.values()]).detach()
    counts = deepctr.count(model, fed(model, x))
    options = {"collection": collection, "parametrization": "ordinal"}
    assert deepctr.convert(model, counts, 0.4, mask_lr=0.05, **options) is model
    layers = amtl.layers(model)
    if collection is False:
        assert set(layers) == {f"embedding_dict.{name}" for name in tables}
        assert model.embedding_dict["item"].weight is trained
        assert model.optim.state[trained] is state
    else:
        assert set(layers) == {"amtl_collection"}
        weight = model.amtl_collection.weight
        assert torch.equal(weight, weights) and trained not in model.optim.state
        moments = model.optim.state[weight]["exp_avg"][40:70]
        assert torch.equal(moments, state["exp_avg"]) and bool(moments.any())
    assert deepctr.count(model, fed(model, x)).keys() == counts.keys()
    assert model.optim.param_groups[-1]["lr"] == 0.05
    sizes = {id(p) for p in amtl.mask_parameters(model)}
    named = {name for name, p in model.named_parameters() if id(p) in sizes}
    assert len(named) == len(sizes) and all(name.startswith("amtl_sizes.") for name in named)
    for linear in model.linear_model.embedding_dict.values():
        assert type(linear) is torch.nn.Embedding
    before = [p.detach().clone() for p in amtl.mask_parameters(model)]
    fit(model, x, y)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, amtl.mask_parameters(model), strict=True)
    )

    searched = model.predict(fed(model, x))
    deepctr.freeze(model)
    np.testing.assert_array_equal(model.predict(fed(model, x)), searched)
    held = {id(p) for group in model.optim.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if ".head." not in name}
    blocks = [b.detach().clone() for b in amtl.table_parameters(model)]
    fit(model, x, y)
    after = amtl.table_parameters(model)
    assert all(not torch.equal(a, b) for a, b in zip(blocks, after, strict=True) if a.numel())
    rows = [layer.full_rows for layer in layers.values()]
    stored = [layer.stored_fraction() * layer.full_rows for layer in layers.values()]
    assert sum(stored) <= 0.4 * sum(rows)

    predicted = model.predict(fed(model, x))
    amtl.save(model, tmp_path / "model.safetensors")
    loaded = deepctr.load(tmp_path / "model.safetensors", compiled(build(kind)))
    np.testing.assert_array_equal(loaded.predict(fed(model, x)), predicted)
    torch.testing.assert_close(
        loaded.get_regularization_loss(), model.get_regularization_loss(), rtol=1e-6, atol=0
    )
    held = [id(p) for group in loaded.optim.param_groups for p in group["params"]]
    assert len(set(held)) == len(held) and set(held) == {id(p) for p in loaded.parameters()}
    fit(loaded, x, y)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(amtl.table_parameters(loaded), amtl.table_parameters(model), strict=True)
    )

    torch.save(model.state_dict(), tmp_path / "state.pt")
    again = deepctr.convert(build(kind), counts, budget=0.4, **options)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    np.testing.assert_array_equal(again.predict(fed(model, x)), predicted)
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    np.testing.assert_array_equal(whole.predict(fed(model, x)), predicted)
    fit(whole, x, y)


def test_counts_are_of_lookups_that_matter():
    model = build(DeepFM)
    x, _ = data()
    counts = deepctr.count(model, [x[name] for name in model.feature_index])
    assert list(counts) == ["user", "item", "tags"]
    torch.testing.assert_close(
        counts["user"], torch.bincount(torch.tensor(x["user"]), minlength=40)
    )
    inside = np.arange(LONGEST) < x["seq_length"][:, None]
    ids = np.concatenate([x["item"], x["hist_item"][inside]])
    torch.testing.assert_close(counts["item"], torch.bincount(torch.tensor(ids), minlength=30))
    assert counts["tags"][0] == 0 and counts["tags"].sum() == (x["tags"] != 0).sum()
    x["user"][3] = 40
    with pytest.raises(ValueError, match=r"'user' has ids from \d to 40; its table 'user' has 40"):
        deepctr.count(model, x)


@pytest.mark.parametrize("kind", [DeepFM, DIN])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_collection_gives_what_its_tables_give(kind, frozen, monkeypatch):
    """At full size both are the model as it was; a lookup is counted for each call."""
    x, y = data()
    results, calls = [], []
    embed = amtl.AMTLEmbeddingCollection._embed
    monkeypatch.setattr(
        amtl.AMTLEmbeddingCollection,
        "_embed",
        lambda self, rows: calls.append(rows.shape) or embed(self, rows),
    )
    for collection in (None, False):
        torch.manual_seed(0)
        model = compiled(build(kind))
        deepctr.convert(model, deepctr.count(model, x), budget=1.0, collection=collection)
        fit(model, x, y)
        if frozen:
            deepctr.freeze(model)
        fit(model, x, y)
        calls.clear()
        results.append(model.predict(fed(model, x)))
        if kind is DeepFM and collection is None:
            # One each for the two sequences, one for user and item.
            assert [tuple(rows) for rows in calls] == [(96, 4), (96, 3), (96, 2)]
        assert bool(calls) == (collection is None)
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_tables_that_differ_have_layers_of_their_own():
    features = [SparseFeat("user", 40, embedding_dim=8), SparseFeat("item", 30, embedding_dim=4)]
    features += [SparseFeat("day", 7, embedding_dim=8)]
    model = WDL(features, features, dnn_hidden_units=(4,))
    counts = {"user": np.arange(40), "item": np.arange(30), "day": np.arange(7)}
    with pytest.raises(ValueError, match="'item' differs from 'user' in embedding_dim"):
        deepctr.convert(model, counts, collection=True)
    assert not amtl.layers(model)
    deepctr.convert(model, {"user": counts["user"], "day": counts["day"]}, budget=1.0)
    assert list(amtl.layers(model)) == ["amtl_collection"]
    with pytest.raises(ValueError, match="has a collection already"):
        deepctr.convert(model, {"item": counts["item"]}, collection=True)
    X = torch.stack([torch.arange(5), torch.arange(5), torch.arange(5)], 1).float()
    out, dense = model.input_from_feature_columns(X, features, model.embedding_dict)
    assert [tuple(o.shape) for o in out] == [(5, 1, 8), (5, 1, 4), (5, 1, 8)] and dense == []
    for feature, found in zip(features, out, strict=True):
        assert torch.equal(found[:, 0], model.embedding_dict[feature.name](torch.arange(5)))
    model = WDL(features, features, dnn_hidden_units=(4,))
    deepctr.convert(model, counts)
    assert len(amtl.layers(model)) == 3


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path):
    x, _ = data()
    model = build(DeepFM)
    amtl.save(
        deepctr.freeze(deepctr.convert(model, deepctr.count(model, x))), tmp_path / "m.safetensors"
    )
    other = build(DeepFM, dnn_hidden_units=(9, 4))
    before = other.predict(fed(other, x))
    with pytest.raises(amtl.PackedFileError, match="does not fit the model"):
        deepctr.load(tmp_path / "m.safetensors", other)
    wider = columns()
    wider[0] = SparseFeat("user", 41, embedding_dim=8)
    grown = DeepFM(wider, wider, dnn_hidden_units=(8, 4))
    with pytest.raises(amtl.PackedFileError, match=r"'user' has shape \[40, 8\] .* \[41, 8\]"):
        deepctr.load(tmp_path / "m.safetensors", grown)
    assert not amtl.layers(grown)
    assert not amtl.layers(other) and type(other.embedding_dict["item"]) is torch.nn.Embedding
    np.testing.assert_array_equal(other.predict(fed(other, x)), before)


def test_compiling_before_or_after_is_the_same():
    x, y = data()
    results = []
    for order in ("before", "after"):
        model = build(DeepFM)
        counts = deepctr.count(model, x)
        torch.manual_seed(0)
        if order == "before":
            compiled(model)
        deepctr.convert(model, counts, budget=0.5)
        if order == "after":
            compiled(model)
        fit(model, x, y)
        deepctr.freeze(model)
        fit(model, x, y)
        results.append(model.predict(fed(model, x)))
    np.testing.assert_array_equal(*results)


def test_frozen_tables_are_penalised_and_dense_ones_are_gone():
    x, y = data()
    model = compiled(build(DeepFM, l2_reg_linear=0, l2_reg_embedding=0.5))
    before = model.get_regularization_loss().detach()
    deepctr.convert(model, deepctr.count(model, x), budget=0.4)
    torch.testing.assert_close(model.get_regularization_loss(), before)
    fit(model, x, y)
    dense = [weakref.ref(p) for p in amtl.table_parameters(model)]
    deepctr.freeze(model)
    gc.collect()
    assert all(reference() is None for reference in dense)
    expected = 0.5 * sum(b.square().sum() for b in amtl.table_parameters(model))
    torch.testing.assert_close(model.get_regularization_loss(), expected.detach()[None])
    model.get_regularization_loss().backward()
    assert all(b.grad is not None for b in amtl.table_parameters(model))


def test_early_stopping_goes_back_across_the_phases():
    x, _ = data()
    model = compiled(build(WDL))
    deepctr.convert(model, deepctr.count(model, x), budget=0.4)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    penalty = model.get_regularization_loss()
    deepctr.freeze(model)
    model.load_state_dict(best)
    torch.testing.assert_close(model.get_regularization_loss(), penalty)


def test_what_is_refused():
    model = build(DeepFM)
    counts = deepctr.count(model, data()[0])
    with pytest.raises(ValueError, match=r"no table 'users'.*\['user', 'item', 'tags'\]"):
        deepctr.convert(model, {"users": counts["user"]})
    with pytest.raises(ValueError, match=r"call model\.compile\(\) first"):
        deepctr.convert(model, counts, mask_lr=0.1)
    model.embedding_dict["user"].num_embeddings = 2**24 + 2
    with pytest.raises(ValueError, match=r"'user' has 16,777,218 rows.*float32"):
        deepctr.convert(model, counts)
    assert not amtl.layers(model)
    with pytest.raises(TypeError, match="Linear is not a model of deepctr-torch"):
        deepctr.convert(torch.nn.Linear(2, 2), counts)


def test_loading_wants_a_new_model(tmp_path):
    x, _ = data()
    model = build(DeepFM)
    counts = deepctr.count(model, x)
    amtl.save(deepctr.freeze(deepctr.convert(model, counts)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="newly built"):
        deepctr.load(tmp_path / "m.safetensors", model)
