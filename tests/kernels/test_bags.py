"""What callers may give as bags: two integer types, gaps in memory, indices nobody asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, PLURALS, Case, Inputs, build, in_order, join, several
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import fused, optim

N, D, L, B = 50, 8, 40, 6
CASE = Case(
    rows=N, dim=D, lookups=L, groups=5, bags=B, include_last_offset=True, columns=0, weighted=True
)


def look_up(
    form: str, several: bool, inputs: Inputs, tables: list[Tensor], room: Any = ak, **options: Any
) -> Tensor:
    """One table's bags, or the same bags of a call for several, which has one."""
    call = inputs.call(form, True)
    call.tables["blocks"] = tables
    return call.look_up(room, several, **options)


def tables_of(form: str, inputs: Inputs) -> list[Tensor]:
    return inputs.call(form, True).fresh().tables["blocks"]


def trained(form: str, several: bool, inputs: Inputs, psw: Tensor, **options: Any) -> list[Tensor]:
    """Output, gradients, and the tables after a fused step."""
    tables = tables_of(form, inputs)
    psw = psw.detach().requires_grad_()
    out = look_up(form, several, inputs, tables, per_sample_weights=psw, **options)
    out.square().sum().backward()
    assert psw.grad is not None
    found = [out.detach(), psw.grad, *(t.grad.to_dense() for t in tables if t.grad is not None)]
    optimizer = optim.SGD(tables, lr=0.1)
    out = look_up(
        form, several, inputs, tables, fused, per_sample_weights=psw, optimizer=optimizer, **options
    )
    out.sum().backward()
    return [*found, *tables]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
def test_offsets_and_indices_of_two_types(backend: Any, form: str, several: bool) -> None:
    inputs = build(CASE, backend.device)
    psw = torch.rand(L, device=backend.device)
    results = []
    for indices in (torch.int64, torch.int32):
        for offsets in (torch.int64, torch.int32):
            types = {"indices": inputs.indices.to(indices), "offsets": inputs.offsets.to(offsets)}
            results.append(trained(form, several, inputs, psw, **types))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("beyond", [2**32, 2**32 + 3])
def test_offsets_do_not_wrap(backend: Any, form: str, several: bool, beyond: int) -> None:
    """Narrowed to the type of the indices they would be 0 and 3, and nothing would look wrong."""
    inputs = build(CASE, backend.device)
    offsets = torch.tensor([0, beyond], device=backend.device)
    indices = inputs.indices.int()
    with pytest.raises(ValueError, match=rf"end within the {L} indices, but offsets.* {beyond}"):
        look_up(form, several, inputs, tables_of(form, inputs), indices=indices, offsets=offsets)
        ak.synchronize()


def test_bags_of_equal_length_are_counted_in_64_bits() -> None:
    """Two bags of 2^30 lookups: the end of the second is past what int32 holds."""
    indices = torch.empty(2, 2**30, dtype=torch.int32, device="meta")
    table = torch.empty(1, D, device="meta")
    _, offsets, *_ = ak._checks.pooled(table, indices, None, "sum", None, [-1], False)
    assert offsets.dtype == torch.int64


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
def test_weights_with_gaps_in_memory(backend: Any, form: str, several: bool) -> None:
    inputs = build(CASE, backend.device)
    psw = torch.rand(L, device=backend.device)
    gaps = torch.stack([psw, -psw], 1)[:, 0]
    assert not gaps.is_contiguous()
    want = trained(form, several, inputs, psw)
    got = trained(form, several, inputs, gaps)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("bounds_check", ["raise", "clamp", "off"])
