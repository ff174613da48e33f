"""TorchRec: collections that hold AMTL layers.

`fuse_embedding_optimizer`, `quantize_inference_model` and the sharders build new collections from
the configuration of an `EmbeddingBagCollection`, which knows nothing of the layers in it. So one
that holds a layer is of a class here: the same tables, state and outputs, but none that they know.
They leave it as it is; its parameters train by an ordinary optimizer or one fused in the backward.
`amtl.convert`, `amtl.load` and `amtl.revert` see to it by themselves.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torchrec.modules import embedding_modules as theirs

from amtl.table import AMTLTable


class AMTLEmbeddingBagCollection(theirs.EmbeddingBagCollectionInterface):  # type: ignore[misc]
    """An `EmbeddingBagCollection` with AMTL layers in it."""

    forward = theirs.EmbeddingBagCollection.forward
    embedding_bag_configs = theirs.EmbeddingBagCollection.embedding_bag_configs
    is_weighted = theirs.EmbeddingBagCollection.is_weighted
    device = theirs.EmbeddingBagCollection.device
    original: ClassVar[type[nn.Module]] = theirs.EmbeddingBagCollection


class AMTLEmbeddingCollection(theirs.EmbeddingCollectionInterface):  # type: ignore[misc]
    """An `EmbeddingCollection` with AMTL layers in it."""

    forward = theirs.EmbeddingCollection.forward
    embedding_configs = theirs.EmbeddingCollection.embedding_configs
    embedding_dim = theirs.EmbeddingCollection.embedding_dim
    embedding_names_by_table = theirs.EmbeddingCollection.embedding_names_by_table
    need_indices = theirs.EmbeddingCollection.need_indices
    device = theirs.EmbeddingCollection.device
    original: ClassVar[type[nn.Module]] = theirs.EmbeddingCollection


_KINDS: tuple[Any, ...] = (AMTLEmbeddingBagCollection, AMTLEmbeddingCollection)


def reclass_collections(model: nn.Module) -> None:
    """Give collections the class that fits what they hold now, in place.

    Raises:
        TypeError: a subclass of a collection, of which nothing is known, holds a layer.
    """
    for module in model.modules():
        holds = any(isinstance(inner, AMTLTable) for inner in module.modules())
        for kind in _KINDS:
            if holds and type(module) is kind.original:
                module.__class__ = kind
            elif holds and isinstance(module, kind.original):
                raise TypeError(
                    f"{type(module).__name__} is a subclass of {kind.original.__name__}, which "
                    "TorchRec rebuilds without the AMTL layers in it: use the class itself"
                )
            elif not holds and type(module) is kind:
                module.__class__ = kind.original
