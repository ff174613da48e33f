"""opcheck, fake tensors and torch.compile, for the operators as the public functions use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import FORMS, RULES, Case, Inputs, applying, build, in_order
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import amtl_kernels as ak
from amtl_kernels import reference

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    case = Case(seed=2, rows=50, dim=7, lookups=40, groups=5, weighted=True, padding="first")
    found = build(case)
    # Operators must be traced with both, and nothing else here says so.
    assert not all(block.numel() for block in found.blocks) and not found.row_dims.all()
    return found


def learnable(inputs: Inputs) -> dict[str, list[Tensor]]:
    def fresh(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_()

    assert inputs.per_sample_weights is not None
    return {
        "masked": [fresh(inputs.weight), fresh(inputs.per_sample_weights)],
        "adaptive": [fresh(inputs.weight), fresh(inputs.group_mask)],
        "tiered": [fresh(block) for block in inputs.blocks],
        "dense": [fresh(inputs.weight)],
    }


def model(inputs: Inputs, tables: dict[str, list[Tensor]], seed: int) -> Tensor:
    i, o = inputs.indices, inputs.offsets
    weight, psw = tables["masked"]
    masked = ak.masked_embedding_bag(weight, i, o, inputs.row_dims, per_sample_weights=psw)
    weight, mask = tables["adaptive"]
    adaptive = ak.adaptive_embedding_bag(
        weight, i, o, inputs.row_group, inputs.group_dims, mask, seed=seed, mode="mean"
    )
    tiered = ak.tiered_embedding_bag(
        tables["tiered"], inputs.tier_ends, i, o, embedding_dim=inputs.case.dim
    )
    dense = ak.masked_embedding(tables["dense"][0], i, inputs.row_dims, sparse=False)
    return (masked * adaptive * tiered).sum() + dense.square().sum()


def gradients(
    run: Callable[[Inputs, dict[str, list[Tensor]], int], Tensor], inputs: Inputs, seed: int
) -> list[Tensor]:
    tables = learnable(inputs)
    run(inputs, tables, seed).backward()
    grads = [tensor.grad for tensors in tables.values() for tensor in tensors]
    assert all(grad is not None for grad in grads)
    assert [grad.is_sparse for grad in grads] == [
        True,
        False,
        True,
        False,
        *[True] * len(inputs.blocks),
        False,
    ]
    return [grad.to_dense() for grad in grads]


def test_compile_traces_everything_once_for_all_seeds(inputs: Inputs) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (3, 10, -5, 2**40):
        for got, want in zip(
            gradients(compiled, inputs, seed), gradients(model, inputs, seed), strict=True
        ):
            torch.testing.assert_close(got, want)
    # The second seed makes it a symbol; no other seed compiles anew.
    assert counter.frame_count <= 2


def with_grad(value: Any) -> Any:
    """Fresh leaves in place of floating-point tensors."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return [with_grad(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("sparse_grad", [True, False])
def test_opcheck_of_lookups(inputs: Inputs, sparse_grad: bool) -> None:
    for _, arguments in inputs.forwards():
        torch.library.opcheck(
            torch.ops.amtl.lookup.default, (*map(with_grad, arguments[:-1]), sparse_grad)
        )


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_backwards_and_updates(inputs: Inputs, form: str) -> None:
    ops = torch.ops.amtl
    for pooled in (True, False):
        call = inputs.call(form, pooled)
        backward = in_order("lookup_backward", call.backward())
        torch.library.opcheck(ops.lookup_backward.default, backward)
        rows, grads, _, _ = ops.lookup_backward(*backward)
        for rule in RULES:
            update = in_order("lookup_update_", call.update(rule))
            torch.library.opcheck(ops.lookup_update_.default, update)
            apply = in_order("apply_", applying(call.tables["blocks"], rows, grads, rule))
            torch.library.opcheck(ops.apply_.default, apply)


def test_needs_input_grad_is_honoured(inputs: Inputs) -> None:
    calls = []

    def spy(*arguments: object) -> object:
        calls.append(arguments[-3:])
        return reference.IMPLEMENTATIONS["lookup_backward"](*arguments)

    ak.register_backend("spy", lambda: {"lookup_backward": spy})
    with ak.use_backend("spy"):
        for rows, mask in ((True, False), (False, True), (True, True)):
            weight = inputs.weight.clone().requires_grad_(rows)
            soft = inputs.group_mask.clone().requires_grad_(mask)
            ak.adaptive_embedding(
                weight, inputs.indices, inputs.row_group, inputs.group_dims, soft
            ).sum().backward()
            assert (weight.grad is not None, soft.grad is not None) == (rows, mask)
    assert calls == [(True, False, False), (False, True, False), (True, True, False)]


def test_a_compiled_lookup_takes_other_numbers() -> None:
    """From the second value on Dynamo keeps a number open."""
    codes, rows = torch.arange(20, dtype=torch.uint8).view(5, 4), torch.arange(5)
    steps = torch.ones(1)

    def lookup(bits: int, dim: int, padding: int) -> Tensor:
        return ak.tiered_embedding(
            [codes], [5], rows, steps=steps, bits=bits, embedding_dim=dim, padding_idx=padding
        )

    torch._dynamo.reset()
    compiled = torch.compile(lookup, fullgraph=True, backend="aot_eager")
    for numbers in ((8, 4, 1), (4, 8, 2), (2, 16, 3), (8, 5, 4)):
        assert torch.equal(compiled(*numbers), lookup(*numbers))
