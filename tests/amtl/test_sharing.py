"""Rows of size 0: looked up as their field's shared row, or zeros, in both phases and in files."""

from __future__ import annotations

import copy

import amtl
import pytest
import torch
import torch._dynamo
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer.options import SearchOptions
from amtl.layer.sharing import groups_that_share
from torch import nn
from torch.nn import functional as F

import amtl_kernels

KINDS = [AMTLEmbedding, AMTLEmbeddingBag]
FIELDS = [150, 90]
ROWS, DIM = sum(FIELDS), 16


def counts_of(seed=0):
    """A long tail in each field, in any order, with many rows seen once or never."""
    generator = torch.Generator().manual_seed(seed)
    parts = [(400 / torch.arange(1, n + 1).pow(1.3)).long() for n in FIELDS]
    return torch.cat([p[torch.randperm(len(p), generator=generator)] for p in parts])


def layer_of(kind=AMTLEmbedding, shared_rows=(11, 160), **options):
    torch.manual_seed(0)
    options = {
        "counts": counts_of(),
        "field_sizes": FIELDS,
        "budget": 0.06,
        "bits": None,
        **options,
    }
    options = {"parametrization": "ordinal", **options}
    return kind(ROWS, DIM, shared_rows=shared_rows, **options)


def looked_up(layer):
    """The row that each row is looked up as, and what it shows there, by the definition."""
    sizes = layer.group_dims()[layer.row_group]
    fields = torch.tensor([0] * FIELDS[0] + [1] * FIELDS[1])
    target = torch.arange(ROWS)
    if layer.shared_rows is not None:
        moved = sizes == 0
        if layer.padding_idx is not None:
            moved[layer.padding_idx] = False
        target = torch.where(moved, layer.shared_rows[fields], target)
    masked = torch.where(torch.arange(DIM) < sizes[:, None], layer.weight, 0)
    return target, masked[target].detach()


@pytest.mark.every(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parametrization", ["ordinal", "rule"])
@pytest.mark.parametrize("shared_rows", [(11, 160), "rarest", "zero"])
@pytest.mark.parametrize("padding_idx", [None, 5])
def test_a_life(kind, parametrization, shared_rows, padding_idx, tmp_path):
    """Search, freeze, absorb, state, file, thaw: the same outputs all along."""
    counts = counts_of()
    if padding_idx is not None:
        counts[padding_idx] = 0
    options = {
        "parametrization": parametrization,
        "padding_idx": padding_idx,
        "shared_rows": shared_rows,
        "counts": counts,
    }
    layer = layer_of(kind, **options).eval()
    target, shown = looked_up(layer)
    merged = target != torch.arange(ROWS)
    nothing = int((layer.row_dims() == 0).sum())
    assert nothing > 50 and (shared_rows == "zero" or int(merged.sum()) >= nothing - 3)
    rows = torch.arange(ROWS)[:, None]
    if padding_idx is not None and kind is AMTLEmbeddingBag:
        shown[padding_idx] = 0
    flat = torch.arange(ROWS) if kind is AMTLEmbedding else rows
    before = layer(flat)
    assert torch.equal(before, shown)
    dense = layer.dense_weight()
    assert torch.equal(dense[target != padding_idx], shown[target != padding_idx])
    stored = layer.stored_bytes()
    assert 0.05 * ROWS * DIM * 4 < stored <= 0.06 * ROWS * DIM * 4

    layer.freeze()
    assert torch.equal(layer(flat), before) and torch.equal(layer.dense_weight(), dense)
    assert layer.stored_bytes() == stored + 4 * ROWS
    assert sum(b.numel() for b in layer.blocks if b.shape[1]) == stored // 4
    assert layer.tier_ends[-1] == ROWS - int(merged.sum())
    assert bool((layer.row_dims()[merged] == 0).all())
    amtl.save(layer, tmp_path / "layer")
    packed = amtl.load(tmp_path / "layer")
    assert torch.equal(packed(flat), before) and packed.dense_bytes() == ROWS * DIM * 4
    fresh = layer_of(kind, **{**options, "counts": torch.zeros(ROWS)}).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(flat), before)
    again = copy.deepcopy(layer).thaw()
    assert torch.equal(again(flat), before) and torch.equal(again.freeze()(flat), before)

    new = layer.absorb_order()
    assert layer.num_embeddings == layer.tier_ends[-1] == ROWS - int(merged.sum())
    assert new.dtype == torch.int32 and torch.equal(
        new.unique(), torch.arange(layer.num_embeddings, dtype=torch.int32)
    )
    assert torch.equal(new[target], new)
    moved = new.view(flat.shape)
    assert torch.equal(layer(moved), before)
    assert layer.stored_bytes() == stored and layer.stored_fraction() <= 0.06
    assert layer.dense_bytes() == ROWS * DIM * 4
    amtl.save(layer, tmp_path / "absorbed")
    assert torch.equal(amtl.load(tmp_path / "absorbed")(moved), before)
    for phase in ("search", "frozen"):
        fresh = layer_of(kind, **options).eval()
        if phase == "frozen":
            fresh.freeze()
        fresh.load_state_dict(layer.state_dict())
        assert fresh.num_embeddings == layer.num_embeddings
        assert torch.equal(fresh(moved), before)
        # Back to the state before rows were merged.
        other = layer_of(kind, **options).eval()
        fresh.load_state_dict(other.state_dict())
        assert fresh.num_embeddings == ROWS and torch.equal(fresh(flat), before)
    layer.thaw()
    assert torch.equal(layer(moved), before)
    fresh = layer_of(kind, **options).eval()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(moved), before)
    layer.freeze()
    assert torch.equal(layer(moved), before)


