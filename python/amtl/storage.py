"""Safetensors files with a JSON header: vocabularies beside a run, and whole packed models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from amtl.data.encoding import Encoder
from amtl.errors import UserError

_KEY = "amtl"


def save_tensors(
    path: Path, kind: str, version: int, tensors: dict[str, Tensor], meta: Any
) -> None:
    """Writes tensors and a JSON-able `meta` atomically.

    Args:
        path: target; its folder is made if needed.
        kind: what the file is, checked on loading.
        version: of its layout.
        tensors: contiguous tensors by name.
        meta: everything else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    header = json.dumps({"kind": kind, "version": version, "meta": meta})
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {_KEY: header})
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def load_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """Reads (memory-mapped) what `save_tensors` wrote.

    Raises:
        UserError: if the file is missing, truncated, of another kind, or newer than `version`.
    """
    if not path.exists():
        raise UserError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if header is None or header.get("kind") != kind:
                raise UserError(f"{path} is not an {kind} file")
            if header["version"] > version:
                raise UserError(
                    f"{path} has layout {header['version']}, this version reads up to {version}: "
                    "upgrade amtl"
                )
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, header["meta"]
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from error


def save_encoder(path: Path, encoder: Encoder) -> None:
    """Saves fields and vocabularies."""
    tensors, meta = encoder.to_tensors()
    save_tensors(path, "amtl-encoder", 1, tensors, meta)


def load_encoder(path: Path) -> Encoder:
    """Loads what `save_encoder` wrote."""
    return Encoder.from_tensors(*load_tensors(path, "amtl-encoder", 1))
