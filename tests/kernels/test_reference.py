"""The reference against the equations written with PyTorch's own differentiable operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import Case, Inputs, build, draw_reals
from torch import Tensor

import amtl_kernels as ak

N, D, L, B, G, Q = 23, 6, 40, 7, 4, 5


@pytest.fixture(autouse=True)
def on_the_reference() -> None:
    with ak.use_backend("reference"):
        yield


def hard_mask(sizes: Tensor) -> Tensor:
    return (torch.arange(D) < sizes[:, None]).double()


@pytest.fixture
def table() -> Inputs:
    case = Case(
        rows=N, dim=D, lookups=L, groups=G, columns=Q, sorted_groups=False, bags=B, weighted=True
    )
    found = build(case, dtype=torch.float64, values=draw_reals)
    # One bag in between is empty, and so is the last.
    found.offsets = torch.tensor([0, 4, 4, 11, 12, 30, 40])
    for leaf in (found.weight, found.per_sample_weights):
        leaf.requires_grad_()
    return found


def row_sizes(table: Inputs, seed: int) -> Tensor:
    column = ak.reference.hash_columns(torch.arange(N), seed, Q)
    return table.group_dims[table.row_group.long(), column]


def test_masked_embedding_is_a_product_with_the_mask(table: Inputs) -> None:
    weight, indices = table.weight, table.indices
    got = ak.masked_embedding(weight, indices, table.row_dims)
    want = F.embedding(indices, weight * hard_mask(table.row_dims))
    assert torch.equal(got, want)
    target = torch.randn_like(got)
    (grad,) = torch.autograd.grad((got * target).sum(), weight)
    (dense,) = torch.autograd.grad((want * target).sum(), weight)
    torch.testing.assert_close(grad.to_dense(), dense)


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
@pytest.mark.parametrize("padding_idx", [None, 5, -1])
def test_bag_is_embedding_bag_of_the_masked_table(
    table: Inputs, mode: str, padding_idx: int | None, weighted: bool
) -> None:
    weight, psw = table.weight, table.per_sample_weights if weighted else None
    mask = hard_mask(table.row_dims)
    arguments = {"mode": mode, "per_sample_weights": psw, "padding_idx": padding_idx}
    got = ak.masked_embedding_bag(weight, table.indices, table.offsets, table.row_dims, **arguments)
    want = F.embedding_bag(table.indices, weight * mask, table.offsets, **arguments)
    torch.testing.assert_close(got, want)
    inputs = [weight, psw] if weighted else [weight]
    target = torch.randn_like(got)
    grads = torch.autograd.grad((got * target).sum(), inputs)
    wanted = torch.autograd.grad((want * target).sum(), inputs)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b)


def test_mask_gradient_is_that_of_a_product_with_the_mask(table: Inputs) -> None:
    """Straight-through: the gradient at the hard mask, as if the mask had been multiplied."""
    seed = 11
    weight, indices, group = table.weight, table.indices, table.row_group.long()
    soft = torch.rand(G, D, dtype=torch.float64, requires_grad=True)
    arguments = (table.row_group, table.group_dims, soft)
    got = ak.adaptive_embedding_bag(
        weight,
        indices,
        table.offsets,
        *arguments,
        per_sample_weights=table.per_sample_weights,
        seed=seed,
    )
    target = torch.randn_like(got)
    (mask_grad,) = torch.autograd.grad((got * target).sum(), soft)

    # One mask per row in this formula; groups add theirs up.
    mask = hard_mask(row_sizes(table, seed)).requires_grad_()
    want = F.embedding_bag(
        indices,
        weight * mask,
        table.offsets,
        mode="sum",
        per_sample_weights=table.per_sample_weights.detach(),
    )
    torch.testing.assert_close(got, want)
    (per_row,) = torch.autograd.grad((want * target).sum(), mask)
    torch.testing.assert_close(mask_grad, torch.zeros(G, D).double().index_add(0, group, per_row))


def test_paper_gradients_through_a_softmax(table: Inputs) -> None:
    """The paper's layer end to end: selection forward, softmax backward, masks as prefix sums."""
    weight, indices = table.weight.detach(), table.indices
    z = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    target = torch.randn(L, D, dtype=torch.float64)
    temperature = 0.7
    p = torch.softmax(z / temperature, 1)
    sizes = (p.argmax(1) + 1).to(torch.int32)
    soft = p.flip(1).cumsum(1).flip(1)
    row_group = torch.arange(N, dtype=torch.int32)
    out = ak.adaptive_embedding(weight, indices, row_group, sizes, soft)
    (got,) = torch.autograd.grad((out * target).sum(), z)

    delta = torch.zeros(N, D, dtype=torch.float64).index_add(0, indices, target)
    grad_p = (delta * weight).cumsum(1)
    want = p / temperature * (grad_p - (p * grad_p).sum(1, keepdim=True))
    torch.testing.assert_close(got, want)


def test_gradcheck(table: Inputs) -> None:
    indices, offsets, dims = table.indices, table.offsets, table.row_dims

    def masked(weight: Tensor, psw: Tensor) -> Tensor:
        return ak.masked_embedding_bag(
            weight, indices, offsets, dims, per_sample_weights=psw, padding_idx=2, sparse=False
        )

    def mean(weight: Tensor) -> Tensor:
        return ak.masked_embedding_bag(weight, indices, offsets, dims, mode="mean", sparse=False)

    def adaptive(weight: Tensor) -> Tensor:
        return ak.adaptive_embedding(
            weight,
            indices,
            table.row_group,
            table.group_dims,
            torch.zeros(G, D),
            seed=9,
            sparse=False,
        )

    def tiered(first: Tensor, second: Tensor, psw: Tensor) -> Tensor:
        return ak.tiered_embedding_bag(
            [first, second], [10, N], indices, offsets, per_sample_weights=psw, sparse=False
        )

    second = torch.randn(N - 10, 2, dtype=torch.float64, requires_grad=True)
    first = torch.randn(10, D, dtype=torch.float64, requires_grad=True)
    for function, inputs in (
        (masked, (table.weight, table.per_sample_weights)),
        (mean, (table.weight,)),
        (adaptive, (table.weight,)),
        (tiered, (first, second, table.per_sample_weights)),
    ):
        assert torch.autograd.gradcheck(function, inputs)


def test_dense_gradients_equal_sparse_ones(table: Inputs) -> None:
    weight = table.weight
    grads = []
    for sparse in (True, False):
        out = ak.masked_embedding(weight, table.indices, table.row_dims, sparse=sparse)
        (grad,) = torch.autograd.grad(out.square().sum(), weight)
        assert grad.is_sparse == sparse
        grads.append(grad.to_dense())
    assert torch.equal(*grads)


def test_bags_of_equal_length_need_no_offsets(table: Inputs) -> None:
    indices = table.indices.reshape(8, 5)
    got = ak.masked_embedding_bag(table.weight, indices, None, table.row_dims)
    want = F.embedding_bag(indices, table.weight * hard_mask(table.row_dims), mode="sum")
    torch.testing.assert_close(got, want)


def test_tiers_hold_the_masked_rows(table: Inputs) -> None:
    sizes = torch.tensor([6] * 10 + [4] * 8 + [1] * 5, dtype=torch.int32)
    weight, indices = table.weight, table.indices
    blocks = [
        weight[:10].contiguous(),
        weight[10:18, :4].contiguous(),
        weight[18:, :1].contiguous(),
    ]
    got = ak.tiered_embedding(blocks, [10, 18, N], indices)
    assert torch.equal(got, ak.masked_embedding(weight, indices, sizes))
