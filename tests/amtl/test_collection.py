"""Collections: what their tables would give one by one, through every phase."""

from __future__ import annotations

import copy
from functools import partial

import amtl
import pytest
import torch
import torch.fx
from amtl import AMTLEmbedding, AMTLEmbeddingCollection
from amtl.store.tensors import read_tensors
from torch import nn
from torch.nn import functional as F

from amtl_kernels import optim

ROWS, DIM = {"user": 70, "item": 50, "day": 7}, 8
COUNTS = {
    "user": (torch.arange(70).roll(9) ** 2) % 307,
    "item": torch.arange(50).flip(0) * 3,
    "day": torch.full((7,), 400),
}


def collection_of(**options):
    torch.manual_seed(0)
    return AMTLEmbeddingCollection(
        ROWS, DIM, **{"counts": COUNTS, "budget": 0.4, "bits": None, **options}
    )


def draw(shape=(11,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(rows, shape, generator=generator) for rows in ROWS.values()]
    return torch.stack(columns, -1)


def bags_of(seed=0, bags=4):
    """Indices and offsets of three tables, empty bags among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(ROWS), bags), generator=generator)
    lengths[1, 2] = 0
    indices = [
        torch.randint(rows, (int(n.sum()),), generator=generator)
        for rows, n in zip(ROWS.values(), lengths, strict=True)
    ]
    return torch.cat(indices), F.pad(lengths.flatten().cumsum(0), (1, 0))


def tables(collection):
    return collection.dense_weight().split(list(ROWS.values()))


def expected(collection, input):
    parts = zip(input.unbind(-1), tables(collection), strict=True)
    return torch.stack([F.embedding(rows, table) for rows, table in parts], -2)


def expected_bags(collection, indices, offsets, mode, weights=None):
    bags = (len(offsets) - 1) // len(ROWS)
    found = []
    for t, table in enumerate(tables(collection)):
        mine = offsets[t * bags : (t + 1) * bags + 1]
        part = slice(int(mine[0]), int(mine[-1]))
        psw = None if weights is None else weights[part]
        found.append(
            F.embedding_bag(
                indices[part],
                table,
                mine - mine[0],
                mode=mode,
                include_last_offset=True,
                per_sample_weights=psw,
            )
        )
    return torch.stack(found, 1)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0,)])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shared", [None, "rarest", {"user": 4, "item": 1, "day": 0}])
def test_one_call_gives_what_the_tables_give(shape, index_type, frozen, shared):
    collection = collection_of(shared_rows=shared, budget=0.2).eval()
    input = draw(shape)
    wanted = expected(collection, input)
    if frozen:
        collection.freeze()
    assert torch.equal(collection(input.to(index_type)), wanted)
    named = dict(zip(ROWS, input.to(index_type).unbind(-1), strict=True))
    assert torch.equal(collection(dict(reversed(named.items()))), wanted)
    for t, name in enumerate(ROWS):
        assert torch.equal(collection.lookup(name, named[name]), wanted[..., t, :])
        assert torch.equal(collection.table(name)(named[name]), wanted[..., t, :])
    some = input[..., [2, 0, 2]]
    assert torch.equal(collection.lookup(["day", "user", "day"], some), wanted[..., [2, 0, 2], :])


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("frozen", [False, True])
def test_bags_are_those_of_the_tables(mode, frozen):
    collection = collection_of(mode=mode).eval()
    indices, offsets = bags_of()
    wanted = expected_bags(collection, indices, offsets, mode)
    if frozen:
        collection.freeze()
    # What lies past the last offset is ignored.
    longer = torch.cat([indices, torch.tensor([10**6])])
    for type_ in (torch.int32, torch.int64):
        found = collection(longer.to(type_), offsets.to(type_))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    if mode == "sum":
        weights = torch.rand(len(indices))
        found = collection(indices, offsets, weights)
        wanted = expected_bags(collection, indices, offsets, mode, weights)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert collection(indices[:0], offsets[:1]).shape == (0, 3, DIM)


def test_the_budget_is_one_for_all_tables():
    collection = collection_of()
    whole = sum(ROWS.values()) * DIM * 4
    stored = collection.table_bytes()
    assert list(stored) == list(ROWS)
    assert 0.37 < sum(stored.values()) / whole <= 0.4
    assert collection.stored_fraction() == pytest.approx(sum(stored.values()) / whole)
    fractions = {name: stored[name] / (rows * DIM * 4) for name, rows in ROWS.items()}
    assert fractions["day"] > 0.5 > fractions["user"]
    more = collection_of(field_weights=[100.0, 1.0, 1.0]).table_bytes()
    assert more["user"] > stored["user"] and more["item"] < stored["item"]
    before = sum(stored.values())
    assert sum(collection.freeze().table_bytes().values()) == before
    assert collection.stored_bytes() - collection.row_order.nbytes == before


def test_sizes_are_those_of_a_table_with_fields():
    fields = AMTLEmbedding(
        127,
        DIM,
        counts=torch.cat(list(COUNTS.values())),
        field_sizes=list(ROWS.values()),
        bits=None,
    )
    assert torch.equal(collection_of().row_dims(), fields.row_dims())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
@pytest.mark.parametrize("pooled", [False, True])
def test_trains_as_a_layer_would(fused, parametrization, pooled):
    """Beside a plain layer over all rows, which other tests compare with a masked table."""
    options = {"parametrization": parametrization, "size_noise": 0.0}
    made = partial(optim.Adagrad, lr=0.5)
    collection = collection_of(fused_optimizer=made if fused else None, **options)
    torch.manual_seed(0)
    kind = amtl.AMTLEmbeddingBag if pooled else AMTLEmbedding
    layer = kind(
        127,
        DIM,
        counts=torch.cat(list(COUNTS.values())),
        field_sizes=list(ROWS.values()),
        bits=None,
        sparse=True,
        **{"mode": "sum"} if pooled else {},
        **options,
    )
    collection.sparse = True
    layer.load_state_dict(collection.state_dict())
    optimizers = []
    for each in (collection, layer):
        held = each.fused_optimizer or made(each.table_parameters())
        masks = each.mask_parameters()
        optimizers.append([held, *([torch.optim.SGD(masks, lr=1.0)] if masks else [])])
    starts = torch.tensor([0, 70, 120])
    for seed in range(9):
        input, (indices, offsets) = draw(seed=seed), bags_of(seed)
        table = torch.repeat_interleave(torch.arange(3), offsets[::4].diff())
        outs = (
            collection(indices, offsets) if pooled else collection(input),
            layer(indices + starts[table], offsets[:-1]).view(3, 4, DIM).transpose(0, 1)
            if pooled
            else layer(input + starts),
        )
        for out, held in zip(outs, optimizers, strict=True):
            (out - 1).square().mean().backward()
            for optimizer in held:
                optimizer.step()
                optimizer.zero_grad()
        if seed == 3:
            collection.freeze(optimizers[0])
            layer.freeze(optimizers[1])
        if seed == 6:
            collection.thaw(optimizers[0])
            layer.thaw(optimizers[1])
    mine, theirs = collection.state_dict(), layer.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("frozen", [False, True])
def test_state_copies_and_files(frozen, tmp_path):
    collection = collection_of(shared_rows="rarest", budget=0.2).eval()
    if frozen:
        collection.freeze()
    wanted = collection(draw())
    other = collection_of(shared_rows="rarest", budget=0.2).eval()
    other.load_state_dict(collection.state_dict())
    for each in (other, copy.deepcopy(collection)):
        assert torch.equal(each(draw()), wanted)
    if not frozen:
        return
    model = nn.ModuleDict({"tables": collection})
    amtl.save(model, tmp_path / "model")
    fresh = nn.ModuleDict({"tables": collection_of()})
    amtl.load(tmp_path / "model", model=fresh)
    loaded = fresh["tables"]
    assert isinstance(loaded, AMTLEmbeddingCollection) and loaded.names == list(ROWS)
    assert torch.equal(fresh["tables"](draw()), wanted)
    assert torch.equal(loaded.lookup("item", draw()[:, 1]), wanted[:, 1])
    assert torch.equal(loaded(*bags_of()), collection(*bags_of()))
    loaded.thaw(counts=torch.cat(list(COUNTS.values())))
    assert loaded.field_sizes == list(ROWS.values())
    assert torch.equal(loaded.freeze()(draw()), wanted)


def test_row_numbers_stay():
    with pytest.raises(RuntimeError, match="keeps the row numbers"):
        collection_of().freeze().absorb_order()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("table", "value"), [(0, 70), (1, -1), (2, 7), (2, 10**9)])
def test_an_index_never_reaches_the_next_table(frozen, table, value):
    collection = collection_of()
    clamping = collection_of(bounds_check="clamp")
    if frozen:
        collection.freeze(), clamping.freeze()
    input = draw((4,))
    input[2, table] = value
    name, rows = list(ROWS.items())[table]
    text = f"table '{name}': index {value} at position 2 is out of range for a table of {rows} rows"
    with pytest.raises(IndexError, match=text):
        collection(input)
    with pytest.raises(IndexError, match=f"table '{name}': index {value} at position 2"):
        collection.lookup(name, input[:, table])
    with pytest.raises(IndexError, match=f"table '{name}': index {value} at position 2"):
        collection.lookup(["user", name], torch.stack([input[:, 0] * 0, input[:, table]], 1))
    indices, offsets = bags_of()
    first, last = int(offsets[4 * table]), int(offsets[4 * table + 4])
    position = last - first - 1
    indices[last - 1] = value
    with pytest.raises(IndexError, match=f"'{name}': index {value} at position {position} is"):
        collection(indices, offsets)
    inside = input.clone()
    inside[2, table] = min(max(value, 0), rows - 1)
    assert torch.equal(clamping(input), collection(inside))
    fitting = indices.clone()
    fitting[last - 1] = min(max(value, 0), rows - 1)
    assert torch.equal(clamping(indices, offsets), collection(fitting, offsets))


def test_compiles_in_one_graph():
    collection = collection_of().eval()
    compiled = torch.compile(lambda input: collection(input), fullgraph=True, backend="aot_eager")
    input = draw()
    assert torch.equal(compiled(input), collection(input))
    input[3, 1] = 50
    with pytest.raises(IndexError, match="index -1"):
        compiled(input)
    collection.freeze()
    assert torch.equal(compiled(draw(seed=1)), collection(draw(seed=1)))


class Asks(nn.Module):
    """Every way to look up in a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.all = collection_of(parametrization="rule").eval()
        self.item = self.all.table("item")

    def forward(self, input, bags, offsets):
        named = {name: input[..., t] for t, name in enumerate(ROWS)}
        return (
            self.all(input).flatten(1) + self.all(named).flatten(1),
            self.all.lookup(["day", "day"], input[:, -1:].expand(-1, 2)),
            self.all.lookup("day", input[:, -1]) + self.item(input[:, 1]),
            self.all(bags, offsets),
        )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torch_fx_records_calls_and_torchscript_is_refused(frozen):
    model = Asks()
    if frozen:
        model.all.freeze()
    traced = torch.fx.symbolic_trace(model)
    arguments = draw(), *bags_of()
    for mine, theirs in zip(traced(*arguments), model(*arguments), strict=True):
        assert torch.equal(mine, theirs)
    assert len(list(traced.parameters())) == len(list(model.parameters()))
    with pytest.raises(RuntimeError, match="holds it as a module"):
        torch.fx.symbolic_trace(nn.Sequential(model.item))
    for module in (model.all, model.item):
        with pytest.raises(RuntimeError, match=r"torch\.export.*embeddings\(\)"):
            torch.jit.script(module)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({n: nn.Embedding(r, DIM) for n, r in ROWS.items()})
        self.top = nn.Linear(3 * DIM, 1)

    def forward(self, input):
        parts = zip(self.tables.values(), input.unbind(-1), strict=True)
        return self.top(torch.cat([table(rows) for table, rows in parts], -1)).square().mean()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
@pytest.mark.parametrize("told", [True, False])
def test_takes_over_weights_and_the_optimizers_state(kind, told):
    torch.manual_seed(0)
    model = Model()
    optimizer = kind(
        [{"params": [model.top.weight]}, {"params": model.tables.parameters()}], lr=0.1
    )
    twin = copy.deepcopy(model)
    other = kind([{"params": [twin.top.weight]}, {"params": twin.tables.parameters()}], lr=0.1)
    for each, held in ((model, optimizer), (twin, other)):
        each(draw()).backward()
        held.step()
        held.zero_grad()
    collection = AMTLEmbeddingCollection.from_embeddings(
        model.tables, COUNTS, optimizer if told else None, budget=1.0
    )
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(collection.weight)]
    assert {id(p) for p in optimizer.state} <= {id(collection.weight), id(model.top.weight)}
    for step in range(3):
        model.top(collection(draw(seed=step)).flatten(1)).square().mean().backward()
        twin(draw(seed=step)).backward()
        for held in (optimizer, other):
            held.step()
            held.zero_grad()
    trained = torch.cat([table.weight for table in twin.tables.values()])
    torch.testing.assert_close(collection.weight, trained, rtol=1e-5, atol=1e-6)
    back = collection.embeddings(masked=False)
    assert torch.equal(torch.cat([back[name].weight for name in ROWS]), collection.weight)
    shown = collection.freeze().embeddings()
    assert torch.equal(shown["day"](draw()[:, 2]), collection.lookup("day", draw()[:, 2]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("wrong", [None, "1", [1, 2], 3, torch.ones(11)])
def test_what_is_no_tensor_of_rows_is_named(wrong, frozen):
    collection, input = collection_of(), draw()
    if frozen:
        collection.freeze()
    told = (TypeError, ValueError)
    with pytest.raises(told, match=r"input\['item'\] must be .*int32 or int64"):
        collection({"user": input[:, 0], "item": wrong, "day": input[:, 2]})
    for names in ("item", ["item", "day"]):
        with pytest.raises(told, match=r"input must be .*int32 or int64"):
            collection.lookup(names, wrong)
    with pytest.raises(ValueError, match=r"of one shape on one device, got \{'user': \(11, 'cpu'"):
        collection({"user": input[:, 0], "item": input[:2, 1], "day": input[:, 2]})
    indices, offsets = bags_of()
    if wrong is not None:
        with pytest.raises(told, match="per_sample_weights"):
            collection(indices, offsets, wrong)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="counts must name the tables"):
        collection_of(counts={"user": COUNTS["user"]})
    with pytest.raises(ValueError, match="2 counts for 3 tables"):
        collection_of(counts=[COUNTS["user"], COUNTS["item"]])
    with pytest.raises(ValueError, match="tables of at least one row"):
        AMTLEmbeddingCollection({"a": 3, "b": 0}, DIM, counts=[torch.ones(3), torch.ones(0)])
    with pytest.raises(ValueError, match="mode must be"):
        collection_of(mode="max")
    collection = collection_of()
    with pytest.raises(ValueError, match=r"indices must be \[\.\.\., 3\]"):
        collection(draw()[:, :2])
    with pytest.raises(RuntimeError, match="in one call, without vmap"):
        torch.vmap(collection)(draw()[None])
    with pytest.raises(ValueError, match="must be int32 or int64"):
        collection(draw().float())
    with pytest.raises(ValueError, match="input must name the tables"):
        collection({"user": draw()[:, 0]})
    with pytest.raises(ValueError, match="bags, which need offsets"):
        collection(draw(), None, torch.rand(11, 3))
    indices, offsets = bags_of()
    for wrong in (offsets[:-1], offsets + 1, offsets.flip(0)):
        with pytest.raises(ValueError, match="offsets"):
            collection(indices, wrong)
    with pytest.raises(ValueError, match="offsets must be int32 or int64"):
        collection(indices, offsets.float())
    with pytest.raises(TypeError, match="offsets must be a tensor"):
        collection(indices, [0, 1])
    for call in (lambda: collection.lookup("hour", draw()[:, 0]), lambda: collection.table("hour")):
        with pytest.raises(KeyError, match="no table 'hour'; the collection has"):
            call()
    with pytest.raises(ValueError, match="no embedding can stand in for"):
        amtl.revert(nn.ModuleDict({"tables": collection}))
    for key in ("max_norm", "scale_grad_by_freq"):
        odd = {"a": nn.Embedding(4, DIM, **{key: True})}
        with pytest.raises(ValueError, match=f"'a' has {key}"):
            AMTLEmbeddingCollection.from_embeddings(odd, {"a": torch.ones(4)})
    mixed = {"a": nn.Embedding(4, DIM), "b": nn.Embedding(4, DIM + 1)}
    with pytest.raises(ValueError, match="'b' differs from 'a' in embedding_dim"):
        AMTLEmbeddingCollection.from_embeddings(mixed, {"a": torch.ones(4), "b": torch.ones(4)})
    model = Model()
    optimizer = torch.optim.SGD([model.tables["user"].weight], lr=0.1)
    with pytest.raises(ValueError, match="must be in one group"):
        AMTLEmbeddingCollection.from_embeddings(model.tables, COUNTS, optimizer)


PADDINGS = [{"user": 3, "day": -1}, [5, 49, 0], {"item": 7}]
"""Of some tables, of all, of one."""


def rows_of(paddings):
    """The padding row of each table, None for none."""
    given = paddings if isinstance(paddings, dict) else dict(zip(ROWS, paddings, strict=True))
    found = {name: given.get(name) for name in ROWS}
    return {name: row if row is None else row % ROWS[name] for name, row in found.items()}


def with_paddings(input, paddings):
    """These rows with the padding row of each table among them."""
    input = input.clone()
    for t, row in enumerate(rows_of(paddings).values()):
        if row is not None:
            input[t::4, t] = row
    return input


def padded_tables(paddings, kind=nn.Embedding, value=0.5, **options):
    """Embeddings whose padding rows show .5: zeros would hide what is not looked up."""
    torch.manual_seed(0)
    made = {
        n: kind(ROWS[n], DIM, padding_idx=row, **options) for n, row in rows_of(paddings).items()
    }
    for module in made.values():
        if module.padding_idx is not None:
            nn.init.constant_(module.weight[module.padding_idx], value)
    return nn.ModuleDict(made)


def bags_with(paddings, seed):
    """Bags whose rows are the padding row now and then, one bag of nothing else."""
    indices, offsets = bags_of(seed)
    table = torch.repeat_interleave(torch.arange(3), offsets[::4].diff())
    for t, row in enumerate(rows_of(paddings).values()):
        if row is not None:
            mine = (table == t).nonzero().flatten()
            indices[mine[::2]] = row
            indices[offsets[4 * t] : offsets[4 * t + 1]] = row
    return indices, offsets


@pytest.mark.parametrize("paddings", PADDINGS)
@pytest.mark.parametrize("mode", [None, "sum", "mean"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
def test_padding_rows_are_those_of_the_tables(paddings, mode, frozen, index_type):
    """At full size: values, gradients and steps of Adam, which would move what has a gradient."""
    kind = nn.Embedding if mode is None else partial(nn.EmbeddingBag, mode=mode)
    twins = padded_tables(paddings, kind, **{} if mode is None else {"include_last_offset": True})
    theirs = torch.optim.Adam(twins.parameters(), lr=0.1)
    before = copy.deepcopy(twins)
    mine = torch.optim.Adam((tables := copy.deepcopy(twins)).parameters(), lr=0.1)
    collection = AMTLEmbeddingCollection.from_embeddings(tables, COUNTS, mine, budget=1.0)
    stored = collection.table_bytes()
    if frozen:
        collection.freeze(mine)
    assert collection.table_bytes() == stored
    padding = collection._padding_rows()
    assert collection.row_dims()[padding].tolist() == [DIM, *[0] * len(padding[1:])]
    for seed in range(3):
        if mode is None:
            input = with_paddings(draw(seed=seed), paddings)
            parts = zip(twins.values(), input.unbind(-1), strict=True)
            wanted = torch.stack([table(rows) for table, rows in parts], -2)
            found = collection(input.to(index_type))
        else:
            indices, offsets = bags_with(paddings, seed)
            wanted = []
            for t, table in enumerate(twins.values()):
                own = offsets[4 * t : 4 * t + 5]
                wanted.append(table(indices[own[0] : own[-1]], own - own[0]))
            wanted = torch.stack(wanted, 1)
            found = collection(indices.to(index_type), offsets.to(index_type))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        for out, held in ((found, mine), (wanted, theirs)):
            held.zero_grad()
            (out - 2).square().mean().backward()
            held.step()
    for name, table in collection.embeddings(masked=False).items():
        torch.testing.assert_close(table.weight, twins[name].weight, rtol=1e-5, atol=1e-6)
        row = table.padding_idx
        assert row == twins[name].padding_idx == collection.table(name).padding_idx
        assert row is None or torch.equal(table.weight[row], before[name].weight[row])
    if not frozen and mode is None:
        collection.zero_grad()
        with torch.no_grad():
            collection.weight[collection.padding_idx] = 0.7
        for table in collection.embeddings(masked=False).values():
            row = table.padding_idx
            assert row is None or table.weight[row].eq(0.7).all()
        collection(with_paddings(draw(), paddings)).sum().backward()
        dense = [p.to_dense() for p in collection.weight.grad.split(list(ROWS.values()))]
        for grad, row in zip(dense, rows_of(paddings).values(), strict=True):
            assert bool(grad.any()) and (row is None or not bool(grad[row].any()))


SHARED = [None, "rarest", {"user": 4, "item": 1, "day": 1}]


@pytest.mark.every(4)
@pytest.mark.parametrize("paddings", PADDINGS)
@pytest.mark.parametrize(
    "bits, shared, stay",
    [(bits, shared, False) for bits in (None, 4) for shared in SHARED] + [(4, None, True)],
)
def test_a_life_with_padding_rows(paddings, bits, shared, stay, tmp_path):
    """Search, freeze, state, file, thaw: what the tables show, of which one has no padding row."""
    counts = {name: value.clone() for name, value in COUNTS.items()}
    for name, row in rows_of(paddings).items():
        if row is not None:
            counts[name][row] = 0
    options = {"counts": counts, "shared_rows": shared, "budget": 0.2, "bits": bits}
    value = 0.0 if stay else 0.5
    weight = torch.cat([t.weight.detach() for t in padded_tables(paddings, value=value).values()])
    if stay:
        options["budget"] = 0.14
    collection = collection_of(padding_idx=paddings, _weight=weight, **options).eval()
    starts = dict(zip(ROWS, collection.starts.tolist(), strict=True))
    padding = [starts[n] + row for n, row in rows_of(paddings).items() if row is not None]
    if shared is not None:
        assert not set(collection.shared_rows.tolist()) & set(padding)
    input = with_paddings(draw(), paddings)

    def shows(tables):
        wanted = expected(tables, input)
        assert torch.equal(tables(input), wanted)
        some = tables.lookup(["day", "user", "day"], input[..., [2, 0, 2]])
        assert torch.equal(some, wanted[..., [2, 0, 2], :])
        for t, name in enumerate(ROWS):
            assert torch.equal(tables.table(name)(input[..., t]), wanted[..., t, :])
            row, made = rows_of(paddings)[name], tables.embeddings()[name]
            assert tables.padding_of(name) == made.padding_idx == row
            assert torch.equal(made(input[..., t]), wanted[..., t, :])
            if row is not None:
                assert torch.equal(made.weight[row], made.weight[row].sign() * 0.5) or bits
                assert torch.equal(made.weight[row], tables.dense_weight()[padding[0]])
        return wanted

    stored = collection.table_bytes()
    searched = shows(collection)
    state = copy.deepcopy(collection.state_dict())
    collection.freeze()
    # One padding row is stored, whatever the number of tables.
    assert collection.tier_ends[-1] <= sum(ROWS.values()) - len(padding) + 1
    if stay:
        assert not collection.row_dims()[padding].any()
        assert collection.told_order() is None
        assert collection.stored_bytes() == collection.value_bytes() <= 0.14 * 127 * DIM * 4
    assert collection.table_bytes() == stored or bits
    frozen = shows(collection)
    assert bits or torch.equal(frozen, searched)
    other = collection_of(padding_idx=paddings, _weight=weight, **options).eval()
    other.load_state_dict(collection.state_dict())
    assert torch.equal(shows(other), frozen)
    amtl.save(collection, tmp_path / "layer")
    loaded = amtl.load(tmp_path / "layer")
    assert torch.equal(shows(loaded), frozen)
    written, _ = read_tensors(tmp_path / "layer")
    assert ("layers//row_order" in written) == (collection.told_order() is not None)
    bags = bags_with(paddings, 0)
    assert torch.equal(loaded(*bags), collection(*bags))
    loaded.thaw(counts=torch.cat(list(counts.values())))
    shows(loaded)
    shows(loaded.freeze())
    shows(collection.thaw())
    other.load_state_dict(state)
    assert torch.equal(shows(other), searched)


def test_what_joined_tables_of_few_bits_take():
    """Numbers, and a step size and where its rows end for each table, in place of its padding."""
    tables = {str(t): nn.Embedding(1000, 16, padding_idx=0) for t in range(26)}
    counts = dict.fromkeys(tables, torch.arange(1000).flip(0) + 1)
    collection = AMTLEmbeddingCollection.from_embeddings(tables, counts, budget=0.14, bits=4)
    assert collection.freeze().stored_bytes() == 208_000
    assert collection.row_order.nbytes == 104_000


def test_files_without_padding_rows_are_what_they_were():
    one = collection_of(padding_idx={"item": 7}).freeze().config()
    none = collection_of().freeze().config()
    assert "other_paddings" not in one and "other_paddings" not in none
    assert none["padding_idx"] is None and one["padding_idx"] == 77
    several = collection_of(padding_idx=[1, 2, 3]).freeze()
    assert several.config()["other_paddings"] == [72, 123]
    config, blocks = several.config(), [b.detach() for b in several.blocks]
    with pytest.raises(ValueError, match="do not make a table"):
        AMTLEmbeddingCollection.from_config(config, blocks)


@pytest.mark.parametrize("paddings", PADDINGS)
def test_padding_rows_compile_in_one_graph(paddings):
    collection = collection_of(padding_idx=paddings).eval()
    with torch.no_grad():
        collection.weight[collection.padding_idx] = 0.5
    compiled = torch.compile(lambda input: collection(input), fullgraph=True, backend="aot_eager")
    input = with_paddings(draw(), paddings)
    assert torch.equal(compiled(input), expected(collection, input))
    input[3, 1] = 50
    with pytest.raises(IndexError, match="index -1"):
        compiled(input)
    collection.freeze()
    input = with_paddings(draw(seed=1), paddings)
    assert torch.equal(compiled(input), expected(collection, input))


@pytest.mark.parametrize("frozen", [False, True])
def test_indices_are_checked_before_padding_rows_are_one(frozen):
    """Rows 69 and 70 of the common table are padding; no index outside a table may become them."""
    collection = collection_of(padding_idx={"user": 69, "item": 0})
    clamping = collection_of(padding_idx={"user": 69, "item": 0}, bounds_check="clamp")
    if frozen:
        collection.freeze(), clamping.freeze()
    input = draw((4,))
    for table, value, name in ((0, 70, "user"), (1, -1, "item")):
        outside = input.clone()
        outside[2, table] = value
        with pytest.raises(IndexError, match=f"table '{name}': index {value} at position 2"):
            collection(outside)
        inside = input.clone()
        inside[2, table] = (69, 0)[table]
        assert torch.equal(clamping(outside), clamping(inside))


def test_padding_rows_of_different_values_are_refused():
    tables = padded_tables([0, 0, 0])
    with torch.no_grad():
        tables["day"].weight[0] = 1
    with pytest.raises(ValueError, match="padding rows of 'day' and 'user' hold different values"):
        AMTLEmbeddingCollection.from_embeddings(tables, COUNTS)
    with pytest.raises(ValueError, match=r"padding_idx 7 of table 'day' is outside 0\.\.6"):
        collection_of(padding_idx={"day": 7})
    with pytest.raises(ValueError, match=r"no tables of .*\['hour'\]"):
        collection_of(padding_idx={"hour": 0})
    with pytest.raises(ValueError, match="2 padding_idx for 3 tables"):
        collection_of(padding_idx=[0, 0])
    with pytest.raises(ValueError, match=r"shared_rows\[2\]=122 must be .* not the padding row"):
        collection_of(padding_idx=[0, 0, 2], shared_rows=[1, 1, 2])
