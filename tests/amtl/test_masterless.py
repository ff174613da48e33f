"""Frozen training without masters: codes that a fused optimizer updates."""

import copy
import os
from functools import partial

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from amtl.cli import main
from amtl.errors import UserError
from amtl.layer.rounding import Parts, Rounding, decode
from amtl.run.config import TrainConfig
from amtl.run.done import Interrupted
from amtl.run.folders import pack_run
from amtl.run.training import start

from amtl_kernels.optim import SGD, Adam, RowwiseAdagrad
from amtl_kernels.rounding import BITS, code_type, pack_codes

SOAK = os.environ.get("AMTL_SOAK", "0") not in ("", "0")
ROWS, DIM = 300, 16
COUNTS = (4000 / torch.arange(1, ROWS + 1).pow(1.1)).long()
RULE = partial(RowwiseAdagrad, lr=0.1)


def layer_of(bits=8, budget=0.1, kind=AMTLEmbedding, **more):
    torch.manual_seed(0)
    options = {"shared_rows": "rarest", "field_sizes": [200, 100], **more}
    return kind(ROWS, DIM, counts=COUNTS, budget=budget, bits=bits, **options)


def alone(bits=8, masters=False, rule=RULE, **more):
    """A frozen layer with a fused optimizer, without masters unless they are asked for."""
    return layer_of(bits, **more).fuse(rule).freeze(masters=masters)


def train_towards(layer, wanted, steps, seed=2):
    """The mean square error over all rows, after steps on some of them."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.arange(DIM) < layer.row_dims()[:, None]
    layer.train()
    for _ in range(steps):
        rows = torch.randint(0, ROWS, (64,), generator=generator)
        ((layer(rows) - wanted[rows]) * kept[rows]).square().sum().backward()
        layer.fused_optimizer.step()
    shown = layer.eval()(torch.arange(ROWS)).detach()
    return float((shown - wanted)[kept].square().mean())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [AMTLEmbedding, AMTLEmbeddingBag])
def test_codes_alone_begin_where_rounding_does(bits, kind, tmp_path):
    layers = [alone(bits, masters, kind=kind).eval() for masters in (True, False)]
    rows = torch.arange(ROWS)
    inputs = (rows, torch.tensor([0, 3, 3, 120])) if kind is AMTLEmbeddingBag else (rows,)
    assert torch.equal(layers[1](*inputs), layers[0](*inputs))
    assert torch.equal(layers[1].dense_weight(), layers[0].dense_weight())
    assert layers[1].value_bytes() == layers[0].value_bytes()
    assert layers[1].masterless and not layers[0].masterless
    assert torch.equal(layers[1].row_dims(), layers[0].row_dims())
    # What is stored is what is served, and a number a row for the optimizer.
    numbers = sum(block.numel() for block in layers[0].blocks)
    layers[1].train()(*inputs).sum().backward()
    held = [*layers[1].parameters(), *layers[1].fused_optimizer.state.values()]
    assert sum(t.nbytes for t in held if isinstance(t, torch.Tensor)) == numbers * bits // 8
    state = [s["sum"].numel() for s in held if isinstance(s, dict)]
    assert sum(state) == layers[1].tier_ends[-1]
    # The file holds the very codes.
    amtl.save(layers[1].eval(), tmp_path / "codes.safetensors")
    loaded = amtl.load(tmp_path / "codes.safetensors").eval()
    for ours, theirs in zip(loaded.blocks, layers[1].blocks, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(loaded(*inputs), layers[1](*inputs))
    packed = layers[1].to_integers()
    assert torch.equal(packed(*inputs), loaded(*inputs)) and not packed.masterless
    layers[1].train()(*inputs).sum().backward()
    assert torch.equal(packed(*inputs), loaded(*inputs))


@pytest.mark.parametrize(
    "bits",
    [
        pytest.param(
            bits,
            marks=pytest.mark.skipif(
                bits in (4, 16) and not SOAK, reason="AMTL_SOAK=1 (make soak) trains these, too"
            ),
        )
        for bits in BITS
    ],
)
def test_codes_alone_come_about_as_far_as_with_masters(bits):
    """Also where numbers grow to twenty times what they began with, far beyond the first range."""
    losses = [0.0, 0.0]
    seeds = (3, 4, 5) if SOAK else (3,)
    for seed in seeds:
        wanted = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(seed))
        for i, masters in enumerate((True, False)):
            layer = alone(bits, masters, budget=0.25, weight_std=0.05)
            before = layer.rounding.steps().max()
            losses[i] += train_towards(layer, wanted, 3000) / len(seeds)
            assert layer.rounding.steps()[:20].max() > 5 * before
    # Where nothing is learned it is 1; at 8 bits both are near their last digits.
    assert losses[1] < 1.1 * losses[0] + 2e-4


def test_training_of_codes_that_is_interrupted_goes_on_as_it_would_have():
    wanted = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(3))
    layer = alone(4, weight_std=0.05)
    train_towards(layer, wanted, 21)
    again = alone(4, weight_std=0.05)
    again.load_state_dict(copy.deepcopy(layer.state_dict()))
    again.fused_optimizer.load_state_dict(copy.deepcopy(layer.fused_optimizer.state_dict()))
    fresh = layer_of(4, masters=False, weight_std=0.05)
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    rows = torch.arange(ROWS)
    assert fresh.masterless and torch.equal(fresh.eval()(rows), layer.eval()(rows))
    assert layer.rounding.changes > 0
    for one in (layer, again):
        train_towards(one, wanted, 30, seed=4)
    assert again.rounding.turn == layer.rounding.turn == 51
    assert again.rounding.changes == layer.rounding.changes
    for key, value in layer.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    # Copies train alike, and not each other.
    twin = copy.deepcopy(layer)
    for one in (twin, again):
        train_towards(one, wanted, 9, seed=5)
    assert torch.equal(twin(rows), again(rows)) and not torch.equal(twin(rows), layer(rows))
    with pytest.raises(RuntimeError, match="training with masters=False, the layer has masters=T"):
        layer_of(4).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="training with masters=True, the layer has masters=F"):
        layer.load_state_dict(layer_of(4).freeze().state_dict())


def test_the_first_range_of_codes_holds_a_first_step():
    """Row-wise Adagrad's is as large as its learning rate, whatever numbers begin with."""
    for rule, least in ((partial(RowwiseAdagrad, lr=0.5), 0.5), (partial(SGD, lr=0.5), 0.0)):
        layer = alone(8, rule=rule, weight_std=0.01)
        kept = layer.rounding.widths > 0
        assert bool((layer.rounding.mean_square[kept] >= least**2).all())
        assert bool((layer.rounding.mean_square[kept] < max(least**2, 0.001) * 1.001).all())
    trained = layer_of(8, weight_std=0.01).fuse(partial(RowwiseAdagrad, lr=0.5))
    trained(torch.arange(ROWS)).mul(0).sum().backward()
    assert float(trained.freeze(masters=False).rounding.mean_square.max()) < 0.001


