"""Tiers: the plan, tables into blocks and back, freeze and thaw, optimizer state."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer import lookups
from amtl.layer.tiers import merge_rows, merge_vectors, plan_tiers, split_rows, split_vector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import amtl_kernels
from amtl_kernels import optim

pytestmark = pytest.mark.every(2)


def counts_of(rows, in_order=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = (3000 / torch.arange(1, rows + 1).pow(1.1)).long()
    return counts if in_order else counts[torch.randperm(rows, generator=generator)]


def layer_of(kind=AMTLEmbedding, rows=200, dim=16, in_order=False, **options):
    torch.manual_seed(0)
    options = {"budget": 0.25, "bits": None, "parametrization": "ordinal", **options}
    return kind(rows, dim, counts=counts_of(rows, in_order), **options)


def hold_sizes(layer):
    for parameter in layer.mask_parameters():
        parameter.requires_grad_(False)


def train(layer, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(layer.num_embeddings, (64, 3), generator=generator)
        loss = (layer(rows) - torch.sin(rows.float())[..., None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@settings(max_examples=60)
@given(st.integers(1, 9), st.data())
def test_split_and_merge(dim, data):
    sizes = torch.tensor(data.draw(st.lists(st.integers(1, dim), max_size=40)), dtype=torch.int32)
    if data.draw(st.booleans()):
        sizes = sizes.sort(descending=True).values
    width = data.draw(st.integers(1, dim))
    stored = (-(-sizes // width) * width).clamp(max=dim)
    plan = plan_tiers(stored, dim)
    assert plan.ends[-1] == len(sizes)
    # Rows that come in few runs stay; others are put in order, by falling width.
    runs = len(stored.unique_consecutive())
    assert (plan.order is None) == (runs <= len(stored.unique()) + 4)
    assert len(plan.widths) == (runs if plan.order is None else len(stored.unique())) or not runs
    if plan.order is not None:
        assert list(plan.widths) == sorted(set(plan.widths), reverse=True)
    table = torch.randn(len(sizes), dim)
    columns = torch.arange(dim)
    blocks = split_rows(table, plan, sizes)
    assert all(b.is_contiguous() for b in blocks)
    masked = torch.where(columns < sizes[:, None], table, 0)
    assert torch.equal(merge_rows(blocks, plan, dim), masked)
    full = merge_rows(split_rows(table, plan), plan, dim)
    assert torch.equal(full, torch.where(columns < stored[:, None], table, 0))
    vector = torch.randn(len(sizes), 1)
    assert torch.equal(merge_vectors(split_vector(vector, plan), plan), vector)
    places = plan.places()
    if places is not None:
        flat = torch.cat([b[:, 0] for b in blocks])
        assert torch.equal(flat[places.long()], masked[:, 0])
        # Stable: rows of equal width keep their order.
        for w in plan.widths:
            assert bool((places[stored == w].diff() > 0).all())


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parametrization", ["ordinal", "free", "rule"])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("tier_width", [1, 4])
def test_freeze_is_bit_identical(dtype, parametrization, in_order, tier_width):
    layer = layer_of(
        in_order=in_order, parametrization=parametrization, tier_width=tier_width, dtype=dtype
    ).eval()
    rows = torch.randint(200, (50, 4))
    bag = layer_of(
        AMTLEmbeddingBag,
        in_order=in_order,
        parametrization=parametrization,
        tier_width=tier_width,
        dtype=dtype,
        mode="sum",
    ).eval()
    before, pooled = layer(rows), bag(rows)
    predicted = layer.stored_bytes(), layer.stored_fraction()
    layer.freeze()
    bag.freeze()
    assert layer.phase == "frozen" and "weight" not in dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match="frozen and has no dense weight"):
        layer.weight = torch.nn.Parameter(layer.dense_weight())
    assert not isinstance(layer.weight, torch.nn.Parameter)
    assert torch.equal(layer(rows), before)
    assert torch.equal(bag(rows), pooled)
    order = 0 if layer.row_order is None else 800
    assert (layer.stored_bytes() - order, layer.stored_fraction()) == predicted
    assert layer.stored_bytes() - order == sum(b.nbytes for b in layer.blocks)
    assert layer.stored_fraction() <= 0.25
    if in_order and parametrization != "free":
        assert layer.row_order is None


@pytest.mark.parametrize("dim", [1, 2, 3, 17, 64, 129, 300])
@pytest.mark.parametrize("parametrization", ["ordinal", "free", "rule"])
def test_awkward_widths(dim, parametrization):
    layer = layer_of(dim=dim, parametrization=parametrization, budget=max(0.5, 1 / dim))
    hold_sizes(layer)
    optimizer = torch.optim.SGD(layer.table_parameters(), lr=0.1)
    train(layer, optimizer, 2)
    rows = torch.arange(200)
    before = layer.eval()(rows)
    assert torch.equal(layer.freeze(optimizer)(rows), before)
    assert layer.stored_fraction() <= max(0.5, 1 / dim)
    train(layer, optimizer, 2)
    after = layer(rows)
    assert not torch.equal(after, before) and after.shape == (200, dim)


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
def test_a_life_on_a_device(device, kind, tmp_path):
    """Search, freeze, train, thaw, state and packed file, all on one device."""
    layer = layer_of(kind, padding_idx=3, sparse=True, max_norm=20.0).to(device)
    optimizer = torch.optim.SGD(
        [{"params": layer.table_parameters()}, {"params": layer.mask_parameters()}], lr=0.1
    )
    rows = torch.arange(200, device=device).reshape(50, 4)

    def step():
        optimizer.zero_grad()
        layer(rows).square().mean().backward()
        optimizer.step()

    step()
    before = layer.eval()(rows)
    layer.freeze(optimizer)
    assert layer.row_order is not None and layer.row_order.device.type == device
    assert torch.equal(layer(rows), before)
    step()
    with pytest.raises(IndexError, match="index 200 at position 0"):
        layer(rows[:1] + 200)
    trained = layer(rows)
    amtl.save(layer, tmp_path / "layer")
    assert torch.equal(amtl.load(tmp_path / "layer", device=device)(rows), trained)
    fresh = layer_of(kind, padding_idx=3, max_norm=20.0).to(device).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(rows), trained)
    layer.thaw(optimizer)
    layer.train()
    step()
    assert all(p.device.type == device for p in layer.parameters())


def test_freeze_and_thaw_return_to_the_same_outputs():
    layer = layer_of().eval()
    rows = torch.arange(200)
    before, dims = layer(rows), layer.row_dims()
    layer.freeze().thaw()
    assert layer.phase == "search" and torch.equal(layer(rows), before)
    assert torch.equal(layer.row_dims(), dims)
    layer.freeze()
    assert torch.equal(layer(rows), before)


def test_absorb_order():
    layer = layer_of(padding_idx=7).eval()
    rows = torch.arange(200)
    before, widths, fields = layer(rows), None, layer.row_fields()
    layer.freeze()
    widths = layer.row_dims()
    with_order = layer.stored_bytes()
    new_rows = layer.absorb_order()
    assert new_rows.dtype == torch.int32 and sorted(new_rows.tolist()) == rows.tolist()
    assert layer.stored_bytes() == with_order - 800
    assert torch.equal(layer(new_rows), before)
    assert torch.equal(layer.row_dims()[new_rows.long()], widths)
    assert torch.equal(layer.row_fields()[new_rows.long()], fields)
    assert layer.padding_idx == int(new_rows[7])
    assert torch.equal(layer.absorb_order(), torch.arange(200, dtype=torch.int32))
    dims_after_thaw = layer.thaw().row_dims()
    assert torch.equal(layer(new_rows), before)
    assert bool((dims_after_thaw[new_rows.long()] <= widths).all())


def test_padding_row_gets_no_gradient_in_either_phase():
    for kind in (AMTLEmbedding, AMTLEmbeddingBag):
        layer = layer_of(kind, padding_idx=5)
        layer(torch.tensor([[5, 6]])).sum().backward()
        assert not layer.weight.grad[5].any() and layer.weight.grad[6].any()
        layer.freeze()
        assert layer.row_order is not None
        layer(torch.tensor([[5, 6]])).sum().backward()
        gradient = torch.cat([b.grad.sum(1) for b in layer.blocks])
        assert gradient[layer.row_order[5]] == 0 and gradient[layer.row_order[6]] != 0


def test_weight_is_released():
    layer = layer_of(rows=3000, dim=64)
    optimizer = torch.optim.Adam([*layer.table_parameters(), *layer.mask_parameters()])
    train(layer, optimizer, 2)
    watched = weakref.ref(layer.weight)
    state = weakref.ref(optimizer.state[layer.weight]["exp_avg"])
    numbers = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    layer.freeze(optimizer)
    gc.collect()
    assert watched() is None and state() is None
    train(layer, optimizer, 1)
    after = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    assert after < 0.3 * numbers


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_a_masked_table_would(name):
    """Frozen training equals dense training whose columns beyond the stored width never existed."""
    layer = layer_of(tier_width=1, size_noise=0.0)
    hold_sizes(layer)
    optimizer = OPTIMIZERS[name](layer.table_parameters())
    train(layer, optimizer, 5)
    dense = nn.Parameter(layer.weight.detach().clone())
    row_dims = layer.row_dims()
    twin = OPTIMIZERS[name]([dense])
    twin.state[dense] = copy.deepcopy(optimizer.state[layer.weight])
    layer.freeze(optimizer)
    assert list(optimizer.param_groups[0]["params"]) == list(layer.blocks)
    generator = torch.Generator().manual_seed(9)
    for _ in range(5):
        rows = torch.randint(200, (64,), generator=generator)
        for parameter, out in (
            (None, layer(rows)),
            (dense, torch.where(torch.arange(16) < row_dims[rows][:, None], dense[rows], 0)),
        ):
            step = optimizer if parameter is None else twin
            step.zero_grad()
            out.square().sum().backward()
            step.step()
    rows = torch.arange(200)
    expected = torch.where(torch.arange(16) < row_dims[:, None], dense, 0)
    torch.testing.assert_close(layer(rows), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip(name):
    layer = layer_of(tier_width=4)
    optimizer = OPTIMIZERS[name](
        [{"params": layer.table_parameters()}, {"params": layer.mask_parameters(), "lr": 0.01}]
    )
    train(layer, optimizer, 3)
    before = {
        k: v.clone()
        for k, v in optimizer.state[layer.weight].items()
        if isinstance(v, torch.Tensor)
    }
    kept = torch.arange(16) < layer.row_dims()[:, None]
    stored = torch.arange(16) < (layer.row_dims() + 3).div(4, rounding_mode="floor")[:, None] * 4
    mask_parameters = layer.mask_parameters()
    layer.freeze(optimizer)
    assert optimizer.param_groups[1]["params"] == [] and len(optimizer.param_groups) == 2
    assert not any(p in optimizer.state for p in mask_parameters)
    layer.thaw(optimizer)
    assert list(optimizer.param_groups[0]["params"]) == [layer.weight]
    assert all(
        a is b
        for a, b in zip(optimizer.param_groups[1]["params"], layer.mask_parameters(), strict=True)
    )
    after = optimizer.state[layer.weight]
    assert set(before) == {k for k, v in after.items() if isinstance(v, torch.Tensor)}
    for key, value in before.items():
        if value.ndim == 2:
            # Directions are cut to each row's size, magnitudes to its stored width.
            cut = stored if key in ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg") else kept
            assert torch.equal(after[key], torch.where(cut, value, 0)), key
        else:
            assert torch.equal(after[key], value), key
    train(layer, optimizer, 2)


def test_momentum_does_not_leak_into_padding():
    """A zero gradient after freezing moves no padding, though momentum was there before."""
    layer = layer_of(tier_width=4)
    optimizer = torch.optim.SGD(layer.table_parameters(), lr=0.1, momentum=0.9)
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    dims = layer.row_dims()
    layer.freeze(optimizer)
    for block in layer.blocks:
        block.grad = torch.zeros_like(block)
    optimizer.step()
    beyond = torch.arange(16) >= dims[:, None]
    assert not layer(torch.arange(200))[beyond].any()


def test_frozen_training_uses_the_padding():
    layer = layer_of(tier_width=4)
    dims = layer.row_dims()
    layer.freeze()
    padded = (layer.row_dims() > dims).nonzero().flatten()
    layer(padded).sum().backward()
    row, place = int(padded[0]), 0
    place = int(padded[0]) if layer.row_order is None else int(layer.row_order[row])
    start = 0
    for block, end in zip(layer.blocks, layer.tier_ends, strict=True):
        if place < end:
            assert bool((block.grad[place - start] == 1).all())
            break
        start = end


def test_loss_falls_through_freezing():
    layer = layer_of()
    optimizer = torch.optim.Adam(
        [{"params": layer.table_parameters()}, {"params": layer.mask_parameters()}], lr=0.02
    )
    searched = train(layer, optimizer, 60)
    layer.freeze(optimizer)
    frozen = train(layer, optimizer, 60, seed=1)
    assert searched[-1] < searched[0]
    assert sum(frozen[-10:]) < sum(searched[-10:])


def test_sparse_rows_and_row_optimizers_survive_freezing():
    for cls in (optim.SGD, optim.Adagrad, optim.RowwiseAdagrad, optim.Adam):
        layer = layer_of(sparse=True)
        optimizer = cls(layer.table_parameters(), lr=0.05)
        searched = train(layer, optimizer, 20)
        layer.freeze(optimizer)
        frozen = train(layer, optimizer, 20)
        layer.thaw(optimizer)
        thawed = train(layer, optimizer, 5)
        assert frozen[-1] < searched[0] and thawed[-1] < searched[0], cls


def test_momentum_of_sparse_gradients_survives_freezing_and_thawing():
    """As that of a plain table: PyTorch keeps it as a sparse tensor."""
    torch.manual_seed(0)
    plain = torch.nn.Embedding(40, 8, sparse=True)
    layer = AMTLEmbedding(
        40,
        8,
        counts=torch.arange(40),
        budget=1.0,
        bits=None,
        sparse=True,
        _weight=plain.weight.detach().clone(),
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, layer)]
    rows = torch.randint(40, (6, 11), generator=torch.Generator().manual_seed(1))
    for step in range(6):
        if step == 2:
            layer.freeze()
        if step == 4:
            layer.thaw()
        for module, optimizer in zip((plain, layer), optimizers, strict=True):
            optimizer.zero_grad()
            module(rows[step]).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.dense_weight(), plain.weight.detach())


def test_adafactors_factors_go_with_the_table():
    """It keeps a number a row and a number a column in place of one each."""
    layer = layer_of(parametrization="rule")
    optimizer = torch.optim.Adafactor(layer.table_parameters(), lr=0.01)
    train(layer, optimizer, 2)
    before = {key: value.clone() for key, value in optimizer.state[layer.weight].items()}
    layer.freeze(optimizer)
    least = min(block.shape[1] for block in layer.blocks)
    assert len({block.shape[1] for block in layer.blocks}) > 1
    for block in layer.blocks:
        state = optimizer.state[block]
        assert torch.equal(state["col_var"], before["col_var"][:, : block.shape[1]])
        assert state["row_var"].shape == (len(block), 1) and state["step"] == before["step"]
    layer.thaw()
    state = optimizer.state[layer.weight]
    assert torch.equal(state["row_var"], before["row_var"])
    columns = state["col_var"]
    torch.testing.assert_close(columns[:, :least], before["col_var"][:, :least])
    assert columns.shape == (1, 16) and (columns <= before["col_var"] * (1 + 1e-5)).all()
    layer.freeze(optimizer)
    losses = train(layer, optimizer, 30)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adafactor])
@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
def test_an_optimizer_without_the_tiers_of_no_numbers_follows(parametrization, kind, told):
    """Some divide by the size of a gradient."""
    layer = layer_of(parametrization=parametrization, bits=4, budget=0.125, padding_idx=0)
    layer.freeze()
    held = [block for block in layer.table_parameters() if block.numel()]
    assert len(held) < len(layer.table_parameters())
    optimizer = kind(held, lr=0.01)
    train(layer, optimizer, 2)
    states = [
        value[0].clone()
        for block in held
        for value in optimizer.state[block].values()
        if value.shape == block.shape or value.shape == (len(block), 1)
    ]
    layer.thaw(optimizer if told else None)
    expected = [layer.weight, *layer.mask_parameters()]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, expected))
    kept = [value for value in optimizer.state[layer.weight].values() if value.dim() == 2]
    assert all(any(bool((s[:1] == v[:, :1]).any()) for v in kept) for s in states)
    before = layer.weight.detach().clone()
    train(layer, optimizer, 2)
    assert not torch.equal(layer.weight, before)


def test_a_state_of_the_other_phase_reaches_an_optimizer_without_tiers_of_no_numbers():
    def made():
        return layer_of(parametrization="rule", bits=4, budget=0.125, padding_idx=0)

    searching, layer = made(), made().freeze()
    first = layer.table_parameters()[0]
    assert not first.numel()
    held = [block for block in layer.table_parameters() if block.numel()]
    optimizer = torch.optim.Adam(held, 0.01)
    layer.load_state_dict(searching.state_dict())
    assert list(map(id, optimizer.param_groups[0]["params"])) == [id(layer.weight)]


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_models_may_leave_integers_alone_only(bits, use_buffers, tmp_path):
    """PyTorch's averages integers, too, and cuts them off."""
    counts = counts_of(500)
    layer = AMTLEmbedding(500, 8, counts=counts, budget=0.05, bits=bits).freeze()
    assert layer.row_order is not None
    model, rows = torch.nn.Sequential(layer), torch.arange(500)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=average, use_buffers=use_buffers
    )
    for _ in range(20):
        averaged.update_parameters(model)
    averaged.eval()
    if not use_buffers:
        torch.testing.assert_close(averaged(rows), model.eval()(rows), rtol=0, atol=1e-6)
        amtl.save(averaged.module, tmp_path / "averaged")
        return
    with pytest.raises(RuntimeError, match="AveragedModel\\(use_buffers=True\\)"):
        averaged(rows)
    with pytest.raises(RuntimeError, match="AveragedModel\\(use_buffers=True\\)"):
        amtl.save(averaged.module, tmp_path / "averaged")
    # What belongs to the model is looked at once more, and passes.
    layer.eval().load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(layer(rows), copy.deepcopy(layer)(rows))


