"""What convert and freeze say where a model asks for something else than it gets."""

from __future__ import annotations

import copy
import warnings

import amtl
import pytest
import torch
from torch import nn
from torch.nn import functional as F


def test_freezing_a_model_without_layers_is_warned_of():
    model = nn.ModuleDict({"item": nn.Embedding(50, 8)})
    amtl.convert(model["item"], torch.arange(50), budget=0.3)
    with pytest.warns(UserWarning, match="no AMTL layers.*it returns the layer") as told:
        assert amtl.freeze(model) is model
    assert told[0].filename == __file__
    model["item"] = amtl.convert(model["item"], torch.arange(50), budget=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amtl.freeze(amtl.freeze(model))


def shared():
    table = nn.Embedding(50, 8)
    return nn.ModuleDict({"query": nn.Sequential(table), "doc": nn.Sequential(table)})


@pytest.mark.parametrize("names", [None, ["query.0"], ["doc.0"]])
def test_counts_under_both_names_of_a_table_are_refused_if_they_differ(names):
    model, up = shared(), torch.arange(50)
    with pytest.raises(ValueError, match=r"'doc\.0'.*one table.*sum, under one"):
        amtl.convert(model, {"query.0": up, "doc.0": up.flip(0)}, names=names)
    assert not amtl.layers(model)
    amtl.convert(model, {"query.0": up, "doc.0": up.float()}, names=names, budget=0.3)
    assert model["query"][0] is model["doc"][0] is amtl.layers(model)["query.0"]


def test_weights_of_float64_are_told_how_to_be_others():
    model = nn.ModuleDict({"item": nn.Embedding(50, 8)}).double()
    with pytest.raises(ValueError, match=r"float64.*model\.float\(\)"):
        amtl.convert(model, {"item": torch.arange(50)})
    amtl.convert(model.float(), {"item": torch.arange(50)})


class Tied(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.emb, self.mix = nn.Embedding(50, 8), nn.Linear(8, 8)
        if head:
            self.head = nn.Linear(8, 50)
            self.head.weight = self.emb.weight
        else:
            self.bias = nn.Parameter(torch.randn(50))

    def forward(self, rows):
        return F.linear(self.mix(self.emb(rows)), self.emb.weight, self.bias)


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_a_tied_head_is_told_what_stays_tied_and_it_does(budget, tmp_path):
    counts = {"emb": torch.arange(50)}
    with pytest.raises(ValueError, match=r"F\.linear\(h, self\.emb\.weight, bias\).*amtl\.freeze"):
        amtl.convert(Tied(head=True), counts)
    torch.manual_seed(0)
    model = amtl.freeze(amtl.convert(Tied(head=False), counts, budget=budget))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    rows, others = torch.tensor([49, 48]), torch.arange(40, 48)
    before = model.emb(others).detach().clone()
    F.cross_entropy(model(rows), torch.tensor([45, 44])).backward()
    optimizer.step()
    # Rows that were not looked up: the gradient is that of the head.
    assert not torch.equal(model.emb(others), before)
    amtl.save(model, tmp_path / "model.safetensors")
    loaded = amtl.load(tmp_path / "model.safetensors", Tied(head=False)).eval()
    torch.testing.assert_close(loaded(rows), model.eval()(rows))
    assert torch.equal(loaded.emb.weight[others], loaded.emb(others))


class TiedByAList(Tied):
    """Hides the weight from nn.Module, which would name it twice."""

    def __init__(self):
        super().__init__(head=False)
        self.tied = [self.emb.weight]

    def forward(self, rows):
        return F.linear(self.mix(self.emb(rows)), self.tied[0], self.bias)


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_a_head_that_is_tied_by_a_list_is_told_to_read_the_layer(budget, tmp_path):
    """It would score by numbers before rounding, and a loaded one by those of before the load."""
    counts, rows = {"emb": torch.arange(50)}, torch.tensor([49, 48])
    model = amtl.freeze(amtl.convert(TiedByAList(), counts, budget=budget))
    amtl.save(model, tmp_path / "model.safetensors")
    loaded = amtl.load(tmp_path / "model.safetensors", TiedByAList())
    again = amtl.load(tmp_path / "model.safetensors", loaded)
    for each in (model, loaded, again.eval()):
        with pytest.raises(RuntimeError, match=r"in a list.*\(linear\).*model\.emb\.weight, read"):
            each(rows)
    plain = amtl.revert(again)
    assert plain.tied[0] is plain.emb.weight
    expected = F.linear(plain.mix(plain.emb(rows)), plain.emb.weight, plain.bias)
    assert torch.equal(plain(rows), expected)


def tiny():
    counts = {"0": [500, 300], "1": [290, 210, 300], "2": [60, 90, 200, 200, 100, 70, 50, 20, 10]}
    return nn.ModuleList([nn.Embedding(2, 2), nn.Embedding(3, 3), nn.Embedding(9, 5)]), counts


def test_tables_that_keep_nothing_are_named_with_the_budget_that_was_given():
    model, counts = tiny()
    with pytest.warns(UserWarning, match="keep no numbers") as told:
        amtl.convert(model, counts, budget=0.125)
    assert len(told) == 1 and told[0].filename == __file__
    text = str(told[0].message)
    assert "'1', '2': at budget=0.125 of all tables together" in text
    assert "names=" in text and "amtl.convert" not in text
    model, counts = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        amtl.convert(model, counts, budget=0.8, names=["0"])
    assert list(amtl.layers(model)) == ["0"]


@pytest.mark.parametrize("budget", [0.05, {"table": 0.05, "other": 0.5}])
def test_a_table_that_keeps_nothing_of_its_own_budget_is_told_of_a_common_one(budget):
    model = nn.ModuleDict({"table": nn.Embedding(8, 16), "other": nn.Embedding(50, 16)})
    counts = {"table": [50, 40, 30, 60, 20, 50, 44, 40], "other": torch.arange(50)}
    names = None if isinstance(budget, dict) else ["table"]
    with pytest.warns(UserWarning, match=r"'table':.* rows .*one budget") as told:
        amtl.convert(model, counts, budget=budget, names=names)
    assert len(told) == 1 and told[0].filename == __file__


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(50, 8), nn.Embedding(50, 8)


class Thin(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Embedding(50, 1)


def scheduler(model):
    return torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1)


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        (lambda m, c: amtl.convert(m, c, names="item"), TypeError, r"such as \['item'\]"),
        (lambda m, c: amtl.convert(m, {m.user: c["user"]}), TypeError, "a dict by an Embedding"),
        (lambda m, c: amtl.convert(m, c["user"]), TypeError, r"a Tensor; .*\['user', 'item'\]"),
        (lambda m, c: amtl.convert(Two, c), TypeError, "the class Two, not a model made of it"),
        (lambda m, c: amtl.convert(m, c, {"user": 0.3, "itme": 0.3}), ValueError, "'itme'"),
        (lambda m, c: amtl.convert(m, c, shared_rows={"itme": "rarest"}), ValueError, "'itme'"),
        (
            lambda m, c: amtl.freeze(amtl.convert(m, c), scheduler(m)),
            TypeError,
            "a StepLR: left",
        ),
        (lambda m, c: amtl.thaw(amtl.freeze(amtl.convert(m, c)), c), TypeError, "got a str"),
        (lambda m, c: amtl.freeze(Two), TypeError, "the class Two"),
        (lambda m, c: amtl.counting({"a": m}).__enter__(), TypeError, "got a dict"),
        (lambda m, c: amtl.save("model.safetensors", m), TypeError, "first, got a str"),
        (lambda m, c: amtl.load(m, "model.safetensors"), TypeError, "the path first"),
        (lambda m, c: amtl.convert(Thin(), {"fc": c["user"]}, bits=4), ValueError, "bits=8 fits"),
    ],
)
def test_what_was_mixed_up_is_said(mistake, kind, message):
    counts = dict.fromkeys(("user", "item"), torch.arange(50))
    with pytest.raises(kind, match=message):
        mistake(Two(), counts)


