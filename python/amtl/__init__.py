"""Embedding tables whose rows learn their own width."""

from amtl.budget import BudgetError
from amtl.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.options import SearchOptions
from amtl.table import AMTLTable

__all__ = [
    "AMTLEmbedding",
    "AMTLEmbeddingBag",
    "AMTLTable",
    "BudgetError",
    "SearchOptions",
]
