"""Rows of few bits: codes, training that rounds, the budget in bytes, and files of codes."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from functools import partial

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag, BudgetError
from amtl.cli import main
from amtl.errors import UserError
from amtl.layer.rounding import (
    PART_BYTES,
    Parts,
    Rounding,
    decode,
    encode,
    is_drawn,
    mean_squares,
    numbers_in,
    plan_parts,
    ranges_of,
    step_groups,
    step_of,
    unit,
    where_they_are,
)
from amtl.run import methods
from amtl.run.config import TrainConfig
from amtl.run.folders import pack_run
from amtl.run.training import start
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import amtl_kernels
from amtl_kernels import optim
from amtl_kernels.rounding import BITS, code_type, pack_codes, unpack_codes

pytestmark = pytest.mark.every(2)

ROWS, DIM = 300, 16
COUNTS = (4000 / torch.arange(1, ROWS + 1).pow(1.1)).long()
SCATTERED = COUNTS[torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))]


def layer_of(bits=4, budget=0.1, kind=AMTLEmbedding, **more):
    torch.manual_seed(0)
    options = {"shared_rows": "rarest", "field_sizes": [200, 100], **more}
    return kind(ROWS, DIM, **{"counts": COUNTS, "budget": budget, "bits": bits, **options})


def trained(layer, steps=5, bags=False):
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(0, layer.num_embeddings, (64,), generator=generator)
        out = layer(rows, torch.arange(0, 64, 4)) if bags else layer(rows)
        (out - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


@settings(max_examples=50)
@given(bits=st.sampled_from(BITS), rows=st.integers(0, 5), units=st.integers(0, 4))
def test_codes_fill_bytes_and_come_back(bits, rows, units):
    generator = torch.Generator().manual_seed(rows * 10 + units)
    codes = torch.randint(0, 2**bits, (rows, units * unit(bits)), generator=generator)
    codes = codes.to(code_type(bits))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, codes.shape[1] * bits // 8)
    assert numbers_in(packed, bits) == codes.shape[1]
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_codes_by_hand():
    # Levels of 2 bits at step 2: -3, -1, 1, 3.
    codes = encode(torch.tensor([[-9.0, -1.9, 0.1, 2.5]]), 2.0, 2)
    assert codes.tolist() == [[0, 1, 2, 3]]
    packed = pack_codes(codes, 2)
    assert packed.tolist() == [[0b11100100]]
    assert decode(packed, torch.tensor(2.0), 2).tolist() == [[-3.0, -1.0, 1.0, 3.0]]
    assert pack_codes(torch.tensor([[1, 15]], dtype=torch.uint8), 4).tolist() == [[0xF1]]
    # Of 16 bits, the lower byte first: code 0, the two in the middle, and the last.
    codes = encode(torch.tensor([[-4e4, -0.6, 0.4, 4e4]]), 1.0, 16)
    assert codes.tolist() == [[0, 32767, 32768, 65535]]
    packed = pack_codes(codes, 16)
    assert packed.tolist() == [[0, 0, 255, 127, 0, 128, 255, 255]]
    shown = [[-32767.5, -0.5, 0.5, 32767.5]]
    assert decode(packed, torch.tensor(1.0), 16).tolist() == shown


@pytest.mark.parametrize("bits", BITS)
def test_step_sizes_lose_least_of_a_normal_distribution(bits):
    """Neither more nor less would do: the mean square of what is lost, by quadrature."""
    half = 2 ** (bits - 1)

    def lost(step):
        # A fine grid within each interval of a code, and one beyond the last, where codes end.
        inside = step * torch.arange(half, dtype=torch.float64)[:, None]
        inside = inside + step * (torch.arange(32, dtype=torch.float64) + 0.5) / 32
        beyond = half * step + (torch.arange(4000, dtype=torch.float64) + 0.5) / 500
        every = torch.cat([inside.flatten(), beyond])
        weight = torch.cat([torch.full_like(inside, step / 32).flatten(), beyond * 0 + 1 / 500])
        level = (every / step).floor().clamp(max=half - 1) + 0.5
        density = torch.exp(-every.square() / 2)
        return float((weight * density * (level * step - every).square()).sum())

    step = float(step_of(torch.ones(()), bits))
    assert lost(step) < min(lost(step * 1.005), lost(step / 1.005))


def test_steps_of_numbers_too_small_for_their_type_are_its_least():
    """Of half precision a step size of 16 bits could be zero, which no number is a multiple of."""
    counts = torch.arange(64, 0, -1)
    layer = AMTLEmbedding(64, 4, counts=counts, bits=16, budget=1.0, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.mul_(1e-4)
    before = layer.weight.detach().clone()
    layer.freeze()
    codes = layer.to_integers()
    assert float(codes.steps.min()) > 0
    kept = torch.arange(4) < layer.row_dims()[:, None]
    assert float(kept.float().mean()) > 0.5 and float(before[kept].abs().mean()) > 2.0**-15
    for one in (layer, codes):
        assert float((one.dense_weight() - before)[kept].abs().max()) <= 2.0**-24


@pytest.mark.parametrize("bits", BITS)
def test_no_level_is_nearer(bits):
    values = torch.linspace(-3, 3, 997)[None]
    step = torch.tensor(0.37)
    levels = (torch.arange(2**bits) - (2**bits - 1) / 2) * step
    found = (encode(values, step, bits) - (2**bits - 1) / 2) * step
    best = levels[(values[0, :, None] - levels).abs().argmin(1)]
    # Of a code of 16 bits and what lies between it and the next float32 keeps 8 bits of the latter.
    near = {"rtol": 0, "atol": float(step) * 2.0**-8} if bits == 16 else {}
    torch.testing.assert_close((found[0] - values[0]).abs(), (best - values[0]).abs(), **near)


def test_parts_are_runs_of_one_width_and_one_step():
    stored, steps = torch.tensor([8, 8, 8, 4, 4, 0]), torch.tensor([0, 0, 1, 1, 1, 0])
    assert plan_parts(stored, steps) == Parts([2, 3, 5, 6], [8, 8, 4, 0])
    assert step_groups(torch.tensor([0, 1, 3, 6, 7]), torch.tensor([0, 0, 0, 0, 2])).tolist() == [
        *(0, 1, 2, 2, 131)
    ]


@pytest.mark.parametrize("bits", BITS)
def test_what_is_looked_up_are_levels_and_gradients_pass_straight_through(bits):
    layer = trained(layer_of(bits).freeze())
    layer.eval()
    rows = torch.arange(ROWS)
    out = layer(rows)
    places = layer._frozen_rows(rows)
    part = torch.bucketize(places, layer.rounding.ends, right=True)
    codes = out / layer.rounding.steps()[part][:, None] + (2**bits - 1) / 2
    kept = torch.arange(DIM) < layer.rounding.widths[part][:, None]
    assert bool((out[~kept] == 0).all()) and int(kept.sum()) > 0
    torch.testing.assert_close(codes[kept], codes[kept].round(), atol=1e-3, rtol=0)
    assert bool(((codes > -0.01) & (codes < 2**bits - 0.99))[kept].all())
    slope = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(0))
    (out * slope).sum().backward()
    plain = copy.deepcopy(layer)
    plain.rounding = None
    plain.zero_grad()
    (plain(rows) * slope).sum().backward()
    for ours, theirs in zip(layer.blocks, plain.blocks, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("masters", [True, False])
def test_a_table_in_frequency_order_keeps_it(bits, masters):
    alone = {"field_sizes": None, "shared_rows": None, "min_dim": unit(bits), "masters": masters}
    if not masters:
        alone["fused_optimizer"] = partial(optim.SGD, lr=0.1)
    layer = layer_of(bits, bits / 64, **alone)
    layer.freeze()
    assert layer.row_order is None and len(set(layer.row_dims().tolist())) > 1
    # Two such fields, or one after a row of padding, are a few runs more.
    both = layer_of(bits, bits / 64)
    padded = layer_of(
        bits, bits / 64, **{**alone, "counts": COUNTS.roll(1), "padding_idx": 0, "min_dim": 0}
    )
    for more in (both, padded):
        more.freeze()
        assert more.row_order is None
    assert padded.row_dims()[0] == 0 and not padded(torch.tensor([0])).any()
    # Scattered ones are put in order.
    scattered = layer_of(bits, bits / 64, **{**alone, "counts": SCATTERED})
    scattered.freeze()
    assert scattered.row_order is not None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("padding", [None, 7])
def test_rows_in_no_order_stay_where_they_are_if_the_budget_holds_all(bits, masters, padding):
    """An order of 4 bytes a row would cost as much as half of what 4 bits take."""
    budget = bits / 32
    options = {
        "counts": SCATTERED,
        "field_sizes": None,
        "shared_rows": None,
        "padding_idx": padding,
        "masters": masters,
    }
    if not masters:
        options["fused_optimizer"] = partial(optim.SGD, lr=0.1)
    layer = layer_of(bits, budget, **options)
    trained = layer.weight.detach().clone()
    layer.freeze()
    assert layer.row_order is None
    assert layer.stored_bytes() == layer.value_bytes() <= budget * ROWS * DIM * 4
    assert layer.value_bytes() > 0.98 * budget * ROWS * DIM * 4
    widths = layer.row_dims()
    kept = torch.arange(DIM) < widths[:, None]
    assert widths.sum() >= ROWS * DIM * 0.96 and (padding is None or widths[padding] == 0)
    # Each run of them is rounded by a step size of its own.
    rows = torch.arange(ROWS)
    given = layer.eval()(rows).detach()
    assert not given[~kept].any()
    parts = layer.rounding.parts()
    assert len(parts.ends) <= 4
    step = layer.rounding.steps()[torch.searchsorted(torch.tensor(parts.ends), rows, right=True)]
    reach = step[:, None] * (2**bits - 2) / 2
    inside = (given.abs() < reach) & kept
    off = (given - trained).abs() / step[:, None]
    assert float(off[inside].max()) <= 0.505
    assert float(inside.float().sum() / kept.sum()) > 0.6
    back = copy.deepcopy(layer).to_integers() if masters else layer
    assert torch.equal(back.eval()(rows), given)
    layer.thaw()
    assert torch.equal(layer.weight[kept], (trained if masters else given)[kept])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("counts", [COUNTS, SCATTERED], ids=["in order", "scattered"])
def test_rows_of_which_all_numbers_fit_are_of_two_widths_at_most(bits, counts):
    """Each width is a parameter: step sizes by the count are not worth half a dozen of them."""
    layer = layer_of(bits, bits / 32, counts=counts, field_sizes=None, shared_rows=None)
    layer.freeze()
    widths = layer.row_dims()
    assert len(layer.table_parameters()) <= 2 and layer.row_order is None
    assert int(widths.min()) >= DIM - unit(bits) and float((widths == DIM).float().mean()) >= 0.87
    assert layer.value_bytes() <= bits / 32 * ROWS * DIM * 4


@pytest.mark.parametrize("counts", [COUNTS, SCATTERED], ids=["in order", "scattered"])
@pytest.mark.parametrize("budget", [None, 0.3])
def test_bits_given_at_freezing_widen_no_rows(counts, budget):
    """A budget in floats is no aim for codes, and no budget is none."""
    options = {"counts": counts, "field_sizes": None, "shared_rows": None}
    kind = {"parametrization": "rule"} if budget else {"parametrization": "free"}
    layer = AMTLEmbedding(ROWS, DIM, budget=budget, bits=None, **options, **kind)
    if not budget:
        with torch.no_grad():
            for name, parameter in layer.head.named_parameters():
                parameter.zero_()
                if name.endswith("2.bias"):
                    parameter[2] = 9.0
    sizes = layer.row_dims()
    layer.freeze(bits=8)
    assert int(sizes.sum()) < ROWS * DIM / 2
    assert bool((layer.row_dims() <= sizes + 1).all())


def test_the_rarest_rows_of_the_largest_field_pay_for_step_sizes():
    """Not the last field's, which may be few that everybody looks up."""
    fields = torch.tensor([0] * 20 + [1] * 300 + [2] * 10)
    counts = torch.cat([torch.arange(n, 0, -1) * 50 for n in (20, 300, 10)])
    torch.manual_seed(0)
    layer = AMTLEmbedding(
        330, 16, counts=counts, field_sizes=[20, 300, 10], budget=0.125, bits=4, seed=0
    )
    layer.freeze()
    widths = layer.row_dims()
    assert layer.row_order is None and layer.value_bytes() <= 330 * 8
    short = widths < 16
    assert bool(short.any()) and bool(fields[short].eq(1).all())
    assert bool(short[20:320].int().diff().ge(0).all())
    # Where no field has as many, the last rows do.
    alike = where_they_are(torch.full((648,), 16), torch.arange(648) // 72, None, 4, 648 * 8, 16)
    assert alike.tolist() == [16] * 568 + [14] * 80
    alone = where_they_are(torch.full((96,), 16), torch.zeros(96).long(), None, 4, 96 * 8 - 1, 16)
    assert bool((alone.diff() <= 0).all()) and int(alone[-1]) == 14


def test_when_rows_stay_where_they_are():
    """16 rows of 4 bits: 8 bytes a row, 8 for a step size and where its rows end."""
    fields = torch.zeros(16, dtype=torch.int64)
    stored = torch.full((16,), 16)
    stored[3] = 14
    wide = where_they_are(stored, fields, None, 4, 16 * 8 + 8, 16)
    assert torch.equal(wide, torch.full((16,), 16))
    assert torch.equal(
        where_they_are(stored, fields, 3, 4, 16 * 8 + 8, 16),
        wide.index_fill(0, torch.tensor([3]), 0),
    )
    # Two rows pay for what is missing, and not more than an eighth of them.
    saved = where_they_are(stored.repeat(8), fields.repeat(8), None, 4, 128 * 8 + 2, 16)
    assert saved.tolist() == [16] * 114 + [14] * 14
    assert where_they_are(stored, fields, None, 4, 16 * 8, 16) is None
    # A budget that wants narrow rows, rows that take less in order, rows that store nothing.
    assert where_they_are(stored, fields, None, 4, 100, 16) is None
    narrow = stored.clone()
    narrow[4:] = 2
    assert where_they_are(narrow, fields, None, 4, 16 * 8 + 8, 32) is None
    # All that they could have, where that is allowed.
    assert where_they_are(narrow, fields, None, 4, 16 * 16 + 8, 32).tolist() == [32] * 16
    nothing = stored.clone()
    nothing[:3] = 0
    assert where_they_are(nothing, fields, None, 4, 1e9, 16) is None
    assert (
        where_they_are(nothing.index_fill(0, fields[:1], 16), fields, None, 4, 1e9, 16) is not None
    )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("budget", [0.03, 0.06, 0.12])
def test_the_budget_counts_bytes_and_step_sizes(bits, budget):
    layer = layer_of(bits, budget)
    limit = budget * ROWS * DIM * 4
    planned = layer.value_bytes()
    layer.freeze()
    parts = layer.rounding.parts()
    kept = sum(width > 0 for width in parts.widths)
    numbers = sum(block.numel() for block in layer.blocks)
    assert layer.value_bytes() == planned == numbers * bits // 8 + kept * PART_BYTES
    full = numbers == ROWS * DIM
    assert planned <= limit and (full or planned > 0.9 * limit)
    assert layer.stored_fraction() == pytest.approx(planned / (ROWS * DIM * 4))
    packed = layer.to_integers()
    assert packed.value_bytes() == planned
    assert sum(b.nbytes for b in packed.blocks) == numbers * bits // 8


@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
@pytest.mark.parametrize("bits", BITS)
def test_a_file_of_codes_gives_the_same_outputs(bits, kind, tmp_path):
    bags = kind is AMTLEmbeddingBag
    layer = trained(layer_of(bits, kind=kind).freeze(), bags=bags).eval()
    rows = torch.arange(ROWS)
    inputs = (rows, torch.tensor([0, 3, 3, 120])) if bags else (rows,)
    expected = layer(*inputs)
    amtl.save(layer, tmp_path / "few.safetensors")
    loaded = amtl.load(tmp_path / "few.safetensors").eval()
    assert torch.equal(loaded(*inputs), expected)
    assert torch.equal(loaded.dense_weight(), layer.dense_weight())
    assert loaded.value_bytes() == layer.value_bytes() and loaded.dtype == torch.float32
    assert not [p for p in loaded.parameters() if p.requires_grad]
    amtl.save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(amtl.load(tmp_path / "again.safetensors").eval()(*inputs), expected)
    order = layer.absorb_order()
    moved = (order[rows], *inputs[1:])
    assert torch.equal(layer(*moved), expected)
    assert torch.equal(layer.to_integers()(*moved), expected)


def test_state_dicts_hold_what_rounding_needs():
    layer = trained(layer_of().freeze())
    fresh = layer_of()
    fresh.load_state_dict(layer.state_dict())
    rows = torch.arange(ROWS)
    assert torch.equal(fresh.eval()(rows), layer.eval()(rows))
    for one in (layer, fresh):
        trained(one.train())
    assert torch.equal(fresh.eval()(rows), layer.eval()(rows))
    with pytest.raises(RuntimeError, match="bits=None"):
        layer_of(None).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="with bits=None, the layer has bits=4"):
        layer_of().load_state_dict(layer_of(None).freeze().state_dict())
    packed = layer.to_integers()
    other = trained(layer_of().freeze()).to_integers()
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(rows), packed(rows))


