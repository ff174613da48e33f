"""What goes past a layer: models that use its weight themselves, and calls of what it replaced.

Nobody can read the former off a model, so the first forward passes after a conversion are watched,
one in training mode and one in evaluation: where the weight of a layer goes into a lookup or a
product, the pass ends with an error that names the layer. So it does where a tier goes there, by a
list in which the model kept the weight. Passes after both cost nothing.

An embedding that a layer took the place of may live on in a loss or a variable. It works as ever,
so that whoever trains it would never know that the model has another: it says so.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from amtl.layer.size_head import being_traced
from amtl.layer.table import AMTLTable
from amtl.layer.tiers import Weakly

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
    def __init__(self, tables: Mapping[int, AMTLTable]) -> None:
        super().__init__()
        self.tables = tables

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _USES:
            given = (*args, *kwargs.values())
            lists = (value for value in given if isinstance(value, (list, tuple)))
            for value in itertools.chain(given, *lists):
                if id(value) in self.tables:
                    _refuse(self.tables[id(value)], func.__name__)
        return func(*args, **kwargs)


def _refuse(layer: AMTLTable, use: str) -> NoReturn:
    name = layer.name
    if layer.phase == "frozen":
        raise RuntimeError(
            f"the model uses the weight of {name!r} that it keeps in a list, a dict or an object "
            f"of its own ({use}): frozen, that is a part of what is stored, not what lookups show. "
            f"{_called(name)}.weight, read where it is used, shows all rows"
        )
    raise RuntimeError(
        f"the model uses the weight of {name!r} itself ({use}), where no mask reaches it: "
        "amtl.freeze the model first, after which the weight is what lookups show; or call the "
        f"module, for all rows on torch.arange({layer.num_embeddings}), or convert the model "
        f"without {name!r}"
    )


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
                self.remove()
            return
        tables = {
            id(parameter): module
            for module in model.modules()
            if isinstance(module, AMTLTable)
            for parameter in (module._parameters.get("weight"), *module._tiers())
            if parameter is not None
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

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def watch_first_passes(model: nn.Module) -> None:
    """Let the next forward pass in either mode fail where it goes past one of its AMTL layers."""
    _FirstPasses(model)


def end_first_passes(model: nn.Module) -> None:
    """Takes back `watch_first_passes`, whose hooks TorchScript would compile with the model."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _FirstPasses):
                owner.remove()


class _Calls:
    """A hook of an embedding that warns, once, of a call with gradients while its layer lives.

    Copies and files of the embedding are without the layer, and silent.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = Weakly(layer)

    def __call__(self, module: nn.Module, inputs: object) -> None:
        # Without gradients it is looked at for comparison.
        if being_traced() or not torch.is_grad_enabled():
            return
        layer, self.layer = self.layer(), Weakly()
        if layer is not None:
            name = str(getattr(layer, "name", ""))
            warnings.warn(
                f"table {name!r}: the {type(module).__name__} from before is still called, by a "
                "loss or a variable that holds it. The model does not know of what it looks up or "
                f"learns, and no file will: call {_called(name)}, build the loss after "
                "amtl.convert, or pass it the layer",
                stacklevel=5,
            )


def _called(name: str) -> str:
    """How a module is written, by its dotted name."""
    if not name:
        return "the layer that amtl.convert returned"
    parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in name.split("."))
    return f"model{''.join(parts)}"


def watch_calls(embedding: nn.Module, layer: nn.Module) -> None:
    """Let an embedding warn of calls from now on, for a layer has its place.

    The layer is not held.
    """
    # The layer has taken over the dictionary itself, with the hooks of the user's.
    embedding._forward_pre_hooks = OrderedDict(embedding._forward_pre_hooks)
    embedding.register_forward_pre_hook(_Calls(layer))


def end_calls(module: nn.Module) -> nn.Module:
    """Takes back `watch_calls` for a module that makes way: of itself, or of what it replaced.

    Returns:
        The embedding that it replaced, if that lives; else itself.
    """
    former = module.__dict__.get("_former", Weakly())()
    first = former if isinstance(former, nn.Embedding | nn.EmbeddingBag) else module
    for embedding in (module, first):
        for key, hook in list(embedding._forward_pre_hooks.items()):
            if isinstance(hook, _Calls):
                del embedding._forward_pre_hooks[key]
    return first
