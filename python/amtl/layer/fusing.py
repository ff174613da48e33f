"""Optimizers that a backward applies: the handle of a layer, and what it does not go with.

A handle is an optimizer of `amtl_kernels.optim` that holds the table. While a layer has one, no
gradient of the table is made: backward updates each row as soon as its gradient is summed. The
handle stays an ordinary optimizer: its learning rate is read at every update, its state is saved
and loaded as any other, and its `step()` finds no gradient and only counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from amtl.layer.instances import instances_of
from amtl.layer.replicas import are_several
from amtl_kernels.optim import SGD, RowOptimizer, RowwiseAdagrad

FusedOptimizer = Callable[[list[nn.Parameter]], RowOptimizer] | RowOptimizer
"""What makes an optimizer of parameters, such as its class or a `functools.partial` of it; or one
that holds them already."""


def make_handle(optimizer: FusedOptimizer, tables: Sequence[nn.Parameter]) -> RowOptimizer:
    """The optimizer that updates these tables in the backward.

    Args:
        optimizer: see `FusedOptimizer`.
        tables: what it has to hold.

    Raises:
        TypeError: not an optimizer of `amtl_kernels.optim`, nor what makes one.
        ValueError: it does not hold the tables, those of one layer in one group.
    """
    made: Any = optimizer
    if not isinstance(optimizer, Optimizer) and callable(optimizer):
        made = optimizer(list(tables))
    if not isinstance(made, RowOptimizer):
        raise TypeError(
            "a fused optimizer is SGD, Adagrad, RowwiseAdagrad or Adam of amtl_kernels.optim, such "
            f"as functools.partial(amtl_kernels.optim.Adam, lr=1e-3), not {type(made).__name__}"
        )
    return made


def require_rule_of_codes(optimizer: Optimizer | None, name: str) -> None:
    """Raise ValueError unless this optimizer can be fused with a table without masters."""
    if not isinstance(optimizer, SGD | RowwiseAdagrad):
        has = "none" if optimizer is None else type(optimizer).__qualname__
        raise ValueError(
            f"table {name!r}: masters=False needs a fused SGD or RowwiseAdagrad, whose state is "
            f"smaller than masters, and it has {has}: layer.fuse(functools.partial("
            "amtl_kernels.optim.RowwiseAdagrad, lr=...)) before freeze() (of a model: amtl.fuse)"
        )
    if any(group["decay_every"] and group["weight_decay"] for group in optimizer.param_groups):
        raise ValueError(
            f"table {name!r}: masters=False leaves codes only, which decay_every cannot decay: use "
            "weight_decay alone, or masters=True"
        )


def first_step(optimizer: Optimizer | None, table: nn.Parameter) -> float:
    """What numbers of a table move by at first; 0 if it has been trained, or nobody knows.

    Row-wise Adagrad divides a row's first gradient by its root mean square.
    """
    if not isinstance(optimizer, RowwiseAdagrad) or optimizer.state.get(table):
        return 0.0
    return float(optimizer.check_owns([table])["lr"])


def require_no_need_of_masters(
    name: str, weight: Tensor, optimizer: Optimizer | None, renormed: bool
) -> None:
    """Raise unless a table can train as codes.

    Args:
        name: of the table.
        weight: [N, D].
        optimizer: the fused one.
        renormed: whether it has a `max_norm`.

    Raises:
        ValueError: it cannot.
    """
    require_rule_of_codes(optimizer, name)
    if not weight.requires_grad:
        raise ValueError(f"table {name!r} does not train: to_integers() makes codes of it")
    if weight.dtype != torch.float32:
        raise ValueError(
            f"table {name!r}: masters=False makes codes of float32, not of {weight.dtype}: convert "
            "the layer first, layer.float()"
        )
    if renormed:
        raise ValueError(
            f"table {name!r} has max_norm, which scales rows in place as codes cannot be scaled: "
            "it needs masters=True"
        )


@dataclass
class Updated:
    """The last update of a layer's table: in which backward, and after how many steps of whom."""

    backward: int = -1
    steps: int = -1
    passes: _Passes | None = None


