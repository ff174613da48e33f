"""One whole training step of a model of 26 fields, captured into a CUDA graph and replayed.

Lookups are checked as by default, tables are updated in the backward, a network of 256 and 128 on
top learns with Adam. Replays must leave every weight as the same steps one by one do, bit for bit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import amtl_kernels

STEPS = 5
REPLAYS = 50


@dataclass(frozen=True)
class _Shape:
    tables: int
    rows: int
    dim: int
    batch: int
    hidden: tuple[int, int]


class _Model:
    """Tables, network, one batch in memory that stays where it is, and the step on it."""

    def __init__(self, shape: _Shape, device: str) -> None:
        g = torch.Generator().manual_seed(0)
        groups = 50

        def random(*size: int) -> Tensor:
            return (0.1 * torch.randn(*size, generator=g)).to(device)

        self.tables = [nn.Parameter(random(shape.rows, shape.dim)) for _ in range(shape.tables)]
        self.masks = [nn.Parameter(random(groups, shape.dim)) for _ in range(shape.tables)]
        order = torch.arange(shape.rows) * groups // shape.rows
        self._row_groups = [order.int().to(device) for _ in self.tables]
        sizes = torch.randint(1, shape.dim + 1, (groups, 4), generator=g).int()
        self._sizes = [sizes.to(device) for _ in self.tables]
        lookups = shape.tables * shape.batch
        self.indices = torch.randint(0, shape.rows, (lookups,), generator=g).to(device)
        self._offsets = torch.arange(lookups + 1).to(device)
        self._labels = (torch.rand(shape.batch, 1, generator=g) < 0.3).float().to(device)
        torch.manual_seed(1)
        first, second = shape.hidden
        self.network = nn.Sequential(
            nn.Linear(shape.tables * shape.dim, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 1),
        ).to(device)
        rest = [*self.network.parameters(), *self.masks]
        self._optimizer = torch.optim.Adam(rest, lr=1e-3, capturable=device == "cuda")
        self._updates = amtl_kernels.optim.RowwiseAdagrad(self.tables, lr=0.01)

    def step(self) -> None:
        """Lookup, network, loss, backward with the tables' updates, the network's update."""
        self._optimizer.zero_grad()
        out = amtl_kernels.fused.adaptive_embedding_bag_tables(
            self.tables,
            self.indices,
            self._offsets,
            self._row_groups,
            self._sizes,
            self.masks,
            optimizer=self._updates,
        )
        logits = self.network(out)
        loss: Any = nn.functional.binary_cross_entropy_with_logits(logits, self._labels)
        loss.backward()
        self._optimizer.step()

    def weights(self) -> list[Tensor]:
        return [t.detach() for t in (*self.tables, *self.masks, *self.network.parameters())]


def _captured(model: _Model) -> Callable[[], object]:
    """The model's step as a graph; takes one step to warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    return graph.replay


def _seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of a call, the host's part included."""
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def measure(device: str, *, simulated: bool) -> dict[str, Any]:
    """Compares and times; without a GPU the step stands for its graph.

    Raises:
        RuntimeError: Replays leave other weights than steps, or a bad index goes unnoticed.
    """
    small = _Shape(tables=2, rows=40, dim=8, batch=4, hidden=(4, 4))
    shape = small if simulated else _Shape(26, 100_000, 16, 4096, (256, 128))
    eager, replayed = _Model(shape, device), _Model(shape, device)
    if device == "cuda":
        replay = _captured(replayed)
    else:
        replayed.step()
        replay = replayed.step
    for _ in range(STEPS + 1):
        eager.step()
    for _ in range(STEPS):
        replay()
    amtl_kernels.synchronize()
    pairs = zip(eager.weights(), replayed.weights(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise RuntimeError("replays leave other weights than the same steps one by one")
    repeats = 2 if simulated else REPLAYS
    found = {
        "replay_seconds": _seconds(replay, device, repeats),
        "eager_seconds": _seconds(eager.step, device, repeats),
        "samples": shape.batch,
    }
    replayed.indices[3] = -7
    try:
        replay()
        amtl_kernels.synchronize()
    except IndexError:
        return found
    raise RuntimeError("a replay has looked up a bad index, and nobody was told")
