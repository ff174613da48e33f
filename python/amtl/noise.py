"""Seeds of the size noise: one per forward, counted in a tensor so that torch.compile can follow.

A Python counter would be a constant of the compiled graph and recompile it at every step. Here the
counter is a CPU tensor, and an operator turns it into the number that the lookups take.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("amtl", "FRAGMENT")
_LIBRARY.define("read_seed(Tensor counter) -> SymInt")


@torch.library.impl(_LIBRARY, "read_seed", "CompositeExplicitAutograd")
def _read_seed(counter: Tensor) -> int:
    return int(counter)


@torch.library.register_fake("amtl::read_seed", lib=_LIBRARY)
def _read_seed_fake(counter: Tensor) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def first_seed(seed: int) -> int:
    """A 62-bit number to count up from (splitmix64), so that layers of other seeds differ."""
    mask = (1 << 64) - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 2


def next_seed(counter: Tensor) -> int:
    """Count up and return the new value.

    Args:
        counter: int64 scalar on the CPU, changed in place.
    """
    counter.add_(1)
    seed: int = torch.ops.amtl.read_seed(counter)
    return seed
