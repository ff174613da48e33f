"""The Triton backend: every operator of ``torch.ops.amtl`` as kernels that people can read.

It needs no compiler at install and is the automatic choice for CUDA tensors where the package was
built without its own CUDA kernels. Importing this package does not import Triton;
:func:`implementations` does, on first use.

    tables.py     where a row lives and how much of it is kept: shared device functions
    launch.py     launches, device guard, autotuning, block sizes
    operators.py  the four operators: from arguments to tables and lookups, and to the kernels
    check.py      bad indices, sizes and offsets, found on the device, reported on the host
    lookup.py     plain and pooled lookup, of one table of any kind or of several
    lookups.py    lookups and their bags; how several tables become one in tiers
    plan.py       sort the lookups by row and cut them into equal work, hot rows included
    reduce.py     sums of gradient rows in two passes without float atomics; mask gradient
    samples.py    gradient of ``per_sample_weights``
    backward.py   the gradients of a lookup, put together from the above
    rules.py      SGD, Adagrad, row-wise Adagrad and Adam: the formulas
    optimizer.py  these on touched rows and given gradients
    update.py     these fused into the backward, which then stores no gradient

Under ``TRITON_INTERPRET=1``, set before the first use, the same functions run on CPU tensors,
slowly, so that the tests of the operators run without a GPU.

Waits of the host: ``bounds_check="raise"`` waits for the answer, a backward for the number of
distinct rows that it returns. A fused update waits for nothing and can be captured in a CUDA graph,
after one call that compiles its kernels and, for tiers or several tables, uploads where they are;
``"clamp"`` and ``"off"`` lookups likewise. Limits:

- A captured update repeats the learning rate that it was captured with; steps are counted on if the
  counter is on the device (``capturable`` of the optimizers).
- Row-wise Adagrad of rows wider than 1,024 values reads their gradients twice, since a step needs
  the sum of squares of a whole row first.
- A call of several tables takes as many launches as one of a single table. It loads in 16 bytes
  only if the rows of all tables are aligned to that, has tiles as wide as the widest table, sorts
  64-bit keys where all rows times all groups pass 2^31, and is compiled for the number of tables.
  Sizes of different integer types are copied to int32 in every call of a backward or update, which
  a graph can't hold; the lookup then goes table by table.

Autotuning is in ``launch.py`` (``Tuned``) and only of the two lookups in one table, in spaces of
three and four points of loads per thread and warps per program (``WIDE_SPACE``, ``NARROW_SPACE``,
which say why these). What bounds a lookup is bytes in flight, so a space needs no more than a
middle and its neighbours; and a lookup's result is the same bit for bit in any tile. Backwards and
updates have fixed tiles (``launch.TILE``): the order of their sums follows the tile, and a choice
by time would make results differ from run to run; they also write weights, which a timed trial must
not. ``AMTL_TRITON_AUTOTUNE=0`` takes the first point always.

What has been shown so far: results equal the reference under the interpreter, and every kernel
compiles ahead of time for sm_80, sm_90 and sm_100 within its register ceiling, without spills and
with 128-bit table loads; on fake CUDA tensors a fused update of several tables asks for no value
(``tests/triton``). None of it has run on a GPU yet: races between programs, graph capture, speed
and the autotuner's choices are unproved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from amtl_kernels import reference

__all__ = ["implementations"]


def implementations() -> dict[str, Callable[..., object]]:
    """Operator name to implementation, arguments as in the schema of the same name.

    float64, which nobody trains in, goes to the reference.

    Raises:
        ImportError: Triton is not installed.
    """
    from amtl_kernels.triton.check import raise_found
    from amtl_kernels.triton.operators import OPERATORS

    operators = {op: _except_float64(op, function) for op, function in OPERATORS.items()}
    return {**operators, "_raise_found": raise_found}


def _except_float64(op: str, function: Callable[..., object]) -> Callable[..., object]:
    @functools.wraps(function)
    def implementation(*args: Any) -> object:
        tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
        if tensor.dtype == torch.float64:
            return reference.IMPLEMENTATIONS[op](*args)
        return function(*args)

    return implementation