@pytest.mark.parametrize("bits", BITS)
def test_codes_get_another_step_size_when_it_is_far_from_right(bits):
    generator = torch.Generator().manual_seed(bits)
    half, parts = (2**bits - 1) / 2, Parts([500, 1000], [16, 16])
    rounding = Rounding(bits, parts, torch.ones(2))
    steps = rounding.steps()
    codes = torch.randint(0, 2**bits, (1000, 16), generator=generator).to(code_type(bits))
    blocks = list(pack_codes(codes, bits).split(500))
    before = [decode(block, step, bits) for block, step in zip(blocks, steps, strict=True)]
    kept = [block.clone() for block in blocks]
    # The first by less than an eighth, the second by more.
    rounding.mean_square.copy_(torch.tensor([1.1, 1.4]).square())
    rounding.recode(blocks, steps)
    assert torch.equal(blocks[0], kept[0]) and rounding.changes == 1
    torch.testing.assert_close(steps, rounding.steps() / torch.tensor([1.1, 1.0]))
    after = decode(blocks[1], steps[1], bits)
    assert float((after - before[1]).abs().max()) <= float(steps[1]) * 1.0001
    # Rounded at random, up or down: the mean is kept, of 8,000 numbers.
    assert abs(float((after - before[1]).mean())) < 0.02 * float(steps[1])
    assert float(after.abs().max()) <= half * float(steps[1]) * 1.0001
    again = [block.clone() for block in blocks]
    rounding.recode(blocks, steps)
    assert all(torch.equal(a, b) for a, b in zip(blocks, again, strict=True))
    rounding.mean_square.copy_(torch.tensor([0.8, 1.4]).square())
    rounding.recode(blocks, steps)
    assert not torch.equal(blocks[0], again[0]) and torch.equal(blocks[1], again[1])


def test_codes_alone_are_thawed_and_frozen_again():
    layer = alone(8)
    rows = torch.arange(ROWS)
    train_towards(layer, torch.ones(ROWS, DIM), 20)
    shown, sums = layer.dense_weight(), layer.fused_optimizer.state
    total = sum(float(state["sum"].sum()) for state in sums.values())
    layer.thaw()
    own = layer.row_dims() > 0
    assert layer.weight.requires_grad and torch.equal(layer.weight.detach()[own], shown[own])
    assert layer.fused_optimizer.state[layer.weight]["sum"].sum() == pytest.approx(total)
    layer.freeze()
    assert layer.masterless
    step = float(layer.steps.max())
    assert float((layer.eval()(rows).detach() - shown).abs().max()) <= step
    plain = amtl.revert(copy.deepcopy(layer))
    assert torch.equal(plain.weight.detach(), layer.dense_weight()) and plain.weight.requires_grad
    assert layer.half().steps.dtype == torch.float32
    assert torch.equal(layer(rows), plain(rows))


