"""One budget over several tables: who gets what, and that it is met."""

import amtl
import pytest
import torch
from amtl.layer.budget import BudgetError
from amtl.layer.shares import automatic_bits
from torch import nn


def zipf_counts(rows, total, seed):
    rank = 1 + torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return (total / rank.to(torch.float64) ** 1.1).to(torch.int64)


COUNTS = {
    "user": zipf_counts(3000, 20_000, 0),
    "item": zipf_counts(500, 60_000, 1),
    "sex": torch.tensor([60_000, 40_000, 0]),
}


def build(widths=(16, 16, 16)):
    torch.manual_seed(0)
    pairs = zip(COUNTS.items(), widths, strict=True)
    return nn.ModuleDict({name: nn.Embedding(len(c), w) for (name, c), w in pairs})


def frozen_bytes(model):
    amtl.freeze(model)
    return sum(
        layer.stored_fraction() * layer.full_rows * layer.embedding_dim * 4
        for layer in amtl.layers(model).values()
    )


def sizes(model):
    return torch.cat([layer.row_dims() for layer in amtl.layers(model).values()])


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.4, 0.9])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_exponent": 0.5},
        {"granularity": 3},
        {"parametrization": "ordinal"},
        {"field_weights": [3.0]},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_tables_share_as_one_table_of_all_rows_would(budget, options):
    model = amtl.convert(build(), COUNTS, budget, bits=None, tier_width=1, **options)
    together = torch.cat(list(COUNTS.values()))
    weights = {"field_weights": options["field_weights"] * 3} if "field_weights" in options else {}
    one = amtl.AMTLEmbedding(
        len(together),
        16,
        counts=together,
        field_sizes=[len(c) for c in COUNTS.values()],
        budget=budget,
        bits=None,
        tier_width=1,
        **{**options, **weights},
    )
    assert torch.equal(sizes(model), one.row_dims())


@pytest.mark.parametrize("widths", [(16, 16, 16), (16, 8, 4)])
@pytest.mark.parametrize("bits", [None, 16, 8, 4, 2])
@pytest.mark.parametrize("budget", [0.03, 0.125, 0.4])
def test_the_budget_of_all_is_met_in_bytes(widths, bits, budget):
    model = amtl.convert(build(widths), COUNTS, budget, bits=bits)
    whole = sum(len(c) * width * 4 for c, width in zip(COUNTS.values(), widths, strict=True))
    stored = frozen_bytes(model)
    held = whole if bits is None else whole * bits / 32
    assert stored <= budget * whole
    # Rows of one count change together: the largest group decides how near it comes.
    assert stored >= 0.9 * min(budget * whole, held)


