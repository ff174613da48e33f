"""Embeddings that layers took the place of, where a loss or a variable still holds them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import amtl
import pytest
import torch
from torch import nn

ROWS = torch.arange(5)
COUNTS = {"item_emb": torch.arange(50)}


class Encoder(nn.Module):
    def __init__(self, kind=nn.Embedding):
        super().__init__()
        self.item_emb = kind(50, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, rows):
        return self.out(self.item_emb(rows))


class Criterion(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, rows):
        return self.table(rows).sum()


def warned(call, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call(*args)
    return found


def converted(freeze=True):
    """A converted model, and the embedding of before."""
    model = Encoder()
    former = model.item_emb
    amtl.convert(model, COUNTS, budget=0.3)
    return (amtl.freeze(model) if freeze else model), former


@pytest.mark.parametrize("freeze", [False, True])
def test_calls_of_the_former_module_are_warned_of_once(freeze):
    model = Encoder()
    criterion = Criterion(model.item_emb)
    amtl.convert(model, COUNTS, budget=0.3)
    if freeze:
        amtl.freeze(model)
    assert not warned(model, ROWS)
    (told,) = warned(criterion, ROWS)
    assert told.category is UserWarning
    assert "'item_emb'" in str(told.message) and "call model.item_emb" in str(told.message)
    assert told.filename == __file__
    assert not warned(criterion, ROWS)
    assert not warned(Criterion(model.item_emb), ROWS)


def test_bags_and_places_in_lists():
    bags = Encoder(nn.EmbeddingBag)
    former = bags.item_emb
    amtl.convert(bags, COUNTS, budget=0.3)
    assert "EmbeddingBag" in str(warned(former, ROWS[None])[0].message)
    listed = nn.ModuleList([nn.Embedding(50, 8), nn.Embedding(50, 8)])
    former = listed[1]
    amtl.convert(listed, {"1": torch.arange(50)}, budget=0.3)
    assert "call model[1]" in str(warned(former, ROWS)[0].message)
    former = nn.Embedding(50, 8)
    layer = amtl.convert(former, torch.arange(50), budget=0.3)
    assert "that amtl.convert returned" in str(warned(former, ROWS)[0].message)
    assert not warned(layer, ROWS)


def test_without_gradients_it_is_compared():
    _model, former = converted()
    with torch.no_grad():
        assert not warned(former, ROWS)
    with torch.inference_mode():
        assert not warned(former, ROWS)
    assert warned(former, ROWS)


def test_the_layer_is_not_held_and_may_be_gone():
    model, former = converted()
    layer = weakref.ref(model.item_emb)
    del model
    gc.collect()
    assert layer() is None
    assert not warned(former, ROWS)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_and_files_are_silent(copied):
    model, former = converted()
    twin = copied(former)
    assert not warned(twin, ROWS)
    assert torch.equal(twin(ROWS), former.weight[ROWS])
    both = copied(nn.ModuleList([model, Criterion(former)]))
    assert not warned(both[0], ROWS) and not warned(both[1], ROWS)
    assert warned(former, ROWS)


def test_reverted_models_are_silent():
    model, former = converted(freeze=False)
    layer = model.item_emb
    amtl.revert(model)
    assert not warned(model, ROWS) and not warned(former, ROWS)
    reverted = model.item_emb
    amtl.convert(model, COUNTS, budget=0.3)
    assert not warned(former, ROWS) and not warned(layer, ROWS)
    assert warned(reverted, ROWS)


def test_hooks_of_the_users_stay_and_no_layer_has_that_of_the_former():
    model, calls = Encoder(), []
    former = model.item_emb
    handle = former.register_forward_pre_hook(lambda *_: calls.append(1))
    amtl.convert(model, COUNTS, budget=0.3)
    model(ROWS)
    with torch.no_grad():
        former(ROWS)
    assert len(calls) == 2 and len(model.item_emb._forward_pre_hooks) == 1
    handle.remove()
    assert not model.item_emb._forward_pre_hooks
    criterion = Criterion(former)
    amtl.convert(criterion, {"table": COUNTS["item_emb"]}, budget=0.3)
    assert not warned(criterion, ROWS)


def test_a_file_that_is_loaded_has_the_place_from_then_on(tmp_path):
    model, _ = converted()
    amtl.save(model, tmp_path / "model.safetensors")
    other, former = converted()
    for _ in range(2):
        amtl.load(tmp_path / "model.safetensors", other)
        gc.collect()
        assert not warned(other, ROWS)
        assert len(warned(former, ROWS)) == 1 and not warned(former, ROWS)


def test_a_compiled_former_module_is_one_graph():
    _, former = converted()
    compiled = torch.compile(former, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ROWS), former.weight[ROWS])
