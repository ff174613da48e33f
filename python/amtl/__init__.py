"""Embedding tables whose rows learn their own width."""

from amtl.budget import BudgetError
from amtl.convert import (
    convert,
    freeze,
    layers,
    mask_parameters,
    revert,
    table_parameters,
    update_schedule,
)
from amtl.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.options import SearchOptions
from amtl.packing import PackedFile, PackedFileError, load, open_packed, save
from amtl.table import AMTLTable
from amtl.tensorfile import TensorFileError

__all__ = [
    "AMTLEmbedding",
    "AMTLEmbeddingBag",
    "AMTLTable",
    "BudgetError",
    "PackedFile",
    "PackedFileError",
    "SearchOptions",
    "TensorFileError",
    "convert",
    "freeze",
    "layers",
    "load",
    "mask_parameters",
    "open_packed",
    "revert",
    "save",
    "table_parameters",
    "update_schedule",
]
