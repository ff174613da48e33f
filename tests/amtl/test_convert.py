"""convert and revert: warm start in place, names, sharing, hooks, refusals."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import warnings
import weakref

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer import instances
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from amtl_kernels.optim import RowwiseAdagrad

ROWS, DIM = 10, 4


class Model(nn.Module):
    """Two embeddings and a bag in places as awkward as models have them."""

    def __init__(self):
        super().__init__()
        self.users = nn.Embedding(50, 8, padding_idx=2, sparse=True)
        self.more = nn.ModuleDict({"goods": nn.ModuleList([nn.Embedding(30, 4)])})
        self.tags = nn.EmbeddingBag(20, 8, mode="sum", include_last_offset=True, padding_idx=0)
        self.top = nn.Linear(20, 1)

    def forward(self, users, items, tags, offsets):
        parts = [self.users(users), self.more["goods"][0](items), self.tags(tags, offsets)]
        return self.top(torch.cat(parts, dim=1)).squeeze(1)


def counts_of(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (rows,), generator=generator)


COUNTS = {"users": counts_of(50), "more.goods.0": counts_of(30, 1), "tags": counts_of(20, 2)}


def inputs(batch=6):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randint(50, (batch,), generator=generator),
        torch.randint(30, (batch,), generator=generator),
        torch.randint(20, (3 * batch,), generator=generator),
        torch.arange(0, 3 * batch + 1, 3),
    )


def model_of():
    torch.manual_seed(0)
    return Model()


def test_convert_all_and_train():
    model = model_of()
    weights = {n: model.get_submodule(n).weight for n in COUNTS}
    keys = set(model.state_dict())
    result = amtl.convert(model, COUNTS, budget=0.5)
    assert result is model
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AMTLEmbeddingBag if name == "tags" else AMTLEmbedding)
        # The very Parameter: memory is not doubled and optimizers stay valid.
        assert layer.weight is weight and layer.name == name
    assert model.users.padding_idx == 2 and model.users.sparse
    assert model.tags.mode == "sum" and model.tags.include_last_offset
    assert keys <= set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*inputs()).sum().backward()
    optimizer.step()
    amtl.freeze(model, optimizer)
    model(*inputs()).sum().backward()
    optimizer.step()


def test_outputs_are_the_masked_tables():
    model = model_of()
    weight = model.users.weight.detach().clone()
    amtl.convert(model, COUNTS, budget=0.5).eval()
    rows = torch.arange(50)
    masked = torch.where(torch.arange(8) < model.users.row_dims()[:, None], weight, 0)
    assert torch.equal(model.users(rows), F.embedding(rows, masked))


def test_full_budget_changes_nothing():
    model = model_of().eval()
    before = model(*inputs())
    amtl.convert(model, COUNTS, budget=1.0)
    torch.testing.assert_close(model(*inputs()), before)
    amtl.freeze(model)
    torch.testing.assert_close(model(*inputs()), before)


def test_selection_and_options():
    model = model_of()
    amtl.convert(model, COUNTS, 0.5, names=["users"], parametrization="rule", min_dim=2)
    assert isinstance(model.users, AMTLEmbedding)
    assert model.users.options.parametrization == "rule"
    assert int(model.users.row_dims().min()) >= 2
    assert type(model.tags) is nn.EmbeddingBag
    amtl.convert(model, {"tags": COUNTS["tags"]}, None, parametrization="free")
    assert model.tags.budget is None


@pytest.mark.parametrize("trained", [False, True])
def test_revert_is_the_inverse(trained):
    model = model_of().eval()
    before = model(*inputs())
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    amtl.convert(model, COUNTS, budget=0.5)
    if trained:
        model.users.weight.data.mul_(2)
    assert amtl.revert(model) is model
    assert type(model.users) is nn.Embedding and type(model.tags) is nn.EmbeddingBag
    assert dict(model.named_parameters()) == parameters
    if not trained:
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert state.keys() == model.state_dict().keys()
        assert torch.equal(model(*inputs()), before)
    assert model.users.padding_idx == 2 and model.users.sparse
    assert model.tags.mode == "sum" and model.tags.include_last_offset
    assert model.tags.padding_idx == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_revert_that_keeps_outputs(frozen):
    model = amtl.convert(model_of(), COUNTS, budget=0.5).eval()
    if frozen:
        amtl.freeze(model)
    before = model(*inputs())
    amtl.revert(model, masked=not frozen)
    assert not amtl.layers(model)
    torch.testing.assert_close(model(*inputs()), before)


@pytest.mark.parametrize("way", ["frozen", "masked", "fused"])
def test_optimizers_go_on_with_what_a_reverted_model_has(way):
    """As with a plain model, where no number is left out."""
    results = []
    for converts in (False, True):
        torch.manual_seed(0)
        model, rows = nn.Sequential(nn.Embedding(30, 4), nn.Linear(4, 1)), torch.arange(30)
        tables = RowwiseAdagrad(model[0].parameters(), 0.1)
        optimizer = tables if way == "fused" else torch.optim.Adam(model[0].parameters(), 0.1)
        if converts:
            fused = tables if way == "fused" else None
            options = {"budget": 1.0, "bits": None, "fused_optimizer": fused}
            amtl.convert(model, {"0": rows.flip(0)}, **options)
        for step in range(9):
            if converts and step == 3 and way != "masked":
                amtl.freeze(model)
            if converts and step == 6:
                copied = amtl.revert(copy.deepcopy(model), masked=way == "masked")
                amtl.revert(model, masked=way == "masked")
                assert type(model[0]) is nn.Embedding
                assert optimizer.param_groups[0]["params"][0] is model[0].weight
                assert copied[0].weight not in optimizer.state
            optimizer.zero_grad()
            (model(rows) - rows[:, None] / 30).square().mean().backward()
            optimizer.step()
        results.append(model(rows).detach())
    torch.testing.assert_close(*results)


def test_type_device_flags_are_kept():
    model = model_of().to(torch.bfloat16).eval()
    model.users.weight.requires_grad_(False)
    model.tags.train()
    amtl.convert(model, COUNTS, budget=0.5)
    assert model.users.weight.dtype == torch.bfloat16
    assert not model.users.weight.requires_grad and model.tags.weight.requires_grad
    assert not model.users.training and model.tags.training
    model.users.freeze()
    assert not model.users.blocks[0].requires_grad
    amtl.revert(model)
    assert model.users.weight.dtype == torch.bfloat16 and not model.users.weight.requires_grad


def test_shared_modules_stay_shared():
    model = model_of()
    model.again = model.users
    model.more["goods"].append(model.users)
    amtl.convert(model, {"again": COUNTS["users"]}, budget=0.5)
    assert isinstance(model.users, AMTLEmbedding)
    assert model.users is model.again is model.more["goods"][1]
    amtl.revert(model)
    assert type(model.users) is nn.Embedding
    assert model.users is model.again is model.more["goods"][1]


def test_tied_weights_are_refused():
    model = model_of()
    model.out = nn.Linear(8, 50, bias=False)
    model.out.weight = model.users.weight
    with pytest.raises(ValueError, match=r"users.*shared by \['users.weight', 'out.weight'\]"):
        amtl.convert(model, COUNTS, budget=0.5)
    assert not amtl.layers(model), "nothing is replaced when something is refused"
    amtl.convert(model, COUNTS, budget=0.5, names=["tags"])
    other = nn.ModuleList([nn.Embedding(5, 4), nn.Embedding(5, 4)])
    other[1].weight = other[0].weight
    with pytest.raises(ValueError, match="shared by"):
        amtl.convert(other, {"0": torch.ones(5)})


def test_hooks_survive():
    model, calls = model_of(), []
    handle = model.users.register_forward_hook(lambda *_: calls.append("forward"))
    model.users.register_forward_pre_hook(lambda *_: calls.append("pre"))
    model.users.register_forward_hook(
        lambda m, a, k, o: calls.append("kwargs"), with_kwargs=True, always_call=True
    )
    model.users.register_full_backward_hook(lambda *_: calls.append("backward"))
    amtl.convert(model, COUNTS, budget=0.5)
    model(*inputs()).sum().backward()
    assert sorted(calls) == ["backward", "forward", "kwargs", "pre"]
    handle.remove()
    calls.clear()
    model(*inputs())
    assert sorted(calls) == ["kwargs", "pre"]
    amtl.revert(model)
    calls.clear()
    model(*inputs())
    assert sorted(calls) == ["kwargs", "pre"]


def test_a_model_that_is_an_embedding():
    embedding = nn.Embedding(50, 8)
    layer = amtl.convert(embedding, COUNTS["users"], budget=0.5)
    assert isinstance(layer, AMTLEmbedding) and layer.weight is embedding.weight
    assert type(amtl.revert(layer)) is nn.Embedding


def test_state_dict_round_trips():
    model = amtl.convert(model_of(), COUNTS, budget=0.5).eval()
    for _ in range(2):
        fresh = amtl.convert(model_of(), {k: 0 * v for k, v in COUNTS.items()}, budget=0.5).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(*inputs()), model(*inputs()))
        amtl.freeze(model)


def test_parameter_groups():
    model = amtl.convert(model_of(), COUNTS, budget=0.5)
    groups = amtl.parameter_groups(model, lr=0.5)
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in amtl.mask_parameters(model)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("contiguous", [True, False])
def test_optimizer_from_before_goes_on(contiguous):
    model = model_of()
    if not contiguous:
        weight = model.users.weight.detach()
        model.users.weight = nn.Parameter(weight.t().contiguous().t())
        assert not model.users.weight.is_contiguous()
    own = model.users.weight
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    model(*inputs()).sum().backward()
    optimizer.step()
    before = own.detach().clone()
    amtl.convert(model, COUNTS, budget=0.5)
    assert model.users.weight is own and own.is_contiguous() and torch.equal(own, before)
    optimizer.add_param_group({"params": amtl.mask_parameters(model), "lr": 1e-2})
    optimizer.zero_grad()
    model(*inputs()).sum().backward()
    optimizer.step()
    assert not torch.equal(own, before)
    amtl.freeze(model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in amtl.table_parameters(model))


def step_of(model, optimizer):
    optimizer.zero_grad()
    model(*inputs()).square().sum().backward()
    optimizer.step()


def test_freezing_finds_the_optimizer():
    """Nobody passes it, and the table trains on all the same."""
    model = amtl.convert(model_of(), COUNTS, budget=0.5, parametrization="ordinal")
    tables = torch.optim.Adagrad([*amtl.table_parameters(model), *model.top.parameters()], lr=0.1)
    masks = torch.optim.Adam(amtl.mask_parameters(model))
    for optimizer in (tables, masks):
        step_of(model, optimizer)
    amtl.freeze(model)
    held = {id(p) for group in tables.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} - {
        id(p) for layer in amtl.layers(model).values() for p in layer.head.parameters()
    }
    assert masks.param_groups[0]["params"] == []
    assert all("sum" in tables.state[block] for block in amtl.table_parameters(model))
    before = [block.detach().clone() for block in amtl.table_parameters(model)]
    step_of(model, tables)
    after = amtl.table_parameters(model)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model.users.thaw()
    assert any(p is model.users.weight for p in tables.param_groups[0]["params"])


class Plain:
    """An optimizer that is not PyTorch's."""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def test_an_optimizer_that_cannot_be_found_is_told_of_after_freezing():
    model = amtl.convert(model_of(), COUNTS, budget=0.5)
    optimizer = Plain(model.parameters())
    model(*inputs()).sum().backward()
    optimizer.step()
    amtl.freeze(model)
    copied = copy.deepcopy(model)
    model.eval()
    model(*inputs())
    model.train()
    with pytest.warns(UserWarning, match="something still holds the weight") as told:
        model(*inputs())
    assert {str(w.message).split("'")[1] for w in told} == set(COUNTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*inputs())
        copied(*inputs())
        # Freed, or held by an optimizer that freezing finds.
        for own in (None, torch.optim.SGD):
            model = amtl.convert(model_of(), COUNTS, budget=0.5)
            optimizer = own and own(model.parameters(), lr=0.1)
            amtl.freeze(model)
            model(*inputs())
        # A graph that is kept trains nothing.
        model = amtl.convert(model_of(), COUNTS, budget=0.5)
        kept = model(*inputs())
        amtl.freeze(model)
        model(*inputs())
        del kept


