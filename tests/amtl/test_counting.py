"""Counts of rows, taken from the lookups of a model."""

from __future__ import annotations

import warnings

import amtl
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ROWS = 30


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.Embedding(ROWS, 4, padding_idx=0)
        self.tags = nn.EmbeddingBag(ROWS, 4, mode="sum")
        self.inner = nn.ModuleDict({"item": nn.Embedding(ROWS, 4)})
        self.same = self.user

    def forward(self, users, tags, offsets, items):
        bags = self.tags(tags, offsets=offsets)
        return self.user(input=users).sum() + bags.sum() + self.inner["item"](items).sum()


def batch(generator):
    def draw(*shape, dtype=torch.int64):
        return torch.randint(ROWS, shape, generator=generator, dtype=dtype)

    return draw(8, 3), draw(20, dtype=torch.int32), torch.arange(0, 20, 5).int(), draw(8)


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_looked_up_counts(grad):
    generator, model = torch.Generator().manual_seed(1), Model()
    batches = [batch(generator) for _ in range(5)]
    with torch.set_grad_enabled(grad), amtl.counting(model) as counts:
        for each in batches:
            model(*each)
    expected = {
        "user": torch.cat([users.flatten() for users, *_ in batches]),
        "tags": torch.cat([tags for _, tags, *_ in batches]),
        "inner.item": torch.cat([items for *_, items in batches]),
    }
    expected = {name: torch.bincount(rows, minlength=ROWS) for name, rows in expected.items()}
    assert int(expected["user"][0]) > 0
    expected["user"][0] = 0
    assert list(counts) == list(expected)
    for name, wanted in expected.items():
        assert counts[name].dtype == torch.int64 and torch.equal(counts[name], wanted)
    model(*batches[0])
    assert torch.equal(counts["tags"], expected["tags"])
    assert not any(module._forward_pre_hooks for module in model.modules())
    amtl.freeze(amtl.convert(model, counts, budget=0.3))
    assert set(amtl.layers(model)) == {"user", "tags", "inner.item"}


def test_what_was_never_looked_up_is_named_and_left_out():
    model = Model()
    warned = pytest.warns(UserWarning, match=r"no row of 'tags', 'inner\.item' was looked up")
    with warned, amtl.counting(model) as counts:
        model.user(torch.tensor([3]))
    assert list(counts) == ["user"] and int(counts["user"].sum()) == 1


def test_an_embedding_by_itself():
    layer = nn.Embedding(ROWS, 4)
    with amtl.counting(layer) as counts:
        layer(torch.tensor([3, 3, 1]))
    assert counts[""].nonzero().flatten().tolist() == [1, 3]
    assert isinstance(amtl.convert(layer, counts, budget=0.5), amtl.AMTLEmbedding)


def test_an_error_within_leaves_no_hook():
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match="input must be a tensor"), amtl.counting(model):
            model.user([1, 2])
    assert not model.user._forward_pre_hooks
    with pytest.raises(ValueError, match="the model has no"), amtl.counting(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_repeats_counts_once(reentrant):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 1))
    rows = torch.tensor([1, 1, 3])
    start = torch.zeros(1, requires_grad=True)
    with amtl.counting(model) as counts:
        out = checkpoint(lambda x: model(rows) + x, start, use_reentrant=reentrant)
        out.sum().backward()
    assert counts["0"].tolist() == [0, 2, 0, 1, 0]


@pytest.mark.parametrize("phase", ["search", "frozen", "file"])
def test_layers_count_as_the_embeddings_did(phase, tmp_path):
    """A file trains on, on another day, by counts of that day."""
    generator, model = torch.Generator().manual_seed(3), Model()
    batches = [batch(generator) for _ in range(5)]

    def count(model):
        with torch.no_grad(), amtl.counting(model) as counts:
            for each in batches:
                model(*each)
        return counts

    wanted = count(model)
    amtl.convert(model, {name: torch.ones(ROWS) for name in wanted}, budget=0.3)
    if phase != "search":
        amtl.freeze(model)
    if phase == "file":
        amtl.save(model, tmp_path / "model.safetensors")
        model = amtl.load(tmp_path / "model.safetensors", Model())
    counts = count(model)
    assert list(counts) == list(wanted)
    assert all(torch.equal(counts[name], wanted[name]) for name in wanted)
    if phase != "search":
        amtl.freeze(amtl.thaw(model, counts=counts))
