"""Embedding tables whose rows learn their own width under one memory budget.

Put the layers into a model, freeze, train, save:

    counts = {"users": torch.bincount(train_users, minlength=model.users.num_embeddings)}
    amtl.convert(model, counts, budget=0.125)
    amtl.freeze(model)
    ...                                      # an optimizer, training
    amtl.save(model, "model.safetensors")

Where sizes are learned (`parametrization="ordinal"`), training comes first, with
`amtl.parameter_groups(model, lr=1e-2)` and `amtl.update_schedule(model, progress)`, and
`amtl.freeze(model, optimizer)` at about 40 % of it.

- `AMTLEmbedding`, `AMTLEmbeddingBag`: the layers; `AMTLEmbeddingCollection`: many tables in one
  call under one budget; `SearchOptions` has their keyword arguments.
- `counting`, `convert`, `revert`, `layers`, `parameter_groups`, `mask_parameters`,
  `table_parameters`, `name_sizes`, `update_schedule`, `freeze`, `thaw`, `grow`, `fuse`,
  `fused_optimizers`: for whole models.
- `save`, `load`, `open_packed`: packed files (safetensors, memory-mapped); `load` also opens runs.

Rooms, each using only those before it: `layer` (tables that learn sizes), `store` (files),
`integrations` (other people's models), `data` (from tables to indices), `peers` (methods of the
field), `run` (training), `paper` (all methods at equal bytes), `cli`.
"""

import sys

if sys.argv[:1] == ["-m"] and "amtl" in sys.orig_argv:
    # `python -m amtl` imports this before it runs a line of `__main__`.
    import amtl_command

    amtl_command.guard()

import amtl.integrations  # noqa: F401  (registers what other libraries ask of the layers)
from amtl.layer.budget import BudgetError
from amtl.layer.collection import AMTLEmbeddingCollection
from amtl.layer.conversion import (
    convert,
    freeze,
    fuse,
    fused_optimizers,
    grow,
    layers,
    mask_parameters,
    parameter_groups,
    revert,
    table_parameters,
    thaw,
    update_schedule,
)
from amtl.layer.counting import counting
from amtl.layer.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.layer.names import name_sizes
from amtl.layer.options import SearchOptions
from amtl.layer.table import AMTLTable
from amtl.opening import load
from amtl.store import PackedFile, PackedFileError, TensorFileError, open_packed, save

__all__ = [
    "AMTLEmbedding",
    "AMTLEmbeddingBag",
    "AMTLEmbeddingCollection",
    "AMTLTable",
    "BudgetError",
    "PackedFile",
    "PackedFileError",
    "SearchOptions",
    "TensorFileError",
    "convert",
    "counting",
    "freeze",
    "fuse",
    "fused_optimizers",
    "grow",
    "layers",
    "load",
    "mask_parameters",
    "name_sizes",
    "open_packed",
    "parameter_groups",
    "revert",
    "save",
    "table_parameters",
    "thaw",
    "update_schedule",
]