@pytest.mark.parametrize("held", [False, True])
def test_sizes_that_nobody_trains_are_refused_at_the_next_step(held):
    """An optimizer from before convert holds the table, and knows nothing of sizes."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    amtl.convert(model, COUNTS, budget=0.5, parametrization="ordinal")
    masks = torch.optim.SGD(amtl.mask_parameters(model), lr=0.0) if held else None
    step_of(model, optimizer)
    if held:
        step_of(model, optimizer)
        assert masks is not None
        return
    refusal = "is trained, but what learns its sizes is in no optimizer.*add_param_group"
    for name in COUNTS:
        with pytest.raises(RuntimeError, match=f"table '{name}' {refusal}"):
            step_of(model, optimizer)
    with torch.no_grad():
        model(*inputs())
    # Whoever catches that and goes on is told again.
    step_of(model, optimizer)
    with pytest.raises(RuntimeError, match=refusal):
        step_of(model, optimizer)
    optimizer.add_param_group({"params": amtl.mask_parameters(model)})
    before = [p.detach().clone() for p in amtl.mask_parameters(model)]
    for _ in range(3):
        step_of(model, optimizer)
    after = amtl.mask_parameters(model)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_table_changed_by_hand_is_warned_of():
    """Nobody can tell who trains then, or if anybody does."""
    model = amtl.convert(model_of(), COUNTS, budget=0.5, parametrization="ordinal")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            model(*inputs())
            with torch.no_grad():
                for weight in amtl.table_parameters(model):
                    weight.mul_(0.9)
    said = [str(w.message) for w in caught if "in no optimizer" in str(w.message)]
    assert len(said) == 3 and "'users'" in said[0]


@pytest.mark.parametrize("parametrization", ["ordinal", "free"])
def test_initialisers_of_linear_layers_leave_sizes_alone(parametrization):
    """As model.apply(init) and loops over modules() do it."""
    budget = 0.5 if parametrization == "ordinal" else None
    model = amtl.convert(model_of(), COUNTS, budget=budget, parametrization=parametrization)
    before = [p.detach().clone() for p in amtl.mask_parameters(model)]

    def initialise(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)

    model.apply(initialise)
    assert all(torch.equal(a, b) for a, b in zip(before, amtl.mask_parameters(model), strict=True))
    assert not any(
        isinstance(m, nn.Linear) for layer in amtl.layers(model).values() for m in layer.modules()
    )


@pytest.mark.parametrize("parametrization", ["ordinal", "free"])
def test_walks_over_names_of_tables_never_meet_what_learns_sizes(parametrization):
    """As a regulariser or an initialiser of all that is called `users`; optimizers meet it once."""
    model = amtl.convert(model_of(), COUNTS, budget=0.5, parametrization=parametrization)
    sizes = {id(p) for p in amtl.mask_parameters(model)}

    def names(of=model):
        return {name for name, p in of.named_parameters() if id(p) in sizes}

    assert len(sizes) == len(names()) > 0
    assert all(name.startswith("amtl_sizes.") for name in names())
    assert {id(model.get_parameter(name)) for name in names()} == sizes
    before = model.users.row_dims()
    for name, parameter in model.named_parameters():
        if "users" in name:
            nn.init.normal_(parameter)
    assert torch.equal(model.users.row_dims(), before)
    # State dicts, and walks that give every name, keep to the layers.
    assert not [key for key in model.state_dict() if "amtl_sizes" in key]
    whole = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert whole <= set(model.state_dict())
    assert any(name.startswith("users.head.") for name in whole)
    assert list(map(id, model.users.parameters()))[1:] == [
        id(p) for p in model.users.mask_parameters()
    ]
    # Frozen tables have nothing to name, and those that thaw have again.
    amtl.freeze(model)
    assert not names()
    assert not [name for name, _ in model.named_modules() if name.startswith("amtl_sizes.")]
    model.users.thaw()
    assert len(names()) == len(model.users.mask_parameters()) > 0
    # A layer that leaves the model takes its names along, and the next one brings its own.
    model.users = nn.Embedding(*model.users.dense_weight().shape)
    assert not names()
    assert "amtl_sizes" not in amtl.revert(model)._modules


def test_names_of_sizes_follow_copies_and_loads(tmp_path):
    """Of the copy, not of the model it was made of."""
    model = amtl.convert(model_of(), COUNTS, budget=0.5, parametrization="ordinal")
    names = [name for name, _ in model.named_parameters()]
    packed = amtl.freeze(copy.deepcopy(model))
    amtl.save(packed, tmp_path / "model.safetensors")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [name for name, _ in twin.named_parameters()] == names
        ours = {id(p) for p in model.parameters()}
        assert not ours & {id(p) for p in twin.parameters()}
        twin.load_state_dict(model.state_dict())
        given = dict(model.named_parameters())
        torch.func.functional_call(twin, given, inputs()).sum().backward()
        assert all(p.grad is not None for p in amtl.mask_parameters(model))
    amtl.load(tmp_path / "model.safetensors").into(model)
    assert not [name for name, _ in model.named_parameters() if "amtl_sizes" in name]
    named = {name for name, _ in packed.named_parameters()}
    assert {name for name, _ in model.named_parameters()} == named
    model.users.thaw(counts=COUNTS["users"])
    sizes = {id(p) for p in amtl.mask_parameters(model)}
    found = [n for n, p in model.named_parameters() if id(p) in sizes]
    assert len(found) == len(sizes) > 0 and all(n.startswith("amtl_sizes.") for n in found)


def test_what_children_are_counted_or_called_gets_no_names_for_sizes():
    """Its sizes are met under the names of its layers."""
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 1))
    amtl.convert(model, {"0": torch.arange(40)}, budget=0.5, parametrization="ordinal")
    assert len(model) == 2 and model(torch.arange(3)).shape == (3, 1)
    sizes = {id(p) for p in amtl.mask_parameters(model)}
    assert sizes <= {id(p) for n, p in model.named_parameters() if n.startswith("0.head.")}
    # A model around it that is asked for names has them.
    whole = nn.Module()
    whole.embedding = model
    named = amtl.name_sizes(whole).named_parameters()
    assert {n for n, p in named if id(p) in sizes} & {"amtl_sizes.0.branches.numbers"}
    assert not [n for n, p in whole.named_parameters() if "embedding" in n and id(p) in sizes]


class Keeper(Model):
    """Keeps its tables and their weights in containers of its own, as deepctr-torch does."""

    def __init__(self):
        super().__init__()
        self.plain = [self.users, self.top]
        self.by_name = {"tags": self.tags, "rest": (1, self.users)}
        named = [("users", self.users.weight), ("top", self.top.weight)]
        self.regularised = [([self.users.weight, self.tags.weight], 0.0, 1e-3), (named, 1e-3, 0.0)]
        self.itself = self.plain
        self.plain.append(self.plain)

    def regularisation(self):
        first, second = (part[0] for part in self.regularised)
        return sum(w.square().sum() for w in first) + sum(w.square().sum() for _, w in second)


def test_references_of_the_models_own_follow():
    torch.manual_seed(0)
    model = Keeper()
    amtl.convert(model, COUNTS, budget=0.5)
    assert model.plain[0] is model.users and model.plain[1] is model.top
    assert model.by_name["tags"] is model.tags and model.by_name["rest"] == (1, model.users)
    optimizer = torch.optim.SGD(amtl.parameter_groups(model), lr=0.1)
    (model(*inputs()).sum() + model.regularisation()).backward()
    optimizer.step()
    optimizer.zero_grad()
    tables = [weakref.ref(model.users.weight), weakref.ref(model.tags.weight)]
    amtl.freeze(model, optimizer)
    gc.collect()
    assert [table() for table in tables] == [None, None]
    expected = sum(b.square().sum() for m in (model.users, model.tags) for b in m.blocks)
    expected += sum(b.square().sum() for b in model.users.blocks) + model.top.weight.square().sum()
    torch.testing.assert_close(model.regularisation(), expected)
    model.regularisation().backward()
    assert all(b.grad is not None for b in model.users.blocks)
    amtl.thaw(model, optimizer)
    users, tags = model.users.weight, model.tags.weight
    expected = 2 * users.square().sum() + tags.square().sum() + model.top.weight.square().sum()
    torch.testing.assert_close(model.regularisation(), expected)
    amtl.revert(model)
    assert model.plain[0] is model.users and type(model.users) is nn.Embedding


def test_weights_that_a_model_keeps_follow_files_and_the_way_back(tmp_path):
    """Penalties of those of before would go on, and reach nothing that the model looks up."""
    model = amtl.freeze(amtl.convert(Keeper(), COUNTS, budget=0.3))
    amtl.save(model, tmp_path / "model.safetensors")
    before = Keeper()
    (rest, _, _), _ = before.regularised
    other = amtl.load(tmp_path / "model.safetensors", before)
    tables = [*other.users.table_parameters(), *other.tags.table_parameters()]
    assert len(rest) == len(tables) and all(map(operator.is_, rest, tables))
    dense = (other.users.dense_weight(), other.tags.dense_weight())
    amtl.revert(other)
    assert rest[0] is other.users.weight and rest[1] is other.tags.weight and len(rest) == 2
    assert torch.equal(rest[0], dense[0]) and torch.equal(rest[1], dense[1])
    expected = 2 * rest[0].square().sum() + rest[1].square().sum() + other.top.weight.square().sum()
    torch.testing.assert_close(other.regularisation(), expected)


def test_a_model_is_thawed_as_it_was_frozen(tmp_path):
    model = amtl.convert(model_of(), COUNTS, budget=0.3)
    before = {name: layer.dense_weight() for name, layer in amtl.layers(model).items()}
    optimizer = torch.optim.Adam(model.parameters())
    held = len(optimizer.param_groups[0]["params"])
    assert amtl.thaw(amtl.freeze(model, optimizer), optimizer) is model
    assert all(layer.phase == "search" for layer in amtl.layers(model).values())
    assert len(optimizer.param_groups[0]["params"]) == held
    amtl.save(amtl.freeze(model), tmp_path / "model.safetensors")
    packed = amtl.load(tmp_path / "model.safetensors", model_of())
    with pytest.raises(RuntimeError, match="counts"):
        amtl.thaw(packed)
    amtl.thaw(packed, counts=COUNTS)
    for name, layer in amtl.layers(packed).items():
        assert layer.phase == "search" and layer.dense_weight().shape == before[name].shape


def test_new_counts_reach_a_table_under_any_of_its_names():
    model = model_of()
    model.again = model.users
    counts = torch.arange(len(COUNTS["users"])) ** 2
    amtl.freeze(amtl.convert(model, {"users": counts}, budget=0.3, bits=None))
    with pytest.raises(ValueError, match=r"'user', which is no layer; those are \['users'\]"):
        amtl.thaw(model, counts={"user": counts})
    assert model.users.phase == "frozen"
    amtl.thaw(model, counts={"again": counts.flip(0)})
    sizes = model.users.row_dims()
    assert sizes[0] > sizes[-1]


def test_optimizers_are_looked_for_once(monkeypatch):
    """All objects of a process are looked at for it."""
    looked = []
    find = instances.gc.get_referrers
    monkeypatch.setattr(
        instances.gc, "get_referrers", lambda *kinds: looked.append(kinds) or find(*kinds)
    )
    model = amtl.convert(model_of(), COUNTS, budget=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    looked.clear()
    amtl.freeze(model)
    assert len(looked) == 1
    amtl.thaw(model)
    assert len(looked) == 2
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    searched = model.state_dict()
    amtl.freeze(model)
    assert {id(p) for p in other.param_groups[0]["params"]} == set(map(id, model.parameters()))
    frozen = amtl.convert(model_of(), COUNTS, budget=0.3)
    for state in (model.state_dict(), searched):
        looked.clear()
        frozen.load_state_dict(state)
        assert len(looked) == 1
        trained = torch.optim.SGD(frozen.parameters(), lr=0.1)
    amtl.freeze(frozen)
    assert {id(p) for p in trained.param_groups[0]["params"]} == set(map(id, frozen.parameters()))


@pytest.mark.filterwarnings("error")
def test_who_holds_the_module_of_before_is_not_warned():
    model = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 1))
    found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    amtl.convert(model, {"0": torch.arange(100)}, budget=0.3)
    amtl.freeze(model)
    model(torch.arange(5)).sum().backward()
    assert len(found) == 1


class Scaled(nn.Embedding):
    def forward(self, rows):
        return 2 * super().forward(rows)


class Named(nn.Embedding):
    """A subclass that only adds a name."""


def test_subclasses():
    model = nn.ModuleDict({"plain": Named(5, 4), "scaled": Scaled(5, 4)})
    amtl.convert(model, {"plain": torch.ones(5)}, budget=0.5)
    with pytest.raises(ValueError, match="forward of its own"):
        amtl.convert(model, {"scaled": torch.ones(5)}, budget=0.5)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        ({"nobody": torch.ones(5)}, {}, r"no module 'nobody'.*users"),
        ({"top": torch.ones(5)}, {}, "Linear"),
        ({"users": torch.ones(5)}, {}, r"users: counts must have shape \[50\]"),
        (COUNTS, {"names": ["users", "more.goods.0", "tags"], "budget": 2}, "budget"),
        ({"users": COUNTS["users"]}, {"names": ["tags"]}, "counts for 'tags' are missing"),
        (COUNTS, {"budget": 0.25, "min_dim": 4, "bits": None}, "lower min_dim"),
    ],
)
def test_refusals_leave_the_model_alone(counts, options, message):
    model = model_of()
    with pytest.raises(ValueError, match=message):
        amtl.convert(model, counts, **options)
    assert not amtl.layers(model)


def test_more_refusals():
    model = model_of()
    amtl.convert(model, {"users": COUNTS["users"]})
    with pytest.raises(ValueError, match="already"):
        amtl.convert(model, COUNTS)
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        amtl.convert(nn.Embedding(5, 4, scale_grad_by_freq=True), torch.ones(5))
    with pytest.raises(ValueError, match="maximum"):
        amtl.convert(nn.EmbeddingBag(5, 4, mode="max"), torch.ones(5))
    with pytest.raises(ValueError, match="float64"):
        amtl.convert(nn.Embedding(5, 4, dtype=torch.float64), torch.ones(5))
    model = model_of()
    parametrize.register_parametrization(model.users, "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrizations"):
        amtl.convert(model, COUNTS)


@pytest.mark.parametrize("order", ["frequency", "any"])
def test_row_order_does_not_matter(order):
    """A permuted table gets permuted sizes; nobody has to permute it first."""
    counts = counts_of(50)
    if order == "frequency":
        counts = counts.sort(descending=True).values
    shuffle = torch.randperm(50)
    table = torch.randn(50, 8)
    first = amtl.convert(nn.Embedding.from_pretrained(table), counts, bits=None).eval()
    second = amtl.convert(
        nn.Embedding.from_pretrained(table[shuffle]), counts[shuffle], bits=None
    ).eval()
    rows = torch.arange(50)
    assert torch.equal(first(shuffle), second(rows))
    before = second(rows)
    assert torch.equal(second.freeze()(rows), before)
    first.freeze()
    assert (first.row_order is None) == (order == "frequency")


class Normed(nn.Embedding):
    """Another initialisation, which a converted table has no use for, and something that it has."""

    norm_of = 2.0

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.5)


class Drawn(nn.Embedding):
    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.5)


def test_what_a_subclass_has_beside_its_weight_is_not_lost():
    with pytest.raises(ValueError, match=r"'0' is a Normed with 'norm_of' of its own"):
        amtl.convert(nn.Sequential(Normed(30, 4)), {"0": counts_of(30)})
    buffered = nn.Embedding(30, 4)
    buffered.register_buffer("norms", torch.ones(30))
    with pytest.raises(ValueError, match=r"'0' is an Embedding with 'norms' of its own"):
        amtl.convert(nn.Sequential(buffered), {"0": counts_of(30)})
    model = nn.Sequential(Drawn(30, 4))
    model[0].vocabulary = ["a", "b"]
    amtl.convert(model, {"0": counts_of(30)})
    assert type(model[0]) is AMTLEmbedding and model[0].vocabulary == ["a", "b"]
    amtl.revert(amtl.freeze(model))
    assert type(model[0]) is nn.Embedding and model[0].vocabulary == ["a", "b"]


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_a_parametrized_layer_searches_and_refuses_to_change_its_phase():
    model = amtl.convert(nn.Sequential(nn.Embedding(30, 4)), {"0": counts_of(30)}, bits=None)
    expected = copy.deepcopy(model)(torch.arange(30)) / 2
    parametrize.register_parametrization(model[0], "weight", Halved())
    assert torch.equal(model(torch.arange(30)), expected)
    for call in (amtl.freeze, amtl.revert, amtl.table_parameters):
        with pytest.raises(RuntimeError, match=r"'0' is parametrized.*remove_parametrizations"):
            call(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(amtl.freeze(model)(torch.arange(30)), expected)


class PastTheLayer(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.table, self.use = nn.Embedding(ROWS, DIM), use

    def forward(self, rows):
        return self.use(self.table, rows)


USES = {
    "embedding": lambda table, rows: F.embedding(rows, table.weight),
    "bag": lambda table, rows: F.embedding_bag(rows[None], weight=table.weight),
    "brackets": lambda table, rows: table.weight[rows],
    "index_select": lambda table, rows: torch.index_select(table.weight, 0, rows),
    "linear": lambda table, rows: F.linear(table(rows), table.weight),
    "product": lambda table, rows: table(rows) @ table.weight.T,
    "product, mT": lambda table, rows: table(rows) @ table.weight.mT,
    "sparse product": lambda table, rows: torch.sparse.mm(
        torch.eye(ROWS).to_sparse(), table.weight
    )[rows],
    "joined": lambda table, rows: torch.cat([torch.zeros(2, DIM), table.weight])[rows],
    "stacked": lambda table, rows: torch.stack((table.weight, table.weight))[:, rows],
    "normalised": lambda table, rows: table(rows) @ F.normalize(table.weight).mT,
    "thinned out": lambda table, rows: table(rows) @ F.dropout(table.weight, 0.1).mT,
    "of layers": lambda table, rows: F.layer_norm(table.weight, (DIM,))[rows],
}


@pytest.mark.parametrize("use", USES)
def test_models_that_use_the_weight_themselves_are_refused(use):
    rows = torch.arange(3)
    model = amtl.convert(PastTheLayer(USES[use]), {"table": torch.arange(ROWS)})
    for each in (model, copy.deepcopy(model)):
        for _ in range(2):
            with pytest.raises(RuntimeError, match=f"'table' itself.*torch.arange\\({ROWS}"):
                each(rows)
    assert F.embedding(rows, model.table.weight).shape == (3, DIM)


def test_scoring_every_row_through_the_layer():
    """What the error says to write, with the gradients of a product with the weight."""
    counts = torch.arange(ROWS).flip(0)
    model = amtl.convert(
        PastTheLayer(lambda table, rows: table(rows) @ table(torch.arange(ROWS)).T),
        {"table": counts},
        budget=0.5,
        bits=None,
    )
    amtl.freeze(model)
    dense, rows = model.table.dense_weight().requires_grad_(), torch.tensor([3, 0, 3, 7])
    expected, signs = dense[rows] @ dense.T, torch.randn(4, ROWS)
    scores = model(rows)
    torch.testing.assert_close(scores, expected)
    for out in (scores, expected):
        (out * signs).sum().backward()
    found = [block.grad for block in model.table.blocks]
    widths = [block.shape[1] for block in found for _ in block]
    assert len(set(widths)) > 1
    parts = [row[:width] for row, width in zip(dense.grad, widths, strict=False)]
    torch.testing.assert_close([row for block in found for row in block], parts)


@pytest.mark.parametrize("first", [False, True])
def test_each_mode_is_watched(first):
    """A model that scores all items by their weight, where it evaluates or where it trains only."""

    class OneMode(PastTheLayer):
        def forward(self, rows):
            return self.use(self.table, rows) if self.training != first else self.table(rows)

    rows = torch.arange(3)
    model = amtl.convert(OneMode(USES["product"]), {"table": torch.arange(ROWS)}).train(first)
    for _ in range(2):
        model(rows)
    model.train(not first)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the weight of 'table' itself"):
            model(rows)


@pytest.mark.parametrize("eager", [False, True])
def test_a_watched_model_compiles_whole(eager):
    model = amtl.convert(
        PastTheLayer(lambda table, rows: table(rows)), {"table": torch.arange(ROWS)}, bits=None
    )
    rows = torch.arange(3)
    expected = model(rows) if eager else copy.deepcopy(model)(rows)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows), expected)


def test_only_the_first_passes_are_watched():
    def norms(table, rows):
        return table(rows).sum() + table.weight.norm() + table.weight.square().sum()

    model = amtl.convert(PastTheLayer(norms), {"table": torch.arange(ROWS)})
    hooks = model._forward_hooks, model._forward_pre_hooks
    with pytest.raises(IndexError):
        model(torch.tensor([ROWS]))
    assert all(hooks)
    for training in (True, True, False):
        assert all(hooks)
        model.train(training)(torch.arange(3)).backward()
    model(torch.arange(3))
    assert not any(hooks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_by_themselves(copied):
    model = amtl.convert(nn.Sequential(nn.Embedding(ROWS, DIM)), {"0": torch.arange(ROWS)})
    other = copied(model)
    rows = torch.arange(3)
    for each in (other, model):
        assert each._forward_hooks
        for training in (True, False):
            assert torch.equal(each.train(training)(rows), each(rows))
        assert not each._forward_hooks and not each._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("passes", [0, 1])
def test_a_reverted_model_is_scripted_however_often_it_was_called(passes):
    rows = torch.arange(3)
    model = nn.Sequential(nn.Sequential(nn.Embedding(ROWS, DIM)), nn.Linear(DIM, 1))
    amtl.convert(model[0], {"0": torch.arange(ROWS)}, budget=0.3)
    amtl.freeze(model)
    for _ in range(passes):
        model(rows).sum().backward()
    plain = amtl.revert(copy.deepcopy(model), masked=True).eval()
    torch.testing.assert_close(torch.jit.script(plain)(rows), model.eval()(rows))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert model[0]._forward_pre_hooks


def test_a_mistyped_option_is_named():
    model = nn.ModuleDict({"item": nn.Embedding(9, 4)})
    with pytest.raises(TypeError, match="no option 'bugdet': did you mean 'budget'"):
        amtl.convert(model, {"item": torch.ones(9)}, bugdet=0.3)
    with pytest.raises(TypeError, match=r"no option 'xyz'; amtl\.SearchOptions lists them"):
        amtl.convert(model, {"item": torch.ones(9)}, xyz=1)


def test_tables_of_16_bits_say_that_their_rows_are_narrowed():
    """Beside those of 32 they would be rounded, which loses little of a trained table."""

    def convert(dtype, **options):
        model = nn.ModuleDict({name: nn.Embedding(100, 8, dtype=dtype) for name in "ab"})
        amtl.convert(model, {name: [5] * 100 for name in "ab"}, **options)

    told = "tables 'a', 'b': rows of torch.bfloat16.*before it is cast"
    with pytest.warns(UserWarning, match=told):
        convert(torch.bfloat16, budget=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(torch.float32, budget=0.5)
        convert(torch.bfloat16, budget=1.0)
        convert(torch.bfloat16, budget=0.5, bits=None)
        convert(torch.bfloat16, budget=0.5, bits=8)


def test_descriptions_of_features_that_hold_their_table_hold_the_layer():
    """As torch-rechub keeps them: the dense weight would live on beside the tiers."""

    class Feature:
        def __init__(self, embed):
            self.embed, self.name = embed, "a"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(100, 8)
            self.features = [Feature(self.table)]
            self.main = Feature(self.table)

    model = Model()
    before = weakref.ref(model.table.weight)
    amtl.convert(model, {"table": [5] * 100}, budget=0.5)
    assert model.features[0].embed is model.main.embed is model.table
    amtl.freeze(model)
    gc.collect()
    assert before() is None
    amtl.revert(model)
    assert type(model.main.embed) is nn.Embedding and model.features[0].embed is model.table
