"""Models of FuxiCTR: train, convert, train, freeze, predict, save, load."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import amtl
import numpy as np
import pytest
import torch
from amtl.integrations import fuxictr
from torch import nn

pytest.importorskip("fuxictr", reason="needs: pip install -e .[fuxictr], which brings Ray along")

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import (
    FactorizationMachine,
    FeatureEmbedding,
    FeatureEmbeddingDict,
    MLP_Block,
)
from fuxictr.pytorch.models import BaseModel, MultiTaskModel

DIM = 8


def feature_map(folder):
    """Users, items whose table a history shares, and a number."""
    result = FeatureMap("made_here", str(folder))
    result.features = OrderedDict(
        user={"type": "categorical", "source": "", "vocab_size": 40, "padding_idx": 0},
        item={"type": "categorical", "source": "", "vocab_size": 30, "padding_idx": 0},
        history={
            "type": "sequence",
            "source": "",
            "vocab_size": 30,
            "max_len": 4,
            "padding_idx": 0,
            "share_embedding": "item",
            "feature_encoder": "layers.MaskedAveragePooling()",
        },
        price={"type": "numeric", "source": ""},
    )
    result.labels = ["label"]
    result.num_fields = 4
    return result


class DeepFM(BaseModel):
    def __init__(self, features, folder, **options):
        super().__init__(
            features, verbose=0, model_root=str(folder), metrics=["AUC", "logloss"], **options
        )
        torch.manual_seed(0)
        self.embedding_layer = FeatureEmbedding(features, DIM)
        self.fm = FactorizationMachine(features)
        self.mlp = MLP_Block(4 * DIM, hidden_units=[8], output_dim=1)
        self.compile("adam", "binary_crossentropy", 1e-2)
        self.reset_parameters()

    def forward(self, inputs):
        x = self.get_inputs(inputs)
        embedded = self.embedding_layer(x)
        logits = self.fm(x, embedded) + self.mlp(embedded.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logits)}


@pytest.fixture
def model(tmp_path):
    return build(tmp_path)


def build(folder, **options):
    (folder / "made_here").mkdir(exist_ok=True)
    regularizers = {"embedding_regularizer": "l2(0.01)", "net_regularizer": "l2(0.001)"}
    return DeepFM(feature_map(folder), folder, **{**regularizers, **options})


def batches():
    rng = np.random.default_rng(0)
    return [
        {
            "user": torch.tensor(rng.zipf(1.5, 32) % 40),
            "item": torch.tensor(1 + rng.zipf(1.5, 32) % 29),
            "history": torch.tensor(rng.zipf(1.5, (32, 4)) % 30),
            "price": torch.tensor(rng.random(32)),
            "label": torch.tensor(rng.integers(0, 2, 32)),
        }
        for _ in range(3)
    ]


def fit(model, epochs=2):
    model.fit(batches(), epochs=epochs, validation_data=batches())


PLACE = "embedding_layer.embedding_layer"


def test_padding_rows_cost_no_order(model, tmp_path):
    """Each table has one: with a budget for all rows, they stay where they are."""
    fuxictr.convert(model, fuxictr.count(model, batches()), 0.2)
    fuxictr.freeze(model)
    (tables,) = amtl.layers(model).values()
    # 4 bits a number, nothing for padding rows, a step size and where its rows end a table.
    assert tables.stored_bytes() == tables.value_bytes() == 68 * DIM // 2 + 2 * 8
    fit(model)
    predicted = model.predict(batches())
    amtl.save(model, tmp_path / "m")
    loaded = fuxictr.load(tmp_path / "m", build(tmp_path))
    np.testing.assert_array_equal(loaded.predict(batches()), predicted)
    (tables,) = amtl.layers(loaded).values()
    assert tables.told_order() is None and not tables.table("item")(torch.tensor([0])).any()


@pytest.mark.parametrize("collection", [False, None])
def test_a_model_from_training_to_loading(collection, model, tmp_path):
    fit(model)
    tables = model.get_submodule(PLACE).embedding_layers
    trained = tables["item"].weight
    state = model.optimizer.state[trained]
    weights = torch.cat([tables[name].weight for name in ("user", "item")]).detach()
    options = {"collection": collection, "parametrization": "ordinal"}
    counts = fuxictr.count(model, batches())
    assert fuxictr.convert(model, counts, 0.4, mask_lr=0.05, **options) is model
    assert tables["history"] is tables["item"]
    assert tables["item"].padding_idx == tables["user"].padding_idx == 0
    layers = amtl.layers(model)
    if collection is False:
        assert set(layers) == {f"{PLACE}.embedding_layers.{name}" for name in ("user", "item")}
        assert tables["item"].weight is trained
    else:
        assert set(layers) == {f"{PLACE}.amtl_collection"}
        joined = layers[f"{PLACE}.amtl_collection"]
        assert joined.name == f"{PLACE}.amtl_collection" and joined.names == ["user", "item"]
        assert torch.equal(joined.weight, weights) and trained not in model.optimizer.state
        moments = model.optimizer.state[joined.weight]["exp_avg"][40:]
        assert torch.equal(moments, state["exp_avg"]) and bool(moments.any())
    assert model.optimizer.param_groups[-1]["lr"] == 0.05
    linear = model.fm.lr_layer.embedding_layer.embedding_layer.embedding_layers
    assert type(linear["user"]) is type(linear["history"]) is nn.Embedding
    before = [p.detach().clone() for p in amtl.mask_parameters(model)]
    fit(model)
    after = amtl.mask_parameters(model)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    searched = model.predict(batches())
    fuxictr.freeze(model)
    np.testing.assert_array_equal(model.predict(batches()), searched)
    held = {id(p) for group in model.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if ".head." not in name}
    blocks = [b.detach().clone() for b in amtl.table_parameters(model)]
    fit(model)
    trained = amtl.table_parameters(model)
    assert all(not torch.equal(a, b) for a, b in zip(blocks, trained, strict=True) if a.numel())
    predicted = model.predict(batches())
    amtl.save(model, tmp_path / "model.safetensors")
    loaded = fuxictr.load(tmp_path / "model.safetensors", build(tmp_path))
    np.testing.assert_array_equal(loaded.predict(batches()), predicted)
    torch.testing.assert_close(loaded.regularization_loss(), model.regularization_loss())
    held = [id(p) for group in loaded.optimizer.param_groups for p in group["params"]]
    assert len(set(held)) == len(held) and set(held) == {id(p) for p in loaded.parameters()}
    fit(loaded)
    again = amtl.table_parameters(loaded)
    assert any(not torch.equal(a, b) for a, b in zip(again, trained, strict=True))

    model.save_weights(tmp_path / "weights")
    twin = fuxictr.convert(build(tmp_path), counts, **options)
    twin.load_weights(tmp_path / "weights")
    np.testing.assert_array_equal(twin.predict(batches()), predicted)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        np.testing.assert_array_equal(copied.predict(batches()), predicted)
        before = [p.detach().clone() for p in amtl.table_parameters(copied)]
        fit(copied)
        now = amtl.table_parameters(copied)
        assert any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
    np.testing.assert_array_equal(model.predict(batches()), predicted)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_collection_trains_as_its_tables_do(frozen, tmp_path, monkeypatch):
    """At full size both are the model as it was; a lookup is counted for each call."""
    results, calls = [], []
    embed = amtl.AMTLEmbeddingCollection._embed
    monkeypatch.setattr(
        amtl.AMTLEmbeddingCollection,
        "_embed",
        lambda self, rows: calls.append(tuple(rows.shape)) or embed(self, rows),
    )
    for collection in (None, False):
        model = build(tmp_path)
        fit(model, 1)
        fuxictr.convert(model, COUNTS, budget=1.0, collection=collection)
        fit(model)
        if frozen:
            fuxictr.freeze(model)
        fit(model)
        assert (PLACE + ".amtl_collection" in amtl.layers(model)) == (collection is None)
        padding = model.get_submodule(PLACE).embedding_layers["history"](torch.zeros(3).long())
        assert not bool(padding.any())
        calls.clear()
        results.append(model.predict(batches()))
        # Of a batch, users and items together, then histories.
        assert calls == ([(32, 2), (32, 4)] * 3 if collection is None else [])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", [0.05, 0.2])
def test_joined_or_not_frozen_tables_of_equal_sizes_predict_the_same(budget, tmp_path):
    results, sizes = [], []
    for collection in (True, False):
        model = build(tmp_path)
        options = {"collection": collection, "bits": None}
        fuxictr.freeze(fuxictr.convert(model, COUNTS, budget, **options))
        layers = model.get_submodule(PLACE)
        found = amtl.layers(model).values()
        sizes.append(torch.cat([layer.row_dims() for layer in found]))
        # The padding row of items is that of users.
        sizes[-1][40] = 0
        x = model.get_inputs(batches()[0])
        results.append((model.predict(batches()), model.embedding_layer(x)))
        assert hasattr(layers, "amtl_collection") == collection
    assert torch.equal(*sizes)
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def wide_map(folder):
    """Features of every kind that a dictionary of embeddings looks up."""
    result = feature_map(folder)
    categorical = {"type": "categorical", "vocab_size": 9, "padding_idx": 0}
    result.features.update(
        city={**categorical, "source": "place", "feature_encoder": "nn.Linear(8, 8, bias=False)"},
        narrow={**categorical, "source": "", "embedding_dim": 4},
        spare={**categorical, "source": "place"},
        vector={"type": "embedding", "source": "place", "pretrain_dim": 3},
        place={**categorical, "source": "place", "share_embedding": "city"},
        hidden={"type": "meta", "source": ""},
    )
    return result


def wide_inputs(rows=5):
    torch.manual_seed(1)
    inputs = {
        "vector": torch.rand(rows, 3),
        "place": torch.randint(0, 9, (rows,), dtype=torch.int32),
        "history": torch.randint(0, 30, (rows, 4)),
        "city": torch.randint(0, 9, (rows,)).float(),
        "narrow": torch.randint(0, 9, (rows,)),
        "user": torch.randint(0, 40, (rows,)),
        "spare": torch.randint(0, 9, (rows,)),
        "price": torch.rand(rows),
        "item": torch.randint(0, 30, (rows,)),
    }
    inputs["user"][0] = inputs["item"][1] = inputs["city"][2] = 0
    return inputs


class Wide(BaseModel):
    def __init__(self, folder, layer=FeatureEmbedding):
        super().__init__(wide_map(folder), verbose=0, model_root=str(folder), metrics=["AUC"])
        torch.manual_seed(0)
        self.embedding_layer = layer(self.feature_map, DIM)
        self.compile("adam", "binary_crossentropy", 1e-2)


WIDE = {name: torch.arange(rows) for name, rows in (("user", 40), ("item", 30), ("city", 9))}


FILTERS = (
    {},
    {"feature_source": "place"},
    {"feature_type": ["categorical"]},
    {"feature_type": ["sequence", "numeric"]},
)


@pytest.mark.parametrize("frozen", [False, True])
def test_all_other_features_are_looked_up_as_before(frozen, tmp_path):
    model = Wide(tmp_path)
    dictionary = model.get_submodule(PLACE)
    with torch.no_grad():
        for table in dictionary.embedding_layers.values():
            for weight in table.parameters():
                weight.mul_(1000)
    twin = copy.deepcopy(dictionary)
    fuxictr.convert(model, WIDE, budget=1.0)
    assert dictionary.amtl_collection.names == list(WIDE)
    if frozen:
        fuxictr.freeze(model)
    assert dictionary.embedding_layers["place"] is dictionary.embedding_layers["city"]
    assert type(dictionary.embedding_layers["spare"]) is nn.Embedding
    inputs = wide_inputs()
    # Without a feature, with features of several shapes, with none of the collection.
    fewer = {name: value for name, value in inputs.items() if name != "item"}
    uneven = {**inputs, "user": inputs["user"][:, None]}
    for asked in (inputs, fewer, uneven, {"price": inputs["price"]}):
        for filters in FILTERS:
            found, wanted = dictionary(asked, **filters), twin(asked, **filters)
            assert list(found) == list(wanted)
            for name, value in wanted.items():
                assert torch.equal(found[name], value), name
    found = model.embedding_layer(fewer, feature_source="place", feature_type="categorical")
    assert found.shape == (5, 3, DIM)


class OwnDict(FeatureEmbeddingDict):
    def forward(self, inputs, **filters):
        return {name: value + 1 for name, value in super().forward(inputs, **filters).items()}


OwnDict.__name__ = "FeatureEmbeddingDict"


def test_a_forward_of_ones_own_stays(tmp_path):
    model = Wide(tmp_path)
    model.embedding_layer = OwnDict(model.feature_map, DIM)
    twin = copy.deepcopy(model.embedding_layer)
    fuxictr.convert(model, WIDE, budget=1.0)
    assert list(amtl.layers(model)) == ["embedding_layer.amtl_collection"]
    inputs = wide_inputs()
    for name, value in twin(inputs).items():
        assert torch.equal(model.embedding_layer(inputs)[name], value)


def test_when_tables_have_layers_of_their_own(tmp_path):
    model = Wide(tmp_path)
    narrow = {**WIDE, "narrow": torch.arange(9)}
    with pytest.raises(ValueError, match="'narrow' differs from 'user' in embedding_dim"):
        fuxictr.convert(model, narrow, collection=True)
    with pytest.raises(ValueError, match="budgets by feature make layers"):
        fuxictr.convert(model, WIDE, dict.fromkeys(WIDE, 0.5), collection=True)
    table = model.get_submodule(PLACE).embedding_layers["item"]
    with torch.no_grad():
        table.weight[0] = 1
    with pytest.raises(ValueError, match="padding rows of 'item' and 'user' hold different"):
        fuxictr.convert(model, WIDE, collection=True)
    assert not amtl.layers(model)
    assert len(amtl.layers(fuxictr.convert(copy.deepcopy(model), WIDE))) == 3
    with torch.no_grad():
        table.weight[0] = 0
    by_feature = fuxictr.convert(copy.deepcopy(model), WIDE, dict.fromkeys(WIDE, 0.5))
    assert len(amtl.layers(by_feature)) == 3
    assert len(amtl.layers(fuxictr.convert(copy.deepcopy(model), narrow))) == 4
    fuxictr.convert(model, WIDE)
    rest = {"spare": torch.arange(9), "narrow": torch.arange(9)}
    with pytest.raises(ValueError, match="has a collection already"):
        fuxictr.convert(model, rest, collection=True)
    fuxictr.convert(model, rest)
    assert len(amtl.layers(model)) == 3
    model = Wide(tmp_path)
    model.tied = nn.Linear(DIM, 30, bias=False)
    model.tied.weight = model.get_submodule(PLACE).embedding_layers["item"].weight
    with pytest.raises(ValueError, match="the weight of 'item' is shared by"):
        fuxictr.convert(model, WIDE)
    assert not amtl.layers(model)
    model = Wide(tmp_path)
    model.second = FeatureEmbedding(model.feature_map, DIM)
    with pytest.raises(ValueError, match="are in 2 FeatureEmbeddings"):
        fuxictr.convert(model, WIDE, collection=True)
    assert len(amtl.layers(fuxictr.convert(model, WIDE))) == 6


def test_a_file_that_does_not_fit_leaves_the_model_alone(tmp_path):
    model = fuxictr.freeze(fuxictr.convert(build(tmp_path), COUNTS))
    amtl.save(model, tmp_path / "m.safetensors")
    other = build(tmp_path)
    other.mlp = nn.Linear(4 * DIM, 1)
    before = other.predict(batches())
    held = [id(p) for group in other.optimizer.param_groups for p in group["params"]]
    for wrong in (other, Wide(tmp_path)):
        with pytest.raises(amtl.PackedFileError, match="does not fit the model"):
            fuxictr.load(tmp_path / "m.safetensors", wrong)
        assert not amtl.layers(wrong)
    tables = other.get_submodule(PLACE).embedding_layers
    assert type(tables["item"]) is nn.Embedding and tables["history"] is tables["item"]
    assert "forward" not in vars(other.get_submodule(PLACE))
    assert held == [id(p) for group in other.optimizer.param_groups for p in group["params"]]
    np.testing.assert_array_equal(other.predict(batches()), before)


COUNTS = {"user": torch.arange(40), "history": torch.arange(30)}


def test_counts_are_summed_over_who_shares_a_table(model):
    counts = fuxictr.count(model, batches())
    assert list(counts) == ["user", "item"]
    ids = torch.cat([torch.cat([b["item"], b["history"].flatten()]) for b in batches()])
    expected = torch.bincount(ids, minlength=30)
    expected[0] = 0
    assert torch.equal(counts["item"], expected)
    broken = batches()
    broken[1]["user"][3] = 40
    with pytest.raises(ValueError, match=r"'user' has ids from \d to 40; its table has 40 rows"):
        fuxictr.count(model, broken)


def test_regularisers_and_initialisers_do_not_touch_the_sizes(model):
    before = model.regularization_loss().detach()
    fuxictr.convert(model, COUNTS, budget=0.5, parametrization="ordinal")
    torch.testing.assert_close(model.regularization_loss().detach(), before)
    model.regularization_loss().backward()
    masks = amtl.mask_parameters(model)
    assert all(p.requires_grad and p.grad is None for p in masks)
    model.zero_grad()
    batch = batches()[0]
    model.train()
    model.compute_loss(model(batch), model.get_labels(batch)).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in masks)
    before = [p.detach().clone() for p in masks]
    model.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, masks, strict=True))


@pytest.mark.parametrize("collection", [False, True])
def test_names_with_embedding_never_meet_the_sizes(collection, tmp_path):
    model = build(tmp_path)
    fuxictr.convert(model, COUNTS, budget=0.5, parametrization="ordinal", collection=collection)
    masks = [id(p) for p in amtl.mask_parameters(model)]
    of_embeddings = {id(p) for n, p in model.named_parameters() if "embedding" in n}
    assert {id(p) for p in amtl.table_parameters(model)} <= of_embeddings
    assert not of_embeddings & set(masks)
    named = [id(p) for n, p in model.named_parameters() if n.startswith("amtl_sizes.")]
    assert named == masks and len(masks) > 0


class TwoTasks(MultiTaskModel):
    def __init__(self, features, folder):
        super().__init__(
            features,
            num_tasks=2,
            task=["binary_classification"] * 2,
            verbose=0,
            model_root=str(folder),
            metrics=["AUC"],
            embedding_regularizer="l1_l2(0.02,0.01)",
            net_regularizer="l2(0.001)",
        )
        torch.manual_seed(0)
        self.embedding_layer = FeatureEmbedding(features, DIM)
        self.towers = MLP_Block(4 * DIM, hidden_units=[8], output_dim=2)
        self.compile("adam", "binary_crossentropy", 1e-2)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [DeepFM, TwoTasks])
def test_a_collection_is_regularised_as_its_tables(kind, frozen, tmp_path):
    models = []
    for collection in (True, False):
        model = kind(feature_map(tmp_path), tmp_path) if kind is TwoTasks else build(tmp_path)
        # Of one width, which equal sizes are stored at in one table as in two.
        options = {"collection": collection, "parametrization": "ordinal", "bits": None}
        fuxictr.convert(model, COUNTS, budget=1.0, **options)
        models.append(fuxictr.freeze(model) if frozen else model)
        model.regularization_loss().backward()
        assert all(p.requires_grad and p.grad is None for p in amtl.mask_parameters(model))
        assert all(bool(p.grad.any()) for p in amtl.table_parameters(model))
    torch.testing.assert_close(*(model.regularization_loss() for model in models))


@pytest.mark.parametrize("kind", [DeepFM, TwoTasks])
def test_a_plain_conversion_is_regularised_as_before(kind, tmp_path):
    """Models of several tasks know embeddings by their type, which layers are not of."""
    model = kind(feature_map(tmp_path), tmp_path) if kind is TwoTasks else build(tmp_path)
    twin = copy.deepcopy(model)
    tables = "embedding_layer.embedding_layer.embedding_layers"
    counts = {f"{tables}.{name}": each for name, each in COUNTS.items()}
    amtl.convert(model, counts, budget=0.5, parametrization="ordinal")
    for each in (model, twin):
        each.regularization_loss().backward()
    torch.testing.assert_close(model.regularization_loss(), twin.regularization_loss())
    assert all(p.requires_grad and p.grad is None for p in amtl.mask_parameters(model))
    for name in COUNTS:
        ours, theirs = (each.get_submodule(f"{tables}.{name}").weight for each in (model, twin))
        assert torch.equal(ours.grad, theirs.grad) and bool(ours.grad.any())
    before = model.regularization_loss()
    weights = amtl.table_parameters(model)
    amtl.freeze(model)
    l1, l2 = (0.02, 0.01) if kind is TwoTasks else (0.0, 0.01)
    cut = [
        sum(l1 * p.abs().sum() + l2 / 2 * p.square().sum() for p in each)
        for each in (weights, amtl.table_parameters(model))
    ]
    assert cut[1] < cut[0]
    torch.testing.assert_close(before - model.regularization_loss(), cut[0] - cut[1])


def test_what_is_refused(model):
    with pytest.raises(
        ValueError, match=r"no table of 'price' to convert; it has \['user', 'item'"
    ):
        fuxictr.convert(model, {"price": torch.arange(4)})
    with pytest.raises(ValueError, match=r"features \['item', 'history'\] share a table"):
        fuxictr.convert(model, {"item": torch.arange(30), "history": torch.arange(30)})
    assert not amtl.layers(model)
    with pytest.raises(TypeError, match="Linear is not a model of FuxiCTR"):
        fuxictr.convert(nn.Linear(2, 2), {})
    fuxictr.convert(model, {"user": COUNTS["user"]}, mask_lr=0.1, parametrization="ordinal")
    fuxictr.convert(model, {"item": COUNTS["history"]}, mask_lr=0.2, parametrization="ordinal")
    assert [g["lr"] for g in model.optimizer.param_groups] == [1e-2, 0.1, 0.2]
    with pytest.raises(ValueError, match="newly built"):
        fuxictr.load("nowhere", model)
