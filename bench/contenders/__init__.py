"""Who can take part in a comparison, by name.

What they measure is imported where it is used, ours too: ``bench gpu`` comes here before it has
built the operators, when those that lie there may crash, and needs no ``amtl`` at all.
"""

from __future__ import annotations

from bench.contenders import amtl, fbgemm, peer, product, recsys, torch_eager
from bench.contenders.base import Contender, Session

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for module in (torch_eager, fbgemm, peer, recsys, amtl, product)
    for contender in module.contenders()
}

__all__ = ["CONTENDERS", "Contender", "Session"]
