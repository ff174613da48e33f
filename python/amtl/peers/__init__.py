"""Methods of the field, for comparison at equal bytes: `amtl train --method NAME`."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from amtl.errors import UserError
from amtl.peers.base import DoesNotFit, Facts, Part, Peer, SearchingPeer, served_bytes
from amtl.peers.fields import AutoDim, OptEmbed
from amtl.peers.hashing import DoubleHash, QuotientRemainder
from amtl.peers.popularity import AutoEmb, Esapn, Nis
from amtl.peers.pruning import MagnitudePruning, Pep
from amtl.peers.quantised import Alpt, Mpe, PostTraining
from amtl.peers.sized import MixedDimension, Shuffled

__all__ = ["DoesNotFit", "Facts", "Part", "Peer", "SearchingPeer", "served_bytes"]

PEERS: dict[str, type[Peer]] = {
    "qr": QuotientRemainder,
    "double_hash": DoubleHash,
    "mde": MixedDimension,
    "random": Shuffled,
    "magprune": MagnitudePruning,
    "pep": Pep,
    "ptq": PostTraining,
    "mpe": Mpe,
    "alpt": Alpt,
    "autodim": AutoDim,
    "optembed": OptEmbed,
    "autoemb": AutoEmb,
    "nis": Nis,
    "esapn": Esapn,
}


def add_peer(path: Path) -> str:
    """Take the method that a Python file defines into `PEERS`; the code of the file is run.

    Args:
        path: a file with one subclass of `Peer`; its stem is the name of the method.

    Raises:
        UserError: the file cannot be read or run, or has no such class, or several.
    """
    name = path.stem
    spec = importlib.util.spec_from_file_location(f"amtl_added_{name}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"--add {path}: there is no such Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--add {path}: {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Peer) and value.__module__ == spec.name
    ]
    if len(found) != 1:
        raise UserError(f"--add {path}: it needs one subclass of amtl.peers.Peer, not {len(found)}")
    if name in PEERS and PEERS[name].__module__ != spec.name:
        raise UserError(f"--add {path}: there is a method {name!r} already; rename the file")
    found[0].file, found[0].code = str(path), hashlib.md5(path.read_bytes()).hexdigest()[:8]
    PEERS[name] = found[0]
    return name


def code_of(name: str) -> str | None:
    """Checksum of the file that a method was added from; None for others."""
    return PEERS[name].code if name in PEERS else None
