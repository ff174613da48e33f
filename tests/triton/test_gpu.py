"""What only a GPU can show of the Triton backend: streams and graphs. Run by ``pytest -m gpu``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import late_findings
from kernel_cases import RULES, Call, call, in_order, states

import amtl_kernels as ak

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

ROWS, DIM, GROUPS, LOOKUPS, BAGS = 5_000, 64, 30, 40_000, 2_000
HYPER = [0.1, 1e-3, 0.01, 0.9, 0.99, 1.0]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with ak.use_backend("triton"):
        yield


class Problem:
    """A table and the lookups of some steps; hot rows own a large share."""

    def __init__(self, kind: str, rule: str) -> None:
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
        self.states = states(rule, self.tables, partial(torch.zeros, device="cuda"))

    def call(self) -> Call:
        if self.kind == "tables":
            count = len(self.tables)
            return call(
                self.tables,
                self.indices,
                self.grad.view(BAGS // count, -1)[:, : sum(t.shape[1] for t in self.tables)],
                sizes=self.sizes,
                row_groups=[self.row_group] * count,
                seed=7,
                offsets=torch.arange(0, LOOKUPS + 1, LOOKUPS // BAGS, device="cuda"),
            )
        described: dict[str, Any] = {"dims": [DIM]}
        if self.kind == "adaptive":
            groups = {"sizes": [self.group_dims], "row_groups": [self.row_group]}
            described = {**groups, "seed": 7}
        return call(self.tables, self.indices, self.grad, offsets=self.offsets, **described)

    def update(self) -> list[Tensor]:
        arguments = self.call().update(self.rule, HYPER, self.states, self.tables)
        return list(torch.ops.amtl.lookup_update_(*in_order("lookup_update_", arguments)))


@pytest.mark.parametrize("kind", ["adaptive", "tiered", "tables"])
@pytest.mark.parametrize("rule", RULES)
def test_a_fused_update_in_a_cuda_graph(kind: str, rule: str) -> None:
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
    problem = Problem("adaptive", "sgd")
    arguments = in_order("lookup_backward", problem.call().backward())
    torch.ops.amtl.lookup_backward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="CUDA graph"), torch.cuda.graph(graph):
        torch.ops.amtl.lookup_backward(*arguments)


def test_every_replay_of_a_captured_lookup_is_checked() -> None:
    problem = Problem("adaptive", "sgd")
    arguments = in_order("lookup", problem.call().lookup(bounds_check=1))
    torch.ops.amtl.lookup(*arguments)
    ak.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.amtl.lookup(*arguments)
    for bad in (-5, ROWS):
        problem.indices[7] = bad
        graph.replay()
        with pytest.raises(IndexError, match=f"index {bad} at position 7"):
            ak.synchronize()
        problem.indices[7] = 0
        graph.replay()
        ak.synchronize()


def a_later_call() -> None:
    """A good one, after the GPU has run what was called before."""
    torch.cuda.synchronize()
    late_findings.lookup("cuda", [0])


TELLS = pytest.mark.parametrize(
    "tell", [pytest.param(ak.synchronize, id="synchronize"), a_later_call]
)


@TELLS
def test_an_error_comes_later_and_once(tell: Callable[[], None]) -> None:
    late_findings.errors_come_later_and_once("cuda", tell)


@TELLS
def test_a_clamped_index_is_told_of_later(
    tell: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    late_findings.a_clamped_index_is_told_of_later("cuda", tell, monkeypatch)


def test_updates_on_a_side_stream() -> None:
    """Kernels go to the current stream: a late gradient there must be waited for by none else."""
    first, second = (Problem("adaptive", "adagrad") for _ in range(2))
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
        problem = Problem("adaptive", "rowwise_adagrad")
        mask, _ = problem.update()
        results.append([problem.tables[0], problem.states[0], mask])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