def test_places_of_rows_may_be_made_in_inference_mode(tmp_path):
    """What is made there counts no writes."""
    path, rows = tmp_path / "table", torch.arange(500)
    with torch.inference_mode():
        layer = AMTLEmbedding(500, 8, counts=counts_of(500), budget=0.05).freeze().eval()
        assert layer.row_order is not None and layer.row_order.is_inference()
        shown = layer(rows)
        amtl.save(layer, path)
        assert torch.equal(amtl.load(path).eval()(rows), shown)
    assert torch.equal(amtl.load(path).eval()(rows), shown)


class Projected(torch.optim.SGD):
    """Keeps what nobody can cut, as SOAP does, and a number of a column, as CAME does."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            rows, columns = parameter.shape
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(1)
                state["GG"] = [torch.eye(rows), torch.eye(columns)]
                state["columns"] = torch.ones(columns)
            state["step"] += 1
            assert state["GG"][0].shape == (rows, rows) and state["columns"].shape == (columns,)
        return super().step(closure)


def test_states_that_cannot_be_cut_begin_anew():
    layer = layer_of(parametrization="rule")
    optimizer = Projected(layer.table_parameters(), lr=0.01)
    train(layer, optimizer, 2)
    with pytest.warns(UserWarning, match="Projected keeps a state that cannot follow"):
        layer.freeze(optimizer)
    assert len(layer.blocks) > 1 and not optimizer.state
    losses = train(layer, optimizer, 30)
    assert losses[-1] < losses[0]
    with pytest.warns(UserWarning, match="Projected keeps a state that cannot follow"):
        layer.thaw(optimizer)
    assert not optimizer.state
    train(layer, optimizer, 2)


@pytest.mark.filterwarnings("error")
def test_states_that_cannot_be_cut_stay_where_rows_do():
    layer = layer_of(parametrization="rule", budget=0.3, bits=8)
    optimizer = Projected(layer.table_parameters(), lr=0.01)
    train(layer, optimizer, 2)
    before = optimizer.state[layer.weight]["GG"]
    layer.freeze(optimizer)
    (block,) = layer.blocks
    assert all(map(torch.equal, optimizer.state[block]["GG"], before))
    assert optimizer.state[block]["step"].tolist() == [2.0]
    layer.thaw(optimizer)
    assert all(map(torch.equal, optimizer.state[layer.weight]["GG"], before))


def test_several_optimizers():
    layer = layer_of()
    tables = torch.optim.SGD(layer.table_parameters(), lr=0.1)
    masks = torch.optim.Adam(layer.mask_parameters())
    layer.freeze([tables, masks])
    assert masks.param_groups[0]["params"] == []
    layer.thaw([tables, masks])
    assert len(masks.param_groups[0]["params"]) == len(layer.mask_parameters())


@pytest.mark.parametrize("told", [False, True])
def test_masks_return_to_the_optimizer_that_they_came_from(told):
    """Not to that of the table, whose learning rate is another; in a copy they have none but it."""
    layer = layer_of()
    masks = torch.optim.Adam([{"params": []}, {"params": layer.mask_parameters(), "lr": 0.5}])
    tables = torch.optim.SGD(layer.table_parameters(), lr=0.1)
    layer.freeze([tables, masks] if told else None)
    other = copy.deepcopy(layer)
    layer.thaw()
    assert masks.param_groups[1]["params"] == layer.mask_parameters()
    assert tables.param_groups[0]["params"] == layer.table_parameters()
    optimizer = torch.optim.SGD(other.table_parameters(), lr=0.1)
    other.thaw(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1 + len(other.mask_parameters())
    other.freeze(optimizer)
    stranger = torch.optim.SGD(other.table_parameters(), lr=0.1)
    other.thaw(stranger)
    assert len(stranger.param_groups[0]["params"]) == 1 + len(other.mask_parameters())


class Delegating(torch.optim.Optimizer):
    """As accelerate wraps an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)


