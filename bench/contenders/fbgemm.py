"""FBGEMM's table-batched embeddings on the CPU: Split (fused optimizers), Dense, IntNBit."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bench.contenders.base import (
    CHUNK_ROWS,
    AutogradSession,
    Contender,
    Rows,
    Session,
    refuse_copy,
)
from bench.inputs import Case, Problem
from bench.oracle import Equations

INSTALL = "pip install --no-deps fbgemm-gpu-cpu==1.8.0"
_DENSE_LIMIT = 2**29


class _Fbgemm(Contender):
    equations = Equations("all")
    install = INSTALL
    devices = ("cpu",)

    def absent(self) -> str:
        """Whether the package imports."""
        if importlib.util.find_spec("fbgemm_gpu") is None:
            return "fbgemm_gpu is not installed"
        try:
            import fbgemm_gpu.split_table_batched_embeddings_ops_training  # noqa: F401
        except Exception as error:
            return f"fbgemm_gpu does not import here: {error}"
        return ""

    def refuses(self, case: Case) -> str:
        """Pooled lookups over widths that are multiples of four."""
        if case.dim % 4:
            return "FBGEMM needs D divisible by 4"
        return ""


class Split(_Fbgemm):
    """Split TBE: the optimizer runs inside the backward."""

    name = "fbgemm"
    title = "FBGEMM TBE Split, no mask"
    devices = ("cpu", "cuda")

    def refuses(self, case: Case) -> str:
        """Its backward always updates, so there is no backward alone."""
        if case.work == "backward":
            return "Split TBE always updates in its backward"
        if case.optimizer == "adam":
            return "compared with SGD and Adagrad only"
        if case.dtype == "bfloat16":
            return "no bfloat16 weights on a CPU" if case.device == "cpu" else "float32 and float16"
        return super().refuses(case)

    def prepare(self, problem: Problem) -> Session:
        """Points it at the problem's weights."""
        from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            PoolingMode,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        case = problem.case
        optimizers: dict[str, Any] = {
            "none": EmbOptimType.EXACT_SGD,
            "sgd": EmbOptimType.EXACT_SGD,
            "adagrad": EmbOptimType.EXACT_ADAGRAD,
            "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        }
        rows, weight = problem.rows_per_table, problem.weight
        on_cpu = case.device == "cpu"
        location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
        spec = (rows, case.dim, location, ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA)
        # Its own table would be written with zeros first, which doubles the peak.
        given = {"preallocated_host_buffers": {"weights": weight.view(-1)}} if on_cpu else {}
        tbe: Any = SplitTableBatchedEmbeddingBagsCodegen(
            [spec] * case.tables,
            optimizer=optimizers[case.optimizer],
            learning_rate=problem.learning_rate,
            eps=problem.eps,
            pooling_mode=PoolingMode.SUM,
            weights_precision=SparseType.from_dtype(case.torch_dtype),
            output_dtype=SparseType.from_dtype(case.torch_dtype),
            **given,
        )
        if not on_cpu:
            for mine, part in zip(tbe.split_embedding_weights(), weight.split(rows), strict=True):
                mine.copy_(part)
            weight = tbe.weights_dev.view(-1, case.dim)
        if case.huge_pages and case.optimizer.endswith("adagrad"):
            from amtl_kernels.memory import advise_huge_pages

            advise_huge_pages(tbe.momentum1_host)
        ids, offsets = problem.ids, problem.offsets

        def lookup(rotation: int) -> Tensor:
            output: Tensor = tbe(ids[rotation], offsets)
            return output

        return AutogradSession(problem, lookup, [], rows=Rows(weight))

    def allocates(self, case: Case) -> dict[str, float]:
        """On a GPU its tables are its own."""
        size = case.tables * case.rows * case.dim * (4.0 if case.dtype == "float32" else 2.0)
        return {**super().allocates(case), **({self.name: size} if case.device == "cuda" else {})}


class Dense(_Fbgemm):
    """Dense TBE: gradients of the whole table."""

    name = "fbgemm_dense"
    title = "FBGEMM TBE Dense, no mask"

    def refuses(self, case: Case) -> str:
        """Has no optimizer, and a dense gradient of a large table is out of reach."""
        if case.work == "step":
            return "Dense TBE has no optimizer of its own"
        if case.dtype != "float32":
            return "measured in float32 only"
        if case.tables * case.rows * case.dim * 4 > _DENSE_LIMIT:
            return "its gradient is as large as the table"
        return super().refuses(case)

    def allocates(self, case: Case) -> dict[str, float]:
        """Its dense gradient."""
        return {self.name: case.tables * case.rows * case.dim * 4.0}

    def prepare(self, problem: Problem) -> Session:
        """Points it at the problem's weights."""
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            DenseTableBatchedEmbeddingBagsCodegen,
        )

        case = problem.case
        tbe: Any = DenseTableBatchedEmbeddingBagsCodegen(
            [(problem.rows_per_table, case.dim)] * case.tables, use_cpu=True
        )
        tbe.weights = nn.Parameter(problem.weight.view(-1))
        ids, offsets = problem.ids, problem.offsets

        def lookup(rotation: int) -> Tensor:
            output: Tensor = tbe(ids[rotation], offsets)
            return output

        def gradient(rows: Tensor) -> Tensor:
            found: Tensor = tbe.weights.grad
            return found.view(-1, case.dim)[rows]

        return AutogradSession(problem, lookup, [tbe.weights], gradient=gradient)


