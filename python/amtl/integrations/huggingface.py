"""transformers, huggingface_hub, sentence-transformers: what their functions do with a layer.

`save_pretrained` writes the tables as what they show, dense, under the keys of `nn.Embedding`: the
file is an ordinary one, and `from_pretrained` gives a model of the same outputs with or without
amtl. So it is of models with huggingface_hub's `PyTorchModelHubMixin`, whose `from_pretrained`
would pass other keys by without a word, and of the modules of sentence-transformers and their
`save`. `amtl.save` writes the small file. `resize_token_embeddings` refuses the layers: revert,
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

_SENTENCES = "sentence_transformers."


def save_as_dense(model: nn.Module) -> None:
    """Let `save_pretrained`, of the model and of models in it, write dense tables for AMTL layers.

    And `save`, of what is of sentence-transformers. Models without such a method stay as they are.
    Copies of the model keep this.
    """
    for module in model.modules():
        saving = {name: getattr(type(module), name, None) for name in _methods(type(module))}
        found = {name: method for name, method in saving.items() if method is not None}
        if not found or not _holds_layers(module):
            continue
        for name, method in found.items():
            takes = "state_dict" in inspect.signature(method).parameters
            by = _save if takes and name == "save_pretrained" else _save_shown
            vars(module)[name] = functools.partial(by, module, name)


def _methods(kind: type) -> list[str]:
    of_sentences = any(base.__module__.startswith(_SENTENCES) for base in kind.__mro__)
    return ["save_pretrained", "save"] if of_sentences else ["save_pretrained"]


def _holds_layers(module: nn.Module) -> bool:
    return any(isinstance(inner, AMTLTable) for inner in module.modules())


def _save(
    model: Any, method: str, *args: Any, state_dict: Mapping[str, Any] | None = None, **more: Any
) -> Any:
    state = _dense(model, model.state_dict() if state_dict is None else state_dict)
    return getattr(type(model), method)(model, *args, state_dict=state, **more)


def _save_shown(model: nn.Module, method: str, *args: Any, **more: Any) -> Any:
    """A method that asks the model, or modules in it, for a state dict, which is dense to it."""
    before = {
        module: vars(module).get("state_dict")
        for module in model.modules()
        if _holds_layers(module) and not isinstance(module, AMTLTable)
    }
    for module in before:
        vars(module)["state_dict"] = functools.partial(_shown_state, module)
    try:
        return getattr(type(model), method)(model, *args, **more)
    finally:
        for module, former in before.items():
            del vars(module)["state_dict"]
            if former is not None:
                vars(module)["state_dict"] = former


def _shown_state(model: nn.Module, *args: Any, destination: Any = None, **more: Any) -> Any:
    state = type(model).state_dict(model, *args, destination=destination, **more)
    # What is within the state of another module, that one makes dense.
    return state if args or destination is not None or more.get("prefix") else _dense(model, state)


def _dense(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict with one dense weight for each AMTL layer."""
    named = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in named if isinstance(module, AMTLTable)}
    inside = tuple(f"{name}." for name in layers)
    dense = {key: value for key, value in state.items() if not key.startswith(inside)}
    return dense | {f"{name}.weight": layer.dense_weight() for name, layer in layers.items()}