class Sharing(torch.optim.Optimizer):
    """As Lightning wraps one: what it held when it was wrapped."""

    def __init__(self, optimizer):
        self.__dict__ = dict(optimizer.__dict__)


@pytest.mark.parametrize("wrapping", [Delegating, Sharing])
@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_a_wrapped_optimizer_is_changed_once(wrapping, reloaded, told):
    layer = layer_of()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    wrapper = wrapping(optimizer)
    train(layer, optimizer, 2)
    if reloaded:
        # A wrapper that shares keeps the groups and the state of before.
        optimizer.load_state_dict(optimizer.state_dict())
        train(layer, optimizer, 1)
    for change in (layer.freeze, layer.thaw):
        change([wrapper, optimizer] if told else None)
        held = [id(p) for p in optimizer.param_groups[0]["params"]]
        assert sorted(held) == sorted(id(p) for p in layer.parameters())
        for table in layer.table_parameters():
            assert optimizer.state[table]["exp_avg"].shape == table.shape
        assert all(bool(optimizer.state[t]["exp_avg"].any()) for t in layer.table_parameters()[:1])
        train(layer, optimizer, 1)


def test_parameter_names_follow():
    layer = layer_of()
    named = [(n, p) for n, p in layer.named_parameters()]
    optimizer = torch.optim.SGD(named, lr=0.1)
    for action in (layer.freeze, layer.thaw):
        action(optimizer)
        group = optimizer.param_groups[0]
        assert len(group["param_names"]) == len(group["params"]) == len(set(group["param_names"]))


