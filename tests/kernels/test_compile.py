"""opcheck, fake tensors and torch.compile, for the operators as the public functions use them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_cases import Inputs, build
from test_lookup import variant
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import amtl_kernels as ak

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    case = variant(seed=2, rows=50, dim=7, lookups=40, groups=5, weighted=True, padding="first")
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


def test_opcheck_of_lookups(inputs: Inputs) -> None:
    for suffix in ("", "_densegrad"):
        for op, arguments in inputs.forwards():
            arguments = tuple(
                a.detach().clone().requires_grad_()
                if isinstance(a, Tensor) and a.is_floating_point()
                else [b.detach().clone().requires_grad_() for b in a]
                if isinstance(a, list) and isinstance(a[0], Tensor)
                else a
                for a in arguments
            )
            torch.library.opcheck(getattr(torch.ops.amtl, op + suffix).default, arguments)


def test_opcheck_of_backwards_and_updates(inputs: Inputs) -> None:
    for op, arguments in inputs.backwards():
        torch.library.opcheck(getattr(torch.ops.amtl, op).default, arguments)
    rows = torch.tensor([1, 4, 9])
    grads = torch.randn(3, 7)
    weight, state, second = torch.randn(50, 7), torch.rand(50, 7), torch.rand(50, 7)
    ops = torch.ops.amtl
    for op, arguments in (
        (ops.apply_sgd_, (weight, rows, grads, 0.1, 0.0)),
        (ops.apply_adagrad_, (weight, state, rows, grads, 0.1, 1e-8, 0.0)),
        (ops.apply_rowwise_adagrad_, (weight, state[:, 0].clone(), rows, grads, 0.1, 1e-8, 0.0)),
        (ops.apply_adam_, (weight, state, second, rows, grads, 1, 0.1, 0.9, 0.99, 1e-8, 0.0)),
    ):
        torch.library.opcheck(op.default, arguments)


def test_needs_input_grad_is_honoured(inputs: Inputs) -> None:
    calls = []

    def spy(*arguments: object) -> object:
        calls.append(arguments[-3:])
        return ak.reference.adaptive_embedding_backward(*arguments)

    ak.register_backend("spy", lambda: {"adaptive_embedding_backward": spy})
    with ak.use_backend("spy"):
        for rows, mask in ((True, False), (False, True), (True, True)):
            weight = inputs.weight.clone().requires_grad_(rows)
            soft = inputs.group_mask.clone().requires_grad_(mask)
            ak.adaptive_embedding(
                weight, inputs.indices, inputs.row_group, inputs.group_dims, soft
            ).sum().backward()
            assert (weight.grad is not None, soft.grad is not None) == (rows, mask)
    assert calls == [(True, False, False), (False, True, False), (True, True, False)]
