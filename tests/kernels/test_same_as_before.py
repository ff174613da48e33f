"""The operators over lists of tables equal those that they replace, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_cases import FORMS, Call, Case, cases, in_order, join, several
from torch import Tensor

from amtl_kernels import backend as backends

OPTIMIZERS = (0, 1, 2, 3)


def _has_both(backend: Any) -> bool:
    if backend.force == "auto":
        return torch._C._dispatch_has_kernel_for_dispatch_key("amtl::lookup", "CPU")
    return "lookup" in backends._backends[backend.force].load()


def _old_tables(form: str, a: dict[str, Any]) -> list[Any]:
    """The tables as the operators of a form with one table take them."""
    if form == "tiered":
        ends = list(itertools.accumulate(block.shape[0] for block in a["blocks"]))
        return [a["blocks"], ends]
    return [a["blocks"][0]]


def _old_sizes(form: str, a: dict[str, Any]) -> list[Any]:
    if form == "tiered":
        return []
    return [*(groups for groups in a["row_groups"]), *a["sizes"]]


def _seed(form: str, a: dict[str, Any]) -> list[Any]:
    return [a["seed"]] if form == "adaptive" else []


def old_lookup(form: str, a: dict[str, Any]) -> Tensor:
    """``lookup`` by the operators before it."""
    ops, seed = torch.ops.amtl, _seed(form, a)
    padding = a["padding_idx"]
    if len(a["block_counts"]) > 1:
        op = getattr(ops, f"{form}_embedding_bag_tables")
        bags = [a["indices"], a["offsets"], a["per_sample_weights"], a["pooling"], padding]
        return op(*_several(form, a), *_masks(a), *bags, *seed, a["bounds_check"])
    tables, sizes = _old_tables(form, a), [*_old_sizes(form, a), *a["masks"]]
    if a["offsets"] is None:
        op = getattr(ops, f"{form}_embedding")
        dim = a["dims"]
        return op(*tables, a["indices"], *sizes, *dim, *seed, padding[0], a["bounds_check"])
    op = getattr(ops, f"{form}_embedding_bag")
    psw, pooled = a["per_sample_weights"], (a["pooling"], padding[0], a["include_last_offset"])
    lookups = (a["indices"], a["offsets"])
    if form == "tiered":
        return op(*tables, *lookups, psw, a["dims"][0], *pooled, a["bounds_check"])
    return op(*tables, *lookups, *sizes, psw, *pooled, *seed, a["bounds_check"])


def _masks(a: dict[str, Any]) -> list[Any]:
    return [a["masks"]] if a["row_groups"] else []


def _several(form: str, a: dict[str, Any]) -> list[Any]:
    if form == "masked":
        return [a["blocks"], a["sizes"]]
    if form == "adaptive":
        return [a["blocks"], a["row_groups"], a["sizes"]]
    ends, first = [], 0
    for count in a["block_counts"]:
        rows = (block.shape[0] for block in a["blocks"][first : first + count])
        ends += itertools.accumulate(rows)
        first += count
    return [a["blocks"], a["block_counts"], ends, a["dims"]]


def _without_form(form: str, found: Any) -> tuple[Any, ...]:
    """Results of a backward or an update in the form of the new operators."""
    found = list(found) if isinstance(found, tuple | list) else [found]
    if len(found) > 2 and isinstance(found[0], Tensor):
        found[:2] = [[found[0]], [found[1]]]
    if form != "adaptive":
        found.insert(len(found) - 1, torch.empty(0, device=found[-1].device))
    found[-2] = found[-2].flatten()
    return tuple(found)


def old_backward(form: str, a: dict[str, Any]) -> tuple[Any, ...]:
    """``lookup_backward`` by the operators before it."""
    ops, seed = torch.ops.amtl, _seed(form, a)
    wants = [a["weight_grad"], *([a["mask_grad"]] if form == "adaptive" else []), a["psw_grad"]]
    psw, padding = a["per_sample_weights"], a["padding_idx"]
    if len(a["block_counts"]) > 1:
        op = getattr(ops, f"{form}_embedding_bag_tables_backward")
        bags = [a["indices"], a["offsets"], psw, a["pooling"], padding]
        return _without_form(form, op(a["grad"], *_several(form, a), *bags, *seed, *wants))
    op = getattr(ops, f"{form}_embedding_backward")
    tables, sizes = _old_tables(form, a), _old_sizes(form, a)
    pooled = (a["pooling"], padding[0], a["include_last_offset"])
    lookups = (a["indices"], a["offsets"])
    bags = [*lookups, *sizes, psw, *a["dims"], *pooled, *seed]
    return _without_form(form, op(a["grad"], *tables, *bags, *wants))


def old_update(form: str, a: dict[str, Any]) -> tuple[Any, ...]:
    """``lookup_update_`` by the operators before it."""
    ops, seed = torch.ops.amtl, _seed(form, a)
    wants = [*([a["mask_grad"]] if form == "adaptive" else []), a["psw_grad"]]
    psw, padding, step = a["per_sample_weights"], a["padding_idx"], (a["optimizer"], a["hyper"])
    if len(a["block_counts"]) > 1:
        op = getattr(ops, f"{form}_embedding_bag_tables_update_")
        bags = [a["indices"], a["offsets"], psw, a["pooling"], padding]
        found = op(*_several(form, a), a["state"], a["grad"], *bags, *seed, *wants, *step)
        return _without_form(form, found)
    op = getattr(ops, f"{form}_embedding_update_")
    pooled = (a["pooling"], padding[0], a["include_last_offset"])
    lookups, sizes = (a["indices"], a["offsets"]), _old_sizes(form, a)
    first = [a["blocks"] if form == "tiered" else a["blocks"][0], a["state"], a["grad"]]
    ends = _old_tables(form, a)[1:]
    rest = [*ends, *lookups, *sizes, psw, *a["dims"], *pooled, *seed, *wants, *step]
    sort = [a["groups_sorted"]] if form == "adaptive" else []
    return _without_form(form, op(*first, *rest, *sort))


def old_apply(a: dict[str, Any]) -> None:
    """``apply_`` by the operators before it."""
    lr, eps, decay, beta1, beta2, step, *stochastic = a["hyper"]
    seed = int(step) if stochastic else None
    kind, ops, moments = a["optimizer"], torch.ops.amtl, (0, 1, 1, 2)[a["optimizer"]]
    for c, block in enumerate(a["blocks"]):
        mine = a["state"][c * moments : (c + 1) * moments]
        rates = ([lr, decay], [lr, eps, decay], [lr, eps, decay])
        counted = [int(step), lr, beta1, beta2, eps, decay]
        op = (ops.apply_sgd_, ops.apply_adagrad_, ops.apply_rowwise_adagrad_, ops.apply_adam_)
        rest = counted if kind == 3 else rates[kind]
        op[kind](block, *mine, a["rows"][c], a["grads"][c], *rest, seed)


def assert_same(got: Any, want: Any, what: str) -> None:
    if isinstance(want, list | tuple):
        assert len(got) == len(want), what
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            assert_same(g, w, f"{what}[{i}]")
        return
    assert got.shape == want.shape and got.dtype == want.dtype, (what, got, want)
    assert torch.equal(_bits(got), _bits(want)), (what, got, want)


def _bits(tensor: Tensor) -> Tensor:
    """-0.0 differs from 0.0 here, and NaN equals itself."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def calls(case: Case, device: str) -> Iterator[tuple[str, str, Call]]:
    """What there is of a case: plain, pooled, of one table and of three."""
    inputs = several(case, 3, device=device)
    for form in FORMS:
        yield f"{form} flat", form, inputs[0].call(form, False)
        yield f"{form} bag", form, inputs[0].call(form, True)
        yield f"{form} tables", form, join(form, inputs)