@pytest.mark.parametrize("rows", [(9000, 4000), (9000, 50, 12), (3000, 500, 300, 40, 7)])
def test_an_eighth_holds_all_numbers_where_they_are(rows, tmp_path):
    """A few numbers of the largest table pay for step sizes, and no table is put in order."""
    model = nn.ModuleDict({f"t{i}": nn.Embedding(n, 16) for i, n in enumerate(rows)})
    noise = torch.Generator().manual_seed(0)
    counts = {
        f"t{i}": (2e5 * torch.rand(n, generator=noise) ** 4 / n).long() for i, n in enumerate(rows)
    }
    amtl.freeze(amtl.convert(model, counts, 0.125))
    layers = list(amtl.layers(model).values())
    assert sum(layer.stored_bytes() for layer in layers) <= 0.125 * 64 * sum(rows)
    narrow = [int((layer.row_dims() < 16).sum()) for layer in layers]
    assert narrow[0] <= rows[0] // 8 and not any(narrow[1:])
    amtl.save(model, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= 0.125 * 64 * sum(rows) + 1500 * len(rows)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("budget", [0.4, 0.125, 0.05])
@pytest.mark.parametrize("more", [{}, {"parametrization": "ordinal"}, {"tier_width": 3}])
def test_a_layer_made_by_hand_is_what_convert_makes(kind, budget, more):
    counts = COUNTS["user"]
    converted = amtl.convert(kind(len(counts), 16), counts, budget, **more)
    layer = type(converted)(len(counts), 16, counts=counts, budget=budget, **more)
    assert layer.options == converted.options
    assert (layer.options.bits is None) == ("parametrization" in more)
    assert torch.equal(layer.row_dims(), converted.row_dims())
    collection = amtl.AMTLEmbeddingCollection([3000], 16, counts=[counts], budget=budget, **more)
    assert collection.options == layer.options


def test_where_step_sizes_are_dearer_than_numbers_these_keep_their_type():
    counts = [4, 3, 2, 1]
    for budget in (0.4, 0.1, 0.05):
        layer = amtl.AMTLEmbedding(4, 5, counts=counts, budget=budget, masters=budget > 0.1)
        assert layer.options.bits is None and layer.stored_fraction() <= budget
        assert layer.freeze().stored_fraction() <= budget
        model = nn.Sequential(nn.Embedding(4, 5))
        assert amtl.convert(model, {"0": counts}, budget)[0].options.bits is None
        with pytest.raises(ValueError, match="step sizes take"):
            amtl.AMTLEmbedding(4, 5, counts=counts, budget=budget, bits=8)


def test_a_table_of_which_most_lookups_find_nothing_is_told_of(recwarn):
    counts = [50, 40, 30, 60, 20, 50, 44, 40]
    for shared in (None, "rarest"):
        amtl.AMTLEmbedding(8, 16, counts=counts, budget=0.4, shared_rows=shared)
        amtl.AMTLEmbedding(3000, 16, counts=COUNTS["user"], budget=0.02, shared_rows=shared)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"budget=0.05 rows with 82% of the lookups keep no num"):
        amtl.AMTLEmbedding(8, 16, counts=counts, budget=0.05)
    # Padding looks nothing up.
    with pytest.warns(UserWarning, match="with 39% of the lookups"):
        amtl.AMTLEmbedding(9, 16, padding_idx=8, counts=[*counts, 9999], budget=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_budget_that_is_no_number_is_none_for_few_bits_either(bits):
    with pytest.raises(ValueError, match=r"budget must be a fraction in \(0, 1\], got nan"):
        amtl.AMTLEmbedding(50, 8, counts=range(50), budget=float("nan"), bits=bits)


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 8),
        ({"budget": 0.3}, 8),
        ({"budget": 0.29}, 8),
        ({"budget": 0.255}, 8),
        ({"budget": 0.25}, 4),
        ({"budget": 0.01}, 4),
        ({"budget": 1.0}, None),
        ({"budget": 0.1, "tier_width": 1}, 8),
        ({"budget": 0.1, "bits": 2}, 2),
        ({"bits": 16}, 16),
        ({"bits": None}, None),
        ({"parametrization": "ordinal"}, None),
        ({"parametrization": "free", "budget": None}, None),
    ],
    ids=str,
)
def test_bits_follow_from_the_budget(options, bits):
    model = amtl.convert(build(), COUNTS, **options)
    assert {layer.options.bits for layer in amtl.layers(model).values()} == {bits}


def test_bits_that_are_not_to_be_had():
    half = build().half()
    one_half = build()
    one_half["item"].bfloat16()
    models = (half, [None] * 3), (build((16, 1, 16)), [4, 8, 4]), (one_half, [4, None, 4])
    for model, bits in models:
        amtl.convert(model, COUNTS, 0.1)
        assert [layer.options.bits for layer in amtl.layers(model).values()] == bits
    single = amtl.convert(nn.Embedding(3, 1), COUNTS["sex"], 0.1)
    assert single.options.bits is None
    empty = amtl.convert(nn.ModuleDict({"x": nn.Embedding(0, 8)}), {"x": torch.zeros(0)}, 0.1)
    assert empty["x"].options.bits is None
    each = amtl.convert(build(), COUNTS, {"user": 0.1, "item": 0.4, "sex": 1.0})
    assert [layer.options.bits for layer in amtl.layers(each).values()] == [4, 8, None]


def test_small_tables_in_use_stay_whole():
    model = amtl.convert(build(), COUNTS, budget=0.05, bits=None)
    assert model["sex"].row_dims().tolist() == [16, 16, 0]
    assert model["sex"].budget > 0.6 > 0.05 > model["user"].budget


