"""A fused step equals lookup, backward and optimizer step one after the other.

Except where the gradient of a row's last kept values is exactly zero: the separate optimizer reads
the kept prefix off the gradient, the fused one knows it. Weights here are drawn so that none is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import Inputs, build
from test_lookup import limited, variant
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import _calls, fused, optim

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": optim.SGD,
    "adagrad": optim.Adagrad,
    "rowwise_adagrad": optim.RowwiseAdagrad,
    "adam": optim.Adam,
    "adam, counting on the device": functools.partial(optim.Adam, capturable=True),
}
KINDS = ("masked", "masked bag", "adaptive", "adaptive bag", "tiered", "tiered bag")


def lookup(
    kind: str, inputs: Inputs, tables: list[Tensor], mask: Tensor, psw: Tensor, **options: Any
) -> Tensor:
    """One call; with ``optimizer`` in the options it is a fused one."""
    room = options.pop("room", fused if "optimizer" in options else ak)
    i, o = inputs.indices, inputs.offsets
    bags = {"per_sample_weights": psw, "include_last_offset": inputs.include_last_offset}
    padding = {"padding_idx": 0, **options}
    if kind == "masked":
        return room.masked_embedding(tables[0], i, inputs.row_dims, **padding)
    if kind == "masked bag":
        return room.masked_embedding_bag(tables[0], i, o, inputs.row_dims, **bags, **padding)
    groups = (inputs.row_group, inputs.group_dims, mask)
    if kind == "adaptive":
        return room.adaptive_embedding(tables[0], i, *groups, seed=7, **padding)
    if kind == "adaptive bag":
        return room.adaptive_embedding_bag(tables[0], i, o, *groups, seed=7, **bags, **padding)
    tiers = (tables, inputs.tier_ends)
    dim = {"embedding_dim": inputs.case.dim}
    if kind == "tiered":
        return room.tiered_embedding(*tiers, i, **dim, **padding)
    return room.tiered_embedding_bag(*tiers, i, o, **dim, **bags, **padding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_separate_steps(backend: Any, kind: str, name: str) -> None:
    case = limited(
        backend, variant(rows=300, dim=17, lookups=1500, weighted=True, sorted_groups=False)
    )
    inputs = build(case, backend.device)
    results = []
    for is_fused in (False, True):
        source = inputs.blocks if kind.startswith("tiered") else [inputs.weight]
        tables = [t.clone().requires_grad_() for t in source]
        mask = inputs.group_mask.clone().requires_grad_()
        generator = torch.Generator().manual_seed(2)
        psw = torch.randn(inputs.indices.shape, generator=generator).to(backend.device)
        psw.requires_grad_()
        optimizer = OPTIMIZERS[name](tables, lr=0.1, weight_decay=0.01)
        options = {"optimizer": optimizer} if is_fused else {}
        for scale in (1.0, 0.5, 2.0):
            optimizer.zero_grad()
            out = lookup(kind, inputs, tables, mask, psw, **options)
            (out * scale).sum().backward()
            assert all((t.grad is None) == is_fused for t in tables)
            optimizer.step()
        states = [
            value
            for t in tables
            for value in optimizer.state[t].values()
            if isinstance(value, Tensor)
        ]
        grads = [g.grad for g in (mask, psw) if g.grad is not None]
        results.append([*tables, *states, *grads])
    assert len(results[0]) == len(results[1])
    for separate, together in zip(*results, strict=True):
        torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_tables(backend: Any, name: str, dtype: torch.dtype) -> None:
    inputs = build(limited(backend, variant(rows=300, dim=40, dtype=dtype)), backend.device)
    results = []
    for is_fused in (False, True):
        table = inputs.weight.clone().requires_grad_()
        optimizer = OPTIMIZERS[name]([table], lr=0.1)
        psw, mask = torch.ones_like(inputs.indices, dtype=dtype), inputs.group_mask.clone()
        options = {"optimizer": optimizer} if is_fused else {}
        lookup("adaptive bag", inputs, [table], mask, psw, **options).sum().backward()
        optimizer.step()
        results.append(table.detach())
    torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps * 2, atol=1e-2)


def test_fused_steps_repeat_bit_for_bit(backend: Any) -> None:
    inputs = build(limited(backend, variant(rows=3000, lookups=40_000)), backend.device)
    threads = torch.get_num_threads()
    tables = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            table = inputs.weight.clone().requires_grad_()
            mask = inputs.group_mask.clone().requires_grad_()
            optimizer = optim.RowwiseAdagrad([table], lr=0.1)
            psw = torch.rand(inputs.indices.shape, generator=torch.Generator().manual_seed(0)).to(
                backend.device
            )
            lookup("adaptive bag", inputs, [table], mask, psw, optimizer=optimizer).sum().backward()
            tables.append((table.detach(), mask.grad))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*tables, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_public_lookups_take_an_optimizer(kind: str) -> None:
    """The same as the fused ones, which must be given one."""
    inputs = build(variant(rows=50, dim=7, lookups=40, weighted=True))
    results = []
    for room in (ak, fused):
        source = inputs.blocks if kind.startswith("tiered") else [inputs.weight]
        tables = [t.clone().requires_grad_() for t in source]
        psw = torch.ones(inputs.indices.shape, requires_grad=True)
        mask = inputs.group_mask.clone().requires_grad_()
        optimizer = optim.Adagrad(tables, lr=0.1)
        lookup(kind, inputs, tables, mask, psw, room=room, optimizer=optimizer).sum().backward()
        assert all(table.grad is None for table in tables)
        assert any(not torch.equal(a, b) for a, b in zip(tables, source, strict=True))
        results.append([*tables, *(t.grad for t in (psw, mask) if t.grad is not None)])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(TypeError, match="required keyword-only argument: 'optimizer'"):
        lookup(kind, inputs, tables, mask, psw, room=fused)


def test_the_optimizer_must_hold_the_table() -> None:
    inputs = build(variant(rows=50, dim=7, lookups=40))
    other = torch.zeros(3, 3, requires_grad=True)
    weight = inputs.weight.requires_grad_()
    optimizer = optim.SGD([other])
    with pytest.raises(ValueError, match="must be in one group"):
        fused.masked_embedding(weight, inputs.indices, inputs.row_dims, optimizer=optimizer)
    blocks = [block.requires_grad_() for block in inputs.blocks]
    apart = optim.SGD([{"params": [block]} for block in blocks])
    with pytest.raises(ValueError, match="must be in one group"):
        fused.tiered_embedding(blocks, inputs.tier_ends, inputs.indices, optimizer=apart)


def test_schedulers_reach_the_fused_step() -> None:
    inputs = build(variant(rows=50, dim=7, lookups=40))
    table = inputs.weight.requires_grad_()
    optimizer = optim.SGD([table], lr=1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    before = table.detach().clone()
    fused.masked_embedding(
        table, inputs.indices, inputs.row_dims, optimizer=optimizer
    ).sum().backward()
    assert torch.equal(before, table)


def test_the_order_of_groups_is_looked_at_once() -> None:
    """A changed tensor is looked at again, a dead one forgotten."""
    group = torch.tensor([0, 0, 1, 5], dtype=torch.int32)
    assert _calls._never_falls(group)
    known = _calls._orders[group]
    assert _calls._never_falls(group) and _calls._orders[group] is known
    group[1] = 7
    assert not _calls._never_falls(group)
    before = len(_calls._orders)
    del group
    assert len(_calls._orders) == before - 1
    assert _calls._never_falls(torch.zeros(0, dtype=torch.int32))