def test_thawing_finds_the_numbers_that_were_rounded():
    layer = layer_of(8)
    before = layer.weight.detach().clone()
    layer.freeze()
    shown = layer.dense_weight()
    layer.thaw()
    kept = shown != 0
    own = layer.row_dims() > 0
    assert layer.rounding is None
    assert torch.equal(layer.weight.detach()[own][kept[own]], before[own][kept[own]])
    assert not torch.equal(shown[own], before[own])
    packed = layer.freeze().to_integers()
    back = packed.thaw(counts=COUNTS)
    assert back.weight.requires_grad and back.steps is None
    assert torch.equal(back.weight.detach()[own], shown[own])


def test_a_fused_optimizer_trains_what_is_rounded():
    layers = [layer_of().freeze(), layer_of().freeze()]
    layers[0].fuse(partial(optim.Adagrad, lr=0.1))
    optimizers = [layers[0].fused_optimizer, optim.Adagrad(layers[1].table_parameters(), lr=0.1)]
    rows = torch.arange(ROWS)
    for _ in range(3):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            layer(rows).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(*(layer.eval()(rows) for layer in layers))


def test_a_collection_of_few_bits(tmp_path):
    counts = {"a": COUNTS[:200], "b": COUNTS[200:]}
    tables = amtl.AMTLEmbeddingCollection(
        {"a": 200, "b": 100}, DIM, counts=counts, budget=0.1, bits=4
    )
    trained_rows = torch.stack([torch.arange(100), torch.arange(100)], 1)
    tables.freeze()
    tables(trained_rows).sum().backward()
    tables.eval()
    expected = tables(trained_rows)
    assert torch.equal(expected[:, 1], tables.lookup("b", torch.arange(100)))
    assert (
        sum(tables.table_bytes().values()) + 8 * len(tables.rounding.ends) >= tables.value_bytes()
    )
    amtl.save(tables, tmp_path / "tables.safetensors")
    assert torch.equal(amtl.load(tmp_path / "tables.safetensors")(trained_rows), expected)


