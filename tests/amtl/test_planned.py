"""Evaluating layers look at themselves once, and see whatever changes afterwards."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from torch import Tensor, nn
from torch.nn.utils import parametrize

import amtl_kernels

pytestmark = pytest.mark.skipif(
    "error" in amtl_kernels.build_info()["native"], reason="no native module: make test builds it"
)

ROWS, DIM = 90, 8
COUNTS = (2000 / torch.arange(1, ROWS + 1)).long()
INDICES = torch.randint(ROWS, (4, 33), generator=torch.Generator().manual_seed(3))


def frozen(bits: int | None = None, shuffled: bool = False, bag: bool = False) -> AMTLEmbedding:
    torch.manual_seed(0)
    order = torch.randperm(ROWS) if shuffled else torch.arange(ROWS)
    kind = AMTLEmbeddingBag if bag else AMTLEmbedding
    layer = kind(ROWS, DIM, counts=COUNTS[order], budget=0.1, bits=bits)
    layer.freeze()
    return layer.eval()


def agrees(layer: nn.Module) -> None:
    """Lookups show what the layer says that it holds."""
    dense = layer.dense_weight().float()
    want = nn.functional.embedding(INDICES, dense)
    with torch.no_grad():
        for _ in range(3):
            if isinstance(layer, AMTLEmbeddingBag):
                torch.testing.assert_close(layer(INDICES).float(), want.mean(1))
            else:
                assert torch.equal(layer(INDICES).float(), want)
                assert torch.equal(layer(INDICES.int()[:, 1]).float(), want[:, 1])


def plan_of(layer: nn.Module) -> object:
    agrees(layer)
    assert layer._kept is not None
    kept = layer._kept
    return (kept.plan if layer.phase == "search" else kept.table.plan)._handle


def searching(parametrization: str, bag: bool = False) -> AMTLEmbedding:
    torch.manual_seed(0)
    kind = AMTLEmbeddingBag if bag else AMTLEmbedding
    given = {"counts": COUNTS, "budget": 0.1, "min_dim": 0, "parametrization": parametrization}
    return kind(ROWS, DIM, bits=None, shared_rows=[5], **given).eval()


def write(layer: nn.Module) -> None:
    with torch.no_grad():
        for block in layer.table_parameters():
            block.mul_(1.7)


def train(layer: nn.Module) -> None:
    """Step sizes follow what is looked up."""
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    for _ in range(9):
        layer(INDICES).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer.eval()


def load(layer: nn.Module) -> None:
    other = copy.deepcopy(layer)
    train(other)
    layer.load_state_dict(other.state_dict())


def elsewhere(layer: nn.Module) -> None:
    for block in layer.table_parameters():
        block.data = block.data * 3


def copy_by_data(layer: nn.Module) -> None:
    """As averages and broadcasts by hand do, which no version counts."""
    other = copy.deepcopy(layer)
    train(other)
    tensors = ([*m.parameters(), *m.buffers()] for m in (layer, other))
    for mine, theirs in zip(*tensors, strict=True):
        mine.data.copy_(theirs.data)


CHANGES: list[Callable[[nn.Module], object]] = [
    write,
    train,
    load,
    elsewhere,
    copy_by_data,
    lambda layer: layer.share_memory(),
    lambda layer: layer.half(),
    lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True),
    lambda layer: layer.thaw(counts=COUNTS),
]


@pytest.mark.every(3)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_changes_show(
    change: Callable[[nn.Module], object], bits: int | None, shuffled: bool
) -> None:
    layer = frozen(bits, shuffled)
    assert plan_of(layer)
    change(layer)
    agrees(layer)


def learn(layer: nn.Module) -> None:
    """Other sizes, of another budget's share too."""
    with torch.no_grad():
        for parameter in layer.mask_parameters():
            parameter.add_(torch.randn_like(parameter))


def count_anew(layer: nn.Module) -> None:
    other = AMTLEmbedding(ROWS, DIM, counts=COUNTS.flip(0), **layer_options(layer))
    layer.load_state_dict(other.state_dict())


def layer_options(layer: nn.Module) -> dict[str, object]:
    names = ("budget", "min_dim", "parametrization", "bits")
    return {"shared_rows": [5], **{name: getattr(layer.options, name) for name in names}}


@pytest.mark.parametrize(
    "change",
    [
        *(write, train, load, elsewhere, copy_by_data, learn, count_anew),
        lambda layer: layer.half(),
        lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True),
        lambda layer: layer.freeze(),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(ROWS, DIM))),
    ],
)
@pytest.mark.parametrize("parametrization", ["rule", "ordinal", "free"])
def test_changes_of_a_search_show(
    change: Callable[[nn.Module], object], parametrization: str
) -> None:
    layer = searching(parametrization)
    assert plan_of(layer)
    change(layer)
    agrees(layer)