def test_rows_that_step_sizes_would_not_make_smaller_keep_their_type():
    model = amtl.convert(build((16, 2, 1)), COUNTS, budget=0.1, bits=4)
    bits = {name: layer.options.bits for name, layer in amtl.layers(model).items()}
    assert bits == {"user": 4, "item": 4, "sex": None}
    assert frozen_bytes(model) <= 0.1 * 4 * (3000 * 16 + 500 * 2 + 3)


@pytest.mark.parametrize("budget", [0.3, 0.125])
def test_biases_are_a_byte_each(budget, tmp_path):
    """To say where a row lies takes four, and to leave one out saves one."""
    torch.manual_seed(0)
    counts = dict.fromkeys(("factors", "bias"), COUNTS["user"][torch.randperm(3000)])
    model = nn.ModuleDict({"factors": nn.Embedding(3000, 16), "bias": nn.Embedding(3000, 1)})
    counts |= dict.fromkeys(("others", "theirs"), COUNTS["user"][torch.randperm(3000)][:1500])
    model["others"], model["theirs"] = nn.Embedding(1500, 16), nn.Embedding(1500, 1)
    biases = model["bias"].weight.detach().clone()
    amtl.freeze(amtl.convert(model, counts, budget)).eval()
    assert model["bias"].options.bits == 8 and model["bias"].row_order is None
    off = (model["bias"](torch.arange(3000)) - biases).detach()[counts["bias"] > 0]
    assert float(off.square().mean()) < 1e-3 * float(biases.square().mean())
    for name in ("factors", "others"):
        assert int((model[name].row_dims() < 14).sum()) == 0 and model[name].row_order is None
    amtl.save(model, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= budget * 4 * 17 * 4500 + 6000


@pytest.mark.parametrize("dims", [(7,), (15,), (25,), (5, 13, 25, 50, 9)])
@pytest.mark.parametrize("budget", [0.125, 0.2])
def test_odd_rows_lose_their_last_number_and_little_else(dims, budget):
    """In 8 bits they would lose half of their numbers at an eighth."""
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(1000, dim, generator=g) for dim in dims]
    model = nn.ModuleList(nn.Embedding.from_pretrained(table, freeze=False) for table in tables)
    counts = {str(i): 1000 // torch.arange(1, 1001) for i in range(len(dims))}
    amtl.freeze(amtl.convert(model, counts, budget)).eval()
    if budget == 0.125:
        assert [layer.options.bits for layer in model] == [4] * len(dims)
    stored = sum(layer.stored_bytes() for layer in model)
    assert stored <= 4 * budget * sum(map(torch.numel, tables))
    for layer, table in zip(model, tables, strict=True):
        lost = layer(torch.arange(1000)) - table
        odd = table.shape[1] % 2 if layer.options.bits == 4 else 0
        assert not odd or torch.equal(lost[:, -1], -table[:, -1])
        assert float(lost[:, : table.shape[1] - odd].square().mean()) < 0.02
        assert layer.dense_weight().shape == table.shape


def test_small_odd_tables_keep_all_numbers():
    tables = [(100_000, 16), (7, 3), (50, 9), (5000, 25), (40, 1)]
    bits = automatic_bits(0.125, [torch.empty(shape, device="meta") for shape in tables], {})
    assert bits == [4, 8, 8, 4, 8]
    assert automatic_bits(0.125, [torch.empty(1000, 3)], {}) == [4]
    # Of three numbers 8 bits hold more than two.
    assert automatic_bits(0.2, [torch.empty(1000, 3)], {}) == [8]


def test_a_narrow_table_beside_others_costs_them_nothing():
    """Of three columns 4 bits are no whole bytes; of sixteen they are."""
    alone, beside = build(), build()
    beside["day"] = nn.Embedding(7, 3)
    counts = {**COUNTS, "day": torch.full((7,), 10_000)}
    amtl.freeze(amtl.convert(alone, COUNTS, 0.125))
    amtl.freeze(amtl.convert(beside, counts, 0.125))
    assert beside["day"].options.bits in (8, None)
    for name in COUNTS:
        assert beside[name].options.bits == alone[name].options.bits
        fewer = alone[name].row_dims().sum() - beside[name].row_dims().sum()
        assert int(fewer) <= 0.01 * int(alone[name].row_dims().sum())


@pytest.mark.parametrize("bits", [None, 4])
def test_a_state_brings_its_part_of_the_budget(bits):
    model = amtl.convert(build(), COUNTS, budget=0.05, bits=bits).eval()
    rows = {name: torch.arange(len(counts)) for name, counts in COUNTS.items()}
    for _ in range(2):
        nothing = {name: torch.zeros_like(counts) for name, counts in COUNTS.items()}
        fresh = amtl.convert(build(), nothing, budget=0.05, bits=bits).eval()
        fresh.load_state_dict(model.state_dict())
        for name, layer in amtl.layers(fresh).items():
            assert layer.budget == model[name].budget
            assert torch.equal(layer(rows[name]), model[name](rows[name]))
        amtl.freeze(model)


def test_rows_never_seen_come_last_wherever_they_are():
    counts = {"old": torch.tensor([900, 800, 0, 0]), "new": torch.tensor([1, 1, 1, 0])}
    model = nn.ModuleDict({name: nn.Embedding(4, 8) for name in counts})
    amtl.convert(model, counts, budget=5 / 8, bits=None)
    assert sizes(model).tolist() == [8, 8, 0, 0, 8, 8, 8, 0]


def test_a_budget_for_each():
    budgets = {"user": 0.1, "item": 0.5, "sex": 1.0}
    model = amtl.convert(build(), COUNTS, budgets)
    assert {name: layer.budget for name, layer in amtl.layers(model).items()} == budgets
    with pytest.raises(ValueError, match="a budget for 'item' is missing"):
        amtl.convert(build(), COUNTS, {"user": 0.1})
    for budget in ("2kB", 0.0, 1.5, True, {**budgets, "item": "half"}):
        with pytest.raises(ValueError, match=r"budget must be a fraction in \(0, 1\], got "):
            amtl.convert(build(), COUNTS, budget)
    for budget in ("10kB", "12%", 10_000):
        with pytest.raises(ValueError, match=r"12 % are 0\.12, and 10 kB are 10_000 / sum\("):
            amtl.convert(build(), COUNTS, budget)
    share = 2_000 / sum(module.weight.nbytes for module in build().values())
    assert 1_500 < frozen_bytes(amtl.convert(build(), COUNTS, share)) <= 2_000
    with pytest.raises(TypeError, match=r"counts must be a mapping, of the names.*got None;"):
        amtl.convert(build(), None)


@pytest.mark.parametrize("given", [{}, {"names": []}])
def test_nothing_to_convert_is_refused(given):
    counts = COUNTS if given else {}
    message = r"(counts|names) is empty.*counts=\{.*the model's are \['user', 'item', 'sex'\]"
    with pytest.raises(ValueError, match=message):
        amtl.convert(build(), counts, 0.1, **given)


def test_what_cannot_be_met_leaves_the_model_alone():
    model = build()
    with pytest.raises(BudgetError, match=r"cannot be reached by 3 tables together.*lower min_dim"):
        amtl.convert(model, COUNTS, 0.1, bits=None, min_dim=4)
    with pytest.raises(ValueError, match=r"a fraction in \(0, 1\]"):
        amtl.convert(model, COUNTS, 2)
    assert all(type(module) is nn.Embedding for module in model.values())


@pytest.mark.parametrize("bits", ["auto", 8, None])
@pytest.mark.parametrize("budget", [0.9, 0.3, 0.125])
def test_biases_beside_wide_tables_are_kept(budget, bits):
    """Rows of a number have none to spare: of sorted ids the rarest paid with it for step sizes."""
    counts = (20_000 / torch.arange(1, 2001)).long()
    model = nn.ModuleDict({"item": nn.Embedding(2000, 16), "bias": nn.Embedding(2000, 1)})
    before = model["bias"].weight.detach().clone()
    amtl.convert(model, {"item": counts, "bias": counts}, budget=budget, bits=bits)
    amtl.freeze(model)
    bias = model["bias"].weight.detach()
    assert float((bias - before).norm() / before.norm()) < 0.03
    assert sum(m.stored_bytes() for m in amtl.layers(model).values()) <= budget * 4 * 2000 * 17


def test_equal_counts_of_a_small_table_share_a_step_size():
    model = nn.ModuleDict({"bias": nn.Embedding(7, 1)})
    amtl.freeze(amtl.convert(model, {"bias": [50] * 7}, budget=0.9))
    assert model["bias"].options.bits == 8
    assert bool((model["bias"].weight != 0).all())
