"""How often a model looks each row of its embeddings up, by watching it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amtl.layer.convertible import require_model
from amtl.layer.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer.table_rows import require_rows


@contextlib.contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count what is looked up in a model's embeddings while the block runs, for `convert`.

        with torch.no_grad(), amtl.counting(model) as counts:
            for batch in train_batches:
                model(batch)
        amtl.convert(model, counts, budget=0.125)

    The batches are those of the training split, once each; an epoch of training does as well, for
    what activation checkpointing repeats counts once.
    Negatives that a model draws count like what was clicked; padding rows do not. Lookups past the
    modules, as by `F.embedding(ids, model.table.weight)`, and those of a compiled model are not
    seen: give it the model before `torch.compile`. Of several processes each counts its own share,
    to be summed before `convert`. Layers count as the embeddings did whose places they took, for
    `thaw(counts=...)` of a file that is to train on; collections of tables do not.

    Args:
        model: any module with nn.Embedding, nn.EmbeddingBag or such layers in it, or one of these.

    Yields:
        int64 [N] by the dotted name of each embedding, filled in while the block runs. At its end
        those that were never looked up are taken out, and named in a warning. O(1) a lookup.

    Raises:
        TypeError: no module.
        ValueError: the model has no embedding.
    """
    require_model(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag | AMTLEmbedding | AMTLEmbeddingBag)
    }
    if not found:
        raise ValueError("the model has no nn.Embedding or nn.EmbeddingBag whose lookups count")
    counts = {
        name: torch.zeros(
            module.num_embeddings, dtype=torch.int64, device=next(module.parameters()).device
        )
        for name, module in found.items()
    }
    hooks = [
        module.register_forward_pre_hook(_Adds(counts[name]), with_kwargs=True)
        for name, module in found.items()
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
        for name, module in found.items():
            if module.padding_idx is not None:
                counts[name][module.padding_idx] = 0
    idle = [name for name, times in counts.items() if not bool(times.any())]
    for name in idle:
        del counts[name]
    if idle:
        warnings.warn(
            f"no row of {', '.join(map(repr, idle))} was looked up through the module while "
            "lookups were counted, so there are no counts to convert it by",
            stacklevel=3,
        )


class _Adds:
    """A hook that adds what is looked up to counts."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:
            # Within a backward, which repeats what was counted.
            return
        rows = args[0] if args else kwargs["input"]
        require_rows(rows)
        if rows.layout == torch.jagged:
            rows = rows.values()
        rows = rows.reshape(-1).to(device=self.counts.device, dtype=torch.int64)
        self.counts.index_add_(0, rows, torch.ones_like(rows))
