"""Names of modules and parameters in a model: what wrappers add, and where sizes are named.

What learns the sizes belongs to its layer, whose name others know: a penalty or an initialiser of
all that is called `embedding` would meet `embedding.head.…` as well. Optimizers and
DistributedDataParallel have to meet it somewhere. So a model that `convert` has changed names it at
its root first, and walks that name a parameter once never come to the other name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from amtl.layer.table import AMTLTable
from amtl.layer.tiers import Weakly

COMPILED, PARALLEL = "_orig_mod", "module"
SIZES = "amtl_sizes"
_Model = TypeVar("_Model", bound=nn.Module)


def wrapped_as(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps what it wraps; None for other modules."""
    if COMPILED in module._modules:
        return COMPILED
    return PARALLEL if isinstance(module, DataParallel | DistributedDataParallel) else None


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile, DistributedDataParallel and DataParallel have wrapped; else the model."""
    while (name := wrapped_as(model)) is not None:
        model = model.get_submodule(name)
    return model


class SizeNames(nn.Module):
    """Second names of what learns sizes, `<i>.…` for that of the i-th layer.

    Only names: state dicts, moves to a device and `apply` reach a head through its layer. A layer
    that is frozen, or that has left the model, is not named.

    Args:
        layers: those that learn sizes, in the order of the model.
    """

    def __init__(self, layers: Iterable[AMTLTable]) -> None:
        super().__init__()
        self._name(list(layers))

    def _name(self, layers: list[AMTLTable]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]
        for layer in layers:
            layer.size_names = Weakly(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layers": [layer() for layer in self._layers]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name([layer for layer in state["_layers"] if layer is not None])

    def before(self, layer: AMTLTable) -> set[int]:
        """Ids of the parameters that come before those of a layer here, of frozen layers too."""
        found: set[int] = set()
        for other in (reference() for reference in self._layers):
            if other is layer:
                break
            if other is not None and other.head is not None:
                found.update(map(id, other.head.parameters()))
        return found

    def _heads(self) -> dict[str, nn.Module]:
        found = ((str(place), layer()) for place, layer in enumerate(self._layers))
        return {
            name: layer.head
            for name, layer in found
            if layer is not None and layer.head is not None and layer.mask_parameters()
        }

    def __getattr__(self, name: str) -> Any:
        return self._heads()[name] if name.isdigit() else super().__getattr__(name)

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of nn.Module, with the heads in walks that name a module once.

        Others give all names that are in the state dict, as torch.export expects.
        """
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        for name, head in self._heads().items() if remove_duplicate else ():
            yield from head.named_modules(memo, f"{prefix}.{name}".removeprefix("."))


def name_sizes(model: _Model) -> _Model:
    """Let walks over a model meet what learns sizes at its root, `amtl_sizes.<i>.…`.

    Penalties and initialisers of all that is called `embedding` pass it by then; optimizers and
    DistributedDataParallel find it as ever, and state dicts keep their keys. `convert` and
    `PackedFile.into` do it by themselves; a model that makes its layers itself may ask for it once
    they are in place. Containers (nn.Sequential, nn.ModuleList, nn.ModuleDict) stay as they are,
    for their children are counted and called, and so do models that learn no sizes.

    Args:
        model: what holds the layers, as it is or wrapped by torch.compile or data parallelism.

    Returns:
        The model.
    """
    root = unwrapped(model)
    children = root._modules
    children.pop(SIZES, None)
    learning = [
        module
        for module in root.modules()
        if isinstance(module, AMTLTable) and module.options.parametrization != "rule"
    ]
    if learning and not isinstance(root, AMTLTable | nn.Sequential | nn.ModuleList | nn.ModuleDict):
        behind = dict(children)
        children.clear()
        # A walk takes the first name that it meets.
        children[SIZES] = SizeNames(learning)
        children.update(behind)
    return model
