"""Seeds of the size noise: one per forward, from torch's default generator, as dropout draws.

So `torch.manual_seed` makes a run repeat, activation checkpointing draws the same again, and
whoever saves torch's generator resumes exactly. The seed is drawn as a CPU tensor, which
torch.compile can follow, and an operator turns it into the number that the lookups take.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amtl.layer.size_head import being_traced

_LIBRARY = torch.library.Library("amtl", "FRAGMENT")
_LIBRARY.define("read_seed(Tensor seed) -> SymInt")


@torch.library.impl(_LIBRARY, "read_seed", "CompositeExplicitAutograd")
def _read_seed(seed: Tensor) -> int:
    return int(seed)


@torch.library.register_fake("amtl::read_seed", lib=_LIBRARY)
def _read_seed_fake(seed: Tensor) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


def mix_seed(seed: int) -> int:
    """A 62-bit number from any seed (splitmix64), so that neighbouring seeds differ everywhere."""
    mask = (1 << 64) - 1
    x = (seed + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 2


def draw_seed(offset: int) -> int:
    """A number of 63 bits from the default generator of the CPU.

    Args:
        offset: 0..2^62 - 1, added to what was drawn.
    """
    drawn = torch.randint(1 << 62, ())
    if being_traced() or torch._C._len_torch_dispatch_stack():
        seed: int = torch.ops.amtl.read_seed(drawn + offset)
        return seed
    return int(drawn) + offset
