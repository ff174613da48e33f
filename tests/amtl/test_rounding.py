"""Rows of few bits: codes, training that rounds, the budget in bytes, and files of codes."""

from __future__ import annotations

import copy

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag, BudgetError
from amtl.layer.rounding import (
    BITS,
    PART_BYTES,
    Parts,
    Rounding,
    decode,
    encode,
    lookup,
    pack_codes,
    plan_parts,
    pooled,
    step_groups,
    unit,
    unpack_codes,
)
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS, DIM = 300, 16
COUNTS = (4000 / torch.arange(1, ROWS + 1).pow(1.1)).long()


def layer_of(bits=4, budget=0.1, kind=AMTLEmbedding, **more):
    torch.manual_seed(0)
    options = {"shared_rows": "rarest", "field_sizes": [200, 100], **more}
    return kind(ROWS, DIM, counts=COUNTS, budget=budget, bits=bits, **options)


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


@settings(deadline=None, max_examples=50)
@given(bits=st.sampled_from(BITS), rows=st.integers(0, 5), bytes_a_row=st.integers(0, 4))
def test_codes_fill_bytes_and_come_back(bits, rows, bytes_a_row):
    generator = torch.Generator().manual_seed(rows * 10 + bytes_a_row)
    codes = torch.randint(0, 2**bits, (rows, bytes_a_row * unit(bits)), generator=generator)
    packed = pack_codes(codes.to(torch.uint8), bits)
    assert packed.shape == (rows, bytes_a_row)
    assert torch.equal(unpack_codes(packed, bits), codes.to(torch.uint8))


def test_codes_by_hand():
    # Levels of 2 bits at step 2: -3, -1, 1, 3.
    codes = encode(torch.tensor([[-9.0, -1.9, 0.1, 2.5]]), 2.0, 2)
    assert codes.tolist() == [[0, 1, 2, 3]]
    packed = pack_codes(codes, 2)
    assert packed.tolist() == [[0b11100100]]
    assert decode(packed, torch.tensor(2.0), 2).tolist() == [[-3.0, -1.0, 1.0, 3.0]]
    assert pack_codes(torch.tensor([[1, 15]], dtype=torch.uint8), 4).tolist() == [[0xF1]]


@pytest.mark.parametrize("bits", BITS)
def test_no_level_is_nearer(bits):
    values = torch.linspace(-3, 3, 997)[None]
    step = torch.tensor(0.37)
    levels = (torch.arange(2**bits) - (2**bits - 1) / 2) * step
    found = (encode(values, step, bits) - (2**bits - 1) / 2) * step
    best = levels[(values[0, :, None] - levels).abs().argmin(1)]
    torch.testing.assert_close((found[0] - values[0]).abs(), (best - values[0]).abs())


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
    from functools import partial

    from amtl_kernels.optim import Adagrad

    layers = [layer_of().freeze(), layer_of().freeze()]
    layers[0].fuse(partial(Adagrad, lr=0.1))
    optimizers = [layers[0].fused_optimizer, Adagrad(layers[1].table_parameters(), lr=0.1)]
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
    rounding = Rounding(4, Parts([2, 4], [4, 2]), torch.tensor([1.0, 4.0]))
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 0.0, 0.0]])
    rows = torch.tensor([0, 3])
    rounding.eval()(values, rows)
    assert rounding.mean_square.tolist() == [1.0, 4.0]
    rounding.train()(values, rows)
    torch.testing.assert_close(rounding.mean_square, torch.tensor([0.9 + 0.75, 4.0]))
    assert rounding.half().mean_square.dtype == torch.float32


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_pooling_is_that_of_embedding_bag(mode, last):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, 3, generator=generator)
    offsets = torch.tensor([0, 2, 2, 7]) if last else torch.tensor([0, 0, 4])
    weights = torch.rand(9, generator=generator) if mode == "sum" else None
    rows = torch.tensor([0, 1, 2, 1, 4, 5, 1, 7, 8])
    taken = rows[:7] if last else rows
    expected = torch.nn.functional.embedding_bag(
        taken, values, offsets, mode=mode, include_last_offset=last,
        per_sample_weights=None if weights is None else weights[: len(taken)],
        padding_idx=1,
    )  # fmt: skip
    got = pooled(values[rows], offsets, mode, weights, last, rows != 1)
    torch.testing.assert_close(got, expected)
    assert pooled(values, torch.tensor([0]), mode, None, True, None).shape == (0, 3)


