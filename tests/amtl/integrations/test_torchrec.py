"""TorchRec's collections: what rebuilds them leaves the layers alone."""

from __future__ import annotations

import copy
import pickle

import amtl
import pytest
import torch
from torch import nn

pytest.importorskip(
    "torchrec", reason="needs TorchRec: see docs/integrations.md for how it installs without a GPU"
)

import torchrec
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.fused_embedding_modules import fuse_embedding_optimizer

ROWS, DIM = 40, 8


class Model(nn.Module):
    def __init__(self, device=None):
        super().__init__()
        torch.manual_seed(0)
        self.bags = torchrec.EmbeddingBagCollection(
            [
                torchrec.EmbeddingBagConfig(
                    name=f"t{i}", embedding_dim=DIM, num_embeddings=ROWS, feature_names=[f"f{i}"]
                )
                for i in range(2)
            ]
        )
        self.items = torchrec.EmbeddingCollection(
            [
                torchrec.EmbeddingConfig(
                    name="t2", embedding_dim=DIM, num_embeddings=ROWS, feature_names=["f0"]
                )
            ]
        )
        self.top = nn.Linear(2 * DIM, 1)

    def forward(self, features):
        return self.top(self.bags(features).values()) + self.items(features)["f0"].values().sum()


NAMES = ("bags.embedding_bags.t0", "bags.embedding_bags.t1", "items.embeddings.t2")


def converted(names=NAMES):
    counts = dict.fromkeys(names, torch.arange(ROWS) ** 2)
    return amtl.convert(Model(), counts, budget=0.4, bits=None).eval()


def features():
    lengths = torch.tensor([2, 0, 1, 3, 1, 1])
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(ROWS, (int(lengths.sum()),), generator=generator)
    return torchrec.KeyedJaggedTensor(keys=["f0", "f1"], values=values, lengths=lengths)


def test_outputs_state_copies_and_the_way_back():
    plain = Model()
    keys = set(plain.state_dict())
    model = converted()
    assert keys <= set(model.state_dict())
    expected = model(features())
    dense = amtl.revert(copy.deepcopy(model), masked=True)
    assert type(dense.bags) is torchrec.EmbeddingBagCollection
    assert type(dense.items) is torchrec.EmbeddingCollection
    torch.testing.assert_close(dense(features()), expected)
    assert not torch.allclose(plain(features()), expected)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(features()), expected)
    assert torch.equal(amtl.freeze(model)(features()), expected)
    assert model.bags.embedding_bag_configs()[1].name == "t1" and not model.bags.is_weighted()
    assert model.items.embedding_dim() == DIM and model.items.need_indices() is False


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("names", [NAMES, NAMES[1:]])
def test_fusing_an_optimizer_does_not_drop_the_layers(names, frozen):
    model = converted(names)
    if frozen:
        amtl.freeze(model)
    layers, expected = amtl.layers(model), model(features())
    fused = fuse_embedding_optimizer(model, torch.optim.SGD, {"lr": 0.1}, torch.device("cpu"))
    assert amtl.layers(fused) == layers
    if names == NAMES:
        assert torch.equal(fused(features()), expected)
    optimizer = torch.optim.SGD(amtl.table_parameters(fused), lr=0.1)
    before = [p.detach().clone() for p in amtl.table_parameters(fused)]
    fused.train()(features()).sum().backward()
    optimizer.step()
    after = amtl.table_parameters(fused)
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    alone = fused.bags
    assert fuse_embedding_optimizer(alone, torch.optim.SGD, {}, torch.device("cpu")) is alone


@pytest.mark.parametrize("frozen", [False, True])
def test_quantizing_leaves_the_layers_as_they_are(frozen):
    model = converted()
    if frozen:
        amtl.freeze(model)
    expected = model(features())
    quantized = quantize_inference_model(model)
    assert list(amtl.layers(quantized)) == list(NAMES)
    assert torch.equal(quantized(features()), expected)


def test_loading_a_packed_file_does_the_same(tmp_path):
    model = amtl.freeze(converted())
    amtl.save(model, tmp_path / "m.safetensors")
    loaded = amtl.load(tmp_path / "m.safetensors", Model()).eval()
    fused = fuse_embedding_optimizer(loaded, torch.optim.SGD, {"lr": 0.1}, torch.device("cpu"))
    assert list(amtl.layers(fused)) == list(NAMES)
    assert torch.equal(fused(features()), model(features()))


def test_a_collection_of_a_class_of_your_own_is_refused():
    class Own(torchrec.EmbeddingBagCollection):
        pass

    model = Model()
    model.bags.__class__ = Own
    with pytest.raises(ValueError, match="Own is a subclass of a collection of TorchRec"):
        amtl.convert(model, {NAMES[0]: torch.arange(ROWS)})
    assert not amtl.layers(model)
    amtl.convert(model, {NAMES[2]: torch.arange(ROWS)})