def test_positions_past_the_last_offset(
    backend: Any, form: str, several: bool, bounds_check: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Whatever is there: no such row, a row whose size is wrong, a weight that is NaN."""
    inputs = build(CASE, backend.device)
    inputs.offsets[-1] = L - 3
    inputs.indices[inputs.indices == 7] = 8
    psw = torch.rand(L, device=backend.device)
    options = {"bounds_check": bounds_check}
    want = trained(form, several, inputs, psw, **options)
    inputs.indices[-3:] = torch.tensor([N + 100, -5, 7])
    inputs.row_dims[7] = D + 1
    inputs.row_group[7] = 5
    psw[-3:] = float("nan")
    got = trained(form, several, inputs, psw, **options)
    assert not got[1][-3:].any()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not recwarn.list


@pytest.mark.parametrize("several", [False, True])
def test_positions_past_the_last_offset_of_an_empty_table(backend: Any, several: bool) -> None:
    inputs = build(replace(CASE, rows=1, lookups=4, bags=3), backend.device)
    inputs.weight, inputs.row_dims = inputs.weight[:0], inputs.row_dims[:0]
    psw = torch.ones(4, device=backend.device)
    offsets = torch.zeros(3, dtype=torch.int64, device=backend.device)
    out, psw_grad, grad, _ = trained("masked", several, inputs, psw, offsets=offsets)
    assert out.shape == (2, D) and not out.any() and not psw_grad.any() and grad.shape == (0, D)


@pytest.mark.parametrize("rows", [0, 5])
def test_weights_past_the_last_offset_of_a_table_of_codes(backend: Any, rows: int) -> None:
    place = {"device": backend.device}
    codes, steps = torch.zeros(rows, 1, dtype=torch.uint8, **place), torch.ones(1, **place)
    indices = torch.tensor([1, 2, -7], **place)
    offsets = torch.tensor([0, 2] if rows else [0], **place)
    psw = torch.ones(3, requires_grad=True, **place)
    few = {"steps": steps, "bits": 2, "embedding_dim": 4, "include_last_offset": True}
    out = ak.tiered_embedding_bag(
        [codes], [rows], indices, offsets, mode="sum", per_sample_weights=psw, **few
    )
    out.sum().backward()
    # Four codes of -1.5.
    assert psw.grad is not None and psw.grad.tolist() == ([-6, -6, 0] if rows else [0, 0, 0])


MIXES: dict[str, dict[str, Any]] = {
    "several tables need include_last_offset": {"include_last_offset": False},
    "per_sample_weights go with mode sum only": {"pooling": 1},
    "several tables need offsets": {"offsets": None},
}


@pytest.mark.parametrize("op", ["lookup", "lookup_backward"])
@pytest.mark.parametrize("message", MIXES)
def test_operators_refuse_what_does_not_go_together(backend: Any, op: str, message: str) -> None:
    call = join("masked", several(CASE, 2, device=backend.device))
    call.bags |= MIXES[message]
    arguments = call.lookup() if op == "lookup" else call.backward()
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.amtl, op)(*in_order(op, arguments))


@pytest.mark.parametrize("op", ["lookup", "lookup_backward"])
def test_weights_without_bags_are_refused(backend: Any, op: str) -> None:
    call = build(CASE, backend.device).call("masked", False)
    call.bags["per_sample_weights"] = torch.ones(L, device=backend.device)
    arguments = call.lookup() if op == "lookup" else call.backward()
    with pytest.raises(ValueError, match="per_sample_weights need offsets"):
        getattr(torch.ops.amtl, op)(*in_order(op, arguments))


WRONG: tuple[Any, ...] = (None, "rows", [0, 1])
TENSORS: dict[str, tuple[str, ...]] = {
    "masked_embedding": ("weight", "indices", "row_dims"),
    "adaptive_embedding": ("weight", "indices", "row_group", "group_dims", "group_mask"),
    "tiered_embedding": ("blocks", "tier_ends", "indices"),
}
OTHERS: dict[str, tuple[Any, ...]] = {
    "per_sample_weights": ("rows", [1.0]),
    "offsets": ("rows", [0]),
    "mode": (None, 3, ["sum"]),
    "padding_idx": ("first", [0], 0.5),
    "bounds_check": (None, 1, ["raise"]),
    "embedding_dim": ("wide", [8]),
    "seed": (None, "one"),
}


@pytest.mark.parametrize("op", [*TENSORS, *(f"{op}_bag" for op in TENSORS)])
@pytest.mark.parametrize("form", ["one", "one fused", "several", "several fused"])
def test_what_is_no_tensor_is_named(op: str, form: str) -> None:
    """None, strings and lists: the message holds the argument's name, and no attribute's."""
    several, is_fused = "several" in form, "fused" in form
    if several and "bag" not in op:
        pytest.skip("several tables are looked up in bags")
    kinds = dict.fromkeys(TENSORS[op.removesuffix("_bag")], WRONG)
    tried = 0
    for name, values in (kinds | OTHERS).items():
        for value in values:
            call = build(CASE).call(op.split("_")[0], "bag" in op).fresh()
            public, arguments = call.public(several)
            arguments["bounds_check"] = "raise"
            plural = PLURALS.get(name, name) if several else name
            if plural not in arguments:
                continue
            # These two are lists.
            if name == "tier_ends" and isinstance(value, list):
                continue
            if several and name == "padding_idx" and isinstance(value, list):
                continue
            if is_fused:
                arguments["optimizer"] = optim.SGD(call.tables["blocks"])
            of_each = several and isinstance(arguments[plural], list) and name != "padding_idx"
            arguments[plural] = [value] if of_each else value
            with pytest.raises((TypeError, ValueError, RuntimeError), match=name) as caught:
                getattr(fused if is_fused else ak, public)(**arguments)
            assert "attribute" not in str(caught.value) and "len()" not in str(caught.value)
            tried += 1
    assert tried >= 10


def test_lists_of_tables_are_named() -> None:
    inputs = build(CASE)
    lookups = (inputs.indices, inputs.offsets)
    for value in (None, "tables", inputs.weight):
        with pytest.raises(TypeError, match="weights must be a list of tensors"):
            ak.masked_embedding_bag_tables(value, *lookups, [inputs.row_dims])
        with pytest.raises(TypeError, match="row_dims must be a list of tensors"):
            ak.masked_embedding_bag_tables([inputs.weight], *lookups, value)
        with pytest.raises(TypeError, match="blocks must be a list"):
            ak.tiered_embedding_bag_tables(value, [inputs.tier_ends], *lookups)
        with pytest.raises(TypeError, match="tier_ends must be a list"):
            ak.tiered_embedding_bag_tables([inputs.blocks], value, *lookups)


def test_an_optimizer_that_is_none_is_named() -> None:
    inputs = build(CASE)
    for optimizer in (None, "sgd", torch.optim.SGD([torch.zeros(1, requires_grad=True)])):
        with pytest.raises(TypeError, match=r"optimizer must be of amtl_kernels\.optim"):
            fused.masked_embedding(
                inputs.weight, inputs.indices, inputs.row_dims, optimizer=optimizer
            )
