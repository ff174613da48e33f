"""TorchRec: collections that hold AMTL layers.

`fuse_embedding_optimizer`, `quantize_inference_model` and the sharders build new collections from
the configuration of an `EmbeddingBagCollection`, which knows nothing of the layers in it. So one
that holds a layer is of a class here: the same tables, state and outputs, but none that they know.
They leave it as it is; its parameters train by an ordinary optimizer or one fused in the backward.
`amtl.convert`, `amtl.load` and `amtl.revert` see to it by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torchrec.modules import embedding_modules as theirs

from amtl.layer.table import AMTLTable


class AMTLEmbeddingBagCollection(theirs.EmbeddingBagCollectionInterface):  # type: ignore[misc]
    """An `EmbeddingBagCollection` with AMTL layers in it."""

    forward = theirs.EmbeddingBagCollection.forward
    embedding_bag_configs = theirs.EmbeddingBagCollection.embedding_bag_configs
    is_weighted = theirs.EmbeddingBagCollection.is_weighted
    device = theirs.EmbeddingBagCollection.device


class AMTLEmbeddingCollection(theirs.EmbeddingCollectionInterface):  # type: ignore[misc]
    """An `EmbeddingCollection` with AMTL layers in it."""

    forward = theirs.EmbeddingCollection.forward
    embedding_configs = theirs.EmbeddingCollection.embedding_configs
    embedding_dim = theirs.EmbeddingCollection.embedding_dim
    embedding_names_by_table = theirs.EmbeddingCollection.embedding_names_by_table
    need_indices = theirs.EmbeddingCollection.need_indices
    device = theirs.EmbeddingCollection.device


_OURS: dict[type[nn.Module], type[nn.Module]] = {
    theirs.EmbeddingBagCollection: AMTLEmbeddingBagCollection,
    theirs.EmbeddingCollection: AMTLEmbeddingCollection,
}
_THEIRS = {ours: original for original, ours in _OURS.items()}


def check_collections(model: nn.Module, embeddings: Iterable[nn.Module]) -> None:
    """Whether the collections that hold `embeddings` could hold AMTL layers.

    Raises:
        ValueError: one is of a subclass, of which nothing is known.
    """
    wanted = set(embeddings)
    for module in model.modules():
        known = type(module) in _OURS or not isinstance(module, tuple(_OURS))
        if not known and wanted & set(module.modules()):
            raise ValueError(
                f"{type(module).__name__} is a subclass of a collection of TorchRec, which "
                "rebuilds it without the AMTL layers in it: use TorchRec's own class"
            )


def reclass_collections(model: nn.Module) -> None:
    """Give collections the class that fits what they hold now, in place."""
    for module in model.modules():
        holds = any(isinstance(inner, AMTLTable) for inner in module.modules())
        kind = (_OURS if holds else _THEIRS).get(type(module))
        if kind is not None:
            module.__class__ = kind
