"""Which modules an AMTL layer may take the place of, what is said of others, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from amtl.layer.basis import turn_states
from amtl.layer.embedding import AMTLEmbeddingBag
from amtl.layer.replicas import retire, wrappers_of
from amtl.layer.table import AMTLTable
from amtl.layer.tiers import hand_over, replace_parameters, thaw_optimizers
from amtl_kernels._calls import kind

_OF_NO_CONSEQUENCE = {
    *("__init__", "__module__", "__qualname__", "__doc__", "__annotations__", "__annotate_func__"),
    *("__static_attributes__", "__firstlineno__", "__constants__"),
    *("reset_parameters", "extra_repr"),
}
"""What a subclass of nn.Embedding may define and still be replaced."""


def require_model(model: object) -> None:
    """Raise TypeError unless this is a module."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else kind(model)
        made = ", not a model made of it" if isinstance(model, type) else ""
        raise TypeError(f"model must be an nn.Module, got {what}{made}")


def is_embedding(module: nn.Module) -> bool:
    """Whether it is an embedding of PyTorch's."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def embeddings_of(model: nn.Module) -> list[str]:
    """Dotted names of PyTorch's embeddings in a model."""
    return [name for name, module in model.named_modules() if is_embedding(module)]


def find_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a dotted name.

    Raises:
        ValueError: there is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"the model has no module {name!r}; its embeddings are {embeddings_of(model)}"
        ) from None


def check_convertible(name: str, module: nn.Module) -> None:
    """Refuse what is no embedding, or more than one.

    Raises:
        ValueError: see the message.
    """
    if isinstance(module, AMTLTable):
        raise ValueError(f"{name!r} is an AMTL layer already")
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        raise ValueError(f"{name!r} is {kind(module)}, not an nn.Embedding or nn.EmbeddingBag")
    if parametrize.is_parametrized(module):
        raise ValueError(
            f"{name!r} has parametrizations; remove them first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    if type(module).forward is not base.forward:
        raise ValueError(
            f"{name!r} is {kind(module)} with a forward of its own, which an AMTL layer would lose"
        )
    kinds = type(module).__mro__[: type(module).__mro__.index(base)]
    own = {key for kind in kinds for key in vars(kind)} - _OF_NO_CONSEQUENCE
    own |= {*module._parameters, *module._buffers, *module._modules} - {"weight"}
    if own:
        raise ValueError(
            f"{name!r} is {kind(module)} with {', '.join(map(repr, sorted(own)))} of "
            "its own, which an AMTL layer would lose: put a plain nn.Embedding in its place"
        )
    if module.weight.is_meta:
        raise ValueError(
            f"{name!r} is on the meta device and has no numbers yet: model.to_empty(device='cpu') "
            "and initialise or load it first, or amtl.load(FILE, model), which fills it"
        )
    if module.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name!r} has weights of type {module.weight.dtype}, not float32, float16 or "
            "bfloat16: model.float() makes float32 of them"
        )


def check_unshared(model: nn.Module, wanted: Mapping[nn.Module, str]) -> None:
    """Refuse weights that another module uses, too: masks would not reach it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    for module, name in wanted.items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        users = owners[id(weight)]
        if len(users) > 1:
            raise ValueError(
                f"the weight of {name!r} is shared by {users}: an AMTL layer keeps only a prefix "
                "of each row, which the other user would not see. An output layer stays tied, "
                "trains and is saved if its module is left out, and the model's forward has "
                f"F.linear(h, self.{name or 'emb'}.weight, bias) instead, called after "
                "amtl.freeze. Or untie it (give the other module a clone of the weight), or share "
                "the embedding module itself."
            )


def embedding_from(layer: AMTLTable, masked: bool) -> nn.Embedding | nn.EmbeddingBag:
    """The embedding that takes the place of a layer, also in the optimizers of its table.

    Args:
        layer: of one table.
        masked: zeroes in the search phase what masks hide, else the weight is the very same.
    """
    tables = layer.table_parameters()
    weight = tables[0]
    if layer.phase == "frozen" or masked or layer.basis is not None:
        trains = weight.requires_grad or layer.masterless
        whole = layer.phase == "search" and not masked
        dense = layer._out_of_basis(weight.detach()) if whole else layer.dense_weight()
        weight = nn.Parameter(dense, requires_grad=trains)
        optimizers = layer._followed(None, tables) if trains else []
        hand_over(tables, [weight], layer.name)
        if layer.phase == "frozen":
            thaw_optimizers(optimizers, weight, tables, layer._plan())
        else:
            replace_parameters(optimizers, tables, [weight])
        if layer.basis is not None:
            turn_states(optimizers, weight, layer.basis.double().inverse().T)
        retire(wrappers_of(tables))
    common: dict[str, Any] = {
        "max_norm": layer.max_norm,
        "norm_type": layer.norm_type,
        "sparse": layer.sparse,
        "padding_idx": layer.padding_idx,
        "_weight": weight.detach(),
    }
    shape = layer.num_embeddings, layer.embedding_dim
    module: nn.Embedding | nn.EmbeddingBag
    if isinstance(layer, AMTLEmbeddingBag):
        last = layer.include_last_offset
        module = nn.EmbeddingBag(*shape, mode=layer.mode, include_last_offset=last, **common)
    else:
        module = nn.Embedding(*shape, **common)
    module.weight = weight
    return module
