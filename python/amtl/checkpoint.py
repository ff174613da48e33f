"""Checkpoints that are whole or absent, readable without running code from them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from amtl.errors import UserError

FORMAT = 1


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes aside, flushes to disk, renames: a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically."""
    text = json.dumps(content, indent=1, sort_keys=False, allow_nan=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; is {path.parent} a run of amtl train?") from error
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors, numbers, strings and containers of them, atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` wrote; never unpickles code (`weights_only=True`).

    Raises:
        UserError: if the file is missing, damaged, or of a newer format.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; run amtl train without --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error})"
        ) from error
    if version > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {version}, this version reads up to {FORMAT}: "
            "upgrade amtl"
        )
    return state
