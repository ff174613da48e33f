"""Models of FuxiCTR: train, convert, train, freeze, predict, save, load."""

from __future__ import annotations

import copy
from collections import OrderedDict

import amtl
import numpy as np
import pytest
import torch
from amtl.integrations import fuxictr
from torch import nn

pytest.importorskip("fuxictr", reason="needs: pip install -e .[fuxictr], which brings Ray along")

from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel, MultiTaskModel

DIM = 8


def feature_map(folder):
    """Users, items whose table a history shares, and a number."""
    result = FeatureMap("made_here", str(folder))
    result.features = OrderedDict(
        user={"type": "categorical", "source": "", "vocab_size": 40},
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


def test_a_model_from_training_to_loading(model, tmp_path):
    fit(model)
    tables = model.embedding_layer.embedding_layer.embedding_layers
    trained = tables["item"].weight
    assert (
        fuxictr.convert(
            model, fuxictr.count(model, batches()), 0.4, mask_lr=0.05, parametrization="ordinal"
        )
        is model
    )
    assert tables["history"] is tables["item"] and tables["item"].weight is trained
    assert tables["item"].padding_idx == 0
    assert len(amtl.layers(model)) == 2
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
    fit(loaded)
    again = amtl.table_parameters(loaded)
    assert any(not torch.equal(a, b) for a, b in zip(again, trained, strict=True))

    model.save_weights(tmp_path / "weights")
    twin = fuxictr.convert(build(tmp_path), COUNTS, parametrization="ordinal")
    twin.load_weights(tmp_path / "weights")
    np.testing.assert_array_equal(twin.predict(batches()), predicted)


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