def test_a_forgotten_table_is_an_error():
    layer = layer_of()
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="not in the optimizer"):
        layer.freeze(other)
    assert layer.phase == "search"
    layer.weight.requires_grad_(False)
    layer.freeze(other)
    assert not layer.blocks[0].requires_grad


def test_wrong_phase():
    layer = layer_of()
    with pytest.raises(RuntimeError, match="search phase already"):
        layer.thaw()
    with pytest.raises(RuntimeError, match="freeze"):
        layer.absorb_order()
    layer.freeze()
    with pytest.raises(RuntimeError, match="frozen already"):
        layer.freeze()
    assert layer.mask_parameters() == []
    few = layer_of(bits=8).freeze().to_integers()
    with pytest.raises(RuntimeError, match="thaw"):
        few.reset_parameters()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_frozen_table_is_drawn_anew(bits):
    """As trainers do at the start of a run: `model.apply(lambda m: m.reset_parameters())`."""
    layer = layer_of(bits=bits, padding_idx=3, weight_std=0.5, parametrization="rule").freeze()
    dims, before = layer.row_dims(), layer.dense_weight()
    with torch.no_grad():
        for block in layer.blocks:
            block.mul_(40)
    layer.reset_parameters()
    after = layer.dense_weight()
    assert torch.equal(layer.row_dims(), dims) and not torch.equal(after, before)
    columns = torch.arange(after.shape[1])
    stored = (columns < dims[:, None]) & (torch.arange(len(after)) != 3)[:, None]
    assert not after[~stored].any()
    assert 0.4 < float(after[stored].std()) < 0.6
    if bits:
        # Step sizes are those of the new numbers.
        assert len(after[stored].unique()) > 2 ** (bits - 2)


