"""What only a GPU can show of the Triton backend: streams and graphs. Run by ``pytest -m gpu``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import amtl_kernels as ak
from amtl_kernels import reference

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

ROWS, DIM, GROUPS, LOOKUPS, BAGS = 5_000, 64, 30, 40_000, 2_000
RULES = {
    reference.SGD: 0,
    reference.ADAGRAD: 1,
    reference.ROWWISE_ADAGRAD: 1,
    reference.ADAM: 2,
}
HYPER = [0.1, 1e-3, 0.01, 0.9, 0.99, 1.0]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with ak.use_backend("triton"):
        yield


class Problem:
    """A table and the lookups of some steps; hot rows own a large share."""

    def __init__(self, kind: str, rule: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.kind, self.rule = kind, rule
        indices = (torch.rand(3, LOOKUPS, generator=g) ** 4 * ROWS).long()
        self.steps = [i.cuda() for i in indices]
        self.indices = self.steps[0].clone()
        self.offsets = torch.arange(0, LOOKUPS, LOOKUPS // BAGS).cuda()
        self.grad = torch.randn(BAGS, DIM, generator=g).cuda()
        self.row_group = torch.randint(0, GROUPS, (ROWS,), generator=g).int().cuda()
        self.group_dims = torch.randint(0, DIM + 1, (GROUPS, 4), generator=g).int().cuda()
        self.ends = [1_000, ROWS]
        shapes = {
            "adaptive": [(ROWS, DIM)],
            "tiered": [(1_000, DIM), (ROWS - 1_000, 16)],
            "tables": [(ROWS, dim) for dim in (DIM, 16, 32, 8)],
        }[kind]
        self.tables = [torch.randn(*shape, generator=g).cuda() for shape in shapes]
        self.sizes = [self.group_dims.clamp(max=t.shape[1]) for t in self.tables]
        row_wise = rule == reference.ROWWISE_ADAGRAD
        self.states = [
            torch.zeros(t.shape[:1] if row_wise else t.shape, device="cuda")
            for t in self.tables
            for _ in range(RULES[rule])
        ]

    def update(self) -> list[Tensor]:
        bags = (None, 0, -1, False)
        if self.kind == "tables":
            dims = [t.shape[1] for t in self.tables]
            count = len(dims)
            offsets = torch.arange(0, LOOKUPS + 1, LOOKUPS // BAGS, device="cuda")
            grad = self.grad.view(BAGS // count, -1)[:, : sum(dims)]
            return list(
                torch.ops.amtl.adaptive_embedding_bag_tables_update_(
                    *(self.tables, [self.row_group] * count, self.sizes, self.states, grad),
                    *(self.indices, offsets, None, 0, [-1] * count, 7, True, False),
                    *(self.rule, HYPER),
                )
            )
        if self.kind == "tiered":
            out = torch.ops.amtl.tiered_embedding_update_(
                *(self.tables, self.states, self.grad, self.ends, self.indices, self.offsets),
                *(None, DIM, 0, -1, False, False, self.rule, HYPER),
            )
            return [out]
        return list(
            torch.ops.amtl.adaptive_embedding_update_(
                *(self.tables[0], self.states, self.grad, self.indices, self.offsets),
                *(self.row_group, self.group_dims, *bags, 7, True, False, self.rule, HYPER),
            )
        )


@pytest.mark.parametrize("kind", ["adaptive", "tiered", "tables"])
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_update_in_a_cuda_graph(kind: str, rule: int) -> None:
    """Captured once and replayed on other lookups, it does what the same steps do one by one."""
    eager, captured = Problem(kind, rule), Problem(kind, rule)
    want: list[Tensor] = []
    for step in eager.steps:
        eager.indices.copy_(step)
        want = eager.update()
    tables, states = [t.clone() for t in captured.tables], [s.clone() for s in captured.states]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.update()
    torch.cuda.current_stream().wait_stream(side)
    for changed, before in zip(captured.tables + captured.states, tables + states, strict=True):
        changed.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = captured.update()
    for step in captured.steps:
        captured.indices.copy_(step)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(
        [*captured.tables, *captured.states, *got],
        [*eager.tables, *eager.states, *want],
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_backward_that_waits_is_refused_in_a_capture() -> None:
    problem = Problem("adaptive", reference.SGD)
    arguments: list[Any] = [problem.grad, problem.tables[0], problem.indices, problem.offsets]
    arguments += [problem.row_group, problem.group_dims, None, 0, -1, False, 7, True, False, False]
    torch.ops.amtl.adaptive_embedding_backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(graph):
        torch.ops.amtl.adaptive_embedding_backward(*arguments)


def test_updates_on_a_side_stream() -> None:
    """Kernels go to the current stream: a late gradient there must be waited for by none else."""
    first, second = (Problem("adaptive", reference.ADAGRAD) for _ in range(2))
    first.update()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        second.grad = second.grad * 1
        second.update()
    stream.synchronize()
    assert torch.equal(first.tables[0], second.tables[0])


def test_hot_rows_repeat_bit_for_bit() -> None:
    results = []
    for _ in range(5):
        problem = Problem("adaptive", reference.ROWWISE_ADAGRAD)
        mask, _ = problem.update()
        results.append([problem.tables[0], problem.states[0], mask])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
