"""amtl.grow: counts and ids of a new day for frozen tables that go on training."""

from __future__ import annotations

import copy
from functools import partial

import amtl
import pytest
import torch
from torch import nn

from amtl_kernels import optim

ITEMS, USERS, NEW = 60, 40, 20


class Model(nn.Module):
    def __init__(self, items=ITEMS, users=USERS):
        super().__init__()
        self.item = nn.Embedding(items, 8, padding_idx=0)
        self.user = nn.EmbeddingBag(users, 8, mode="sum")
        self.top = nn.Linear(16, 1)

    def forward(self, items, users):
        found = torch.cat([self.item(items), self.user(users[:, None])], 1)
        return self.top(found).squeeze(1)


def counts_of(rows, first=400):
    return first // torch.arange(1, rows + 1)


def batch(items=ITEMS, users=USERS, rows=64):
    return torch.randint(items, (rows,)), torch.randint(users, (rows,))


def train(model, optimizer, steps, items=ITEMS, users=USERS):
    model.train()
    for _ in range(steps):
        i, u = batch(items, users)
        loss = (model(i, u) - (i % 2) - 0.1 * u).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def frozen(bits, make, budget, **options):
    torch.manual_seed(0)
    model = Model()
    counts = {"item": counts_of(ITEMS), "user": counts_of(USERS)}
    amtl.convert(model, counts, budget=budget, bits=bits, **options)
    amtl.freeze(model)
    optimizer = make(model.parameters())
    train(model, optimizer, 30)
    return model, optimizer


