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
from amtl.layer.hosts import Host, register

_FUXICTR = "fuxictr.pytorch.torch_utils"
_TORCHREC = "torchrec.modules.embedding_modules"


def _check(model: nn.Module, embeddings: Iterable[nn.Module]) -> None:
    if _TORCHREC in sys.modules:
        from amtl.integrations.torchrec import check_collections

        check_collections(model, embeddings)


def _settle(model: nn.Module) -> None:
    save_as_dense(model)
    if _FUXICTR in sys.modules:
        from amtl.integrations.fuxictr import regularise_layers

        regularise_layers(model)
    if _TORCHREC in sys.modules:
        from amtl.integrations.torchrec import reclass_collections

        reclass_collections(model)


register(Host(_check, _settle))
