"""One whole training step of a model of 26 fields, captured into a CUDA graph and replayed.

Lookups are checked as by default, tables are updated in the backward, a network of 256 and 128 on
top learns with Adam. It is timed, then compared with the same steps one by one. The network's
matrix products are another library's, which may sum in another order in a graph: so after whole
steps weights must be close, and bits must be those of tables and masks where the gradient of what
was looked up is given, and the network's rounding out of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import amtl_kernels

STEPS = 5
REPLAYS = 50
# Of what the steps have changed, by the Euclidean norm: a step more or less of six is a sixth, and
# gradients that are off by a hundred-thousandth a five-hundredth.
CLOSE = 1e-2
# With PyTorch's 1e-8 Adam moves numbers by its rate whose gradient is nothing but rounding.
EPS = 1e-6


@dataclass(frozen=True)
class _Shape:
    tables: int
    rows: int
    dim: int
    batch: int
    hidden: tuple[int, int]


class _Model:
    """Tables, network, one batch in memory that stays where it is, and the step on it.

    ``given``: The tables learn from gradients that are given, not from the network's.
    """

    def __init__(self, shape: _Shape, device: str, *, given: bool = False) -> None:
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
        self._given = random(shape.batch, shape.tables * shape.dim) if given else None
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
        self._optimizer = torch.optim.Adam(rest, lr=1e-3, eps=EPS, capturable=device == "cuda")
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
        seen = out if self._given is None else out.detach()
        logits = self.network(seen)
        loss: Any = nn.functional.binary_cross_entropy_with_logits(logits, self._labels)
        loss.backward()
        if self._given is not None:
            out.backward(self._given)
        self._optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """A copy of all, flat, by whose they are."""
        parts = {"tables": self.tables, "masks": self.masks}
        every: dict[str, Sequence[Tensor]] = {**parts, "network": [*self.network.parameters()]}
        return {
            name: torch.cat([each.detach().flatten() for each in part])
            for name, part in every.items()
        }


def _captured(model: _Model, device: str) -> Callable[[], object]:
    """The model's step as a graph; takes one step to warm up.

    Without a GPU the step itself, on a simulated device that refuses what a capture refuses.
    """
    if device != "cuda":
        import amtl_kernels._tools as tools

        def captured() -> None:
            tools.configure(capturing=True)
            try:
                model.step()
            finally:
                tools.configure()

        model.step()
        return captured
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    return graph.replay


@dataclass
class _Pair:
    """A model that takes its steps one by one, and its twin, whose step is replayed."""

    eager: _Model
    replayed: _Model
    replay: Callable[[], object]
    off: dict[str, float]
    """How far they are apart after some steps, as a share of what those have changed."""
    same_bits: dict[str, bool]

    @classmethod
    def after_steps(cls, shape: _Shape, device: str, *, given: bool) -> _Pair:
        eager, replayed = (_Model(shape, device, given=given) for _ in range(2))
        before = eager.weights()
        replay = _captured(replayed, device)
        for _ in range(STEPS + 1):
            eager.step()
        for _ in range(STEPS):
            replay()
        amtl_kernels.synchronize()
        want, got = eager.weights(), replayed.weights()
        off = {
            name: float((got[name] - now).norm() / (now - before[name]).norm())
            for name, now in want.items()
        }
        same_bits = {name: torch.equal(got[name], now) for name, now in want.items()}
        return cls(eager, replayed, replay, off, same_bits)

    def told(self) -> dict[str, Any]:
        return {"off by": self.off, "same bits": self.same_bits}

    def must_be_close(self, which: str) -> None:
        """Raises RuntimeError unless they are."""
        wrong = [f"{name} by {off:.2g}" for name, off in self.off.items() if not off <= CLOSE]
        if wrong:
            raise RuntimeError(f"replays of {which} leave other weights: {', '.join(wrong)}")


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


def measure(device: str, save: Callable[[dict[str, Any]], None], *, simulated: bool) -> None:
    """Times, saves, then compares; without a GPU the step stands for its graph.

    Args:
        device: Where.
        save: Told what was found, before anything that was found is judged.
        simulated: Whether a small model has to do.

    Raises:
        RuntimeError: Replays leave other weights than steps, or a bad index goes unnoticed.
    """
    small = _Shape(tables=2, rows=40, dim=8, batch=4, hidden=(4, 4))
    shape = small if simulated else _Shape(26, 100_000, 16, 4096, (256, 128))
    whole = _Pair.after_steps(shape, device, given=False)
    repeats = 2 if simulated else REPLAYS
    found = {
        "replay_seconds": _seconds(whole.replay, device, repeats),
        "eager_seconds": _seconds(whole.eager.step, device, repeats),
        "samples": shape.batch,
        "whole steps": whole.told(),
    }
    save(found)
    given = _Pair.after_steps(shape, device, given=True)
    save({**found, "steps on given gradients": given.told()})
    whole.must_be_close("whole steps")
    given.must_be_close("steps on given gradients")
    wrong = [name for name in ("tables", "masks") if not given.same_bits[name]]
    if wrong:
        raise RuntimeError(f"replays on given gradients leave other bits of {', '.join(wrong)}")
    whole.replayed.indices[3] = -7
    try:
        whole.replay()
        amtl_kernels.synchronize()
    except IndexError:
        return
    raise RuntimeError("a replay has looked up a bad index, and nobody was told")