KINDS = {
    "4 bits": (4, partial(torch.optim.Adagrad, lr=0.1), 0.25),
    "8 bits": (8, partial(torch.optim.Adam, lr=0.05), 0.4),
    "32 bits": (None, partial(torch.optim.Adam, lr=0.05), 0.6),
    "rows": (4, partial(optim.RowwiseAdagrad, lr=0.1, initial_accumulator_value=0.2), 0.3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_before_go_on_and_new_ones_begin(kind):
    bits, make, budget = KINDS[kind]
    model, optimizer = frozen(bits, make, budget)
    model.eval()
    every = torch.arange(ITEMS)
    shown, users = model.item(every).detach(), model.user.weight.clone()
    dense = model.item.weight.detach()
    mean = dense.sum(0) / (dense != 0).sum(0)
    counts = torch.cat([counts_of(ITEMS), torch.full((NEW,), 400)])
    groups = len(optimizer.param_groups)
    assert amtl.grow(model, {"item": counts}, optimizer) is model
    assert model.item.num_embeddings == ITEMS + NEW and model.item.phase == "frozen"
    widths = model.item.row_dims()
    for row in range(ITEMS):
        kept = int(widths[row])
        # What sizes leave of a row is what it was: no step size moved, no number was lost.
        assert torch.equal(model.item(every)[row, :kept], shown[row, :kept]), row
    assert torch.equal(model.user.weight, users)
    model.item.thaw(optimizer)
    weight = model.item.weight.detach()
    # Of numbers as they were before they were rounded.
    assert torch.allclose(weight[ITEMS:], mean.expand(NEW, 8), atol=1e-6 if bits is None else 0.1)
    state = optimizer.state[model.item.weight]
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            assert len(value) == ITEMS + NEW
            begins = 0.2 if kind == "rows" else 0.0
            assert bool((value[ITEMS:] == begins).all()), name
            assert bool((value[1:ITEMS] != begins).any())
    assert len(optimizer.param_groups) == groups
    model.item.freeze(optimizer)
    before = model.item(torch.arange(ITEMS, ITEMS + NEW)).detach().clone()
    assert train(model, optimizer, 30, items=ITEMS + NEW) < 3
    assert not torch.equal(model.item(torch.arange(ITEMS, ITEMS + NEW)), before)


def test_a_fused_optimizer_goes_on():
    tables = partial(optim.Adagrad, lr=0.1)
    model, optimizer = frozen(4, partial(torch.optim.Adam, lr=0.05), 0.3, fused_optimizer=tables)
    model.eval()
    said = model(torch.arange(40), torch.arange(40)).detach()
    amtl.grow(model, {"user": counts_of(USERS + NEW)}, optimizer)
    assert torch.allclose(model(torch.arange(40), torch.arange(40)), said, atol=1e-5)
    assert train(model, optimizer, 20, users=USERS + NEW) < 3


def test_a_file_goes_on(tmp_path):
    model, _ = frozen(4, partial(torch.optim.Adam, lr=0.05), 0.3)
    amtl.save(model.eval(), tmp_path / "monday.safetensors")
    items, users = batch()
    loaded = amtl.load(tmp_path / "monday.safetensors", Model()).eval()
    said = loaded(items, users).detach()
    counts = {"item": counts_of(ITEMS + NEW), "user": counts_of(USERS + NEW)}
    amtl.grow(loaded, counts)
    assert torch.allclose(loaded(items, users), said, atol=1e-5)
    optimizer = torch.optim.Adagrad(loaded.parameters(), lr=0.1)
    assert train(loaded, optimizer, 30, ITEMS + NEW, USERS + NEW) < 3
    amtl.save(loaded.eval(), tmp_path / "tuesday.safetensors")
    again = amtl.load(tmp_path / "tuesday.safetensors", Model(ITEMS + NEW, USERS + NEW)).eval()
    items, users = batch(ITEMS + NEW, USERS + NEW)
    assert torch.equal(again(items, users), loaded(items, users))


def test_new_counts_alone_move_sizes():
    model, optimizer = frozen(None, partial(torch.optim.Adam, lr=0.05), 0.5)
    before = model.item.row_dims()
    amtl.grow(model, {"item": counts_of(ITEMS).flip(0)}, optimizer)
    after = model.item.row_dims()
    assert int(before[1]) > int(before[-1]) and int(after[-1]) > int(after[1])
    # A dictionary of row numbers may name rows that are new, and leave others out.
    amtl.grow(model, {"item": {1: 9, ITEMS + 2: 5}}, optimizer)
    assert model.item.num_embeddings == ITEMS + 3
    assert int(model.item.row_dims()[1]) == 8


def test_what_cannot_grow():
    model, optimizer = frozen(4, partial(torch.optim.Adam, lr=0.05), 0.3)
    with pytest.raises(ValueError, match="'items', which is no layer"):
        amtl.grow(model, {"items": counts_of(99)}, optimizer)
    with pytest.raises(ValueError, match=r"must have shape \[60\]"):
        amtl.grow(model, {"item": counts_of(ITEMS - 1)}, optimizer)
    assert model.item.phase == "frozen" and model.item.num_embeddings == ITEMS
    searching = amtl.convert(Model(), {"item": counts_of(ITEMS)}, budget=0.3)
    with pytest.raises(RuntimeError, match="'item' is still searching"):
        amtl.grow(searching, {"item": counts_of(ITEMS + 1)})
    several = nn.ModuleDict({"all": nn.Embedding(ITEMS, 8)})
    amtl.convert(several, {"all": counts_of(ITEMS)}, budget=0.3, field_sizes=[20, 40])
    amtl.freeze(several)
    with pytest.raises(ValueError, match=r"2 fields: give the counts of each, .counts_of_the"):
        amtl.grow(several, {"all": counts_of(ITEMS + 1)})
    amtl.grow(several, {"all": counts_of(ITEMS)})
    counts = {"a": torch.arange(9), "b": torch.arange(9)}
    tables = amtl.AMTLEmbeddingCollection({"a": 9, "b": 9}, 8, counts=counts, budget=0.5)
    tables.requires_grad_(False).freeze()
    with pytest.raises(ValueError, match=r"2 fields: give the counts of each, {'a': its_counts"):
        amtl.grow(nn.Sequential(tables), {"0": torch.ones(20)})
    with pytest.raises(ValueError, match=r"counts must name the tables \['a', 'b'\]"):
        amtl.grow(nn.Sequential(tables), {"0": {"a": torch.ones(20)}})
    with pytest.raises(ValueError, match=r"must have shape \[9\]"):
        amtl.grow(nn.Sequential(tables), {"0": [torch.ones(20), torch.ones(8)]})
    assert (tables.phase, tables.field_sizes) == ("frozen", [9, 9])


def test_where_sizes_fit_no_budget_the_table_is_as_it_was(monkeypatch):
    model, optimizer = frozen(4, partial(torch.optim.Adam, lr=0.05), 0.3)

    def fits_nothing(*args):
        raise amtl.BudgetError("too small")

    monkeypatch.setattr(amtl.AMTLTable, "_search", fits_nothing)
    with pytest.raises(amtl.BudgetError):
        amtl.grow(model, {"item": counts_of(ITEMS + NEW)}, optimizer)
    assert (model.item.phase, model.item.num_embeddings) == ("frozen", ITEMS)
    assert model.item.field_sizes == [ITEMS]
    model(*batch())
    counts = {"a": torch.arange(9), "b": torch.arange(9)}
    monkeypatch.undo()
    tables = amtl.AMTLEmbeddingCollection({"a": 9, "b": 9}, 8, counts=counts, budget=0.5)
    tables.requires_grad_(False)
    tables.freeze()
    monkeypatch.setattr(amtl.AMTLTable, "_search", fits_nothing)
    with pytest.raises(amtl.BudgetError):
        amtl.grow(nn.Sequential(tables), {"0": {"a": torch.ones(12), "b": torch.ones(9)}})
    assert (tables.num_embeddings, tables.field_sizes) == (18, [9, 9])
    assert tables.starts.tolist() == [0, 9] and tables.sizes.tolist() == [9, 9]


class Tables(nn.Module):
    """Two tables in one collection, or in one table of two fields."""

    def __init__(self, collected, bits, padded=True, items=ITEMS, users=USERS, **options):
        super().__init__()
        rows, counts = {"item": items, "user": users}, [counts_of(items), counts_of(users, 90)]
        if collected:
            options |= {"padding_idx": {"item": 0, "user": 2}} if padded else {}
            self.all = amtl.AMTLEmbeddingCollection(rows, 8, counts=counts, bits=bits, **options)
            self.user = self.all.table("user")
        else:
            options |= {"padding_idx": items} if padded else {}
            given = {"counts": torch.cat(counts), "field_sizes": list(rows.values())}
            self.all = amtl.AMTLEmbedding(items + users, 8, bits=bits, **given, **options)
        self.top = nn.Linear(16, 1)

    def shown(self, items, users):
        if not hasattr(self, "user"):
            sizes = self.all.field_sizes
            assert sum(sizes) == self.all.num_embeddings
            return self.all(torch.stack([items, users + sizes[0]], -1))
        if not self.training:
            named = self.all({"item": items, "user": users})
            assert torch.equal(self.user(users), named[..., 1, :])
        return self.all(torch.stack([items, users], -1))

    def forward(self, items, users):
        return self.top(self.shown(items, users).flatten(1)).squeeze(1)


@pytest.mark.parametrize(
    "bits, budget, shared", [(4, 0.25, None), (None, 0.6, None), (None, 0.2, "rarest")]
)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("collected", [True, False])
def test_rows_of_several_fields_begin_behind_those_of_their_own(
    collected, padded, bits, budget, shared, tmp_path
):
    torch.manual_seed(1)
    model = Tables(collected, bits, padded, budget=budget, shared_rows=shared)
    amtl.freeze(model)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=0.2)
    train(model, optimizer, 30)
    model.eval()

    def by_field(items=ITEMS, users=USERS):
        """Rows as they are shown, and the state of each that Adagrad has, once thawed."""
        rows = max(items, users)
        ids = [torch.arange(rows).clamp(max=n - 1) for n in (items, users)]
        shown = model.shown(*ids).detach()
        return shown[:items, 0], shown[:users, 1]

    before = by_field()
    kept = model.all.row_dims().split(model.all.field_sizes)
    twin, its = copy.deepcopy((model.all, optimizer))
    twin.thaw(its)
    sums = its.state[twin.weight]["sum"].split(model.all.field_sizes)
    means = [w.sum(0) / (w != 0).sum(0) for w in model.all.dense_weight().split([ITEMS, USERS])]
    more = [torch.full((NEW,), 400), torch.full((7,), 90)]
    counts = [counts_of(ITEMS), counts_of(USERS, 90)]
    given = [torch.cat(pair) for pair in zip(counts, more, strict=True)]
    assert amtl.grow(model, {"all": given}, optimizer) is model
    sizes = [ITEMS + NEW, USERS + 7]
    assert model.all.field_sizes == sizes and model.all.num_embeddings == sum(sizes)
    after = by_field(*sizes)
    widths = model.all.row_dims().split(sizes)
    alone = None if shared is None else model.all.shared_rows - torch.tensor([0, sizes[0]])
    if shared:
        # The rarest of before, wherever they are now.
        assert alone.tolist() == [ITEMS - 1, USERS - 1]
    merged = 0
    for field, rows in enumerate((ITEMS, USERS)):
        for row in range(rows):
            width = min(int(widths[field][row]), int(kept[field][row]))
            found = after[field][row, :width], before[field][row, :width]
            assert torch.equal(*found), (field, row)
            if shared and not widths[field][row] and not (padded and row in (0, 2)):
                assert torch.equal(after[field][row], after[field][alone[field]])
                merged += 1
    assert bool(merged) == bool(shared)
    if padded:
        row = 2 if collected else 0
        assert torch.equal(after[1][row], torch.zeros(8))
    model.all.thaw(optimizer)
    weight = model.all.weight.detach().split(sizes)
    state = optimizer.state[model.all.weight]["sum"].split(sizes)
    for field, rows in enumerate((ITEMS, USERS)):
        width = int(widths[field][rows])
        new = weight[field][rows:, :width]
        # Of numbers as they were before they were rounded.
        atol = 0.1 if bits else 1e-6
        assert torch.allclose(new, means[field][:width].expand_as(new), atol=atol)
        assert bool((state[field][rows:, :width] == 0.2).all())
        for row in range(rows):
            width = min(int(widths[field][row]), int(kept[field][row]))
            assert torch.equal(state[field][row, :width], sums[field][row, :width])
        assert bool((sums[field] > 0.2).any())
    model.all.freeze(optimizer)
    assert train(model, optimizer, 30, *sizes) < 3
    amtl.save(model.eval(), tmp_path / "tuesday.safetensors")
    again = Tables(collected, bits, padded, *sizes, budget=budget, shared_rows=shared)
    again = amtl.load(tmp_path / "tuesday.safetensors", again).eval()
    items, users = batch(*sizes)
    assert torch.allclose(again(items, users), model(items, users), atol=1e-6)


def test_a_collection_from_a_file_grows(tmp_path):
    torch.manual_seed(1)
    model = Tables(True, 4, budget=0.25)
    amtl.freeze(model)
    amtl.save(model.eval(), tmp_path / "monday.safetensors")
    loaded = amtl.load(tmp_path / "monday.safetensors", Tables(True, 4, budget=0.25)).eval()
    items, users = batch()
    said = loaded(items, users)
    counts = {"item": counts_of(ITEMS + NEW), "user": {0: 5, USERS + 2: 9}}
    amtl.grow(loaded, {"all": counts})
    assert loaded.user.num_embeddings == USERS + 3 and loaded.user.padding_idx == 2
    assert torch.allclose(loaded(items, users), said, atol=1e-5)
    loaded(torch.tensor([ITEMS + NEW - 1]), torch.tensor([USERS + 2]))
    with pytest.raises(IndexError, match="'user': index 43"):
        loaded(torch.tensor([0]), torch.tensor([USERS + 3]))