def test_gradients_go_to_the_shared_row():
    layer = layer_of(size_noise=0.0, sparse=True)
    target, _ = looked_up(layer)
    rows = torch.randint(ROWS, (80,))
    delta = torch.randn(80, DIM)
    layer(rows).backward(delta)
    gradient = layer.weight.grad.coalesce()
    assert set(gradient.indices()[0].tolist()) == set(target[rows].tolist())
    kept = torch.arange(DIM) < layer.row_dims()[:, None]
    expected = torch.zeros(ROWS, DIM).index_add(0, target[rows], delta) * kept
    torch.testing.assert_close(gradient.to_dense(), expected)
    signal = torch.zeros(layer.head.num_groups, DIM).index_add(
        0, layer.row_group[target[rows]].long(), delta * layer.weight.detach()[target[rows]]
    )
    got = [p.grad.clone() for p in layer.mask_parameters()]
    wanted = torch.autograd.grad(layer.head().mask, layer.mask_parameters(), signal)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    layer.freeze()
    layer(rows).backward(delta)
    place = layer.row_order[target[rows]]
    for start, end, block in zip(
        (0, *layer.tier_ends), layer.tier_ends, layer.blocks, strict=False
    ):
        inside = (place >= start) & (place < end)
        width = block.shape[1]
        expected = torch.zeros(end - start, width).index_add(
            0, place[inside].long() - start, delta[inside, :width]
        )
        torch.testing.assert_close(block.grad.to_dense(), expected)


@pytest.mark.parametrize("bounds_check", ["raise", "clamp", "off"])
def test_rows_in_order_need_one_comparison(bounds_check):
    counts = (300 / torch.arange(1, 201).pow(1.2)).long()
    layer = AMTLEmbedding(
        200,
        DIM,
        counts=counts,
        budget=0.05,
        bits=None,
        shared_rows=[0],
        bounds_check=bounds_check,
    ).eval()
    rows = torch.arange(200)
    before = layer(rows)
    layer.freeze()
    assert layer.row_order is None and layer.tier_ends[-1] < 100
    assert layer.stored_bytes() == sum(b.nbytes for b in layer.blocks)
    for index_type in (torch.int32, torch.int64):
        assert torch.equal(layer(rows.to(index_type)), before)
    assert torch.equal(layer(rows[-5:]), before[0].expand(5, DIM))
    assert torch.equal(copy.deepcopy(layer).thaw()(rows), before)
    new = layer.absorb_order()
    assert torch.equal(new[-5:], torch.zeros(5, dtype=torch.int32))
    assert torch.equal(layer(new), before)


@pytest.mark.parametrize("bounds_check", ["raise", "clamp"])
@pytest.mark.parametrize("in_order", [False, True])
def test_out_of_range_is_the_same_in_both_phases(bounds_check, in_order, monkeypatch):
    monkeypatch.setattr(amtl_kernels.reference, "_warned_clamped", True)
    if in_order:
        counts, shared = (300 / torch.arange(1, ROWS + 1).pow(1.2)).long(), [0]
        options = {"counts": counts, "field_sizes": None, "shared_rows": shared}
    else:
        options = {}
    layer = layer_of(bounds_check=bounds_check, **options).eval()
    bad = torch.tensor([3, ROWS, -1])
    good = layer(bad.clamp(0, ROWS - 1))
    for _ in range(2):
        if bounds_check == "raise":
            with pytest.raises(IndexError, match=rf"index {ROWS} at position 1 .* {ROWS} rows"):
                layer(bad)
        else:
            assert torch.equal(layer(bad), good)
        if layer.phase == "search":
            layer.freeze()
            assert (layer.row_order is None) == in_order


