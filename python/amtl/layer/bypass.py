"""Models that look up in an embedding's weight themselves, past the layer and its masks.

Nobody can read that off a model, so the first forward passes after a conversion are watched, one in
training mode and one in evaluation: where the weight of a layer goes into a lookup or a product,
the pass ends with an error that names the layer. Passes after both cost nothing.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from amtl.layer.table import AMTLTable

_TRANSPOSED: tuple[Any, ...] = (Tensor.T, Tensor.mT)
_USES = {
    *(F.embedding, F.embedding_bag, torch.embedding, torch.embedding_bag),
    *(torch.index_select, Tensor.index_select, torch.gather, Tensor.gather, Tensor.__getitem__),
    *(F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
    *(torch.mm, Tensor.mm, torch.sparse.mm, torch.addmm, torch.einsum),
    *(torch.t, Tensor.t, torch.transpose, Tensor.transpose),
    *(attribute.__get__ for attribute in _TRANSPOSED),
    # On the way to a product: graph models join tables, and those that score every row scale them.
    *(torch.cat, torch.concat, torch.vstack, torch.stack),
    *(F.normalize, F.layer_norm, F.dropout),
}
"""What reads rows of a table, or multiplies by it; norms and the like are no such use."""


class _Watch(TorchFunctionMode):
    def __init__(self, tables: Mapping[int, str]) -> None:
        super().__init__()
        self.tables = tables

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _USES:
            given = (*args, *kwargs.values())
            lists = (value for value in given if isinstance(value, (list, tuple)))
            for value in itertools.chain(given, *lists):
                if id(value) in self.tables:
                    name = self.tables[id(value)]
                    raise RuntimeError(
                        f"the model uses the weight of {name!r} itself ({func.__name__}), where no "
                        f"mask reaches it: amtl.freeze the model first, after which the weight is "
                        f"what lookups show; or call the module, for all rows on torch.arange"
                        f"({len(value)}), or convert the model without {name!r}"
                    )
        return func(*args, **kwargs)


class _FirstPasses:
    """Hooks around forward passes until one of each mode has ended well."""

    def __init__(self, model: nn.Module) -> None:
        self.watch: _Watch | None = None
        self.thread: int | None = None
        self.seen: set[bool] = set()
        self.handles = [
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def begin(self, model: nn.Module, inputs: object) -> None:
        if torch.compiler.is_compiling() or torch._C._is_tracing() or self.watch is not None:
            return
        if model.training in self.seen:
            if len(self.seen) == 2:
                for handle in self.handles:
                    handle.remove()
            return
        tables = {
            id(module._parameters["weight"]): name
            for name, module in model.named_modules()
            if isinstance(module, AMTLTable) and module._parameters.get("weight") is not None
        }
        self.watch, self.thread = _Watch(tables), threading.get_ident()
        self.watch.__enter__()

    def end(self, model: nn.Module, inputs: object, output: object) -> None:
        if self.watch is None or self.thread != threading.get_ident():
            return
        self.watch.__exit__(None, None, None)
        self.watch = None
        # None is also what a pass gives that failed.
        if output is not None:
            self.seen.add(model.training)


def watch_first_passes(model: nn.Module) -> None:
    """Let the next forward pass in either mode fail where it goes past one of its AMTL layers."""
    _FirstPasses(model)
