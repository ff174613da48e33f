"""Safetensors files with a JSON header: vocabularies beside a run, and whole packed models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from amtl.data.encoding import Encoder
from amtl.errors import UserError
from amtl.tensorfile import TensorFileError, read_tensors, write_tensors

_KEY = "amtl"


def save_tensors(
    path: Path, kind: str, version: int, tensors: dict[str, Tensor], meta: Any
) -> None:
    """Writes tensors and a JSON-able `meta` atomically.

    Args:
        path: target; its folder is made if needed.
        kind: what the file is, checked on loading.
        version: of its layout.
        tensors: dense tensors by name.
        meta: everything else.
    """
    header = json.dumps({"kind": kind, "version": version, "meta": meta})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {_KEY: header})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """Reads (memory-mapped) what `save_tensors` wrote.

    Raises:
        UserError: if the file is missing, truncated, of another kind, or newer than `version`.
    """
    if not path.exists():
        raise UserError(f"there is no file {path}")
    try:
        tensors, attributes = read_tensors(path)
        header = json.loads(attributes.get(_KEY, "null"))
    except (TensorFileError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise UserError(f"{path} is not an {kind} file")
    if header["version"] > version:
        raise UserError(
            f"{path} has layout {header['version']}, this version reads up to {version}: "
            "upgrade amtl"
        )
    return tensors, header["meta"]


def save_encoder(path: Path, encoder: Encoder) -> None:
    """Saves fields and vocabularies."""
    tensors, meta = encoder.to_tensors()
    save_tensors(path, "amtl-encoder", 1, tensors, meta)


def load_encoder(path: Path) -> Encoder:
    """Loads what `save_encoder` wrote."""
    return Encoder.from_tensors(*load_tensors(path, "amtl-encoder", 1))