def test_a_shared_row_that_keeps_nothing_gives_zeros():
    counts = torch.full((50,), 100)
    counts[20:] = 0
    layer = AMTLEmbedding(50, 8, counts=counts, budget=0.3, bits=None, shared_rows=[49]).eval()
    assert layer.row_dims()[20:].tolist() == [0] * 30
    rows = torch.arange(50)
    before = layer(rows)
    assert not before[20:].any() and bool(before[:20].any(1).all())
    layer.freeze()
    assert torch.equal(layer(rows), before) and layer.tier_ends[-1] == 21
    assert torch.equal(layer(layer.absorb_order()), before)


def test_zeros_keep_their_number_and_no_bytes():
    layer = layer_of(shared_rows=None).eval()
    rows = torch.arange(ROWS)
    before, dims = layer(rows), layer.row_dims()
    assert not before[dims == 0].any()
    layer.freeze()
    assert layer.blocks[-1].shape == (int((dims == 0).sum()), 0)
    new = layer.absorb_order()
    assert sorted(new.tolist()) == rows.tolist() and torch.equal(layer(new), before)
    layer(new).sum().backward()


def test_padding_never_shares():
    counts = counts_of()
    counts[5] = 0
    layer = layer_of(AMTLEmbeddingBag, padding_idx=5, counts=counts, mode="mean").eval()
    assert int(layer.row_dims()[5]) == 0
    other = int((layer.row_dims() > 2).nonzero()[0])
    bags = torch.tensor([[5, other], [5, 5]])
    expected = torch.stack([layer.dense_weight()[other], torch.zeros(DIM)])
    for _ in range(2):
        assert torch.equal(layer(bags), expected)
        if layer.phase == "search":
            layer.freeze()
    new = layer.absorb_order()
    assert layer.padding_idx == int(new[5]) and int((new == new[5]).sum()) == 1
    assert torch.equal(layer(new[bags]), expected)


def test_the_rarest_row():
    counts = torch.tensor([3, 1, 2, 1, 9, 0, 0, 4])
    options = {"counts": counts, "field_sizes": [5, 3], "budget": 0.5}
    layer = AMTLEmbedding(8, 4, shared_rows="rarest", **options)
    assert layer.shared_rows.tolist() == [3, 6]
    layer = AMTLEmbedding(8, 4, padding_idx=6, shared_rows="rarest", **options)
    assert layer.shared_rows.tolist() == [3, 5]


@pytest.mark.parametrize("exponent", [None, 1.0])
def test_shared_rows_count_what_lands_on_them(exponent):
    """The size of a shared row is that of a row seen as often as it is looked up."""
    layer = layer_of(parametrization="rule", init_exponent=exponent)
    counts = counts_of()
    target, _ = looked_up(layer)
    landing = torch.bincount(target, weights=counts.double(), minlength=ROWS).long()
    seen = layer.head.group_counts[layer.row_group]
    # The second pass gives the shared row more, so rows at the edge may land there in addition.
    for row in (11, 160):
        assert 2 * int(counts[row]) < int(seen[row]) <= int(landing[row])
        assert int(seen[row]) >= 0.5 * int(landing[row])
        alike = (seen - seen[row]).abs().where(torch.arange(ROWS) != row, 10**9).argmin()
        assert abs(int(layer.row_dims()[row]) - int(layer.row_dims()[alike])) <= 1
    others = torch.ones(ROWS, dtype=torch.bool)
    others[[11, 160]] = False
    assert torch.equal(seen[others], counts[others])
    assert 0.055 < layer.stored_fraction() <= 0.06


def test_noise_follows_the_shared_row():
    layer = layer_of()
    target, _ = looked_up(layer)
    rows = torch.arange(ROWS)
    for seed in range(3):
        torch.manual_seed(seed)
        out = layer(rows)
        assert torch.equal(out, out[target])
        kept = out != 0
        assert bool((kept[:, 1:] <= kept[:, :-1]).all())


def test_nobody_is_redirected_where_everybody_keeps_something():
    layer = layer_of(budget=0.9)
    sizes = layer.head().sizes
    assert int(sizes.min()) > 0 and layer._redirect(sizes) is None
    assert layer_of(min_dim=1, budget=0.1)._redirect(torch.zeros(3)) is None


