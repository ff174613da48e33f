"""Counts what an operator asks of the GPU: launches of kernels, PyTorch's own, waits of the host.

    TRITON_INTERPRET=1 python tests/triton/launch_counts.py

Works under the interpreter, where every kernel still comes through ``launch.launch`` and every
PyTorch call through the dispatcher. A PyTorch call that computes counts as one launch, though a
sort or a cumulative sum is a few on a GPU; views and allocations count as none. A wait is whatever
needs a value of the device on the host: ``tolist``, ``item``, and calls whose result has a size
that only the device knows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from amtl_kernels.triton import launch

FREE = {
    "alias",
    "as_strided",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "expand",
    "new_empty",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
    "_unsafe_view",
    "resize_",
    "record_stream",
}
WAITING = {
    "_local_scalar_dense",
    "_unique",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
}


@dataclass
class Counts:
    """Names of what was called, in order."""

    kernels: list[str] = field(default_factory=list)
    torch_calls: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return len(self.kernels) + len(self.torch_calls)

    def __str__(self) -> str:
        return (
            f"{self.launches} launches ({', '.join(self.kernels + self.torch_calls)}), "
            f"{len(self.waits)} waits ({', '.join(self.waits)}), {len(self.uploads)} uploads"
        )


class _Dispatched(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        sized = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITING or by_mask or sized:
            self.counts.waits.append(name)
        if name == "lift_fresh":
            self.counts.uploads.append(name)
        elif name not in FREE and name != "_local_scalar_dense":
            self.counts.torch_calls.append(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts what runs inside."""
    counts = Counts()
    real_launch, real_tolist = launch.launch, Tensor.tolist

    def counting_launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if 0 not in grid:
            counts.kernels.append(kernel.fn.__name__)
        with _disable_current_modes():
            real_launch(kernel, grid, *args, **meta)

    def counting_tolist(tensor: Tensor) -> Any:
        counts.waits.append("tolist")
        with _disable_current_modes():
            return real_tolist(tensor)

    with (
        mock.patch.object(launch, "launch", counting_launch),
        mock.patch.object(Tensor, "tolist", counting_tolist),
        _Dispatched(counts),
    ):
        yield counts


def count(call: Callable[..., Any], *arguments: Any) -> Counts:
    """What one call of ``call(*arguments)`` asks for, once its tables of tiers are known."""
    call(*arguments)
    with counted() as counts:
        call(*arguments)
    return counts


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
    from kernel_cases import Case, build

    from amtl_kernels.triton import implementations

    ops = implementations()
    inputs = build(Case(rows=300, dim=17, lookups=500, weighted=True, sorted_groups=False))
    for op, arguments in inputs.backwards():
        flags = [a for a in arguments if isinstance(a, bool)]
        print(op, flags, count(ops[op], *arguments))


if __name__ == "__main__":
    main()