class Daily(nn.Module):
    def __init__(self, users: int, items: int):
        super().__init__()
        self.user, self.item = nn.Embedding(users, 8), nn.EmbeddingBag(items, 8, mode="sum")
        self.norm, self.top = nn.BatchNorm1d(16), nn.Linear(16, 1)

    def forward(self, user, items):
        return self.top(self.norm(torch.cat([self.user(user), self.item(items)], 1)))


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_of_yesterday_goes_on_with_ids_that_are_new(whole, tmp_path):
    """docs/integrations.md, Day after day."""
    torch.manual_seed(0)
    counts = {"user": torch.arange(1, 41), "item": torch.arange(1, 31)}
    monday = amtl.freeze(amtl.convert(Daily(40, 30), counts, budget=0.3))
    users, items = torch.randint(40, (64,)), torch.randint(30, (64, 3))
    optimizer = torch.optim.Adam(monday.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad(), monday(users, items).square().mean().backward(), optimizer.step()
    amtl.save(monday, tmp_path / "monday.safetensors")
    if whole:
        model = amtl.convert(Daily(40, 30), {n: torch.ones(len(c)) for n, c in counts.items()})
        amtl.freeze(model).load_state_dict(monday.state_dict())
    else:
        model = amtl.load(tmp_path / "monday.safetensors", Daily(40, 30))
    new = torch.randint(50, (200,)), torch.randint(33, (200,))
    for (name, count), ids, rows in zip(counts.items(), new, (50, 33), strict=True):
        counts[name] = torch.bincount(ids, minlength=rows)
        counts[name][: len(count)] += (0.9 * count).long()
    amtl.grow(model, counts)
    # Rows in another order of counts are rounded by another step size.
    assert torch.allclose(model.eval()(users, items), monday.eval()(users, items), atol=0.02)

    model.train()
    before = model.user(torch.tensor([45]))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    model(torch.arange(50), torch.randint(33, (50, 2))).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.user(torch.tensor([45])), before)
    amtl.save(model, tmp_path / "tuesday.safetensors")
    tuesday = amtl.load(tmp_path / "tuesday.safetensors", Daily(50, 33)).eval()
    ids = torch.arange(33)
    assert torch.equal(tuesday(ids, ids[:, None]), model.eval()(ids, ids[:, None]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_come_as_a_nested_tensor_too(mode, frozen):
    parts = [torch.tensor(part) for part in ([3, 4], [5], [19, 0, 3])]
    bags = torch.nested.nested_tensor(parts, layout=torch.jagged)
    values = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1, -1.0])
    weights = torch.nested.nested_tensor_from_jagged(values, bags.offsets())
    torch.manual_seed(0)
    model = nn.ModuleDict({"tags": nn.EmbeddingBag(20, 4, mode=mode)})
    plain = copy.deepcopy(model["tags"])
    amtl.convert(model, {"tags": torch.arange(20)}, budget=1.0, bits=None)
    if frozen:
        amtl.freeze(model)
    given = [None, weights] if mode == "sum" else [None]
    for each in given:
        expected = plain(bags, per_sample_weights=each)
        assert torch.allclose(model["tags"](bags, per_sample_weights=each), expected)
    with pytest.raises(ValueError, match="must be nested, as the input is"):
        model["tags"](bags, per_sample_weights=values)