def test_sizes_that_move_take_rows_along():
    """Once a group gets numbers its rows are their own again."""
    layer = layer_of(size_noise=0.0)
    with torch.no_grad():
        before = layer(torch.arange(ROWS))
        layer.head.set_field_weights([1e4, 1.0])
        _, shown = looked_up(layer)
        after = layer(torch.arange(ROWS))
    assert torch.equal(after, shown) and not torch.equal(after, before)
    assert layer.stored_fraction() <= 0.06


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_optimizers_go_on(name):
    layer = layer_of(size_noise=0.0)
    parameters = layer.table_parameters()
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(parameters, lr=0.01)
    rows = torch.arange(ROWS)

    def step():
        optimizer.zero_grad()
        layer(rows).square().sum().backward()
        optimizer.step()

    step()
    key = "momentum_buffer" if name == "sgd" else "exp_avg_sq"
    target, _ = looked_up(layer)
    own = target == rows
    before = optimizer.state[layer.weight][key].clone()
    layer.freeze(optimizer)
    step()
    layer.thaw(optimizer)
    after = optimizer.state[layer.weight][key]
    assert after.shape == before.shape and not after[~own].any()
    assert bool(after[11].any())
    step()


def test_compile():
    layer = layer_of(sparse=True)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for step in range(3):
        rows = torch.randint(ROWS, (9, 3))
        for each in (compiled, twin):
            torch.manual_seed(step)
            each.zero_grad()
            each(rows).sum().backward()
        assert torch.equal(layer.weight.grad.to_dense(), twin.weight.grad.to_dense())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    layer.eval().freeze()
    twin.eval().freeze()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), twin(rows))


def test_convert_and_revert():
    model = nn.ModuleDict({"a": nn.Embedding(ROWS, DIM), "b": nn.Embedding(ROWS, DIM)}).eval()
    amtl.convert(
        model,
        {"a": counts_of(), "b": counts_of(1)},
        budget=0.06,
        bits=None,
        shared_rows={"a": [7], "b": "rarest"},
    )
    assert model["a"].shared_rows.tolist() == [7]
    assert model["b"].shared_rows.shape == (1,)
    rows = torch.arange(ROWS)
    before = model["a"](rows), model["b"](rows)
    amtl.freeze(model)
    amtl.revert(model)
    assert torch.equal(model["a"](rows), before[0]) and torch.equal(model["b"](rows), before[1])
    single = amtl.convert(nn.Embedding(ROWS, DIM), counts_of(), budget=0.06, shared_rows="rarest")
    assert torch.equal(F.embedding(rows, single.dense_weight()), single.eval()(rows))


def test_packed_layers_thaw(tmp_path):
    layer = layer_of(shared_rows=[30], field_sizes=None).eval().freeze()
    amtl.save(layer, tmp_path / "layer")
    rows = torch.arange(ROWS)
    again = amtl.load(tmp_path / "layer").thaw(counts=counts_of())
    assert torch.equal(again.eval()(rows), layer(rows)) and again.shared_rows.tolist() == [30]


def test_evicted_values_give_their_place_to_others(tmp_path):
    layer = layer_of(shared_rows=[30], field_sizes=None, budget=0.1).eval().freeze()
    amtl.save(layer, tmp_path / "layer")
    counts = counts_of()
    gone = counts >= counts.topk(10).values[-1]
    gone[30] = False
    assert bool((layer.row_dims()[gone] > 0).all())
    again = amtl.load(tmp_path / "layer").thaw(counts=counts.masked_fill(gone, 0)).eval()
    again.freeze()
    rows = torch.arange(ROWS)
    assert not again.row_dims()[gone].any()
    assert torch.equal(again(rows[gone]), again(torch.full_like(rows[gone], 30)))
    assert 0.09 < again.stored_fraction() <= 0.1


@pytest.mark.parametrize(
    "shared_rows", ["rare", [11], [11, 160, 3], [11, 12], [-1, 160], [11, ROWS], [5, 160]]
)
def test_bad_shared_rows(shared_rows):
    with pytest.raises(ValueError, match="shared_rows"):
        layer_of(shared_rows=shared_rows, padding_idx=5)


def test_other_tables_are_refused():
    state = layer_of().freeze().state_dict()
    for rows in (ROWS + 1, ROWS - 1):
        other = AMTLEmbedding(
            rows,
            DIM,
            counts=torch.ones(rows),
            field_sizes=[150, rows - 150],
            shared_rows="rarest",
            bits=None,
        )
        with pytest.raises(RuntimeError, match="do not fit a table"):
            other.load_state_dict(state)


def test_lookups_of_padding_rows_do_not_land_on_shared_rows():
    counts, shared, padding = counts_of(), [11, 160], [30, 170]
    counts[padding] = torch.tensor([1, 2])
    options = SearchOptions(budget=0.02)
    grid = options.grid(DIM, 4)
    landed = []
    for rows in ([], padding):
        groups = groups_that_share(counts, FIELDS, None, shared, rows, options, grid)
        landed.append(groups.counts[groups.row_group[shared]])
    assert (landed[0] - landed[1]).tolist() == [1, 2]
