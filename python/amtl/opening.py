"""`amtl.load`: opens whatever was saved, a file or the folder of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import nn

from amtl.errors import UserError
from amtl.store import open_packed

_Model = TypeVar("_Model", bound=nn.Module)


@overload
def load(
    path: str | os.PathLike[str],
    model: _Model,
    *,
    verify: bool | None = None,
    device: torch.device | str | None = None,
) -> _Model: ...


@overload
def load(
    path: str | os.PathLike[str],
    model: None = None,
    *,
    verify: bool | None = None,
    device: torch.device | str | None = None,
) -> Any: ...


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    verify: bool | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Load what `save`, `amtl pack` or `amtl train` wrote; no pickle, tables are memory-mapped.

    Args:
        path: a file of `save` or `amtl pack`, or a run folder.
        model: for a file with a model: one of the same architecture, to be filled in place.
        verify: see `open_packed`.
        device: see `open_packed`.

    Returns:
        The layer, or the layers by name. For a model: `model`, or, if none was given, the
        `PackedFile`, whose `into(model)` fills one later. For a run, in a folder or a file, with
        no `model` given: `amtl.run.trained.Trained`, the model with its vocabularies.

    Raises:
        TypeError: a model in place of the path.
        As `open_packed` and `PackedFile.into`; UserError for a run folder without a trained model
            or with damaged files.
    """
    if isinstance(path, nn.Module):
        raise TypeError("load(path, model) takes the path first, got a model")
    if Path(path).is_dir():
        from amtl.run.folders import load_run

        if model is not None:
            raise UserError(f"{path} is a run folder: load({str(path)!r}).model is its model")
        run = load_run(Path(path))
        if device is not None:
            run.model.to(device)
        return run
    packed = open_packed(path, verify=verify, device=device)
    if model is not None:
        return packed.into(model)
    if packed.kind == "layer":
        return packed.layers[""]
    if packed.kind == "layers":
        return packed.layers
    if packed.kind == "run":
        from amtl.run.folders import from_packed

        return from_packed(packed)
    return packed