def test_means_of_long_bags_of_16_bit_numbers():
    values = torch.full((1000, 2), 0.5, dtype=torch.bfloat16)
    out = pooled(values, torch.tensor([0]), "mean", None, False, None)
    assert out.dtype == torch.bfloat16 and out.tolist() == [[0.5, 0.5]]


def test_degenerate_tables():
    nothing = layer_of(_weight=torch.zeros(ROWS, DIM)).freeze()
    assert float(nothing(torch.arange(ROWS)).abs().max()) < 1e-20
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


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8\) or None, got 8\.0"):
        layer_of(8.0)
    with pytest.raises(ValueError, match="a table without rows has no step sizes"):
        AMTLEmbedding(0, 8, counts=torch.zeros(0, dtype=torch.int64), bits=8)
    with pytest.raises(ValueError, match="bits must be one of"):
        layer_of(3)
    with pytest.raises(ValueError, match="multiples of 4"):
        AMTLEmbedding(10, 6, counts=torch.ones(10), bits=2)
    with pytest.raises(BudgetError, match="step sizes take"):
        layer_of(4, 1e-4)
    with pytest.raises(RuntimeError, match="frozen layer with bits"):
        layer_of(None).freeze().to_integers()
    packed = layer_of().freeze().to_integers()
    with pytest.raises(IndexError, match=f"index {ROWS} at position 1"):
        packed(torch.tensor([0, ROWS]))


def test_lookup_of_codes():
    blocks = [torch.tensor([[0xF1, 0x20]], dtype=torch.uint8), torch.zeros(2, 0, dtype=torch.uint8)]
    out = lookup(blocks, [1, 3], torch.tensor([2.0, 1.0]), 4, torch.tensor([[0, 2]]), 6)
    assert out.shape == (1, 2, 6)
    assert out[0, 0].tolist() == [-13.0, 15.0, -15.0, -11.0, 0.0, 0.0]
    assert out[0, 1].tolist() == [0.0] * 6


@pytest.mark.parametrize("method", ["amtl", "fixed"])
def test_a_run_of_few_bits_is_packed_as_it_was_validated(method, tmp_path):
    from amtl.cli import main
    from amtl.run import methods
    from amtl.run.config import TrainConfig
    from amtl.run.folders import pack_run
    from amtl.run.training import start

    sized = {"budget": 0.08} if method == "amtl" else {}
    config = TrainConfig(
        "synthetic:2000", "label", method=method, dim=8, bits="4", epochs=2, race=False, **sized
    )
    metrics = start(config, tmp_path / "run").run()
    assert metrics["bits"] == 4
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
    from amtl.errors import UserError
    from amtl.run.config import TrainConfig

    with pytest.raises(UserError, match="--bits 4 needs sizes that are settled"):
        TrainConfig("d", "y", bits="4", table_options={"parametrization": "ordinal"})
    with pytest.raises(UserError, match="--bits must be one of"):
        TrainConfig("d", "y", bits="16")


@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
def test_codes_of_a_table_with_a_largest_norm(kind):
    """Codes cannot be scaled at a lookup, so all rows are before."""
    layer = trained(layer_of(8, kind=kind, max_norm=0.7), bags=kind is AMTLEmbeddingBag)
    layer = layer.freeze().eval()
    every = torch.arange(ROWS)[:, None]
    codes = layer.to_integers()
    assert torch.equal(codes(every), layer(every))
    assert codes(every).norm(dim=-1).max() < 0.72


@pytest.mark.parametrize("other", [None, 2, 4])
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
    with pytest.raises(RuntimeError, match=r"is of integers.* thaw\(counts=\.\.\.\)"):
        searching.thaw()
    assert searching.thaw(counts=COUNTS).phase == "search"
