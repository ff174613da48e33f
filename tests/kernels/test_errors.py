"""Bad input gets a clear error on every backend: at once on the CPU, with a later call on a GPU.

``synchronize`` is that later call where there is no other; on the CPU the lookup raises first.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from kernel_cases import Case, build

import amtl_kernels as ak

N, D = 50, 7


KINDS = ("masked", "masked bag", "adaptive", "adaptive bag", "tiered", "tiered bag")


def call(kind: str, indices: torch.Tensor, device: str, **options: Any) -> torch.Tensor:
    """One lookup of each kind over the same indices."""
    form, *bag = kind.split()
    given = build(Case(rows=N, dim=D, lookups=40, groups=5), device).call(form, bool(bag))
    if bag:
        options["offsets"] = torch.tensor([0, 1], device=device)
    return given.look_up(indices=indices, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [N, -1, 2**31 - 1])
def test_index_out_of_range(backend: Any, kind: str, value: int) -> None:
    indices = torch.tensor([3, 4, value, 5, N + 7], device=backend.device)
    message = f"index {value} at position 2 is out of range for a table of {N} rows"
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(IndexError, match=message):
            call(kind, indices.to(dtype), backend.device)
            ak.synchronize()


@pytest.mark.parametrize("kind", KINDS)
def test_clamp_warns_once_and_differentiates_what_it_used(
    backend: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ak.reference, "_warned_clamped", False)
    indices = torch.tensor([3, -4, 5, N + 7], device=backend.device)
    with pytest.warns(RuntimeWarning, match="index -4 at position 1 .* was clamped"):
        got = call(kind, indices, backend.device, bounds_check="clamp")
        ak.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = call(kind, indices, backend.device, bounds_check="clamp")
        ak.synchronize()
    assert torch.equal(got, call(kind, indices.clamp(0, N - 1), backend.device))
    assert torch.equal(got, again)


def test_clamped_lookups_train_the_clamped_row(backend: Any) -> None:
    weight = torch.randn(N, D, device=backend.device, requires_grad=True)
    sizes = torch.full((N,), D, dtype=torch.int32, device=backend.device)
    indices = torch.tensor([N + 3, 2], device=backend.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ak.masked_embedding(weight, indices, sizes, bounds_check="clamp").sum().backward()
        ak.synchronize()
    assert weight.grad is not None
    assert weight.grad._indices().tolist() == [[2, N - 1]]


def test_no_lookup_into_an_empty_table(backend: Any) -> None:
    weight = torch.empty(0, D, device=backend.device)
    sizes = torch.empty(0, dtype=torch.int32, device=backend.device)
    nothing = torch.empty(0, dtype=torch.int64, device=backend.device)
    assert ak.masked_embedding(weight, nothing, sizes).shape == (0, D)
    for options in ({}, {"bounds_check": "clamp"}):
        with pytest.raises(IndexError, match=r"index 0 at position 0 .* a table of 0 rows"):
            ak.masked_embedding(
                weight, torch.zeros(1, dtype=torch.int64, device=backend.device), sizes, **options
            )
            ak.synchronize()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 2], "offsets must start at 0, but offsets\\[0\\] is 1"),
        ([0, 3, 2, 4], "offsets\\[2\\] = 2 is smaller than offsets\\[1\\] = 3"),
        ([0, 6], "offsets must end within the 5 indices, but offsets\\[1\\] is 6"),
        ([0, -1], "offsets\\[1\\] = -1 is smaller than offsets\\[0\\] = 0"),
    ],
)
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_offsets_out_of_order(
    backend: Any, offsets: list[int], message: str, include_last_offset: bool
) -> None:
    device = backend.device
    weight = torch.randn(N, D, device=device)
    sizes = torch.full((N,), D, dtype=torch.int32, device=device)
    indices = torch.arange(5, device=device)
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=message):
            ak.masked_embedding_bag(
                weight,
                indices.to(dtype),
                torch.tensor(offsets, device=device, dtype=dtype),
                sizes,
                include_last_offset=include_last_offset,
            )
            ak.synchronize()


@pytest.mark.parametrize("size", [D + 1, -3])
def test_size_outside_the_row(backend: Any, size: int) -> None:
    device = backend.device
    weight = torch.randn(N, D, device=device)
    sizes = torch.full((N,), 3, dtype=torch.int32, device=device)
    sizes[8] = size
    good, bad = torch.tensor([7, 9], device=device), torch.tensor([7, 8], device=device)
    ak.masked_embedding(weight, good, sizes)
    ak.synchronize()
    message = rf"size.* outside 0\.\.{D}"
    with pytest.raises(ValueError, match=message):
        ak.masked_embedding(weight, bad, sizes)
        ak.synchronize()
    groups = torch.arange(N, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=message):
        ak.adaptive_embedding(weight, bad, groups, sizes, torch.zeros(N, D, device=device))
        ak.synchronize()


@pytest.mark.parametrize("index", [N, N + 9, -1])
@pytest.mark.parametrize("row", [0, N - 1])
def test_an_index_out_of_range_is_not_taken_for_a_bad_size(
    backend: Any, index: int, row: int
) -> None:
    """The size is one of a row that nobody asked for."""
    device = backend.device
    sizes = torch.full((N,), 3, dtype=torch.int32, device=device)
    sizes[row] = D + 1
    indices = torch.tensor([5, index], device=device)
    with pytest.raises(IndexError, match=f"index {index} at position 1"):
        ak.masked_embedding(torch.randn(N, D, device=device), indices, sizes)
        ak.synchronize()


def test_arguments_that_do_not_fit() -> None:
    weight = torch.randn(N, D)
    indices = torch.arange(4)
    sizes = torch.full((N,), 3, dtype=torch.int32)
    group = torch.zeros(N, dtype=torch.int32)
    dims = torch.tensor([3], dtype=torch.int32)
    mask = torch.zeros(1, D)
    offsets = torch.tensor([0, 2])
    bag = ak.masked_embedding_bag
    wrong = {
        "weight must be": lambda: ak.masked_embedding(weight[0], indices, sizes),
        "weight must be float32": lambda: ak.masked_embedding(weight.int(), indices, sizes),
        "contiguous": lambda: ak.masked_embedding(weight.t(), indices, sizes[:D]),
        "indices must be int32 or int64": lambda: ak.masked_embedding(
            weight, indices.float(), sizes
        ),
        "row_dims must be uint8 or int32": lambda: ak.masked_embedding(
            weight, indices, sizes.long()
        ),
        r"row_dims must be \[50\]": lambda: ak.masked_embedding(weight, indices, sizes[1:]),
        "row_group must be int32": lambda: ak.adaptive_embedding(
            weight, indices, group.long(), dims, mask
        ),
        r"group_mask must be \[G, 7\]": lambda: ak.adaptive_embedding(
            weight, indices, group, dims, mask[:, 1:]
        ),
        r"group_dims must be \[1\]": lambda: ak.adaptive_embedding(
            weight, indices, group, dims.repeat(2), mask
        ),
        "bounds_check": lambda: ak.masked_embedding(weight, indices, sizes, bounds_check="no"),
        "padding_idx": lambda: ak.masked_embedding(weight, indices, sizes, padding_idx=N),
        "mode must be": lambda: bag(weight, indices, offsets, sizes, mode="max"),
        "1-D indices need offsets": lambda: bag(weight, indices, None, sizes),
        "offsets must be None": lambda: bag(weight, indices[None], offsets, sizes),
        "mode='sum' only": lambda: bag(
            weight, indices, offsets, sizes, mode="mean", per_sample_weights=torch.ones(4)
        ),
        "per_sample_weights have shape": lambda: bag(
            weight, indices, offsets, sizes, per_sample_weights=torch.ones(3)
        ),
        "per_sample_weights are": lambda: bag(
            weight, indices, offsets, sizes, per_sample_weights=torch.ones(4).half()
        ),
        "one end per block": lambda: ak.tiered_embedding([weight], [N, N], indices),
        "tier_ends say": lambda: ak.tiered_embedding([weight], [N + 1], indices),
        "widest tier": lambda: ak.tiered_embedding([weight], [N], indices, embedding_dim=3),
    }
    for message, function in wrong.items():
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_are_refused_with_the_reason(backend: Any, kind: str) -> None:
    indices = torch.tensor([[3], [4]], device=backend.device)
    mapped = torch.vmap(lambda some: call(kind, some, backend.device), randomness="same")
    with pytest.raises(RuntimeError, match=r"lookups do not work under torch\.func.*without vmap"):
        mapped(indices)


@pytest.mark.parametrize("sparse", [False, True])
def test_second_derivatives_are_refused_with_a_way_around(sparse: bool) -> None:
    weight = torch.randn(N, D, requires_grad=True)
    sizes = torch.full((N,), D, dtype=torch.int32)
    rows = ak.masked_embedding(weight, torch.arange(3), sizes, sparse=sparse)
    loss = rows.square().sum()
    (found,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives.*grad\(loss, rows"):
        found.to_dense().square().sum().backward()
    (found,) = torch.autograd.grad(rows.square().sum(), rows, create_graph=True)
    found.square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.to_dense()[:3], 8 * weight[:3])


def test_float64_says_where_it_runs() -> None:
    weight = torch.randn(N, D, dtype=torch.float64)
    sizes = torch.full((N,), D, dtype=torch.int32)
    if "error" not in ak.build_info()["native"]:  # type: ignore[operator]
        with pytest.raises(ValueError, match="set_backend"):
            ak.masked_embedding(weight, torch.arange(3), sizes)
    with ak.use_backend("reference"):
        ak.masked_embedding(weight, torch.arange(3), sizes)


def test_backends_by_name() -> None:
    assert ak.get_backend() == "auto"
    with pytest.raises(ValueError, match="unknown backend 'cdua'; known: auto,"):
        ak.set_backend("cdua")
    with ak.use_backend("reference"):
        assert ak.get_backend() == "reference"
        assert ak.build_info()["backend"] == "reference"
    assert ak.get_backend() == "auto"
