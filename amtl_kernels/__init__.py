"""Fused operators for embedding tables whose rows have their own width."""

from amtl_kernels import _autograd, backend, reference
from amtl_kernels._version import __version__

backend.initialize()
_autograd.register()

from amtl_kernels import fused, optim  # noqa: E402
from amtl_kernels.backend import (  # noqa: E402
    build_info,
    get_backend,
    register_backend,
    set_backend,
    synchronize,
    use_backend,
)
from amtl_kernels.memory import advise_huge_pages, empty_table  # noqa: E402
from amtl_kernels.ops import (  # noqa: E402
    adaptive_embedding,
    adaptive_embedding_bag,
    masked_embedding,
    masked_embedding_bag,
    tiered_embedding,
    tiered_embedding_bag,
)
from amtl_kernels.tables import (  # noqa: E402
    adaptive_embedding_bag_tables,
    masked_embedding_bag_tables,
    tiered_embedding_bag_tables,
)
from amtl_kernels.tiered import TieredTable  # noqa: E402

__all__ = [
    "TieredTable",
    "__version__",
    "adaptive_embedding",
    "adaptive_embedding_bag",
    "adaptive_embedding_bag_tables",
    "advise_huge_pages",
    "build_info",
    "empty_table",
    "fused",
    "get_backend",
    "masked_embedding",
    "masked_embedding_bag",
    "masked_embedding_bag_tables",
    "optim",
    "reference",
    "register_backend",
    "set_backend",
    "synchronize",
    "tiered_embedding",
    "tiered_embedding_bag",
    "tiered_embedding_bag_tables",
    "use_backend",
]