def test_steps_follow_the_mean_square_in_training_only():
    blocks = [torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2), torch.tensor([[2.0, 2.0]] * 2)]
    rounding = Rounding(4, Parts([2, 4], [4, 2]), torch.tensor([1.0, 4.0]))
    rows = torch.tensor([[0, 3], [1, 1]])
    waits = next(turn for turn in range(1, 16) if is_drawn(turn)) - 1
    for _ in range(waits):
        assert not rounding.follow(blocks, [2, 4], rows, 4)
    assert rounding.mean_square.tolist() == [1.0, 4.0]
    assert rounding.follow(blocks, [2, 4], rows, 4)
    # Three lookups of the first part move it by 3 of 35, of a window of 32; the other is there.
    torch.testing.assert_close(rounding.mean_square, torch.tensor([1 + 6.5 * 3 / 35, 4.0]))
    assert rounding.half().mean_square.dtype == torch.float32
    layer = layer_of().freeze().eval()
    before = layer.rounding.mean_square.clone()
    # Looking up without gradients is no training, whatever the mode: as of an nn.Embedding.
    for mode, gradients in ((False, True), (True, False), (True, True)):
        for _ in range(16):
            with torch.set_grad_enabled(gradients):
                layer.train(mode)(torch.arange(ROWS))
        assert torch.equal(layer.rounding.mean_square, before) != (mode and gradients)


