"""What a frozen layer keeps of its tiers from one lookup to the next."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer.rounding import is_drawn
from torch import nn

from amtl_kernels import TieredTable

ROWS, DIM = 300, 16
COUNTS = (4000 / torch.arange(1, ROWS + 1).pow(1.1)).long()
INPUT = torch.randint(0, ROWS, (64,), generator=torch.Generator().manual_seed(0))
OFFSETS = torch.arange(0, 64, 4)


def frozen(bits=4, kind=AMTLEmbedding, **more):
    torch.manual_seed(0)
    return kind(ROWS, DIM, counts=COUNTS, budget=0.1, bits=bits, **more).freeze().eval()


def looked_up(layer):
    return layer(INPUT) if isinstance(layer, AMTLEmbedding) else layer(INPUT, OFFSETS)


def anew(layer):
    """What a layer shows that keeps nothing."""
    other = copy.deepcopy(layer)
    assert "_kept" not in other.__dict__
    return looked_up(other)


@pytest.fixture
def asked(monkeypatch):
    """How often tiers are looked at."""
    asked, of = [], TieredTable.of.__func__
    monkeypatch.setattr(
        TieredTable, "of", classmethod(lambda *a, **k: asked.append(1) or of(*a, **k))
    )
    return asked


@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_an_evaluating_layer_looks_at_its_tiers_once(kind, bits, packed, asked):
    layer = frozen(bits, kind)
    if packed and bits is not None:
        layer = layer.to_integers().eval()
    first = looked_up(layer)
    before = len(asked)
    assert torch.equal(looked_up(layer), first) and torch.equal(looked_up(layer), first)
    assert len(asked) == before


def trained(layer):
    """A step of training moves numbers, and the eighth step sizes too."""
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    for _ in range(8):
        looked_up(layer).square().sum().backward()
        optimizer.step()
    return layer.eval()


def loaded(layer):
    """A state of the same tiers with other numbers."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for block in other.table_parameters():
            block.mul_(7)
        other.rounding.mean_square.mul_(49)
    layer.load_state_dict(other.state_dict())
    return layer


CHANGES = {
    "training": trained,
    "a state": loaded,
    "type": lambda layer: layer.to(torch.bfloat16),
    "thawing": lambda layer: layer.thaw().freeze(),
    "other blocks": lambda layer: layer.to(torch.float64).to(torch.float32),
}


@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(kind, change):
    layer = frozen(4, kind)
    before = looked_up(layer)
    layer = CHANGES[change](layer)
    after = looked_up(layer)
    assert torch.equal(after, anew(layer))
    assert change in ("other blocks", "thawing") or not torch.equal(before, after)


def test_inference_mode_leaves_nothing_that_training_cannot_use():
    layer = frozen()
    with torch.inference_mode():
        shown = layer(INPUT)
    layer.rounding.turn = next(n for n in range(9) if not is_drawn(n + 1))
    layer.train()
    out = layer(INPUT)
    assert torch.equal(out, shown)
    out.sum().backward()
    assert all(block.grad is not None for block in layer.table_parameters())


def test_other_tensors_in_place_of_the_blocks_are_looked_up():
    layer = frozen(None)
    before = layer(INPUT)
    state = {name: 2 * value for name, value in layer.named_parameters()}
    assert torch.equal(torch.func.functional_call(layer, state, (INPUT,)), 2 * before)
    assert torch.equal(layer(INPUT), before)


def test_copies_and_pickles_keep_nothing():
    model = nn.Sequential(frozen())
    shown = model(INPUT)
    for other in (copy.deepcopy(model), copy.copy(model[0]), pickle.loads(pickle.dumps(model))):
        layer = other if isinstance(other, AMTLEmbedding) else other[0]
        assert "_kept" not in layer.__dict__
        assert torch.equal(layer(INPUT), shown)