@pytest.mark.parametrize("bounds_check", ["raise", "clamp"])
def test_out_of_range_is_the_same_in_both_phases(bounds_check):
    layer = layer_of(bounds_check=bounds_check).eval()
    bad = torch.tensor([3, 200, -1])
    if bounds_check == "raise":
        for phase in ("search", "frozen"):
            assert layer.phase == phase
            with pytest.raises(IndexError, match=r"index 200 at position 1 .* 200 rows"):
                layer(bad)
            if phase == "search":
                layer.freeze()
        assert layer.row_order is not None
        return
    amtl_kernels.reference._warned_clamped = True
    before = layer(bad)
    assert torch.equal(before, layer(torch.tensor([3, 199, 0])))
    layer.freeze()
    assert torch.equal(layer(bad), before)


def test_empty_table_and_one_row():
    for rows in (0, 1):
        layer = AMTLEmbedding(rows, 4, counts=torch.ones(rows), budget=0.5, bits=None).eval()
        before = layer(torch.zeros(0 if rows == 0 else 2, dtype=torch.int64))
        layer.freeze()
        after = layer(torch.zeros(0 if rows == 0 else 2, dtype=torch.int64))
        assert torch.equal(before, after) and after.shape[-1] == 4
        layer.thaw()


def test_model_helpers():
    model = nn.ModuleDict({"a": layer_of(), "b": layer_of(AMTLEmbeddingBag)})
    model["c"] = model["a"]
    assert list(amtl.layers(model)) == ["a", "b"]
    assert len(amtl.mask_parameters(model)) == 2 * len(model["a"].mask_parameters())
    optimizer = torch.optim.SGD(
        [{"params": amtl.table_parameters(model)}, {"params": amtl.mask_parameters(model)}], lr=0.1
    )
    amtl.update_schedule(model, 0.3)
    assert model["b"].progress == 0.3
    amtl.freeze(model, optimizer)
    amtl.freeze(model, optimizer)
    assert model["a"].phase == model["b"].phase == "frozen"
    assert amtl.mask_parameters(model) == []


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_what_was_set_on_the_weight(hook, load):
    """Attributes go over to the blocks and back; hooks, which expect its shape, are told of."""
    counts = torch.arange(20) ** 2
    layer = amtl.AMTLEmbedding(20, 4, counts=counts, budget=0.5, bits=None)
    layer.name = "item"
    frozen = copy.deepcopy(layer).freeze().state_dict()
    searching = layer.state_dict()
    layer.weight._no_weight_decay = True
    handle = getattr(layer.weight, hook)(lambda *_: None)
    with pytest.warns(UserWarning, match=r"table 'item' .*hook what the layer gives, or .*table_p"):
        layer.load_state_dict(frozen) if load else layer.freeze()
    assert len(layer.blocks) > 1 and all(block._no_weight_decay for block in layer.blocks)
    handle.remove()
    handle = getattr(layer.blocks[1], hook)(lambda *_: None)
    with pytest.warns(UserWarning, match="hooks on those before are called no more"):
        layer.load_state_dict(searching) if load else layer.thaw()
    assert layer.weight._no_weight_decay
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.freeze().thaw()


