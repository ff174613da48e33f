"""AMTL layers in models of other libraries, a module for each; none is needed by amtl.

- `deepctr`: deepctr-torch.
- `fuxictr`: FuxiCTR's models on `FeatureEmbedding`.
- `huggingface`: models of transformers, saved by their own `save_pretrained`.
- `torchrec`: TorchRec's collections of embeddings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from amtl.integrations.huggingface import save_as_dense

_TORCHREC = "torchrec.modules.embedding_modules"


def check(model: nn.Module, embeddings: Iterable[nn.Module]) -> None:
    """Whether AMTL layers may take the place of these embeddings of a model.

    Raises:
        ValueError: the library that the model is of would lose them.
    """
    if _TORCHREC in sys.modules:
        from amtl.integrations.torchrec import check_collections

        check_collections(model, embeddings)


def settle(model: nn.Module) -> None:
    """What a model needs whose embeddings became AMTL layers, or layers embeddings, in place."""
    save_as_dense(model)
    if _TORCHREC in sys.modules:
        from amtl.integrations.torchrec import reclass_collections

        reclass_collections(model)
