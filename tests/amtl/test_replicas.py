"""Replicas: two processes under DistributedDataParallel, through all phases; DataParallel."""

from __future__ import annotations

import copy
import datetime
import gc
import io
from pathlib import Path
from unittest import mock

import amtl
import pytest
import torch
from amtl.layer.rounding import is_drawn
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)

ROWS, DIM, LEARNED = 60, 8, "ordinal"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, DIM)
        self.top = nn.Linear(DIM, 1)

    def forward(self, rows):
        return self.top(self.table(rows)).sum()


def converted(parametrization, budget=0.4, **options):
    torch.manual_seed(0)
    counts = {"table": torch.arange(ROWS) ** 2}
    model = amtl.convert(Model(), counts, budget, parametrization=parametrization, **options)
    return model, torch.optim.Adagrad(amtl.parameter_groups(model, lr=1e-2), lr=0.1)


def train(wrapped, optimizer, rank, steps=2):
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad()
        wrapped(torch.randint(ROWS, (20,), generator=generator)).backward()
        optimizer.step()


def assert_equal_everywhere(model):
    for value in (*model.parameters(), *model.buffers()):
        both = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(both, value.detach())
        assert torch.equal(*both)


def refuses(wrapped, optimizer, rank):
    before = [p.detach().clone() for p in wrapped.parameters()]
    with pytest.raises(RuntimeError, match="wrap anew"):
        train(wrapped, optimizer, rank)
    assert all(torch.equal(a, b) for a, b in zip(before, wrapped.parameters(), strict=True))
    with torch.no_grad():
        wrapped(torch.arange(3))


def life(rank, parametrization):
    """Search, freeze, frozen, save, resume, thaw."""
    model, optimizer = converted(parametrization)
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, rank)
    assert_equal_everywhere(model)

    amtl.freeze(model, optimizer)
    refuses(wrapped, optimizer, rank)
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, rank, steps=3)
    assert_equal_everywhere(model)

    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file)
    other, other_optimizer = converted(parametrization)
    early = DistributedDataParallel(other)
    other.load_state_dict(saved["model"])
    refuses(early, other_optimizer, rank)
    other_optimizer.load_state_dict(saved["optimizer"])
    train(DistributedDataParallel(other), other_optimizer, rank)
    train(wrapped, optimizer, rank)
    pairs = zip(other.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    model.table.thaw(optimizer)
    refuses(wrapped, optimizer, rank)
    train(DistributedDataParallel(model), optimizer, rank)
    assert_equal_everywhere(model)


def other_sizes(rank):
    """The wrapper copies counts from the first process, for they are buffers; a budget is none."""
    model, optimizer = converted(LEARNED, budget=0.4 + 0.2 * rank)
    wrapped = DistributedDataParallel(model)
    train(wrapped, optimizer, rank)
    with pytest.raises(RuntimeError, match="different sizes for table 'table'"):
        amtl.freeze(model, optimizer)
    assert model.table.phase == "search"


def late_conversion(rank):
    """What learns sizes is new to a wrapper from before; by the rule nothing is."""
    counts = {"table": torch.arange(ROWS)}
    for parametrization in ("rule", LEARNED):
        wrapped = DistributedDataParallel(Model())
        amtl.convert(wrapped.module, counts, budget=0.4, parametrization=parametrization)
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        if parametrization == LEARNED:
            refuses(wrapped, optimizer, rank)
        else:
            train(wrapped, optimizer, rank)
            assert_equal_everywhere(wrapped.module)


def few_bits(rank):
    """Step sizes are those that the first process follows, in the next pass at the latest."""
    model, optimizer = converted("rule", bits=4)
    amtl.freeze(model, optimizer)
    wrapped = DistributedDataParallel(model)
    before = model.table.rounding.mean_square.clone()
    train(wrapped, optimizer, rank, steps=next(turn for turn in range(1, 16) if is_drawn(turn)))
    assert torch.equal(model.table.rounding.mean_square, before) == (rank > 0)
    train(wrapped, optimizer, rank, steps=1)
    assert not torch.equal(model.table.rounding.mean_square, before)
    assert_equal_everywhere(model)
    # So does what they show, for all that buffers are given without a new version.
    with torch.no_grad():
        shown = wrapped(torch.arange(ROWS)).detach()[None]
        both = [torch.empty_like(shown) for _ in range(2)]
        distributed.all_gather(both, shown)
        assert torch.equal(*both)
    before = model.table.rounding.mean_square.clone()
    with wrapped.join():
        train(wrapped, optimizer, rank, steps=16)
    assert not torch.equal(model.table.rounding.mean_square, before)

    apart = DistributedDataParallel(model, broadcast_buffers=False)
    with pytest.raises(RuntimeError, match="leave it out of DistributedDataParallel"):
        train(apart, optimizer, rank, steps=16)
    assert_equal_everywhere(model)
    apart.eval()(torch.arange(3))
    train(model.train(), optimizer, rank, steps=16)


def garbage(rank):
    """Wrappers that are garbage in one process only; all objects are looked at for it once."""
    tables = nn.ModuleList(nn.Embedding(ROWS, DIM) for _ in range(3))
    model = amtl.convert(tables, {str(i): torch.arange(ROWS) for i in range(3)}, budget=0.4)
    gc.disable()
    wrapped = DistributedDataParallel(model)
    wrapped.__dict__["itself"] = wrapped
    del wrapped
    if rank == 0:
        gc.collect()
    with mock.patch.object(gc, "collect", wraps=gc.collect) as collected:
        amtl.freeze(model)
        assert collected.call_count == rank
        wrapped = DistributedDataParallel(model)
        amtl.thaw(model)
        assert collected.call_count == rank + 1
    gc.enable()
    with pytest.raises(RuntimeError, match="wrap anew"):
        wrapped(torch.arange(3))


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=120),
    )
    life(rank, "rule")
    life(rank, LEARNED)
    other_sizes(rank)
    late_conversion(rank)
    few_bits(rank)
    garbage(rank)
    distributed.destroy_process_group()


def test_two_processes(tmp_path: Path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)


def data_parallel_replica(model):
    """What nn.DataParallel makes of a model for one pass, on the device that the model is on.

    Written after torch.nn.parallel.replicate, which asks for GPUs.
    """
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
                continue
            setattr(replica, name, parameter.view_as(parameter))
            replica._former_parameters[name] = getattr(replica, name)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return replicas[model]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_data_parallel(bits, frozen):
    model, _ = converted("rule", bits=bits)
    if frozen:
        amtl.freeze(model)
    rows = torch.arange(ROWS)
    twin = copy.deepcopy(model)
    before = None if model.table.rounding is None else model.table.rounding.mean_square.clone()
    if frozen and bits:
        with torch.no_grad():
            model.table.blocks[0].mul_(3)
    for _ in range(3):
        data_parallel_replica(model)(rows).backward()
    assert torch.equal(data_parallel_replica(model.eval())(rows), model(rows))
    for _ in range(3):
        twin(rows).backward()
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    if bits is None or not frozen:
        assert all(torch.equal(mine.grad, its.grad) for mine, its in pairs)
    else:
        # In a replica no turn is counted, so step sizes follow in each pass.
        assert all(mine.grad is not None for mine, _ in pairs)
        assert not torch.equal(model.table.rounding.mean_square, before)
