"""Graphs of models that hold AMTL layers: torch.fx records a call of one, TorchScript has none."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy


def record(layer: nn.Module, method: str, proxy: Proxy, *args: Any) -> Any:
    """A node that calls a layer, for a model that torch.fx traces.

    What a layer does depends on numbers, which a tracer does not have. So it is a leaf of the graph
    like the modules of torch.nn, in either phase, and trains and freezes where it is.

    Args:
        layer: a module of the model.
        method: of the layer.
        proxy: one of the arguments, which says who traces.
        *args: all of them.

    Raises:
        RuntimeError: the layer is no module of the model, or the model itself.
    """
    tracer: Any = proxy.tracer
    try:
        path = tracer.path_of_module(layer)
    except NameError:
        path = ""
    if not path:
        raise RuntimeError(
            f"torch.fx records a call of {type(layer).__name__} under its name in the traced "
            "model, and here it has none: trace a model that holds it as a module, such as "
            "nn.Sequential(layer)"
        )
    if method == "forward":
        return tracer.create_proxy("call_module", path, args, {})
    module = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_method", method, (module, *args), {})


def refuse_script(layer: nn.Module) -> NoReturn:
    """Say why TorchScript cannot have a layer, and what can.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(layer).__name__}, whose sizes are no part of its "
        "code: use torch.compile, torch.export or, after eval(), torch.jit.trace; or script a "
        "dense model with the same outputs, amtl.revert(copy.deepcopy(model), masked=True) (of a "
        "collection, with its embeddings() in its place)"
    )
