"""transformers: what its functions do with a converted model.

`save_pretrained` writes the tables as what they show, dense, under the keys of `nn.Embedding`: the
file is an ordinary one, and `from_pretrained` gives a model of the same outputs with or without
amtl. `amtl.save` writes the small file. `resize_token_embeddings` refuses the layers: revert,
resize, convert. `amtl.convert` sees to it by itself; a layer put into a model in another way needs
`save_as_dense(model)`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from amtl.layer.table import AMTLTable


def save_as_dense(model: nn.Module) -> None:
    """Let `save_pretrained`, of the model and of models in it, write dense tables for AMTL layers.

    Models without such a method stay as they are. Copies of the model keep this.
    """
    for module in model.modules():
        method = getattr(type(module), "save_pretrained", None)
        if method is None or "state_dict" not in inspect.signature(method).parameters:
            continue
        if any(isinstance(inner, AMTLTable) for inner in module.modules()):
            vars(module)["save_pretrained"] = functools.partial(_save, module)


def _save(model: Any, *args: Any, state_dict: Mapping[str, Any] | None = None, **more: Any) -> Any:
    state = _dense(model, model.state_dict() if state_dict is None else state_dict)
    return type(model).save_pretrained(model, *args, state_dict=state, **more)


def _dense(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict with one dense weight for each AMTL layer."""
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, AMTLTable)}
    inside = tuple(f"{name}." for name in layers)
    dense = {key: value for key, value in state.items() if not key.startswith(inside)}
    return dense | {f"{name}.weight": layer.dense_weight() for name, layer in layers.items()}
