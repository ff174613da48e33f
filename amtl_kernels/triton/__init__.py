"""The Triton backend: every operator of ``torch.ops.amtl`` as kernels that people can read.

It needs no compiler at install and is the automatic choice for CUDA tensors where the package was
built without its own CUDA kernels. Importing this package does not import Triton;
:func:`implementations` does, on first use.

    tables.py     where a row lives and how much of it is kept: the device functions all kernels share
    launch.py     launches, device guard, autotuning, block sizes
    check.py      bad indices, sizes and offsets, found on the device, reported on the host
    lookup.py     plain and pooled lookup, for row sizes, groups with size noise, and tiers
    plan.py       sort the lookups by row and cut them into equal work, hot rows included
    reduce.py     sums of gradient rows in two passes without float atomics; mask gradient
    samples.py    gradient of ``per_sample_weights``
    backward.py   the three backward operators, put together from the above
    optimizer.py  SGD, Adagrad, row-wise Adagrad and Adam on touched rows

Under ``TRITON_INTERPRET=1``, set before the first use, the same functions run on CPU tensors, slowly,
so that the tests of the operators run without a GPU.

What has been shown so far: results equal the reference under the interpreter, and every kernel
compiles ahead of time for sm_80, sm_90 and sm_100 within its register ceiling, without spills and
with 128-bit table loads (``tests/triton``). None of it has run on a GPU yet: races between programs,
speed and the autotuner's choices are unproved.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

__all__ = ["describe", "implementations", "version"]


def version() -> str | None:
    """The installed version of Triton, or None. Does not import it."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def implementations() -> dict[str, Callable[..., object]]:
    """Operator name to implementation, arguments as in the schema of the same name.

    Raises:
        ImportError: Triton is not installed.
    """
    from amtl_kernels.triton import backward, lookup, optimizer

    return {**lookup.OPERATORS, **backward.OPERATORS, **optimizer.OPERATORS}


def describe() -> dict[str, object]:
    """What ``build_info()`` says of this backend: version, and whether the interpreter is asked for.

    Does not import Triton.
    """
    import os

    asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    return {"version": version(), "interpreted": asked, "ran_on_gpu": False}
