"""An ordinary training script is cut off and goes on: as if it had not been, whatever the order."""

from __future__ import annotations

import copy
import io

import amtl
import pytest
import torch
from torch import nn

ROWS, DIM = 60, 8
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Linear(2, 2)
        self.table = nn.Embedding(ROWS, DIM)
        self.top = nn.Linear(DIM + 2, 1)

    def forward(self, rows):
        dense = self.bottom(rows[:, None] / torch.tensor([ROWS, 2.0 * ROWS]))
        return self.top(torch.cat([self.table(rows), dense], 1)).square().mean()


def forgets_later_groups(optimizer):
    """Whether an optimizer fails on groups that are added later, as Adagrad of torch 2.11."""
    first, later = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    held = OPTIMIZERS[optimizer]([first])
    held.add_param_group({"params": [later]})
    later.grad = torch.ones(1)
    try:
        held.step()
    except KeyError:
        return True
    return False


def script(optimizer, parametrization, built="after", grouped=False):
    """Build, convert, and the optimizer before or after that."""
    torch.manual_seed(0)
    model = Model()
    early = OPTIMIZERS[optimizer](model.parameters()) if built == "before" else None
    counts = {"table": torch.arange(ROWS).roll(7) ** 2}
    few = {"parametrization": "rule", "bits": "auto"}
    options = few if parametrization == "few bits" else {"parametrization": parametrization}
    amtl.convert(model, counts, budget=0.4, **{"bits": None, **options})
    if early is not None:
        if amtl.mask_parameters(model) and forgets_later_groups(optimizer):
            pytest.skip("a newer torch, whose Adagrad takes groups later, would run this")
        early.add_param_group({"params": amtl.mask_parameters(model)})
        return model, early
    parameters = amtl.parameter_groups(model, lr=1e-2) if grouped else model.parameters()
    return model, OPTIMIZERS[optimizer](parameters)


def train(model, optimizer, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(ROWS, (20,))).backward()
        optimizer.step()


def checkpoint(model, optimizer):
    file = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_held(model, *optimizers):
    """Each parameter in one place, and nothing else."""
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    assert {id(p) for o in optimizers for p in o.state} <= set(held)


def assert_same(a, b):
    for mine, theirs in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.every(3)
@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
@pytest.mark.parametrize("parametrization", ["rule", "few bits", "ordinal"])
@pytest.mark.parametrize("built", ["before", "after", "grouped", "after loading"])
@pytest.mark.parametrize("saved_phase", ["search", "frozen"])
@pytest.mark.parametrize("loading_phase", ["search", "frozen"])
def test_goes_on_as_if_nothing_had_been(
    optimizer, parametrization, built, saved_phase, loading_phase
):
    how = {"built": built, "grouped": built == "grouped"}
    model, its = script(optimizer, parametrization, **how)
    train(model, its, 3, seed=1)
    if saved_phase == "frozen":
        amtl.freeze(model, its)
        train(model, its, 3, seed=2)
    saved = checkpoint(model, its)

    other, others = script(optimizer, parametrization, **how)
    train(other, others, 1, seed=9)
    if loading_phase == "frozen":
        amtl.freeze(other)
    other.load_state_dict(saved["state_dict"])
    if built == "after loading":
        others = OPTIMIZERS[optimizer](other.parameters())
    assert_held(other, others)
    others.load_state_dict(saved["optimizer"])
    for m, o in ((model, its), (other, others)):
        train(m, o, 3, seed=3)
    assert_same(model, other)
    if saved_phase == "search":
        for m, o in ((model, its), (other, others)):
            amtl.freeze(m, o)
            train(m, o, 3, seed=4)
        assert_same(model, other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("saved_phase", ["search", "frozen"])
@pytest.mark.parametrize("loading_phase", ["search", "frozen"])
def test_the_optimizer_may_be_loaded_before_the_model(optimizer, saved_phase, loading_phase):
    """Where PyTorch takes its state: rows of one width are one tier."""
    model, its = script(optimizer, "few bits")
    train(model, its, 3, seed=1)
    if saved_phase == "frozen":
        amtl.freeze(model, its)
        assert len(amtl.table_parameters(model)) == 1
        train(model, its, 3, seed=2)
    saved = checkpoint(model, its)
    other, others = script(optimizer, "few bits")
    train(other, others, 1, seed=9)
    if loading_phase == "frozen":
        amtl.freeze(other, others)
    others.load_state_dict(saved["optimizer"])
    other.load_state_dict(saved["state_dict"])
    assert_held(other, others)
    for m, o in ((model, its), (other, others)):
        train(m, o, 3, seed=3)
    assert_same(model, other)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("phase", ["search", "frozen"])
def test_weights_alone_may_be_loaded(optimizer, phase):
    """Without the optimizer's state it starts anew for what is new, and all of it trains."""
    model, its = script(optimizer, "ordinal")
    other, others = script(optimizer, "ordinal")
    for m, o in ((model, its), (other, others)):
        train(m, o, 1, seed=1)
    if phase == "frozen":
        amtl.freeze(model, its)
    else:
        amtl.freeze(other, others)
    other.load_state_dict(model.state_dict())
    assert_held(other, others)
    trained = [p for p in (*amtl.table_parameters(other), *other.top.parameters()) if p.numel()]
    before = copy.deepcopy(trained)
    train(other, others, 3, seed=2)
    assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_a_state_that_fits_nothing_is_lost_loudly():
    """Loaded before the model, where PyTorch sees only that there are as many parameters."""
    model, its = script("sgd", "rule")
    amtl.freeze(model, its)
    other, others = script("sgd", "rule")
    others.state[other.table.weight]["momentum_buffer"] = torch.zeros(3, 2)
    with pytest.warns(UserWarning, match="SGD .* load the optimizer's state after the model's"):
        other.load_state_dict(model.state_dict())
    assert_held(other, others)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("by", ["thaw", "load"])
def test_sizes_come_back_where_a_new_optimizer_has_them(by, copied):
    """To one that was made while the model was frozen; of two tables the second comes first."""

    def build():
        torch.manual_seed(0)
        tables = {name: nn.Embedding(ROWS, DIM) for name in ("a", "b")}
        model = nn.ModuleDict({"bottom": nn.Linear(2, 2), "tables": nn.ModuleDict(tables)})
        host = Host(model)
        counts = {f"inner.tables.{name}": torch.arange(ROWS).roll(7) ** 2 for name in tables}
        return amtl.convert(host, counts, budget=0.4, bits=None, parametrization="ordinal")

    class Host(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    model = build()
    searching = copy.deepcopy(model.state_dict())
    amtl.freeze(model)
    if copied:
        model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    if by == "load":
        model.load_state_dict(searching)
    else:
        for layer in reversed(amtl.layers(model).values()):
            layer.thaw()
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert held == [id(p) for p in model.parameters()] and len(held) > 4


def test_a_load_into_the_same_tiers_keeps_the_parameters():
    model, optimizer = script("adam", "rule")
    amtl.freeze(model, optimizer)
    before = list(model.parameters())
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))


