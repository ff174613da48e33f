"""amtl.grow: counts and ids of a new day for frozen tables that go on training."""

from __future__ import annotations

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
    with pytest.raises(ValueError, match="holds several fields"):
        amtl.grow(several, {"all": counts_of(ITEMS + 1)})
    amtl.grow(several, {"all": counts_of(ITEMS)})
    counts = {"a": torch.arange(9), "b": torch.arange(9)}
    tables = amtl.AMTLEmbeddingCollection({"a": 9, "b": 9}, 8, counts=counts, budget=0.5)
    tables.requires_grad_(False).freeze()
    with pytest.raises(ValueError, match="holds several fields"):
        amtl.grow(nn.Sequential(tables), {"0": torch.ones(20)})


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
        amtl.grow(nn.Sequential(tables), {"0": torch.ones(18)})
