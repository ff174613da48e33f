"""What ``bench.gpu`` times: cases, contenders, and one process for each case.

    python -m bench.gpu_timings CASE --part FILE [--seconds S]

A process of its own, because an illegal access spoils its CUDA context for all that follows, and a
kernel that hangs can only be stopped from outside. ``FILE`` (JSON) is written anew after every
contender, so what was measured before such an end is kept.

Timings are of cold caches (twice the L2 is read before every call), medians of CUDA-event times;
shares are the bytes that no implementation can avoid, over the time, over the bandwidth of a copy
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Tests set it to "cpu" to run everything but the timing without a GPU.
DEVICE = "cuda"


@dataclass
class Row:
    """One timing: what, on which case, by whom; seconds; useful bytes; share of the copy rate."""

    work: str
    case: str
    who: str
    seconds: float
    useful_bytes: float
    share: float


@dataclass
class Timings:
    """What one case has given."""

    copy_bandwidth: float = 0.0
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


class Timer:
    """Cold-cache medians of CUDA-event times."""

    def __init__(self, l2_bytes: int) -> None:
        import torch

        self.torch = torch
        self.flush = torch.zeros(max(2 * l2_bytes, 1 << 26) // 4, dtype=torch.int32, device=DEVICE)

    def __call__(self, function: Callable[[], object], repeats: int = 20) -> float:
        """Median seconds of a call, after three to warm up."""
        cuda = self.torch.cuda
        for _ in range(3):
            function()
        times = []
        for _ in range(repeats):
            # Read, not written: dirty lines would be written back during the call.
            self.flush.max()
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            # The GPU is busy while the host enqueues: launch overhead stays out of the time.
            cuda._sleep(200_000)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return sorted(times)[repeats // 2]


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written per second by the best of two copies of 1 GiB."""
    torch = timer.torch
    a = torch.empty(1 << 28, dtype=torch.float32, device=DEVICE)
    b = torch.empty_like(a)
    return max(2 * 4 * a.numel() / timer(lambda: b.copy_(a), 10) for _ in range(2))


