"""Twins of size heads and gradients of soft masks in native code, against PyTorch in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

import amtl_kernels
from amtl_kernels import backend
from amtl_kernels._heads import (
    draw_sizes,
    kernel_mask_gradient,
    softmax_mask_gradient,
    twins,
)

pytestmark = pytest.mark.skipif(
    "error" in amtl_kernels.build_info()["native"], reason="no native module: make test builds it"
)


@pytest.fixture(params=["generic", "avx2", "avx512"], autouse=True)
def capability(request: pytest.FixtureRequest) -> Iterator[None]:
    native = backend.native
    assert native is not None
    if not native.use_cpu_capability(request.param):
        pytest.skip(f"needs a processor with {request.param}")
    yield
    native.use_cpu_capability("")


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(
    numbers: Tensor, features: Tensor, gate: Tensor | None, widths: Sequence[int]
) -> Tensor:
    """What twins are: two MLPs with SiLU, fused by the gate."""
    branches = []
    shapes = list(zip(widths[1:], widths, strict=False))
    at = 0
    for _ in range(1 if gate is None else 2):
        x = features
        for depth, (out, into) in enumerate(shapes):
            x = nn.functional.silu(x) if depth else x
            weight = numbers[:, at : at + out * into].reshape(-1, out, into)
            at += out * into
            x = x @ weight.mT + numbers[:, None, at : at + out]
            at += out
        branches.append(x)
    if gate is None:
        return branches[0]
    return gate[..., None] * branches[0] + (1 - gate[..., None]) * branches[1]


WIDTHS = [(3, 32, 1), (3, 32, 16), (4, 1), (2, 7), (3, 5, 70, 9), (1, 1, 1)]


@pytest.mark.every(2)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("groups", [1, 31, 32, 33, 64, 65, 200])
@pytest.mark.parametrize("single", [False, True])
def test_twins(widths: tuple[int, ...], groups: int, single: bool) -> None:
    heads = 3
    branch = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    numbers = drawn(0, heads, branch if single else 2 * branch)
    features = 3 * drawn(1, heads, groups, widths[0])
    gate = None if single else torch.sigmoid(drawn(2, heads, groups))
    grad = drawn(3, heads, groups, widths[-1])
    exact = numbers.double().requires_grad_()
    want = outputs(exact, features.double(), None if gate is None else gate.double(), widths)
    (want_grad,) = torch.autograd.grad(want, exact, grad.double())

    found = twins(numbers, features, gate, torch.tensor(widths))
    assert found is not None and found.dtype == torch.float32
    scale = float(want.detach().abs().amax()) + 1
    torch.testing.assert_close(found.double(), want.detach(), rtol=1e-5, atol=2e-6 * scale)
    found = twins(numbers, features, gate, torch.tensor(widths), grad)
    assert found is not None
    scale = float(want_grad.abs().amax()) + 1
    torch.testing.assert_close(found.double(), want_grad, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("dim", [1, 7, 16, 33, 64])
def test_gradient_of_positions(dim: int) -> None:
    positions, columns = 5 * drawn(0, 3, 41), 4 * drawn(1, 3, dim)
    positions[0, :4] = torch.tensor([200.0, -200.0, 88.0, -88.0])
    grad = drawn(2, 3, 41, dim)
    exact = positions.double().requires_grad_()
    mask = torch.sigmoid(exact[..., None] - columns.double()[:, None])
    (want,) = torch.autograd.grad(mask, exact, grad.double())
    found = kernel_mask_gradient(positions, columns, grad)
    assert found is not None
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 63, 64, 65])
@pytest.mark.parametrize("step", [1, 3])
def test_gradient_of_logits(groups: int, step: int) -> None:
    dim = 16
    levels = torch.arange(dim) // step
    count = int(levels[-1]) + 1
    logits = 4 * drawn(0, 2, groups, count)
    logits[0, 0] *= 50
    grad = drawn(1, 2, groups, dim)
    exact = logits.double().requires_grad_()
    kept = torch.softmax(exact, -1).flip(-1).cumsum(-1).flip(-1)[..., levels]
    (want,) = torch.autograd.grad(kept, exact, grad.double())
    found = softmax_mask_gradient(logits, levels, grad)
    assert found is not None
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=5e-6)


def test_what_is_no_number_stays_none() -> None:
    numbers, features = drawn(0, 1, 2 * 161), drawn(1, 1, 40, 3)
    features[0, 7, 1] = torch.nan
    found = twins(numbers, features, torch.rand(1, 40), torch.tensor([3, 32, 1]))
    assert found is not None and found.isnan().flatten().nonzero().flatten().tolist() == [7]
    positions = torch.tensor([[0.0, torch.nan, 1.0]])
    moved = kernel_mask_gradient(positions, torch.zeros(1, 5), torch.ones(1, 3, 5))
    assert moved is not None and moved.isnan().tolist() == [[False, True, False]]


def test_others_are_left_to_pytorch() -> None:
    numbers, features, gate = drawn(0, 1, 322), drawn(1, 1, 40, 3), torch.rand(1, 40)
    widths = torch.tensor([3, 32, 1])
    assert twins(numbers.double(), features, gate, widths) is None
    assert twins(numbers, features.to("meta"), gate, widths) is None
    assert kernel_mask_gradient(gate, gate[:, :1].double(), gate[..., None]) is None
    assert kernel_mask_gradient(gate.half(), gate[:, :1], gate[..., None]) is None
    assert softmax_mask_gradient(gate[..., None], torch.zeros(1), gate[..., None]) is None


@pytest.mark.parametrize("dim", [5, 16, 64, 300, 2000])
@pytest.mark.parametrize("step", [1, 3, 4, 700])
@pytest.mark.parametrize("cuts", [False, True])
def test_noisy_sizes_are_those_of_pytorch(dim: int, step: int, cuts: bool) -> None:
    kind = torch.uint8 if dim <= 255 else torch.int32
    real = (drawn(0, 3, 50) * 2 + 1).exp()
    # Halves, whole numbers, the ends, and what is beyond all sizes.
    real[0, :9] = torch.tensor([0.0, 0.5, 1.5, 2.5, 4.0, float(dim), dim / step, 3e9, torch.inf])
    sizes = (torch.arange(150).view(3, 50) % 4).to(kind)
    factors = torch.exp(torch.linspace(-1, 1, 21))
    factors[10] = 1.0
    want = real[..., None] / step * factors
    full = want >= dim / step if cuts and dim % step else torch.zeros_like(want, dtype=torch.bool)
    want = (want.floor() if cuts else want.round()) * step
    want = want.masked_fill(full, dim).clamp(step, dim) * (sizes > 0)[..., None]
    found = draw_sizes(real, sizes, factors, step, min(step, dim), dim, cuts)
    assert found is not None and found.dtype == kind
    assert torch.equal(found, want.to(kind))