def test_tiers_of_other_widths_replace_each_other():
    model, optimizer = script("adam", "rule")
    amtl.freeze(model, optimizer)
    other = amtl.convert(Model(), {"table": torch.arange(ROWS)}, budget=0.7, bits=None)
    others = OPTIMIZERS["adam"](other.parameters())
    train(other, others, 1, seed=1)
    amtl.freeze(other, others)
    assert [b.shape for b in other.table.blocks] != [b.shape for b in model.table.blocks]
    other.load_state_dict(model.state_dict())
    assert_held(other, others)
    train(other, others, 1, seed=1)
    others.load_state_dict(optimizer.state_dict())


class Trainer:
    """Resumes as trainers do: optimizers and the model, in either order, then their state.

    Lightning loads the model of a `ckpt_path` first.
    """

    def __init__(self, parametrization, model_state=None):
        self.model, tables = script("adagrad", parametrization, grouped=True)
        del tables
        if model_state is not None:
            self.model.load_state_dict(model_state)
        masks = amtl.mask_parameters(self.model)
        known = {id(p) for p in masks}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        self.optimizers = [OPTIMIZERS["adagrad"](rest)]
        if parametrization != "rule":
            # In a group, which may be empty: once frozen there is nothing to learn.
            self.optimizers.append(OPTIMIZERS["adam"]([{"params": masks}]))
        self.schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in self.optimizers]

    def fit(self, steps, seed):
        torch.manual_seed(seed)
        for _ in range(steps):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.model(torch.randint(ROWS, (20,))).backward()
            for step in (*self.optimizers, *self.schedules):
                step.step()

    def save(self):
        return copy.deepcopy(
            {
                "state_dict": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "schedules": [s.state_dict() for s in self.schedules],
            }
        )

    def restore(self, saved, with_model):
        if with_model:
            self.model.load_state_dict(saved["state_dict"])
        for mine, state in zip(self.optimizers, saved["optimizers"], strict=True):
            mine.load_state_dict(state)
        for mine, state in zip(self.schedules, saved["schedules"], strict=True):
            mine.load_state_dict(state)


@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first", ["optimizers", "model"])
def test_in_a_trainers_order(parametrization, frozen, first):
    trainer = Trainer(parametrization)
    trainer.fit(3, seed=1)
    if frozen:
        amtl.freeze(trainer.model, trainer.optimizers)
        trainer.fit(2, seed=2)
    saved = trainer.save()
    other = Trainer(parametrization, saved["state_dict"] if first == "model" else None)
    other.restore(saved, with_model=first == "optimizers")
    assert_held(other.model, *other.optimizers)
    for one in (trainer, other):
        one.fit(3, seed=3)
    assert_same(trainer.model, other.model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("frozen", [False, True])
def test_distributed_checkpoints_hold_tables(frozen, tmp_path):
    """`torch.distributed.checkpoint` finds a name in a model for each key of a state."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start():
        model, optimizer = script("adam", "few bits")
        if frozen:
            amtl.freeze(model, optimizer)
        return model, optimizer

    def train(model, optimizer):
        for _ in range(3):
            model(torch.arange(10)).backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, resumed = start(), start()
    train(*whole)
    states = dict(zip("mo", get_state_dict(*whole), strict=True))
    checkpoint.save(states, checkpoint_id=tmp_path / "run", no_dist=True)
    train(*whole)
    states = dict(zip("mo", get_state_dict(*resumed), strict=True))
    checkpoint.load(states, checkpoint_id=tmp_path / "run", no_dist=True)
    set_state_dict(*resumed, model_state_dict=states["m"], optim_state_dict=states["o"])
    train(*resumed)
    expected = whole[0].state_dict()
    assert expected.keys() == resumed[0].state_dict().keys()
    assert all(torch.equal(value, expected[key]) for key, value in resumed[0].state_dict().items())