def test_a_sample_of_lookups_sees_every_field():
    """Fields take turns in a batch: a stride of the batch could meet the same one each time."""
    blocks, ends = [torch.arange(1.0, 9.0)[:, None]], [8]
    rounding = Rounding(4, Parts(list(range(1, 9)), [1] * 8), torch.zeros(8))
    rows = torch.arange(8).expand(8192, 8)
    while not rounding.follow(blocks, ends, rows, 1):
        pass
    share = 256 / (256 + 32)
    wanted = torch.arange(1.0, 9.0).square() * share
    # As often as each other, but for one lookup.
    torch.testing.assert_close(rounding.mean_square, wanted, rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_round_as_their_codes_say(dtype):
    with amtl_kernels.use_backend("reference" if dtype == torch.float64 else "auto"):
        layer, rows = layer_of(kind=AMTLEmbeddingBag, mode="sum", dtype=dtype), torch.arange(ROWS)
        layer.freeze()(rows, rows).sum().backward()
        packed = layer.eval().to_integers()
        weights = torch.rand(ROWS).to(dtype)
        for offsets, more in ((torch.arange(ROWS), None), (torch.tensor([0, 3, 3, 120]), weights)):
            wanted, got = (one(rows, offsets, per_sample_weights=more) for one in (layer, packed))
            assert wanted.dtype == got.dtype == packed.dtype == dtype
            # Codes are summed in float32.
            bound = 1e-5 if dtype == torch.float64 and more is not None else 0
            torch.testing.assert_close(got, wanted, rtol=bound, atol=bound)
        assert torch.equal(layer.dense_weight(), packed.dense_weight())


@pytest.mark.parametrize("packed", [False, True])
def test_weights_of_samples_learn_from_what_is_shown(packed):
    layer = layer_of(2, kind=AMTLEmbeddingBag, mode="sum").freeze()
    layer = layer.to_integers() if packed else layer.eval()
    rows, offsets = torch.tensor([0, 5, 9, 200]), torch.tensor([0, 2])
    weights = torch.tensor([0.5, 2.0, -1.0, 1.0], requires_grad=True)
    slope = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    (layer(rows, offsets, per_sample_weights=weights) * slope).sum().backward()
    wanted = (layer.dense_weight()[rows] * slope[[0, 0, 1, 1]]).sum(1)
    torch.testing.assert_close(weights.grad, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_is_repeated_counts_once(reentrant):
    layers = [layer_of().freeze(), layer_of().freeze()]
    before = layers[0].rounding.mean_square.clone()
    rows, scale = torch.arange(ROWS), torch.ones((), requires_grad=True)
    for _ in range(9):
        repeated = checkpoint(lambda s: layers[0](rows) * s, scale, use_reentrant=reentrant)
        for out in (repeated, layers[1](rows) * scale):
            out.square().sum().backward()
    assert not torch.equal(layers[0].rounding.mean_square, before)
    assert torch.equal(layers[0].rounding.mean_square, layers[1].rounding.mean_square)
    for one, other in zip(layers[0].blocks, layers[1].blocks, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_training_is_compiled_in_one_graph():
    torch.compiler.reset()
    layers = [layer_of().freeze(), layer_of().freeze()]
    waiting = (n for n in range(99) if not any(is_drawn(n + step) for step in (1, 2, 3)))
    layers[1].rounding.turn = next(waiting)
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    for _ in range(3):
        rows = torch.arange(0, ROWS, 2)
        before = layers[0].rounding.mean_square.clone()
        outs = [compiled(rows)]
        # A graph follows in every step, before it looks up.
        assert not torch.equal(layers[0].rounding.mean_square, before)
        layers[1].rounding.mean_square.copy_(layers[0].rounding.mean_square)
        outs.append(layers[1](rows))
        for out in outs:
            (out - 1).square().sum().backward()
        assert torch.equal(*outs)
    for one, other in zip(layers[0].blocks, layers[1].blocks, strict=True):
        assert torch.equal(one.grad, other.grad)


def test_training_that_is_interrupted_goes_on_as_it_would_have():
    """Also in the middle between two steps in which step sizes follow."""
    layer = trained(layer_of().freeze(), steps=5)
    again = layer_of()
    again.load_state_dict(layer.state_dict())
    for one in (layer, again):
        trained(one, steps=7)
    assert again.rounding.turn == layer.rounding.turn == 12
    assert torch.equal(again.rounding.mean_square, layer.rounding.mean_square)


def test_the_lookups_of_a_step_are_one_sample():
    """Users and items in one table, looked up one after the other."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 16, generator=generator)
    weight[100:] *= 4
    squares = []
    for order in ((0, 1), (1, 0), (2,)):
        torch.manual_seed(0)
        options = {"counts": torch.full((200,), 9), "_weight": weight.clone(), "budget": 0.126}
        layer = AMTLEmbedding(200, 16, bits=4, **options).freeze()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
        which = [torch.arange(100), torch.arange(100, 200), torch.arange(200)]
        for _ in range(30):
            sum(layer(which[each]).sum() for each in order).backward()
            optimizer.step()
        squares.append(layer.rounding.mean_square)
    for square in squares[1:]:
        torch.testing.assert_close(square, squares[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("lookups", [1, 2, 3, 4, 8, 16])
def test_step_sizes_follow_each_of_several_lookups_in_a_step(lookups):
    """Users and items in one table, positive and negative items: each of them is measured."""
    for which in range(lookups):
        follows = [is_drawn(which + lookups * step) for step in range(4000)]
        assert 0.1 < sum(follows) / 4000 < 0.15
        assert any(follows[:80])
    assert sum(is_drawn(turn) for turn in range(800)) == 100


def test_a_table_that_does_not_train_keeps_its_step_sizes():
    layer = layer_of(4, 0.125)
    layer.weight.requires_grad_(False)
    layer.freeze()
    rows = torch.arange(ROWS)
    before = layer.eval()(rows).clone()
    layer.train()
    for _ in range(40):
        layer(rows[:3])
    assert torch.equal(layer.eval()(rows), before)


def test_numbers_of_two_sizes_get_two_step_sizes_where_rows_stay():
    """Users and items in one table, converted once it is trained."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4060, 16, generator=generator)
    weight[4000:] *= 5
    counts = torch.randint(1, 900, (4060,), generator=generator)
    for budget, most in ((0.3, 0.012), (0.125, 0.13)):
        options = {"_weight": weight.clone(), "counts": counts, "budget": budget}
        layer = AMTLEmbedding(4060, 16, bits=8 if budget == 0.3 else 4, **options)
        layer.freeze().eval()
        assert layer.row_order is None and layer.stored_bytes() <= budget * weight.nbytes
        shown = layer(torch.arange(4060)).detach()
        kept = torch.arange(16) < layer.row_dims()[:, None]
        for rows in (slice(0, 4000), slice(4000, 4060)):
            off = ((shown - weight) * kept)[rows].norm() / weight[rows].norm()
            assert float(off) < most
    fields = torch.zeros(4060, dtype=torch.int64)
    assert ranges_of(weight, fields).unique_consecutive().tolist() == [0, 1]
    # One size everywhere is one step size a field, and a field is never split by another's rows.
    fields[1000:] = 1
    assert torch.equal(ranges_of(torch.randn(4060, 16, generator=generator), fields), fields)
    assert ranges_of(weight[:0], fields[:0]).tolist() == []
    assert ranges_of(torch.zeros(300, 4), fields[:300]).tolist() == [0] * 300


@pytest.mark.parametrize("bits", [4, 8])
def test_step_sizes_reach_as_far_as_numbers_do(bits):
    """One row in twenty that is much larger than the rest is not cut off."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, 16, generator=generator) * 0.05
    weight[::20] *= 20
    counts = torch.randint(1, 900, (1000,), generator=generator)
    layer = AMTLEmbedding(1000, 16, _weight=weight, counts=counts, budget=bits / 31, bits=bits)
    shown = layer.freeze().eval()(torch.arange(1000)).detach()
    off = (shown - weight).norm() / weight.norm()
    assert float(off) < {4: 0.4, 8: 0.045}[bits]
    # Of numbers of a normal distribution nothing else is better than what was found for these.
    plain = torch.randn(1000, 16, generator=generator)
    square = mean_squares([plain], [1000], Parts([1000], [16]), bits, "x")
    torch.testing.assert_close(square, plain.square().mean()[None])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e38])
def test_what_is_no_number_leaves_no_trace(wrong):
    """Once it is gone. Of a part in which it is, the other rows are what they were."""
    layer = layer_of(4, 0.125).freeze()
    rows, block = torch.arange(ROWS), layer.table_parameters()[0]
    kept = block.detach().clone()
    others = rows[layer.row_dims() > 0][1:]
    before = layer.eval()(others).clone()
    with torch.no_grad():
        block[0] = wrong
    layer.train()
    for _ in range(20):
        layer(rows[:1])
    assert torch.equal(layer.eval()(others), before)
    with torch.no_grad():
        block.copy_(kept)
    assert torch.equal(layer(others), before)


def test_degenerate_tables():
    nothing = layer_of(_weight=torch.zeros(ROWS, DIM)).freeze()
    assert float(nothing(torch.arange(ROWS)).detach().abs().max()) < 1e-20
    assert float(nothing.to_integers()(torch.arange(ROWS)).abs().max()) < 1e-20
    single = AMTLEmbedding(1, DIM, counts=torch.tensor([5]), bits=4, budget=1.0).freeze()
    assert single.to_integers()(torch.tensor([0])).shape == (1, DIM)
    padded = layer_of(8, 0.25, padding_idx=7).freeze()
    for layer in (padded, padded.to_integers()):
        out = layer(torch.tensor([7, 8]))
        assert bool((out[0] == 0).all()) and bool((out[1] != 0).all())
    with torch.no_grad():
        nothing.blocks[0][0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        nothing.to_integers()


@pytest.mark.parametrize(
    ("dtype", "bits", "fits", "too_large", "masters"),
    [
        (torch.float32, 8, 1e17, 3e38, True),
        (torch.float32, 8, 1e17, 3e38, False),
        (torch.bfloat16, 4, 1e17, 1e20, True),
        (torch.float16, 4, 20000.0, 65000.0, True),
    ],
)
def test_numbers_too_large_for_a_step_size_are_refused(dtype, bits, fits, too_large, masters):
    """A square overflows, or what the largest code stands for."""
    signs = torch.where(torch.rand(ROWS, DIM) < 0.5, -1.0, 1.0)

    def filled(number):
        layer = layer_of(bits, 0.3, _weight=(number * signs).to(dtype))
        return layer if masters else layer.fuse(partial(optim.SGD, lr=0.1))

    layer = filled(fits).freeze(masters=masters)
    kept = layer(torch.arange(ROWS))[0].double()
    assert torch.allclose(kept[kept != 0].abs(), torch.tensor(fits).double(), rtol=0.3)
    layer = filled(too_large)
    before = layer.weight
    with pytest.raises(ValueError, match=f"too large to be rounded to {bits} bits"):
        layer.freeze(masters=masters)
    assert layer.phase == "search" and layer.weight is before


def test_one_row_that_is_no_number_does_not_take_the_others_with_it():
    """A step size of nothing would make zeros of them."""
    layer = layer_of(8, 0.3)
    before = layer.weight
    with torch.no_grad():
        before[7, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        layer.freeze()
    assert layer.phase == "search" and layer.weight is before
    with torch.no_grad():
        before[7] = 0
    kept = before[:6].detach().clone()
    torch.testing.assert_close(layer.freeze()(torch.arange(6)), kept, atol=0.05, rtol=0)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8, 16\) or None, got 8\.0"):
        layer_of(8.0)
    with pytest.raises(ValueError, match="a table without rows has no step sizes"):
        AMTLEmbedding(0, 8, counts=torch.zeros(0, dtype=torch.int64), bits=8)
    with pytest.raises(ValueError, match="bits must be one of"):
        layer_of(3)
    with pytest.raises(ValueError, match="a multiple of 4 and embedding_dim no less, got 4 and 3"):
        AMTLEmbedding(10, 3, counts=torch.ones(10), bits=2)
    with pytest.raises(BudgetError, match="step sizes take: bits=None"):
        layer_of(4, 1e-4)
    with pytest.raises(RuntimeError, match="frozen layer with bits"):
        layer_of(None).freeze().to_integers()
    packed = layer_of().freeze().to_integers()
    with pytest.raises(IndexError, match=f"index {ROWS} at position 1"):
        packed(torch.tensor([0, ROWS]))


@pytest.mark.parametrize(("method", "bits"), [("amtl", 4), ("fixed", 4), ("amtl", 16)])
def test_a_run_of_few_bits_is_packed_as_it_was_validated(method, bits, tmp_path):
    sized = {"budget": 0.02 * bits} if method == "amtl" else {}
    config = TrainConfig(
        "synthetic:2000",
        "label",
        method=method,
        dim=8,
        bits=str(bits),
        epochs=2,
        race=False,
        **sized,
    )
    metrics = start(config, tmp_path / "run").run()
    assert metrics["bits"] == bits
    for other in ({"bits": 8}, {"dtype": torch.float16}):
        with pytest.raises(UserError, match=f"{bits} bits, which are packed as they are"):
            pack_run(tmp_path / "run", tmp_path / "other.safetensors", **other)
    packed = pack_run(tmp_path / "run", tmp_path / "run.safetensors")
    table = packed.model.table
    assert table.steps is not None and methods.stored_bytes(table) == metrics["stored_bytes"]
    assert sum(metrics["bytes_by_field"].values()) <= metrics["stored_bytes"]
    evaluated = packed.evaluate(packed.test_split())
    assert evaluated["auc"] == metrics["test_auc"]
    for command in ("inspect", "evaluate"):
        with pytest.raises(SystemExit) as ended:
            main([command, str(tmp_path / "run.safetensors")])
        assert ended.value.code == 0


def test_bits_need_settled_sizes():
    with pytest.raises(UserError, match="--bits 4 needs sizes that are settled"):
        TrainConfig("d", "y", bits="4", table_options={"parametrization": "ordinal"})
    with pytest.raises(UserError, match="--bits must be one of"):
        TrainConfig("d", "y", bits="12")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
def test_bits_given_at_freezing_round_what_was_learned(bits, kind, tmp_path):
    bags = kind is AMTLEmbeddingBag
    layer = trained(layer_of(bits=None, budget=0.3, kind=kind), bags=bags).eval()
    with torch.no_grad():
        # What training leaves rows is larger than its start.
        layer.weight.mul_(10)
    sizes, before = layer.row_dims().clone(), layer.dense_weight()
    full = layer.value_bytes()
    amtl.freeze(torch.nn.Sequential(layer), bits=bits)
    assert layer.options.bits == bits
    whole = unit(bits)
    assert torch.equal(layer.row_dims(), ((sizes + whole - 1) // whole * whole).clamp(max=DIM))
    after, step = layer.dense_weight(), layer.rounding.steps().max()
    kept = torch.arange(DIM) < sizes[:, None]
    assert not torch.equal(after, before)
    if bits >= 8:
        torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=2 * float(step))
    # Rows fill whole bytes and step sizes are paid for; 60 parts at most here.
    assert layer.value_bytes() <= full * bits / 32 + ROWS + 60 * PART_BYTES
    rows = torch.arange(ROWS)
    inputs = (rows, torch.arange(0, ROWS, 3)) if bags else (rows,)
    codes = layer.to_integers()
    assert torch.equal(codes(*inputs), layer(*inputs))
    path = tmp_path / "table.safetensors"
    amtl.save(layer, path)
    assert torch.equal(amtl.load(path)(*inputs), layer(*inputs))
    trained(layer.train(), bags=bags)
    with pytest.raises(ValueError, match="bits must be one of"):
        layer_of(bits=None).freeze(bits=3)
    odd = AMTLEmbedding(4, 5, counts=[4, 3, 2, 1], bits=None)
    with pytest.raises(ValueError, match="of 5 numbers the last would be left out: take bits=8"):
        odd.freeze(bits=4)
    assert odd.phase == "search" and odd.options.bits is None


@pytest.mark.parametrize("bits", [2, 4])
def test_an_odd_row_lives_as_others_do_without_its_last_numbers(bits, tmp_path):
    dim, counts = 7, torch.arange(1, 41)
    layer = AMTLEmbedding(40, dim, counts=counts, bits=bits, budget=7 / 32)
    with torch.no_grad():
        layer.weight.normal_()
    layer.freeze()
    widest = dim // unit(bits) * unit(bits)
    assert int(layer.row_dims().max()) == widest
    rows = torch.arange(40)
    out = layer(rows)
    assert out.shape == (40, dim) and not out[:, widest:].any()
    before = layer.dense_weight()
    optimizer = torch.optim.SGD(layer.table_parameters(), lr=0.1)
    layer(rows).sum().backward()
    optimizer.step()
    moved = layer.dense_weight() - before
    assert not moved[:, widest:].any() and moved[:, :widest].any()
    layer.eval()
    path = tmp_path / "table.safetensors"
    amtl.save(layer, path)
    assert torch.equal(amtl.load(path)(rows), layer(rows))
    again = layer.train().thaw()
    assert again.dense_weight().shape == (40, dim)
    assert int(again.freeze().row_dims().max()) == widest


@pytest.mark.parametrize("method", ["amtl", "fixed"])
def test_packing_leaves_no_learned_number_out(method, tmp_path):
    sized = {"budget": 0.4} if method == "amtl" else {}
    options = {"dim": 7, "epochs": 1, "race": False, "bits": "32", **sized}
    start(TrainConfig("synthetic:500", "label", method=method, **options), tmp_path / "run").run()
    with pytest.raises(UserError, match="of 7 numbers the last would be left out: take bits=8"):
        pack_run(tmp_path / "run", tmp_path / "four.safetensors", None, 4)
    pack_run(tmp_path / "run", tmp_path / "eight.safetensors", None, 8)


@pytest.mark.parametrize("method", ["amtl", "fixed"])
def test_packing_rounds_a_trained_run(method, tmp_path):
    sized = {"budget": 0.4, "bits": "32"} if method == "amtl" else {}
    config = TrainConfig(
        "synthetic:6000", "label", method=method, dim=8, epochs=2, race=False, **sized
    )
    metrics = start(config, tmp_path / "run").run()
    # A pair of samples whose order turns is 5e-6 here, and some are all but equal.
    for bits, near in ((16, 2e-4), (8, 5e-4), (4, 5e-2)):
        file = tmp_path / f"{bits}.safetensors"
        packed = pack_run(tmp_path / "run", file, bits=bits)
        assert methods.number_bits(packed.model.table) == bits
        stored = methods.stored_bytes(packed.model.table)
        steps = methods.row_widths(packed.model.table).numel() * PART_BYTES
        assert stored < metrics["stored_bytes"] * bits / 32 + steps
        result = packed.evaluate(packed.test_split())
        assert result["auc"] == pytest.approx(metrics["test_auc"], abs=near)
    for bits in ("4", "16"):
        out = str(tmp_path / f"{bits}-again.safetensors")
        with pytest.raises(SystemExit) as ended:
            main(["pack", str(tmp_path / "run"), "-o", out, "--bits", bits])
        assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        main(["pack", str(tmp_path / "run"), "-o", str(tmp_path / "d.safetensors"), "--bits", "5"])
    assert ended.value.code != 0


@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
def test_codes_of_a_table_with_a_largest_norm(kind):
    """Codes cannot be scaled at a lookup, so all rows are before."""
    layer = trained(layer_of(8, kind=kind, max_norm=0.7), bags=kind is AMTLEmbeddingBag)
    layer = layer.freeze().eval()
    every = torch.arange(ROWS)[:, None]
    codes = layer.to_integers()
    assert torch.equal(codes(every), layer(every))
    assert codes(every).norm(dim=-1).max() < 0.72


@pytest.mark.parametrize("other", [None, 2, 4, 16])
def test_a_state_of_other_bits_is_refused(other):
    """The bytes would fit, and be read as other numbers."""
    frozen = layer_of(8, budget=0.2).freeze()
    for layer in (frozen, frozen.to_integers()):
        for target in (layer_of(other, budget=0.2), layer_of(other, budget=0.2).freeze()):
            with pytest.raises(RuntimeError, match=f"bits=8, the layer has bits={other}"):
                target.load_state_dict(layer.state_dict(), strict=False)
            target(torch.arange(ROWS)[:, None])


def test_states_that_lack_what_a_phase_needs():
    searching = layer_of(8)
    codes = copy.deepcopy(searching).freeze().to_integers()
    rows = torch.arange(ROWS)
    before = codes(rows)
    with pytest.raises(RuntimeError, match=r"no size head: thaw\(counts=\.\.\.\) makes one"):
        codes.load_state_dict(searching.state_dict())
    assert codes.phase == "frozen" and torch.equal(codes(rows), before)
    searching.load_state_dict(codes.state_dict(), strict=False)
    assert torch.equal(searching(rows), before)
    with pytest.raises(RuntimeError, match=r"is of a packed file.* thaw\(counts=\.\.\.\)"):
        searching.thaw()
    assert searching.thaw(counts=COUNTS).phase == "search"


@pytest.mark.parametrize("evaluates", ["", "before", "after"])
def test_who_trains_beside_a_file_of_codes_is_told_that_it_stays(tmp_path, evaluates):
    amtl.save(layer_of(4).freeze(), tmp_path / "layer")
    layer = amtl.load(tmp_path / "layer").train(evaluates != "before")
    rest = torch.nn.Linear(layer.embedding_dim, 1)
    optimizer = torch.optim.SGD(rest.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            rest(layer(torch.arange(5))).sum().backward()
        assert not caught
        layer.train(not evaluates)
        for _ in range(2):
            optimizer.step()
    told = [str(warning.message) for warning in caught]
    assert len(told) == (not evaluates)
    assert evaluates or re.search(r"codes of 4 bits.*thaw\(counts=...\).*layer.eval\(\)", told[0])
    assert evaluates or caught[0].filename == __file__


def test_tables_that_stay_are_named_together(tmp_path):
    tables = torch.nn.ModuleDict({name: layer_of(4).freeze() for name in "abcde"})
    amtl.save(tables, tmp_path / "tables")
    loaded = amtl.load(tmp_path / "tables", torch.nn.ModuleDict({n: layer_of(4) for n in "abcde"}))
    for layer in loaded.train().values():
        layer(torch.arange(5))
    with pytest.warns(UserWarning, match="tables 'a', 'b', 'c' and 2 more: codes") as told:
        torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).step()
    assert len(told) == 1


def small(budget=0.3):
    model = nn.Sequential(OrderedDict(item=nn.Embedding(ROWS, DIM)))
    nn.init.normal_(model.item.weight, std=0.01)
    return amtl.freeze(amtl.convert(model, {"item": SCATTERED}, budget=budget))


def far_away(model, steps=60):
    """Numbers are thirty times as large as they were."""
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    rows = torch.arange(ROWS)
    for _ in range(steps):
        (model(rows) - 0.3).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def follow_parameters(copied, model):
    for mine, its in zip(copied.parameters(), model.parameters(), strict=True):
        mine.data.copy_(its.data)


def test_step_sizes_that_were_left_behind_are_told_of_once():
    """By an average or a target network of parameters alone, or by training in eval()."""
    rows = torch.arange(ROWS)
    model = small()
    target, whole = copy.deepcopy(model), copy.deepcopy(model)
    target.eval(), whole.eval()
    with torch.no_grad():
        for _ in range(5):
            target(rows)
    far_away(model)
    follow_parameters(target, model)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"'item'.*cut off.*buffers\(\)") as told:
        for _ in range(20):
            target(rows)
    assert len(told) == 1
    with pytest.warns(UserWarning, match=r"trained in eval\(\)") as told:
        far_away(small(0.125).eval())
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow_parameters(whole, model)
        for mine, its in zip(whole.buffers(), model.buffers(), strict=True):
            mine.data.copy_(its.data)
        with torch.no_grad():
            close = torch.full((ROWS, DIM), 0.3)
            torch.testing.assert_close(whole(rows), close, atol=0.1, rtol=0)
            model.eval()
            for _ in range(20):
                model(rows)
        young = small()
        far_away(young, 2)
        with torch.no_grad():
            for block in amtl.table_parameters(young):
                block.mul_(30)
            young.eval()(rows)


def test_a_bag_whose_rows_were_put_in_order_is_told_what_it_cuts_off():
    bag = layer_of(4, 0.1, AMTLEmbeddingBag, counts=SCATTERED, shared_rows=None).freeze()
    assert bag.row_order is not None
    bag.eval()
    rows, offsets = torch.arange(0, ROWS, 3), torch.arange(0, ROWS // 3, 5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            bag(rows, offsets)
    with torch.no_grad(), pytest.warns(UserWarning, match="cut off") as told:
        for block in bag.table_parameters():
            block.mul_(30)
        for _ in range(5):
            bag(rows, offsets)
    assert len(told) == 1 and told[0].filename == __file__