class IntNBit(_Fbgemm):
    """Quantised inference."""

    def __init__(self, bits: int, tolerance: float) -> None:
        self.name = f"fbgemm_int{bits}" if bits < 16 else f"fbgemm_nbit_fp{bits}"
        kind = f"int{bits}" if bits < 16 else f"fp{bits}"
        self.title = f"FBGEMM IntNBit {kind}, no mask"
        self.row_bits = bits
        self.tolerance = tolerance

    def refuses(self, case: Case) -> str:
        """Lookups only."""
        if case.work != "forward":
            return "IntNBit serves lookups only"
        if case.dtype != "float32":
            return "measured with float32 outputs only"
        return refuse_copy(case, "a quantised copy", self.row_bits) or super().refuses(case)

    def allocates(self, case: Case) -> dict[str, float]:
        """Its rows, with scale and bias of two bytes each, in multiples of 16 bytes."""
        row = 16 * math.ceil((case.dim * self.row_bits / 8 + 4) / 16)
        return {self.name: float(case.tables * case.rows * row)}

    def prepare(self, problem: Problem) -> Session:
        """Quantises a copy of the problem's weights."""
        import fbgemm_gpu.split_embedding_configs as configs
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )

        case = problem.case
        kinds = configs.SparseType
        integers = {2: kinds.INT2, 4: kinds.INT4, 8: kinds.INT8}
        kind = {**integers, 16: kinds.FP16, 32: kinds.FP32}[self.row_bits]
        rows = problem.rows_per_table
        tbe: Any = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("", rows, case.dim, kind, EmbeddingLocation.HOST)] * case.tables,
            device="cpu",
            output_dtype=kinds.FP32,
        )
        tbe.initialize_weights()
        for table, (stored, scales) in enumerate(tbe.split_embedding_weights()):
            part = problem.weight[table * rows : (table + 1) * rows]
            for first in range(0, rows, CHUNK_ROWS):
                here = slice(first, first + CHUNK_ROWS)
                scale = None if scales is None else scales[here]
                quantise(part[here], self.row_bits, stored[here], scale)
        ids = [part.int() for part in problem.ids]
        offsets = problem.offsets.int()

        def lookup(rotation: int) -> Tensor:
            output: Tensor = tbe(ids[rotation], offsets)
            return output

        return AutogradSession(problem, lookup, [])


def quantise(weight: Tensor, bits: int, stored: Tensor, scales: Tensor | None) -> None:
    """Writes ``weight`` into the rows of a quantised table, in FBGEMM's row format."""
    if bits >= 16:
        dtype = torch.float16 if bits == 16 else torch.float32
        stored.copy_(weight.to(dtype).view(torch.uint8))
        return
    assert scales is not None
    packed = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(weight, bits)
    if bits == 8:
        fused = torch.ops.fbgemm.FloatToFused8BitRowwiseQuantized(weight)
        body, tail = fused[:, :-8], fused[:, -8:].contiguous().view(torch.float32)
        packed = torch.cat([body, tail.half().view(torch.uint8)], 1)
    stored.copy_(packed[:, : stored.shape[1]])
    scales.copy_(packed[:, -4:])


def contenders() -> Iterable[Contender]:
    """Those of this module; the tolerances of integers are their quantisation error."""
    return [
        Split(),
        Dense(),
        IntNBit(32, 0.0),
        IntNBit(16, 1e-3),
        IntNBit(8, 2e-2),
        IntNBit(4, 0.2),
        IntNBit(2, 0.7),
    ]
