"""Layers whose sizes are solved for together learn what each would learn by itself."""

import copy
import gc
import pickle
import weakref
from functools import partial

import amtl
import pytest
import torch
from amtl import AMTLEmbedding
from torch import nn

from amtl_kernels.optim import SGD

ROWS = {"users": 60, "items": 25, "tags": 8, "days": 31}
KINDS = {
    "capacity": {"parametrization": "ordinal", "budget": 0.3},
    "power": {"parametrization": "ordinal", "budget": 0.3, "init_exponent": 0.5},
    "budgets": {
        "parametrization": "ordinal",
        "budget": {"users": 0.2, "items": 0.7, "tags": 1.0, "days": 0.4},
        "granularity": 3,
    },
    "paper": {"parametrization": "free", "budget": None},
    "free": {"parametrization": "free", "budget": 0.4, "temperature": 0.7, "min_dim": 1},
    "bits": {"parametrization": "ordinal", "budget": 0.1, "bits": 4},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, rows in ROWS.items():
            self.add_module(name, nn.Embedding(rows, 8))
        self.mlp = nn.Linear(8 * len(ROWS), 1)

    def forward(self, rows: torch.Tensor, names=tuple(ROWS)) -> torch.Tensor:
        shown = [getattr(self, name)(rows % n) for name, n in ROWS.items() if name in names]
        return self.mlp(torch.cat(shown, -1)).square().mean()


def counts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {n: torch.randint(0, 40, (rows,), generator=generator) for n, rows in ROWS.items()}


def converted(kind: str = "capacity", **changes: object) -> Model:
    torch.manual_seed(3)
    options = {"bits": None, **KINDS[kind], **changes}
    model = amtl.convert(Model(), counts(), **options)
    with torch.no_grad():
        for parameter in amtl.mask_parameters(model):
            # Output layers start at zero, where nothing behind them has a gradient.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def apart(model: Model) -> Model:
    """A copy whose layers are each solved for by themselves."""
    other = copy.deepcopy(model)
    for layer in amtl.layers(other).values():
        layer.head.companions = None
    return other


def heads(model: nn.Module) -> list:
    return [layer.head for layer in amtl.layers(model).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_they_find_what_each_finds_by_itself(kind):
    model = converted(kind)
    company = {head.companions for head in heads(model)}
    assert len(company) == 1 and None not in company
    for head, alone in zip(heads(model), heads(apart(model)), strict=True):
        shifts = (h._solution()[0].shift.float() for h in (head, alone))
        torch.testing.assert_close(*shifts)
        assert head.sizes().tolist() == alone.sizes().tolist()
        assert torch.equal(head(True).dims, alone(True).dims)
        assert head.stored_fraction() == alone.stored_fraction()
        delta = torch.randn(head.num_groups, 8)
        ours, own = (
            torch.autograd.grad(h().mask, h.branches.numbers, delta)[0] for h in (head, alone)
        )
        assert own.abs().max() > 1e-4
        torch.testing.assert_close(ours, own, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["capacity", "paper"])
def test_training_is_the_same(kind):
    model = converted(kind)
    other = apart(model)
    losses = []
    for each in (model, other):
        optimizer = torch.optim.SGD(amtl.parameter_groups(each, lr=1.0), lr=0.1)
        generator, found = torch.Generator().manual_seed(1), []
        for step in range(12):
            amtl.update_schedule(each, step / 12)
            torch.manual_seed(step)
            loss = each(torch.randint(0, 60, (32,), generator=generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        losses.append(found)
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-6)
    assert losses[0] != sorted(losses[0]) or losses[0][-1] < losses[0][0]
    for ours, own in zip(heads(model), heads(other), strict=True):
        torch.testing.assert_close(
            ours.branches.numbers, own.branches.numbers, rtol=1e-3, atol=1e-5
        )


def gradients(each: Model) -> list[torch.Tensor]:
    """Of every head, by a mask gradient of its own."""
    generator, found = torch.Generator().manual_seed(9), []
    for head in heads(each):
        delta = torch.randn(head.num_groups, 8, generator=generator)
        found += torch.autograd.grad(head().mask, head.branches.numbers, delta)
    return found


@pytest.mark.parametrize("kind", ["capacity", "free"])
def test_what_changes_after_a_pass_is_seen(kind):
    model = converted(kind)

    def move(each: Model) -> None:
        with torch.no_grad():
            for head in heads(each):
                head.branches.numbers.mul_(1.5)

    def heat(each: Model) -> None:
        for i, head in enumerate(heads(each)):
            head.set_temperature(0.33 + 0.15 * i)

    def freeze(each: Model) -> None:
        each.users.freeze()
        move(each)

    before = gradients(model)
    for change in (move, heat, freeze):
        change(model)
        after = gradients(model) if change is not freeze else None
        if after is not None:
            for own, mine, former in zip(gradients(apart(model)), after, before, strict=True):
                torch.testing.assert_close(mine, own, rtol=2e-4, atol=2e-6)
                assert not torch.allclose(mine, former, rtol=1e-2)
            before = after
    for head, own in list(zip(heads(model), heads(apart(model)), strict=True))[1:]:
        assert torch.equal(head.sizes(), own.sizes())


def test_one_solution_for_all():
    model = converted()
    first, *others = heads(model)
    first.sizes()
    assert all(head.present_sizes() is not None for head in others)
    with torch.no_grad():
        others[0].branches.numbers.add_(1.0)
    assert others[0].present_sizes() is None and others[1].present_sizes() is not None
    before = others[1].present_sizes()
    others[0].sizes()
    assert others[1].present_sizes() is not before


def test_tables_that_are_not_looked_up_get_no_gradient():
    model = converted()
    model.mlp = nn.Linear(16, 1)
    model(torch.arange(20), ("users", "tags")).backward()
    found = {n: layer.head.branches.numbers.grad for n, layer in amtl.layers(model).items()}
    assert {name for name, gradient in found.items() if gradient is not None} == {"users", "tags"}


def test_backwards_apart_add_up():
    """Two losses of one pass, and a pass after it without a step between."""
    model, rows = converted(), torch.arange(20)
    model.eval()

    def losses() -> list[torch.Tensor]:
        return [(getattr(model, n)(rows % ROWS[n]) ** 2).sum() for n in ("users", "items")]

    sum(losses()).backward()
    wanted = [head.branches.numbers.grad for head in heads(model)[:2]]
    model.zero_grad()
    for loss in losses():
        loss.backward()
    sum(losses()).backward()
    for head, gradient in zip(heads(model)[:2], wanted, strict=True):
        torch.testing.assert_close(head.branches.numbers.grad, 2 * gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_learn_from_one_pass_of_several(kind):
    """As much as they would from it alone; lookups of one pass learn alike."""
    model, slow = converted(kind), converted(kind, learns_every=3)
    tables = amtl.table_parameters(slow)
    # Sizes are in an optimizer, as who trains them has it.
    optimizers = [torch.optim.SGD(amtl.mask_parameters(each)) for each in (model, slow)]
    for number in range(7):
        for each, optimizer in zip((model, slow), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(number)
            (each(torch.arange(20)) + each(torch.arange(7, 50)).sum()).backward()
        learned = [head.branches.numbers.grad for head in heads(slow)]
        wanted = [head.branches.numbers.grad for head in heads(model)]
        if number % 3:
            assert all(gradient is None for gradient in learned)
        else:
            assert all(map(torch.equal, learned, wanted)) and learned[0].any()
        with torch.no_grad():
            # Evaluating in between changes nothing of that; an optimizer's step of the tables does.
            slow.eval()(torch.arange(20))
            for table in (*tables, *amtl.table_parameters(model)):
                table.mul_(1.5)
        slow.train()


def test_a_fused_update_ends_a_pass():
    model = converted(learns_every=2, fused_optimizer=partial(SGD, lr=0.1))
    optimizer = torch.optim.SGD(amtl.mask_parameters(model))
    learned = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.arange(20)).backward()
        learned.append(model.items.head.branches.numbers.grad is not None)
    assert learned == [True, False, True, False]


def test_processes_that_train_together_wait_for_no_pass(monkeypatch):
    model = converted(learns_every=3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for _ in range(2):
        model.zero_grad()
        model(torch.arange(20)).backward()
        assert all(head.branches.numbers.grad is not None for head in heads(model))
        with torch.no_grad():
            model.users.weight.mul_(2)


def test_a_step_between_pass_and_backward_does_not_matter():
    model = converted().eval()
    loss = model(torch.arange(20))
    before = [head.branches.numbers.detach().clone() for head in heads(model)]
    (wanted,) = torch.autograd.grad(loss, heads(model)[0].branches.numbers, retain_graph=True)
    with torch.no_grad():
        for head in heads(model):
            head.branches.numbers.zero_()
    (found,) = torch.autograd.grad(loss, heads(model)[0].branches.numbers)
    assert torch.equal(found, wanted) and wanted.any() and before[0].any()


def test_what_does_not_learn_gets_no_gradient():
    model = converted()
    model(torch.arange(20))
    model.users.head.branches.numbers.requires_grad_(False)
    assert not model.users.head().mask.requires_grad and model.items.head().mask.requires_grad
    model(torch.arange(20)).backward()
    assert model.users.head.branches.numbers.grad is None
    assert model.items.head.branches.numbers.grad is not None
    model.users.head.branches.numbers.requires_grad_(True)
    model(torch.arange(20)).backward()
    assert model.users.head.branches.numbers.grad is not None
    # Of those that begin to learn, too.
    model = converted()
    model.users.head.branches.numbers.requires_grad_(False)
    model(torch.arange(20))
    model.users.head.branches.numbers.requires_grad_(True)
    model(torch.arange(20)).backward()
    assert model.users.head.branches.numbers.grad.any()


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_what_evaluation_found_trains(how):
    model = converted()
    with how():
        model.eval()(torch.arange(20))
    model.train()(torch.arange(20)).backward()
    assert all(head.branches.numbers.grad is not None for head in heads(model))
    with how():
        shown = [head().sizes.clone() for head in heads(model)]
    assert all(map(torch.equal, shown, (head.sizes() for head in heads(apart(model)))))


def test_budgets_and_weights_that_change_are_seen():
    model = converted("budgets")
    before = [head.sizes() for head in heads(model)]
    model.users.head.set_field_weights([50.0])
    state = converted("capacity").items.state_dict()
    model.items.load_state_dict(state)
    alone = heads(apart(model))
    for head, own in zip(heads(model), alone, strict=True):
        assert torch.equal(head.sizes(), own.sizes())
    assert not torch.equal(heads(model)[1].sizes(), before[1])


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_a_company_of_their_own(way):
    model = converted()
    heads(model)[0].sizes()
    other = way(model)
    (company,) = {head.companions for head in heads(other)}
    assert company is not heads(model)[0].companions
    with torch.no_grad():
        for head in heads(other):
            head.branches.numbers.mul_(3)
    heads(other)[0].sizes()
    assert all(head.present_sizes() is not None for head in heads(other))
    for head, own in zip(heads(other), heads(apart(other)), strict=True):
        assert torch.equal(head.sizes(), own.sizes())
    alone = copy.deepcopy(model.users)
    assert torch.equal(alone.group_dims(), model.users.group_dims())


def test_a_frozen_layer_leaves_and_comes_back():
    model = converted()
    model(torch.arange(20)).backward()
    model.zero_grad()
    company = model.users.head.companions
    model.users.freeze()
    # What it has solved for holds a graph.
    assert company._solved is company._masks is None
    model(torch.arange(20)).backward()
    assert model.items.head.branches.numbers.grad is not None
    assert not list(model.users.head.parameters())
    model.users.thaw()
    model.zero_grad()
    model(torch.arange(20)).backward()
    assert model.users.head.branches.numbers.grad is not None
    for head, own in zip(heads(model), heads(apart(model)), strict=True):
        assert torch.equal(head.sizes(), own.sizes())


def test_layers_that_are_gone_are_forgotten():
    model = converted()
    model(torch.arange(20)).backward()
    gone = weakref.ref(model.tags.head)
    del model.tags
    gc.collect()
    assert gone() is None
    for name in ("users", "items"):
        getattr(model, name)(torch.arange(5)).sum().backward()
    assert len(amtl.layers(model)) == 3
    everything = [weakref.ref(model), *map(weakref.ref, heads(model))]
    del model
    gc.collect()
    assert not any(reference() for reference in everything)


def test_layers_of_one_s_own_model_meet_where_their_parameters_are_asked_for():
    made = counts()
    model = nn.Module()
    for name, rows in ROWS.items():
        layer = AMTLEmbedding(rows, 8, counts=made[name], budget=0.4, parametrization="ordinal")
        model.add_module(name, layer)
    assert len({head.companions for head in heads(model)}) == len(ROWS)
    amtl.mask_parameters(model)
    (company,) = {head.companions for head in heads(model)}
    amtl.mask_parameters(model)
    assert company is not None and {head.companions for head in heads(model)} == {company}


def test_small_tables_are_not_padded_to_a_large_one():
    model = nn.Module()
    rows = {"huge": 400, "large": 300, "some": 50, "few": 40, "tiny": 2}
    for name, number in rows.items():
        model.add_module(name, nn.Embedding(number, 8))
    # So far apart that rounding keeps nearly each of them.
    made = {name: (1.1 ** torch.arange(number)).long() for name, number in rows.items()}
    amtl.convert(model, made, budget=0.4, bits=None, parametrization="ordinal")
    of = {name: layer.head.companions for name, layer in amtl.layers(model).items()}
    assert of["huge"] is of["large"] is not None and of["some"] is of["few"] is not None
    assert of["huge"] is not of["some"] and of["tiny"] not in (of["huge"], of["some"])
    before = dict(of)
    amtl.mask_parameters(model)
    assert {name: layer.head.companions for name, layer in amtl.layers(model).items()} == before
    for head, alone in zip(heads(model), heads(apart(model)), strict=True):
        assert torch.equal(head.sizes(), alone.sizes())


def test_only_heads_that_are_alike_meet():
    model = Model()
    model.users = nn.Embedding(60, 4)
    amtl.convert(model, counts(), budget=0.4, bits=None, parametrization="ordinal")
    others = {model.get_submodule(n).head.companions for n in ("items", "tags", "days")}
    assert len(others) == 1 and model.users.head.companions not in others
    rule = amtl.convert(Model(), counts(), budget=0.4)
    assert not any(head.companions for head in heads(rule))