class Case:
    """A table in frequency order with 40 % of its size kept, and one batch of lookups."""

    def __init__(self, ids: str, dtype: str, rows: int, dim: int, bags: int, bag: int) -> None:
        import torch

        g = torch.Generator(device=DEVICE).manual_seed(1)
        self.name = f"{rows}x{dim} {dtype}, {bags} bags of {bag}, {ids}"
        self.torch, self.rows, self.dim, self.bags = torch, rows, dim, bags
        self.lookups = bags * bag
        kind = getattr(torch, dtype)
        uniform = torch.rand(self.lookups, generator=g, device=DEVICE, dtype=torch.float64)
        if ids == "zipf":
            # Inverse of the distribution function of a continuous Zipf law with exponent 1.05.
            power = -0.05
            top = float(rows + 1) ** power
            self.indices = ((1 + uniform * (top - 1)) ** (1 / power)).long() - 1
        else:
            self.indices = (uniform * rows).long()
        self.indices = self.indices.clamp(0, rows - 1)
        self.offsets = torch.arange(0, self.lookups, bag, device=DEVICE)
        rank = torch.arange(rows, device=DEVICE, dtype=torch.float64)
        sizes = (rank + 1) ** -0.3
        low, high = 0.0, 1e6
        for _ in range(60):
            middle = (low + high) / 2
            mean = (sizes * middle).clamp(1, dim).mean()
            low, high = (middle, high) if mean < 0.4 * dim else (low, middle)
        sizes = (sizes * low).round().clamp(1, dim).int()
        self.groups = 4096
        self.row_group = (rank**0.5 / rows**0.5 * self.groups).int().clamp(max=self.groups - 1)
        first = torch.searchsorted(self.row_group, torch.arange(self.groups, device=DEVICE).int())
        self.group_dims = sizes[first.clamp(max=rows - 1)].contiguous()
        self.row_dims = self.group_dims[self.row_group.long()]
        self.weight = torch.randn(rows, dim, generator=g, device=DEVICE).to(kind)
        self.grad = torch.randn(bags, dim, generator=g, device=DEVICE).to(kind)
        self.mask = torch.zeros(self.groups, dim, device=DEVICE)
        self.element = self.weight.element_size()
        self.kept = float(self.row_dims[self.indices].sum())
        distinct = self.indices.unique()
        self.distinct = distinct.numel()
        self.kept_distinct = float(self.row_dims[distinct].sum())
        width = ((self.row_dims.long() + 7) // 8 * 8).clamp(max=dim)
        order = width.sort(descending=True, stable=True).indices
        place = torch.empty_like(order)
        place[order] = torch.arange(rows, device=DEVICE)
        self.tier_indices = place[self.indices]
        values, counts = torch.unique_consecutive(width[order], return_counts=True)
        self.tier_ends = counts.cumsum(0).tolist()
        self.blocks = [
            torch.randn(n, w, device=DEVICE).to(kind)
            for n, w in zip(counts.tolist(), values.tolist(), strict=True)
        ]
        self.tier_kept = float(width[self.indices].sum())
        self.tier_distinct = float(width[distinct].sum())

    def bytes_of(self, work: str) -> float:
        """Bytes that the work must move (DESIGN: gather, pooled, search backward)."""
        lookups, dim = self.lookups, self.dim
        out = self.bags * dim
        return (
            self.element
            * {
                "gather": self.kept + lookups * dim,
                "pooled": self.kept + out,
                "frozen pooled": self.tier_kept + out,
                "search backward": lookups * dim + self.distinct * dim + self.kept_distinct,
                "search step": self.kept
                + out
                + lookups * dim
                + self.distinct * dim
                + 2 * self.kept_distinct,
                "frozen step": self.tier_kept + out + self.tier_kept + 2 * self.tier_distinct,
            }[work]
        )


HYPER = [0.01, 1e-8, 0.0, 0.0, 0.0, 1.0]
ROWWISE = 2


def ours(case: Case) -> dict[str, Callable[[], object]]:
    """This project's operators by kind of work."""
    ops = case.torch.ops.amtl
    c = case
    state = c.torch.zeros(c.rows, device=DEVICE)
    states = [c.torch.zeros(len(block), device=DEVICE) for block in c.blocks]
    plain: tuple[Any, ...] = (c.indices, None, None, 0, [-1], False)
    bags = (c.indices, c.offsets, None, 0, [-1], False)
    tier_bags = (c.tier_indices, *bags[1:])
    search = ([c.weight], [1], [], [c.group_dims], [c.row_group], 0)
    tiers = (c.blocks, [len(c.blocks)], [c.dim], [], [], 0)
    # Groups rise along the rows of a case, as a table in frequency order has them.
    with_mask, without = (True, False, True), (False, False, False)

    def pooled() -> object:
        return ops.lookup(*search, [c.mask], *bags, 0, True)

    def frozen() -> object:
        return ops.lookup(*tiers, [], *tier_bags, 0, True)

    def update() -> object:
        return ops.lookup_update_(*search, c.grad, *bags, *with_mask, [state], ROWWISE, HYPER)

    def frozen_update() -> object:
        return ops.lookup_update_(*tiers, c.grad, *tier_bags, *without, states, ROWWISE, HYPER)

    return {
        "gather": lambda: ops.lookup(*search, [c.mask], *plain, 0, True),
        "pooled": pooled,
        "frozen pooled": frozen,
        "search backward": lambda: ops.lookup_backward(c.grad, *search, *bags, True, True, False),
        "search step": lambda: (pooled(), update()),
        "frozen step": lambda: (frozen(), frozen_update()),
    }


def eager(case: Case) -> dict[str, Callable[[], object]]:
    """PyTorch without masks, and with the masks' equations."""
    torch, c = case.torch, case
    functional = torch.nn.functional

    def bag_backward() -> object:
        weight = c.weight.detach().requires_grad_()
        out = functional.embedding_bag(c.indices, weight, c.offsets, mode="sum", sparse=True)
        out.backward(c.grad)
        return weight.grad

    return {
        "gather": lambda: functional.embedding(c.indices, c.weight),
        "pooled": lambda: functional.embedding_bag(c.indices, c.weight, c.offsets, mode="sum"),
        "frozen pooled": lambda: functional.embedding_bag(
            c.indices, c.weight, c.offsets, mode="sum"
        ),
        "search backward": bag_backward,
    }


def equations(case: Case) -> Callable[[Any, Any], Any]:
    """Forward and backward of the masked lookup, written in PyTorch as anyone would."""
    torch, c = case.torch, case
    columns = torch.arange(c.dim, device=DEVICE)
    bag = torch.repeat_interleave(
        torch.arange(c.bags, device=DEVICE), c.lookups // c.bags, output_size=c.lookups
    )

    def lookup(weight: Any, mask: Any) -> Any:
        group = c.row_group[c.indices].long()
        hard = (columns < c.group_dims[group][:, None]).to(weight.dtype)
        soft = mask[group].to(weight.dtype)
        rows = torch.nn.functional.embedding(c.indices, weight, sparse=False) * (
            soft + (hard - soft).detach()
        )
        return torch.zeros(c.bags, c.dim, device=DEVICE, dtype=weight.dtype).index_add(0, bag, rows)

    return lookup


def equations_step(case: Case, lookup: Any) -> Callable[[], object]:
    c = case

    def call() -> object:
        weight = c.weight.detach().requires_grad_()
        mask = c.mask.detach().requires_grad_()
        lookup(weight, mask).backward(c.grad)
        return weight.grad, mask.grad

    return call


def fbgemm(case: Case) -> dict[str, Callable[[], object]]:
    """FBGEMM's table-batched embeddings without masks; raises ImportError where it is missing."""
    torch, c = case.torch, case
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    kinds = {torch.float32: SparseType.FP32, torch.float16: SparseType.FP16}
    if c.weight.dtype not in kinds:
        raise ImportError("compared in float32 and float16 only")
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(c.rows, c.dim, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        weights_precision=kinds[c.weight.dtype],
        output_dtype=kinds[c.weight.dtype],
    )
    ends = torch.tensor([c.lookups], device=DEVICE)
    offsets = torch.cat([c.offsets, ends])

    def step() -> object:
        out = tables(c.indices, offsets)
        out.backward(c.grad)
        return out

    return {
        "pooled": lambda: tables(c.indices, offsets).detach(),
        "frozen pooled": lambda: tables(c.indices, offsets).detach(),
        "search step": step,
        "frozen step": step,
    }


def torchrec(case: Case) -> dict[str, Callable[[], object]]:
    """TorchRec's fused collection without masks; raises ImportError where it is missing."""
    torch, c = case.torch, case
    if c.weight.dtype != torch.float32:
        raise ImportError("compared in float32 only")
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
    from torchrec.optim import RowWiseAdagrad
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    collection: Any = FusedEmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name="table",
                embedding_dim=c.dim,
                num_embeddings=c.rows,
                feature_names=["feature"],
            )
        ],
        optimizer_type=RowWiseAdagrad,
        optimizer_kwargs={"lr": HYPER[0], "eps": HYPER[1]},
        device=torch.device(DEVICE),
    )
    ends = torch.tensor([c.lookups], device=DEVICE)
    features = KeyedJaggedTensor(
        keys=["feature"], values=c.indices, offsets=torch.cat([c.offsets, ends])
    )

    def pooled() -> object:
        return collection(features).values().detach()

    def step() -> object:
        out = collection(features).values()
        out.backward(c.grad)
        return out

    return {"pooled": pooled, "frozen pooled": pooled, "search step": step, "frozen step": step}


