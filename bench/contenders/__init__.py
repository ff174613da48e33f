"""Who can take part in a comparison, by name."""

from __future__ import annotations

from bench.contenders import amtl, fbgemm, peer, product, recsys, torch_eager
from bench.contenders.base import Contender, Session

CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for module in (torch_eager, fbgemm, peer, recsys, amtl, product)
    for contender in module.contenders()
}

__all__ = ["CONTENDERS", "Contender", "Session"]