class _Passes:
    """How often `step()` of an optimizer was called, and whether a table went without it."""

    def __init__(self) -> None:
        self.steps = 0
        self.skipped: str | None = None
        self.scales: bool | None = None

    def stepping(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.skipped is not None:
            name, self.skipped = self.skipped, None
            self.steps += 1
            raise RuntimeError(_twice(name))
        self.steps += 1

    def updating(self, updated: Updated, name: str, grad: Tensor) -> None:
        if self.scales is not False:
            self.scales = _scales_gradients()
            if self.scales:
                raise RuntimeError(
                    f"table {name!r} has a fused optimizer, and a GradScaler of this process "
                    "scales losses: the backward would update the table by gradients that nobody "
                    "scales back. Call amtl.fuse(model, None), or do without the scaler, which "
                    "bfloat16 has no need of"
                )
        # Lookups within one backward are one pass.
        backward = torch._C._current_graph_task_id()
        again = updated.passes is self and updated.steps == self.steps
        if again and updated.backward != backward:
            if self.steps:
                raise RuntimeError(_twice(name))
            # Whoever never calls step() means every backward to be one.
            self.skipped = name
        updated.backward, updated.steps, updated.passes = backward, self.steps, self


def _scales_gradients() -> bool:
    """Whether a GradScaler of this process is in use; O(objects in the process)."""
    scalers = instances_of(torch.amp.GradScaler)
    return any(scaler.is_enabled() and scaler._scale is not None for scaler in scalers)


def _twice(name: str) -> str:
    return (
        f"a second backward reached table {name!r} before step() of its fused optimizer. Each "
        "backward is an update, so gradients do not add up: call step() after each, or let "
        "layer.fuse(None) (of a model: amtl.fuse(model, None)) go back to gradients, which the "
        "same optimizer takes at its step()"
    )


_passes: WeakKeyDictionary[Optimizer, _Passes] = WeakKeyDictionary()


def refuse_repetition(updated: Updated, name: str) -> None:
    """Raise where a lookup is repeated in a backward that has changed the table since.

    Activation checkpointing would go on with another output than the one of the forward.

    Raises:
        RuntimeError: it is.
    """
    # A backward within this one, as reentrant checkpointing has it, came after it.
    if 0 <= torch._C._current_graph_task_id() <= updated.backward:
        raise RuntimeError(
            f"activation checkpointing repeats a lookup of table {name!r} that the backward has "
            "updated since, by its fused optimizer: look the table up once in what is "
            "checkpointed, or outside of it, or call amtl.fuse(model, None)"
        )


def watch(out: Tensor, optimizer: RowOptimizer, updated: Updated, name: str) -> Tensor:
    """Refuse a second update between two steps, once the output's gradient arrives."""
    passes = _passes.get(optimizer)
    if passes is None:
        passes = _passes[optimizer] = _Passes()
        optimizer.register_step_pre_hook(passes.stepping)
    if out.requires_grad:
        out.register_hook(partial(passes.updating, updated, name))
    return out


def refuse_replicas(tables: Iterable[nn.Parameter], name: str) -> None:
    """Raise inside a DistributedDataParallel that is to average these tables' gradients.

    Raises:
        RuntimeError: it is.
    """
    if not are_several():
        return
    wrapper: Any = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return
    averaged = {id(p) for p in wrapper._module_parameters}
    if any(id(table) in averaged for table in tables):
        raise RuntimeError(
            f"table {name!r} has a fused optimizer, which updates it from the samples of one "
            "process: DistributedDataParallel, which averages gradients, has none to average, and "
            "processes would part. Call amtl.fuse(model, None) before wrapping, and step() the "
            "optimizer"
        )