def test_a_search_leaves_no_weight_behind() -> None:
    """Or whoever freezes would be told that something still holds it."""
    layer = searching("rule")
    assert plan_of(layer)
    weight = weakref.ref(layer.weight)
    layer.freeze()
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("parametrization", ["rule", "free"])
def test_bags_of_a_search_are_planned_too(parametrization: str) -> None:
    layer = searching(parametrization, bag=True)
    assert plan_of(layer)
    write(layer)
    agrees(layer)


@pytest.mark.parametrize("bits", [None, 4])
def test_bags_are_planned_too(bits: int | None) -> None:
    layer = frozen(bits, bag=True)
    assert plan_of(layer)
    train(layer)
    agrees(layer)


def test_a_renumbered_table_is_looked_at_anew() -> None:
    layer = frozen(shuffled=True)
    assert plan_of(layer)
    with torch.no_grad():
        want = layer(INDICES)
        new_ids = layer.absorb_order()
        assert torch.equal(layer(new_ids[INDICES]), want)


def test_a_norm_that_is_set_later_holds() -> None:
    layer = frozen()
    assert plan_of(layer)
    layer.max_norm = 0.1
    with torch.no_grad():
        assert layer(INDICES).norm(dim=-1).max() <= 0.1001


def test_errors_name_the_table_and_all_its_rows() -> None:
    model = nn.ModuleDict({"item": nn.Embedding(ROWS, DIM)})
    amtl.convert(model, counts={"item": COUNTS}, budget=0.1, shared_rows=None)
    amtl.freeze(model)
    model.eval()
    assert plan_of(model["item"])
    with (
        torch.no_grad(),
        pytest.raises(IndexError, match=f"'item': index {ROWS} at position 1 .* {ROWS} rows"),
    ):
        model["item"](torch.tensor([0, ROWS]))


def test_other_input_is_refused_as_ever() -> None:
    layer = frozen()
    assert plan_of(layer)
    with torch.no_grad():
        with pytest.raises(ValueError, match="int32 or int64"):
            layer(INDICES.float())
        with pytest.raises(TypeError, match="must be a tensor"):
            layer([1, 2])
        assert layer(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3, DIM)
        assert torch.equal(layer(INDICES.t()), layer(INDICES).transpose(0, 1))


def test_who_repeats_a_lookup_with_gradients_gets_them() -> None:
    layer = frozen()
    assert plan_of(layer)
    out = layer(INDICES)
    assert out.requires_grad
    with torch.no_grad():
        assert torch.equal(out, layer(INDICES))
        assert not layer(INDICES).requires_grad


def test_a_copy_looks_at_itself() -> None:
    layer = frozen(4)
    assert plan_of(layer)
    other = copy.deepcopy(layer)
    write(other)
    agrees(other)
    agrees(layer)


def test_what_a_layer_shows_it_shows_tensor_by_tensor() -> None:
    """The same numbers for an index whatever it is looked up with, and however often."""
    layer = frozen(8)
    with torch.no_grad():
        alone: list[Tensor] = [layer(index) for index in INDICES.reshape(-1)[:20]]
        assert torch.equal(torch.stack(alone), layer(INDICES).reshape(-1, DIM)[:20])


def test_a_weight_that_is_parametrized_later_shows() -> None:
    layer = searching("rule")
    assert plan_of(layer)

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    with torch.no_grad():
        want = 2 * layer(INDICES)
        parametrize.register_parametrization(layer, "weight", Double())
        for _ in range(3):
            assert torch.equal(layer(INDICES), want)
        parametrize.remove_parametrizations(layer, "weight")
        assert torch.equal(layer(INDICES), want)


def test_ids_in_no_order_of_counts_are_put_in_order_by_native_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = frozen(shuffled=True)
    assert plan_of(layer) is not None and layer.row_order is not None
    with torch.no_grad():
        want = layer(INDICES)
        monkeypatch.setattr(torch.Tensor, "index_select", None)
        assert torch.equal(layer(INDICES), want)
        assert torch.equal(layer(INDICES.int()), want)
        many = INDICES.flatten()[torch.arange(40_000) % INDICES.numel()]
        assert torch.equal(layer(many), want.flatten(0, 1)[torch.arange(40_000) % INDICES.numel()])
        monkeypatch.undo()
        for wrong in (-1, ROWS, -(2**31), 2**31 - 1):
            spoilt = INDICES.int()
            spoilt[2, 7] = wrong
            with pytest.raises(IndexError, match=str(wrong)):
                layer(spoilt)
        assert torch.equal(layer(INDICES), want)
        layer.row_order = layer.row_order.flip(0)
        assert torch.equal(layer(INDICES), nn.functional.embedding(INDICES, layer.dense_weight()))
