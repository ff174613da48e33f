"""What only a GPU can show: determinism under load, streams, CUDA graphs, very large tables.

The operators' values are tested by ``tests/kernels`` on the backend ``cuda``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import amtl_kernels as ak

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from kernel_cases import Call, call, in_order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available()
        or not str(ak.build_info()["native"].get("cuda", "")).startswith("on"),  # type: ignore[attr-defined]
        reason="needs a CUDA GPU and a build with AMTL_CUDA=on: run `make gpu` there",
    ),
]

ROWS, DIM, LOOKUPS, BAGS, GROUPS = 5_000, 64, 200_000, 10_000, 300


def inputs(sorted_groups: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    group = torch.randint(0, GROUPS, (ROWS,), generator=g).int()
    values = {
        "weight": torch.randn(ROWS, DIM, generator=g),
        "indices": (torch.rand(LOOKUPS, generator=g) ** 6 * ROWS).long().clamp(max=ROWS - 1),
        "offsets": torch.arange(0, LOOKUPS, LOOKUPS // BAGS),
        "row_group": group.sort().values if sorted_groups else group,
        "group_dims": torch.randint(0, DIM + 1, (GROUPS, 16), generator=g).int(),
        "grad": torch.randn(BAGS, DIM, generator=g),
    }
    return {name: value.cuda() for name, value in values.items()}


def run(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.amtl, op)(*in_order(op, arguments))


def search(v: dict[str, Tensor]) -> Call:
    """Bags in a table in groups."""
    groups = {"row_groups": [v["row_group"]], "sizes": [v["group_dims"]], "seed": 7}
    return call([v["weight"]], v["indices"], v["grad"], **groups, offsets=v["offsets"])


def backward(v: dict[str, Tensor]) -> tuple[Tensor, ...]:
    (rows,), (grads,), masks, _ = run("lookup_backward", search(v).backward())
    return rows, grads, masks


ROWWISE = ("rowwise_adagrad", [0.05, 1e-8, 0.0, 0.0, 0.0, 1.0])


def search_step(v: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """A fused step; the table and its mask gradient."""
    arguments = search(v).update(*ROWWISE, [state], [v["weight"]])
    return v["weight"], run("lookup_update_", arguments)[0]


@pytest.mark.parametrize("sorted_groups", [True, False])
def test_the_same_bits_every_time(sorted_groups: bool) -> None:
    v = inputs(sorted_groups)
    first = backward(v)
    noise = torch.randn(4096, 4096, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(10):
        with torch.cuda.stream(side):
            noise = noise @ noise
        for a, b in zip(first, backward(v), strict=True):
            assert torch.equal(a, b)


def test_a_stream_of_ones_own() -> None:
    """Kernels run on PyTorch's current stream, after what was put there before."""
    v = inputs()
    want = backward(v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = dict(v, grad=v["grad"] * 1)
        got = backward(late)
    stream.synchronize()
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


def test_a_fused_step_in_a_cuda_graph() -> None:
    """Captured once and replayed, it does what the same steps do one by one."""
    eager, captured = inputs(), inputs()
    states = [torch.zeros(ROWS, device="cuda") for _ in range(2)]
    for _ in range(3):
        want_weight, want_mask = search_step(eager, states[0])
    # Every kernel that is captured has run once before, so that none is loaded in the capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run("lookup", search(inputs()).lookup(bounds_check=1))
        search_step(inputs(), torch.zeros(ROWS, device="cuda"))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run("lookup", search(captured).lookup(bounds_check=1))
        _, mask = search_step(captured, states[1])
    for _ in range(3):
        graph.replay()
    ak.synchronize()
    assert torch.equal(captured["weight"], want_weight) and torch.equal(mask, want_mask)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_adam_step_counts_on(dtype: torch.dtype) -> None:
    """Five replays are five steps: bias correction and random rounding go on, not round and round.

    Groups are known to be in order from the step that warms up, so the mask gradient is summed in
    the same order in the capture as outside of it.
    """
    target = torch.randn(BAGS, DIM, device="cuda").to(dtype)
    results = []
    for captured in (False, True):
        v = inputs()
        table = v["weight"].to(dtype).requires_grad_()
        mask = torch.zeros(GROUPS, DIM, device="cuda", requires_grad=True)
        optimizer = ak.optim.Adam(
            [table], lr=0.01, capturable=True, stochastic_rounding=dtype != torch.float32
        )

        def one(v=v, table=table, mask=mask, optimizer=optimizer) -> None:
            mask.grad = None
            out = ak.fused.adaptive_embedding_bag(
                table,
                v["indices"],
                v["offsets"],
                v["row_group"],
                v["group_dims"],
                mask,
                optimizer=optimizer,
            )
            (out * target).sum().backward()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            one()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one()
            for _ in range(5):
                graph.replay()
        else:
            for _ in range(5):
                one()
        torch.cuda.synchronize()
        assert int(optimizer.state[table]["step"]) == 6
        results.append((table.detach(), mask.grad, *optimizer.state[table].values()))
    for want, got in zip(*results, strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("dim", [16, 260])
def test_several_tables_in_a_cuda_graph(dim: int) -> None:
    """Tables' addresses travel with the launches, so a replay needs nothing of the host.

    Row-wise Adagrad, also on rows wider than a warp's registers.
    """
    tables, bags, rows = 5, 100, 300
    g = torch.Generator().manual_seed(2)
    offsets = torch.arange(0, tables * bags * 4 + 1, 4).cuda()
    indices = torch.randint(0, rows, (tables * bags * 4,), generator=g).cuda()
    groups = [torch.randint(0, 7, (rows,), generator=g).int().cuda() for _ in range(tables)]
    dims = [torch.randint(0, dim + 1, (7, 2), generator=g).int().cuda() for _ in range(tables)]
    grad = torch.randn(bags, tables * dim, generator=g).cuda()
    first = [torch.randn(rows, dim, generator=g).cuda() for _ in range(tables)]
    padding = [-1, 0, -1, 3, -1]

    def both(weights: list[Tensor], state: list[Tensor]) -> tuple[Tensor, Tensor]:
        described = {"row_groups": groups, "sizes": dims, "seed": 7, "padding_idx": padding}
        of = call(weights, indices, grad, **described, offsets=offsets)
        out = run("lookup", of.lookup(bounds_check=0))
        return out, run("lookup_update_", of.update(*ROWWISE, state, weights))[0]

    def fresh() -> tuple[list[Tensor], list[Tensor]]:
        return [w.clone() for w in first], [torch.zeros(rows, device="cuda") for _ in first]

    eager, captured = fresh(), fresh()
    for _ in range(3):
        want = both(*eager)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(*fresh())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both(*captured)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip([*got, *captured[0]], [*want, *eager[0]], strict=True):
        assert torch.equal(a, b)


def test_a_backward_that_waits_is_refused_in_a_capture() -> None:
    v = inputs()
    backward(v)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="how many distinct rows"), torch.cuda.graph(graph):
        backward(v)
    backward(v)
    ak.synchronize()


def test_every_replay_of_a_captured_lookup_is_checked() -> None:
    v = inputs()
    sizes = torch.full((ROWS,), DIM, dtype=torch.int32, device="cuda")
    arguments = call([v["weight"]], v["indices"], sizes=[sizes]).lookup(bounds_check=1)
    run("lookup", arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run("lookup", arguments)
    good = v["indices"][7].clone()
    for bad in (-5, ROWS):
        v["indices"][7] = bad
        graph.replay()
        with pytest.raises(IndexError, match=f"index {bad} at position 7"):
            ak.synchronize()
        v["indices"][7] = good
        graph.replay()
        ak.synchronize()


def test_bad_input_leaves_the_gpu_usable() -> None:
    """A lookup returns before the GPU has seen it; what it finds comes with a later call."""
    v = inputs()
    sizes = torch.full((ROWS,), DIM, dtype=torch.int32, device="cuda")
    bad = v["indices"].clone()
    bad[123] = 2**40
    torch.cuda._sleep(50_000_000)
    ak.masked_embedding(v["weight"], bad, sizes)
    with pytest.raises(IndexError, match=f"index {2**40} at position 123"):
        ak.synchronize()
    ak.synchronize()
    unchecked = call([v["weight"]], bad, sizes=[sizes]).lookup(bounds_check=0)
    assert run("lookup", unchecked).isfinite().all()
    torch.cuda.synchronize()


@pytest.mark.no_poison
def test_a_table_of_more_than_two_to_the_31_elements() -> None:
    rows, dim = 2**31 // 64 + 1_000, 64
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * rows * dim * 2:
        pytest.skip(f"needs {3 * rows * dim * 2 >> 30} GiB of free GPU memory")
    weight = torch.zeros(rows, dim, dtype=torch.float16, device="cuda")
    weight[-500:] = torch.arange(500, device="cuda", dtype=torch.float16)[:, None]
    sizes = torch.full((rows,), dim, dtype=torch.uint8, device="cuda")
    last = torch.arange(rows - 500, rows, device="cuda")
    assert torch.equal(ak.masked_embedding(weight, last, sizes), weight[-500:])
    every = torch.arange(rows, device="cuda")
    out = ak.masked_embedding(weight, every, sizes, bounds_check="off")
    assert out.numel() > 2**31 and torch.equal(out[-500:], weight[-500:])
    of = call([weight], last, weight[-500:].contiguous(), sizes=[sizes])
    (got,), (grads,), _, _ = run("lookup_backward", of.backward())
    assert torch.equal(got, last) and torch.equal(grads, weight[-500:])
