"""Lookups in a table past PyTorch's dispatcher.

To take a list of tiers through it takes longer than a small lookup in them. So a table, of tiers or
with sizes, that is looked up in again and again on the CPU is described to native code once
(``amtl::_plan``), and a call hands over addresses. It runs the kernel of the operator, whose result
it gives bit for bit, and leaves to the operator whatever there is anything to say of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from amtl_kernels import backend
from amtl_kernels._arguments import CLAMP, Bags, FewBits, Tables

_KINDS = (Tensor, nn.Parameter)
"""Other classes may not have the memory that they say."""
_OR_NONE = (*_KINDS, type(None))

_NO_BAGS = (0, 8, 0, 0, 0, 0)
"""No offsets, and what belongs to them."""
_NO_ORDER = (0, 0)


def unobserved() -> bool:
    """Whether nothing sees operators called or answers for them.

    No gradient, graph, transform, mode, profiler or forced backend.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
        or backend._state.overrides
    )


class Plan:
    """What native code knows of one table, from the second lookup in it on.

    Args:
        tables: The table.
        few: What makes numbers of it.
        numbers: What has the type of the output.
    """

    __slots__ = ("_calls", "_dim", "_dtype", "_few", "_handle", "_numbers", "_tables")

    def __init__(self, tables: Tables, few: FewBits | None, numbers: Tensor) -> None:
        self._tables, self._few, self._numbers = tables, few, numbers
        self._dim, self._dtype = tables.dims[0], numbers.dtype
        self._handle: Any = None
        self._calls = 0

    def __reduce__(self) -> tuple[type[Plan], tuple[Any, ...]]:
        return Plan, (self._tables, self._few, self._numbers)

    def rows(
        self, indices: Tensor, bounds_check: int, order: Tensor | None = None
    ) -> Tensor | None:
        """The operator's rows at contiguous indices on the CPU, or None where it has to be asked.

        Args:
            indices: Of int32 or int64, any shape.
            bounds_check: The number of what to do about an index out of range.
            order: int32, the row in the table of each index; without, indices are rows.
        """
        shape, ordered = (*indices.shape, self._dim), _NO_ORDER
        if order is not None:
            if type(order) is not Tensor or not (order.is_cpu and order.is_contiguous()):
                return None
            if order.dtype != torch.int32:
                return None
            ordered = order.data_ptr(), order.numel()
        return self._lookup(indices, shape, -1, bounds_check, _NO_BAGS, ordered)

    def bags(self, bags: Bags, bounds_check: int) -> Tensor | None:
        """As :meth:`rows`, of lookups that have been checked, pooled or not."""
        indices, offsets, weights, pooling, (padding,), include_last_offset = bags
        if not indices.is_cpu:
            return None
        if offsets is None:
            return self.rows(indices, bounds_check)
        length = offsets.numel()
        if not length or type(offsets) is not Tensor or type(weights) not in _OR_NONE:
            return None
        shape = (length - include_last_offset, self._dim)
        given = 0 if weights is None else weights.data_ptr()
        pooled = (offsets.data_ptr(), offsets.itemsize, length, include_last_offset, pooling, given)
        return self._lookup(indices, shape, padding, bounds_check, pooled)

    def _lookup(
        self,
        indices: Tensor,
        shape: tuple[int, ...],
        padding: int,
        bounds_check: int,
        pooled: tuple[int, ...],
        ordered: tuple[int, int] = _NO_ORDER,
    ) -> Tensor | None:
        handle, count = self._handle or self._made(), indices.numel()
        if not handle or not count or bounds_check == CLAMP or type(indices) is not Tensor:
            return None
        # A tuple would take PyTorch's parser as long again.
        out = torch.empty(*shape, dtype=self._dtype)
        addresses = out.data_ptr(), indices.data_ptr()
        if backend.native.lookup(
            handle, *addresses, indices.itemsize, count, bounds_check, padding, *pooled, *ordered
        ):
            return out
        # An index out of range, or memory that is elsewhere now.
        self._handle = None
        return None

    def _made(self) -> Any:
        """The description; nothing for a first call, which may be the only one."""
        self._calls += 1
        if self._calls > 1 and self._handle is None:
            self._handle = _describe(self._tables, self._few)
            self._dtype = self._numbers.dtype
        return self._handle


def _describe(tables: Tables, few: FewBits | None) -> Any:
    """A description of native code, False where there is none."""
    steps = few.steps if few is not None else []
    tensors = (*tables.blocks, *tables.sizes, *tables.row_groups, *steps)
    if not all(type(tensor) in _KINDS and tensor.is_cpu for tensor in tensors):
        return False
    if backend.native is None:
        return False
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return backend.native.own(torch.ops.amtl._plan(*tables, *(few or ())))
    except (RuntimeError, ValueError):
        # The operator says what is wrong with it, or another backend takes it.
        return False
