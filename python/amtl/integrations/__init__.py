"""AMTL layers in models of other libraries, a module for each; none is needed by amtl.

- `deepctr`: deepctr-torch.
- `huggingface`: models of transformers, saved by their own `save_pretrained`.
- `torchrec`: TorchRec's collections of embeddings.
"""

from __future__ import annotations

import sys

from torch import nn

from amtl.integrations.huggingface import save_as_dense


def settle(model: nn.Module) -> None:
    """What a model needs whose embeddings became AMTL layers, or layers embeddings, in place."""
    save_as_dense(model)
    if "torchrec.modules.embedding_modules" in sys.modules:
        from amtl.integrations.torchrec import reclass_collections

        reclass_collections(model)