def test_models_and_collections_of_codes_alone(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(ROWS, DIM), torch.nn.Linear(DIM, 1))
    rule = partial(SGD, lr=0.1)
    amtl.convert(model, {"0": COUNTS}, 0.2, fused_optimizer=rule, bits=4)
    amtl.freeze(model, masters=False)
    counts = {"a": COUNTS[:200], "b": COUNTS[200:]}
    tables = amtl.AMTLEmbeddingCollection(
        {"a": 200, "b": 100}, DIM, counts=counts, budget=0.1, bits=4, masters=False
    )
    tables.fuse(rule).freeze()
    rows = torch.stack([torch.arange(100), torch.arange(100)], 1)
    for one, inputs in ((model, torch.arange(ROWS)), (tables, rows)):
        (layer,) = amtl.layers(one).values()
        before = [block.detach().clone() for block in layer.blocks]
        for _ in range(3):
            one(inputs).square().sum().backward()
            layer.fused_optimizer.step()
        assert layer.masterless
        assert any(not torch.equal(a, b) for a, b in zip(layer.blocks, before, strict=True))
    expected = tables.eval()(rows)
    amtl.save(tables, tmp_path / "tables.safetensors")
    assert torch.equal(amtl.load(tmp_path / "tables.safetensors")(rows), expected)


def test_what_cannot_do_without_masters_says_so():
    with pytest.raises(
        ValueError, match="masters=False keeps codes only: it needs bits=16, 8, 4 or 2"
    ):
        layer_of(None, masters=False)
    for rule in (None, partial(Adam, lr=0.1)):
        with pytest.raises(
            ValueError, match=r"needs a fused SGD or RowwiseAdagrad.* it has (none|A)"
        ):
            alone(rule=rule)
    with pytest.raises(ValueError, match="does not train: to_integers"):
        alone(_freeze=True)
    with pytest.raises(ValueError, match=r"codes of float32, not of torch\.bfloat16"):
        alone(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="has max_norm, which scales rows in place"):
        alone(max_norm=1.0)
    with pytest.raises(ValueError, match="which decay_every cannot decay"):
        alone(rule=partial(SGD, lr=0.1, weight_decay=0.1, decay_every=2))
    with pytest.raises(ValueError, match="numbers that are not finite"):
        alone(_weight=torch.full((ROWS, DIM), float("nan")))
    layer = alone()
    with pytest.raises(ValueError, match="needs a fused SGD or RowwiseAdagrad"):
        layer.fuse(partial(Adam, lr=0.1))
    with pytest.raises(ValueError, match="which decay_every cannot decay"):
        layer.fuse(partial(SGD, lr=0.1, weight_decay=0.1, decay_every=2))
    layer.fuse(None)
    rows = torch.arange(ROWS)
    with pytest.raises(RuntimeError, match=r"codes have no gradient: layer\.fuse\("):
        layer(rows)
    with torch.no_grad():
        layer(rows)
    assert not layer.eval()(rows).requires_grad


def test_a_run_without_masters(tmp_path):
    settings = {"bits": "8", "masters": False, "table_optimizer": "rowwise_adagrad", "budget": 0.2}
    config = TrainConfig(
        "synthetic:2000", "label", dim=8, batch_size=256, epochs=3, race=False, **settings
    )
    whole = start(config, tmp_path / "run").run()
    packed = pack_run(tmp_path / "run", tmp_path / "run.safetensors")
    assert packed.model.table.value_bytes() == whole["stored_bytes"]
    assert packed.evaluate(packed.test_split())["auc"] == whole["test_auc"]
    # Stopped in the middle and gone on with, it ends bit for bit the same.
    with pytest.raises(Interrupted):
        start(config, tmp_path / "part", stop=lambda steps: steps == 12).run()
    resumed = start(None, tmp_path / "part", resume=True).run()
    assert resumed["test_auc"] == whole["test_auc"]
    for wrong, message in (
        (
            {"bits": "auto"},
            "--no-masters trains codes alone: choose --bits 16, 8, 4 or 2, not auto",
        ),
        ({"table_optimizer": "adam"}, "--no-masters goes with --table-optimizer rowwise_adagrad"),
        ({"method": "alpt", "bits": "auto"}, "--no-masters has no meaning for alpt"),
    ):
        with pytest.raises(UserError, match=message):
            TrainConfig("d", "y", **{**settings, **wrong})
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "train",
                "synthetic:2000",
                "--label",
                "label",
                "--no-masters",
                "--out",
                str(tmp_path / "x"),
            ]
        )
    assert ended.value.code != 0
