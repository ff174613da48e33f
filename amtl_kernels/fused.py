"""Lookups whose backward updates the table: no gradient of the table is ever stored.

Each function is its namesake in ``amtl_kernels`` with ``optimizer`` required: one of
``amtl_kernels.optim`` that holds the table, or all tables in one group. ``backward()`` applies the
update to a row as soon as the row's gradient is summed, so that weight and state pass through the
cache once; ``table.grad`` stays None, and a later ``optimizer.step()`` finds nothing to do for the
table (and updates the optimizer's other parameters as usual). Learning rate and state are the
optimizer's own: schedulers, ``state_dict`` and checkpoints work as they do without fusing.

The gradient is not rounded to the table's type before the update, and the kept prefix is the row's
size, where a separate step ends at the last non-zero gradient. What the caller gives up:
gradients cannot be accumulated over several backwards, nor clipped by a norm over all parameters.
Several lookups in one table within one backward update it one after the other. The functions are
for eager mode; ``torch.compile`` breaks the graph at them.

On a GPU a step waits for nothing, so it can be captured into a CUDA graph: warm up with a step
first, which makes the state and looks whether ``row_group`` is in order, and give the optimizer
``capturable=True``. Row-wise
Adagrad on rows of more than 6,144 columns is the exception: it makes row gradients, whose number
the host must know.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

from torch import Tensor

from amtl_kernels import ops, tables
from amtl_kernels._calls import check_optimizer

_Arguments = ParamSpec("_Arguments")


def _required(lookup: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """The lookup, with ``optimizer`` required."""

    @functools.wraps(lookup)
    def update(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        if "optimizer" not in kwargs:
            name = lookup.__name__
            raise TypeError(f"{name}() missing 1 required keyword-only argument: 'optimizer'")
        check_optimizer(kwargs["optimizer"])
        return lookup(*args, **kwargs)

    return update


masked_embedding = _required(ops.masked_embedding)
""":func:`amtl_kernels.masked_embedding` whose backward updates the table."""
masked_embedding_bag = _required(ops.masked_embedding_bag)
""":func:`amtl_kernels.masked_embedding_bag` whose backward updates the table."""
adaptive_embedding = _required(ops.adaptive_embedding)
""":func:`amtl_kernels.adaptive_embedding` whose backward updates the table."""
adaptive_embedding_bag = _required(ops.adaptive_embedding_bag)
""":func:`amtl_kernels.adaptive_embedding_bag` whose backward updates the table."""
tiered_embedding = _required(ops.tiered_embedding)
""":func:`amtl_kernels.tiered_embedding` whose backward updates the table."""
tiered_embedding_bag = _required(ops.tiered_embedding_bag)
""":func:`amtl_kernels.tiered_embedding_bag` whose backward updates the table."""
masked_embedding_bag_tables = _required(tables.masked_embedding_bag_tables)
""":func:`amtl_kernels.masked_embedding_bag_tables` whose backward updates the tables."""
adaptive_embedding_bag_tables = _required(tables.adaptive_embedding_bag_tables)
""":func:`amtl_kernels.adaptive_embedding_bag_tables` whose backward updates the tables."""
tiered_embedding_bag_tables = _required(tables.tiered_embedding_bag_tables)
""":func:`amtl_kernels.tiered_embedding_bag_tables` whose backward updates the tables."""