def triton_backend(case: Case) -> dict[str, Callable[[], object]]:
    """This project's operators on its Triton kernels."""
    import amtl_kernels

    # Stays set until `measure` has timed what is returned here.
    amtl_kernels.set_backend("triton")
    return ours(case)


PLANS = [
    ("zipf", "float32", 2_000_000, 64, 65_536, 20),
    ("uniform", "float32", 2_000_000, 64, 65_536, 20),
    ("zipf", "float16", 2_000_000, 64, 65_536, 20),
    ("uniform", "float32", 20_000_000, 64, 65_536, 20),
    ("uniform", "float32", 2_000_000, 64, 1_000_000, 1),
    ("zipf", "bfloat16", 2_000_000, 128, 65_536, 20),
    ("zipf", "float32", 2_000_000, 16, 65_536, 20),
]


def contenders(case: Case, with_equations: bool) -> dict[str, Callable[[], Any]]:
    """By name, what returns the calls to time; making them may raise. The riskiest come last."""
    makers: dict[str, Callable[[], Any]] = {
        "amtl CUDA": lambda: ours(case),
        "PyTorch, no mask": lambda: eager(case),
        "FBGEMM, no mask": lambda: fbgemm(case),
        "TorchRec, no mask": lambda: torchrec(case),
    }
    if with_equations:
        lookup = equations(case)
        work = "search backward"
        makers["PyTorch, equations"] = lambda: {work: equations_step(case, lookup)}
        makers["torch.compile, equations"] = lambda: {
            work: equations_step(case, case.torch.compile(lookup))
        }
    makers["amtl Triton"] = lambda: triton_backend(case)
    return makers


def measure_case(
    report: Timings,
    case: Case,
    timer: Callable[[Any], float],
    deadline: float,
    equations: bool,
    save: Callable[[], object] = lambda: None,
) -> None:
    """One case by every contender; who is missing or fails is named and left out."""
    import amtl_kernels

    for who, make in contenders(case, equations).items():
        work = ""
        try:
            for work, function in make().items():
                if time.monotonic() > deadline:
                    report.left_out[f"{who}: {work}, {case.name}"] = "out of time"
                    continue
                seconds = timer(function)
                useful = case.bytes_of(work)
                share = useful / seconds / report.copy_bandwidth
                report.rows.append(Row(work, case.name, who, seconds, useful, share))
        except Exception as error:
            # A peer that fails must not cost the rest their measurement.
            what = f"{who}: {work}, {case.name}" if work else f"{who}, {case.name}"
            report.left_out[what] = f"{type(error).__name__}: {error}"[:300]
        finally:
            amtl_kernels.set_backend("auto")
            save()


def main() -> int:
    """Times one case."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m bench.gpu_timings")
    parser.add_argument("case", type=int, choices=range(len(PLANS)))
    parser.add_argument("--part", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=120.0, help="no new timing after this")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    report = Timings()
    timer = Timer(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 1 << 26)
    report.copy_bandwidth = copy_bandwidth(timer)

    def save() -> None:
        options.part.write_text(json.dumps(asdict(report)))

    case = Case(*PLANS[options.case])
    measure_case(report, case, timer, deadline, options.case == 0, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