def new(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.amtl, op)(*in_order(op, arguments))


def test_same_bits(backend: Any) -> None:
    if not _has_both(backend):
        pytest.skip("this backend has not both")

    @settings(max_examples=backend.examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(backend.max_lookups, min(100, backend.max_dim)))
    def run(case: Case) -> None:
        for what, form, call in calls(case, backend.device):
            check(backend, what, form, call)

    run()


def check(backend: Any, what: str, form: str, call: Call) -> None:
    a = call.lookup()
    assert_same(new("lookup", a), old_lookup(form, a), f"{what} lookup")
    for weight_grad, mask_grad in ((True, True), (True, False), (False, True)):
        a = call.backward(weight_grad, mask_grad)
        assert_same(new("lookup_backward", a), old_backward(form, a), f"{what} backward")
    rows, grads, _, _ = new("lookup_backward", call.backward())
    rounds = backend.force != "auto" or call.grad.dtype == torch.float32
    for number, stochastic in itertools.product(OPTIMIZERS, (False, True)):
        if stochastic and not rounds:
            continue
        updates = [call.update(number, stochastic) for _ in range(2)]
        results = (new("lookup_update_", updates[0]), old_update(form, updates[1]))
        assert_same(*results, f"{what} update {number}")
        applies = [call.apply(rows, grads, number, stochastic) for _ in range(2)]
        new("apply_", applies[0])
        old_apply(applies[1])
        for pair in (updates, applies):
            for name in ("blocks", "state"):
                assert_same(pair[0][name], pair[1][name], f"{what} {number} {name}")
