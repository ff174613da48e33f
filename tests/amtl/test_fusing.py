"""Fused optimizers: as the same optimizer on gradients, in both phases and over their changes."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from functools import partial

import amtl
import pytest
import torch
from amtl import AMTLEmbedding, AMTLEmbeddingBag
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from amtl_kernels import optim

KINDS = [AMTLEmbedding, AMTLEmbeddingBag]
ROWS, DIM = 90, 8
OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=5.0, weight_decay=0.01),
    "adagrad": partial(optim.Adagrad, lr=1.0, initial_accumulator_value=0.1),
    "rowwise_adagrad": partial(optim.RowwiseAdagrad, lr=0.1),
    "adam": partial(optim.Adam, lr=0.05),
}


def layer_of(kind=AMTLEmbedding, **options):
    torch.manual_seed(0)
    counts = (torch.arange(ROWS).roll(7) ** 2) % 541
    return kind(
        ROWS, DIM, counts=counts, sparse=True, **{"padding_idx": 3, "bits": None, **options}
    )


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(ROWS, (12, 3), generator=generator)
    return rows, torch.randn(DIM, generator=generator)


def backward(layer, seed):
    rows, target = draw(seed)
    (layer(rows) - target).square().mean().backward()


def train(layer, optimizers, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(layer, seed)
        for optimizer in optimizers:
            optimizer.step()


def pair(kind, name, **options):
    """A fused layer with its optimizers and an unfused one with the same."""
    fused = layer_of(kind, fused_optimizer=OPTIMIZERS[name], **options)
    plain = layer_of(kind, **options)
    optimizers = [OPTIMIZERS[name](plain.table_parameters())]
    handles = [fused.fused_optimizer]
    for layer, held in ((fused, handles), (plain, optimizers)):
        if layer.mask_parameters():
            held.append(torch.optim.SGD(layer.mask_parameters(), lr=0.5))
    return fused, handles, plain, optimizers


def assert_close(fused, plain):
    mine, theirs = fused.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6, msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("parametrization", ["rule", "ordinal"])
def test_trains_as_gradients_would_through_all_phases(kind, name, parametrization):
    """Adam and Adagrad hide a wrong scale of gradients, SGD shows it; each has its own state."""
    fused, handles, plain, optimizers = pair(kind, name, parametrization=parametrization)
    start = fused.dense_weight()
    train(fused, handles, range(4))
    train(plain, optimizers, range(4))
    assert_close(fused, plain)
    assert all(p.grad is None for p in fused.table_parameters())
    fused.freeze(handles)
    plain.freeze(optimizers)
    train(fused, handles, range(4, 8))
    train(plain, optimizers, range(4, 8))
    assert_close(fused, plain)
    assert all(p.grad is None for p in fused.table_parameters())
    fused.thaw(handles)
    plain.thaw(optimizers)
    train(fused, handles, range(8, 12))
    train(plain, optimizers, range(8, 12))
    assert_close(fused, plain)
    assert (fused.dense_weight() - start).abs().max() > 0.05
    state, theirs = handles[0].state_dict()["state"], optimizers[0].state_dict()["state"]
    assert state.keys() == theirs.keys()
    for number, moments in state.items():
        for key, value in moments.items():
            torch.testing.assert_close(value, theirs[number][key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("told", [True, False])
def test_phases_take_the_handle_along_beside_another_optimizer(told):
    model = nn.Sequential(layer_of(parametrization="ordinal"), nn.Linear(DIM, 1))
    amtl.fuse(model, OPTIMIZERS["adam"])
    (handle,) = amtl.fused_optimizers(model)
    layer = model[0]
    dense = torch.optim.Adam(amtl.parameter_groups(model, lr=0.1), lr=0.01)
    held = {id(p) for group in dense.param_groups for p in group["params"]}
    assert held == {id(p) for p in (*model[1].parameters(), *layer.mask_parameters())}
    for change in (layer.freeze, layer.thaw):
        model(torch.arange(ROWS)).square().mean().backward()
        for optimizer in (handle, dense):
            optimizer.step()
            optimizer.zero_grad()
        change(dense if told else None)
        held, handled = (
            [id(p) for group in o.param_groups for p in group["params"]] for o in (dense, handle)
        )
        tables = [id(p) for p in layer.table_parameters()]
        assert handled[: len(tables)] == tables
        assert all(handle.state[p]["exp_avg"].shape == p.shape for p in layer.table_parameters())
        assert sorted(held + handled) == sorted(id(p) for p in model.parameters())
        # Who is not told of has left no trace, and what was its goes where the table is.
        assert told is False or handled == tables
    assert layer.mask_parameters()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("phase", ["search", "frozen"])
@pytest.mark.parametrize("fresh_phase", ["search", "frozen"])
def test_resumes_bit_for_bit(name, phase, fresh_phase):
    layer = layer_of(fused_optimizer=OPTIMIZERS[name])
    handle = layer.fused_optimizer
    train(layer, [handle], range(3))
    if phase == "frozen":
        layer.freeze()
        train(layer, [handle], range(3, 6))
    file = io.BytesIO()
    torch.save([layer.state_dict(), handle.state_dict()], file)
    file.seek(0)
    state, optimizer_state = torch.load(file, weights_only=True)
    train(layer, [handle], range(6, 9))

    other = layer_of(fused_optimizer=OPTIMIZERS[name])
    if fresh_phase == "frozen":
        other.freeze()
    other.load_state_dict(state)
    other.fused_optimizer.load_state_dict(optimizer_state)
    train(other, [other.fused_optimizer], range(6, 9))
    expected = layer.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in other.state_dict().items())


def test_schedulers_set_the_rate_that_the_backward_uses():
    layer = layer_of(fused_optimizer=partial(optim.SGD, lr=1.0))
    handle = layer.fused_optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(handle, step_size=1, gamma=0.0)
    with warnings.catch_warnings():
        # Steps that were not counted would be warned of.
        warnings.simplefilter("error")
        train(layer, [handle], [0])
        scheduler.step()
    after = layer.weight.detach().clone()
    assert not torch.equal(after, layer_of().weight)
    train(layer, [handle], [1])
    assert torch.equal(layer.weight, after)
    assert scheduler.get_last_lr() == [0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_nothing_is_updated(kind):
    layer = layer_of(kind, fused_optimizer=OPTIMIZERS["sgd"])
    before = layer.weight.detach().clone()
    with torch.no_grad():
        assert not layer(draw(0)[0]).requires_grad
    layer(draw(0)[0])
    layer.weight.requires_grad_(False)
    assert not layer(draw(0)[0]).requires_grad
    assert torch.equal(layer.weight, before)


def test_gradients_that_should_add_up_are_refused():
    layer = layer_of(fused_optimizer=OPTIMIZERS["sgd"])
    layer.name = "users"
    handle = layer.fused_optimizer
    backward(layer, 0)
    backward(layer, 1)
    with pytest.raises(RuntimeError, match="second backward reached table 'users' before step"):
        handle.step()
    backward(layer, 2)
    before = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="second backward reached table 'users' before step"):
        backward(layer, 3)
    assert torch.equal(layer.weight, before)
    handle.step()
    backward(layer, 3)
    assert not torch.equal(layer.weight, before)


def test_what_another_optimizer_updated_is_no_update_of_this_one():
    layer = layer_of(fused_optimizer=OPTIMIZERS["sgd"])
    for seed in range(2):
        backward(layer, seed)
        layer.fused_optimizer.step()
        layer.fuse(None).fuse(OPTIMIZERS["sgd"])
    assert copy.deepcopy(layer)._updated.passes is not layer._updated.passes


def test_whoever_never_steps_means_every_backward_to_be_one():
    stepping, other = (layer_of(fused_optimizer=OPTIMIZERS["adam"]) for _ in range(2))
    for seed in range(3):
        backward(other, seed)
    train(stepping, [stepping.fused_optimizer], range(3))
    assert torch.equal(stepping.weight, other.weight)


def test_lookups_within_one_backward_are_one():
    layer = layer_of(fused_optimizer=OPTIMIZERS["sgd"])
    for _ in range(2):
        (layer(torch.tensor([1])).sum() + layer(torch.tensor([2])).sum()).backward()
        layer.fused_optimizer.step()
    assert layer.weight.grad is None


def test_without_the_handle_gradients_add_up_again():
    layer = layer_of(fused_optimizer=OPTIMIZERS["adagrad"])
    plain = layer_of()
    optimizer = OPTIMIZERS["adagrad"](plain.table_parameters())
    handle = layer.fused_optimizer
    assert layer.fuse(None).fused_optimizer is None
    for each, held in ((layer, handle), (plain, optimizer)):
        backward(each, 0)
        backward(each, 1)
        assert each.weight.grad.is_sparse
        held.step()
        held.zero_grad()
    assert torch.equal(layer.weight, plain.weight)
    layer.fuse(handle)
    train(layer, [handle], [2])
    train(plain, [optimizer], [2])
    assert_close(layer, plain)


def test_scaled_gradients_never_reach_the_table():
    """Also where the handle is never stepped, as with a scaler for the rest of the model."""
    layer = layer_of(fused_optimizer=OPTIMIZERS["sgd"])
    before = layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a GradScaler of this process scales losses"):
            scaler.scale(layer(draw(0)[0]).sum()).backward()
        assert torch.equal(layer.weight, before)
    del scaler
    unused, off = torch.amp.GradScaler("cpu"), torch.amp.GradScaler("cpu", enabled=False)
    off.scale(layer(draw(0)[0]).sum()).backward()
    assert unused.is_enabled() and not torch.equal(layer.weight, before)


def test_the_wrong_kind_is_refused():
    for wrong in (partial(torch.optim.SGD, lr=0.1), "adam", 3):
        with pytest.raises(TypeError, match="a fused optimizer is SGD"):
            layer_of(fused_optimizer=wrong)
    layer, other = layer_of(), layer_of()
    with pytest.raises(ValueError, match="must hold table ''"):
        layer.fuse(optim.SGD(other.table_parameters()))
    assert layer.fused_optimizer is None
    model = nn.ModuleList([layer, other])
    with pytest.raises(ValueError, match="must hold table"):
        amtl.fuse(model, optim.SGD(layer.table_parameters()))
    assert amtl.fused_optimizers(model) == []
    with pytest.raises(ValueError, match="no AMTL layers"):
        amtl.fuse(nn.Linear(2, 2), optim.SGD)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(ROWS, DIM)
        self.items = nn.EmbeddingBag(40, DIM, mode="sum")
        self.top = nn.Linear(2 * DIM, 1)

    def forward(self, rows):
        return self.top(torch.cat([self.users(rows[:, 0]), self.items(rows % 40)], 1)).mean()


COUNTS = {"users": torch.arange(ROWS), "items": torch.arange(40)}


def test_convert_gives_all_tables_one_handle():
    torch.manual_seed(0)
    model = Model()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    amtl.convert(model, COUNTS, fused_optimizer=OPTIMIZERS["adagrad"])
    (handle,) = amtl.fused_optimizers(model)
    assert model.users.fused_optimizer is model.items.fused_optimizer is handle
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(draw(0)[0]).backward()
    assert torch.equal(model.top.weight, before["top.weight"])
    updated = model.users.weight.detach().clone()
    assert not torch.equal(updated, before["users.weight"])
    early.step()
    handle.step()
    assert torch.equal(model.users.weight, updated)
    assert not torch.equal(model.top.weight, before["top.weight"])
    assert model.users.weight.grad is None
    amtl.freeze(model)
    amtl.revert(model)
    assert amtl.fused_optimizers(model) == []


def test_convert_takes_an_optimizer_that_holds_the_tables():
    torch.manual_seed(0)
    model = Model()
    tables = [model.users.weight, model.items.weight]
    optimizer = OPTIMIZERS["adam"](tables)
    model(draw(0)[0]).backward()
    optimizer.step()
    optimizer.zero_grad()
    moments = optimizer.state[tables[0]]["exp_avg"]
    amtl.convert(model, COUNTS, fused_optimizer=optimizer)
    assert amtl.fused_optimizers(model) == [optimizer]
    before = moments.clone()
    model(draw(0)[0]).backward()
    assert optimizer.state[tables[0]]["exp_avg"] is moments and not torch.equal(moments, before)
    model = Model()
    with pytest.raises(ValueError, match="must hold table"):
        amtl.convert(model, COUNTS, fused_optimizer=optim.SGD([model.users.weight]))
    assert amtl.layers(model) == {}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_a_handle_of_their_own(frozen, how):
    layer = layer_of(fused_optimizer=OPTIMIZERS["adam"])
    train(layer, [layer.fused_optimizer], range(2))
    if frozen:
        layer.freeze()
    other = how(layer)
    assert other.fused_optimizer is not layer.fused_optimizer
    assert other.fused_optimizer.param_groups[0]["params"][0] is other.table_parameters()[0]
    kept = [p.detach().clone() for p in layer.table_parameters()]
    train(other, [other.fused_optimizer], range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(kept, layer.table_parameters(), strict=True))
    train(layer, [layer.fused_optimizer], range(2, 4))
    same = zip(other.table_parameters(), layer.table_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_updates_once(reentrant):
    checked, plain = (layer_of(fused_optimizer=OPTIMIZERS["adam"]) for _ in range(2))
    scale = torch.ones((), requires_grad=True)
    for seed in range(2):
        rows, target = draw(seed)
        out = checkpoint(
            lambda rows, scale: checked(rows) * scale, rows, scale, use_reentrant=reentrant
        )
        (out - target).square().mean().backward()
        checked.fused_optimizer.step()
    train(plain, [plain.fused_optimizer], range(2))
    assert torch.equal(checked.weight, plain.weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_lookups_that_checkpointing_would_repeat_after_their_update_are_refused(reentrant):
    layer = layer_of(fused_optimizer=OPTIMIZERS["sgd"])
    layer.name = "users"
    rows, scale = draw(0)[0], torch.ones((), requires_grad=True)

    def part(x):
        return (layer(rows) * x).tanh()

    out = checkpoint(part, scale, use_reentrant=reentrant)
    out = checkpoint(part, out, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpointing repeats a lookup of table 'users'"):
        out.sum().backward()


def test_distributed_data_parallel_is_refused(tmp_path):
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    model = nn.Sequential(layer_of(fused_optimizer=OPTIMIZERS["sgd"]), nn.Linear(DIM, 1))
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match=r"updates it from the samples of one\s+process"):
            wrapped(draw(0)[0])
        with torch.no_grad():
            wrapped(draw(0)[0])
        model(draw(0)[0]).sum().backward()
        model[0].name = "table"
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
        DistributedDataParallel(model)(draw(0)[0]).sum().backward()
    finally:
        distributed.destroy_process_group()


def test_copies_of_data_parallel_are_refused():
    layer = layer_of(fused_optimizer=OPTIMIZERS["sgd"])
    with pytest.raises(RuntimeError, match=r"nn\.DataParallel cannot train"):
        layer._replicate_for_data_parallel()
    with torch.no_grad():
        layer._replicate_for_data_parallel()