def gather(layer, step=None, passes=12):
    for _ in range(passes):
        layer(torch.arange(20)).square().sum().backward()
        if step is not None:
            step()


@pytest.mark.parametrize("bits", [None, 8])
def test_a_frozen_table_in_no_optimizer(bits):
    """As where weights are found by a name that ends in "weight"."""
    model = nn.ModuleDict({"item": nn.Embedding(20, 4), "top": nn.Linear(4, 1)})
    amtl.freeze(amtl.convert(model, {"item": torch.arange(20) ** 2}, budget=0.5, bits=bits))
    named = [p for name, p in model.named_parameters() if name.endswith("weight")]
    optimizer = torch.optim.SGD(named, lr=0.1)
    with pytest.warns(UserWarning, match=r"table 'item' gets gr.*called item\.blocks\.0") as told:
        gather(model["item"], optimizer.step)
    assert len(told) == 1
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    "way", ["accumulates", "by hand", "data", "fused", "fixed", "no gradients", "eval"]
)
def test_a_frozen_table_that_is_well(way):
    layer = amtl.AMTLEmbedding(20, 4, counts=torch.arange(20) ** 2, budget=0.5, bits=None).freeze()
    optimizer, step = None, None
    if way == "accumulates":
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    elif way == "fused":
        layer.fuse(functools.partial(optim.SGD, lr=0.1))
        step = layer.fused_optimizer.step
    elif way == "fixed":
        layer.requires_grad_(False)
        layer.register_forward_hook(lambda _, __, out: out.requires_grad_())
    elif way == "no gradients":
        step = layer.zero_grad
    elif way == "eval":
        layer.eval()
    elif way == "data":

        def step():
            for block in layer.blocks:
                block.data.sub_(block.grad, alpha=0.01)

    elif way == "by hand":

        def step():
            with torch.no_grad():
                for block in layer.blocks:
                    block.sub_(block.grad, alpha=0.01)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gather(layer, step)
    del optimizer


def test_optimizers_are_looked_for_once(monkeypatch):
    asked, layer = [], amtl.AMTLEmbedding(20, 4, counts=torch.ones(20), budget=1.0, bits=None)
    layer.freeze()
    monkeypatch.setattr(lookups, "optimizers_of", lambda p: asked.append(p) or [None])
    gather(layer)
    gather(layer)
    assert len(asked) == 1


def test_states_of_a_frozen_table_and_its_optimizer_are_loaded_in_this_order():
    def fresh():
        layer = amtl.AMTLEmbedding(200, 8, counts=torch.arange(200) ** 2, budget=0.3, bits=None)
        return layer, amtl_kernels.optim.Adam(layer.table_parameters(), lr=0.1)

    def step(layer, optimizer):
        layer(torch.arange(50)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = fresh()
    step(layer, optimizer)
    layer.freeze(optimizer)
    step(layer, optimizer)
    states = copy.deepcopy((layer.state_dict(), optimizer.state_dict()))
    again, other = fresh()
    with pytest.raises(ValueError, match="load the state of the model"):
        other.load_state_dict(states[1])
    again.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for each in ((layer, optimizer), (again, other)):
        step(*each)
    rows = torch.arange(200)
    assert torch.equal(layer(rows), again(rows))
