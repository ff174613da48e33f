"""A table-batched kernel of our own without masks, written as FBGEMM's is (``bench/peer``).

It is there where FBGEMM is not: on every GPU that the harness has built for, and on the host
simulator, where it is checked.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.contenders.base import AutogradSession, Contender, Session
from bench.inputs import Case, Problem
from bench.oracle import Equations

MODULE = Path(__file__).resolve().parents[1] / "peer" / "tbe.so"
MOST_COLUMNS = 256


class _Library:
    """The kernels: on the GPU, or on the host simulator, which is told what memory they may use."""

    def __init__(self, simulated: bool) -> None:
        self._tools: Any = None
        path = MODULE
        if simulated:
            import amtl_kernels._tools as tools

            self._tools, path = tools, Path(str(tools.__file__))
        self._library = ctypes.CDLL(str(path))
        self._library.tbe_workspace_bytes.restype = ctypes.c_size_t

    def workspace_bytes(self, *numbers: int) -> int:
        return int(self._library.tbe_workspace_bytes(*map(ctypes.c_int64, numbers)))

    @contextmanager
    def _registered(self, arguments: tuple[Any, ...]) -> Iterator[None]:
        if self._tools is None:
            yield
            return
        try:
            for value in arguments:
                if isinstance(value, Tensor) and value.numel():
                    size = value.numel() * value.element_size()
                    self._tools.register_buffer("a tensor", value.data_ptr(), size, True)
            yield
        finally:
            self._tools.clear_buffers()

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function: tensors by address, floats as such, other numbers in 64 bits."""
        passed: list[Any] = []
        for value in arguments:
            if isinstance(value, Tensor):
                passed.append(ctypes.c_void_p(value.data_ptr()))
            elif isinstance(value, float):
                passed.append(ctypes.c_float(value))
            else:
                passed.append(ctypes.c_int64(value))
        stream = None if self._tools else torch.cuda.current_stream().cuda_stream
        with self._registered(arguments):
            error = getattr(self._library, name)(*passed, ctypes.c_void_p(stream))
        if error:
            raise RuntimeError(f"{name} ended with CUDA error {error}")


class _Lookup(torch.autograd.Function):
    """Bags of all tables; the backward updates the tables."""

    @staticmethod
    def forward(ctx: Any, peer: _Tables, ids: Tensor, anchor: Tensor) -> Tensor:
        ctx.peer, ctx.ids = peer, ids
        return peer.forward(ids)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.peer.update(ctx.ids, grad.contiguous())
        return None, None, None


class _Tables:
    def __init__(self, problem: Problem) -> None:
        case = problem.case
        self._library = _Library(case.device == "cpu")
        self._problem = problem
        self._half = int(case.dtype == "float16")
        self._shape = (
            case.dim,
            problem.rows_per_table,
            case.bags,
            case.tables * case.bags,
            problem.ids[0].numel(),
        )
        self._state = torch.zeros(problem.weight.shape[0])
        # What makes autograd call a backward.
        self.anchor = torch.zeros(0, requires_grad=True)

    def forward(self, ids: Tensor) -> Tensor:
        problem = self._problem
        out = problem.weight.new_empty(self._shape[3], problem.case.dim)
        head = (self._half, problem.weight, *self._shape)
        self._library.call("tbe_forward", *head, ids, problem.offsets, out)
        return out

    def update(self, ids: Tensor, grad: Tensor) -> None:
        problem = self._problem
        case, rows = problem.case, problem.rows_per_table
        size = self._library.workspace_bytes(case.dim, rows, case.tables, ids.numel())
        workspace = torch.empty(size, dtype=torch.uint8, device=ids.device)
        head = (self._half, problem.weight, *self._shape)
        rates = (float(problem.learning_rate), float(problem.eps))
        rest = (ids, problem.offsets, grad, self._state, *rates, case.tables, workspace)
        self._library.call("tbe_backward", *head, *rest)


class Tbe(Contender):
    """Lookups, and steps with row-wise Adagrad."""

    name = "tbe"
    title = "table-batched kernel of our own, no mask"
    equations = Equations("all")
    install = "cmake --build build --target tbe, or python -m bench gpu, where there is nvcc"

    def absent(self) -> str:
        """Whether it was built, for a GPU or for the simulator."""
        if MODULE.exists() or importlib.util.find_spec("amtl_kernels._tools") is not None:
            return ""
        return "it was not built"

    def refuses(self, case: Case) -> str:
        """What it was not written for."""
        if case.device == "cpu" and case.tables * case.bags * case.bag_size > 10_000:
            return "simulated on a CPU, so for small inputs only"
        if case.device == "cuda" and not MODULE.exists():
            return "it was not built for a GPU"
        if case.work == "backward":
            return "its backward always updates"
        if case.work == "step" and case.optimizer != "rowwise_adagrad":
            return "it has row-wise Adagrad only"
        if case.dtype == "bfloat16" or case.dim % 4 or case.dim > MOST_COLUMNS:
            return f"float32 and float16 of widths divisible by 4 up to {MOST_COLUMNS}"
        return "" if case.pooled else "pooled lookups only"

    def prepare(self, problem: Problem) -> Session:
        """Takes the problem's weights."""
        tables = _Tables(problem)

        def lookup(rotation: int) -> Tensor:
            ids = problem.ids[rotation]
            if problem.case.work == "forward":
                return tables.forward(ids)
            out: Tensor = _Lookup.apply(tables, ids, tables.anchor)
            return out

        return AutogradSession(problem, lookup, [])


def contenders() -> Iterable[Contender]:
    """Those of this module."""
    return [Tbe()]
