"""Packed files: frozen layers, and models with frozen layers, as safetensors.

The tiers are stored as they are, so loading is a memory map: nothing is unpacked, nothing is
pickled, and a table of a gigabyte opens in milliseconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from amtl.conversion import layers as layers_of
from amtl.embedding import AMTLEmbedding, AMTLEmbeddingBag
from amtl.table import AMTLTable
from amtl.tensorfile import TensorFileError, read_tensors, write_tensors

FORMAT = "amtl-packed"
VERSION = 1

_CLASSES: dict[str, type[AMTLTable]] = {
    "AMTLEmbedding": AMTLEmbedding,
    "AMTLEmbeddingBag": AMTLEmbeddingBag,
}
_Model = TypeVar("_Model", bound=nn.Module)
_Kind = Literal["layer", "layers", "model"]


class PackedFileError(TensorFileError):
    """A packed file that cannot be used: not of this format, newer, inconsistent."""


@dataclass
class PackedFile:
    """An opened packed file.

    Attributes:
        kind: what was saved: one "layer", a dict of "layers", or a "model".
        layers: frozen layers by dotted name ("" for a single layer), parameters memory-mapped.
        aliases: further names of shared layers -> the name in `layers`.
        state: the model's other parameters and buffers by state_dict key.
        metadata: what the writer attached, JSON-able.
        tensors: tensors that the writer attached.
    """

    kind: _Kind
    layers: dict[str, AMTLTable]
    aliases: dict[str, str] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    metadata: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def into(self, model: _Model) -> _Model:
        """Put the layers into a model of the same architecture and load the rest of its state.

        Args:
            model: built as usual, with embeddings of any kind where the layers go.

        Returns:
            The same model, its embeddings replaced.

        Raises:
            PackedFileError: the model has other modules, keys or shapes than the one saved; it is
                left as it was.
        """
        targets = {**{name: name for name in self.layers}, **self.aliases}
        prefixes = tuple(f"{name}." for name in targets)
        rest = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
        modules = dict(model.named_modules(remove_duplicate=False))
        absent = [name for name in targets if name not in modules]
        missing, surplus = sorted(rest.keys() - self.state), sorted(self.state.keys() - rest)
        shapes = [k for k in rest.keys() & self.state if rest[k].shape != self.state[k].shape]
        if absent or missing or surplus or shapes:
            raise PackedFileError(
                "the file does not fit the model: "
                f"modules not in the model: {absent}; keys not in the file: {missing}; "
                f"keys not in the model: {surplus}; other shapes: {sorted(shapes)}"
            )
        for name, source in targets.items():
            parent, _, key = name.rpartition(".")
            layer = self.layers[source]
            layer.train(modules[name].training)
            model.get_submodule(parent)._modules[key] = layer
        model.load_state_dict(self.state, strict=False)
        return model


def save(
    obj: AMTLTable | Mapping[str, AMTLTable] | nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a frozen layer, several, or a model that holds frozen layers, to one file.

    The file is written aside, flushed and renamed: an interruption leaves the old file whole. The
    size search (head, counts) is not stored: a packed table can train on, and `thaw(counts=...)`.

    Args:
        obj: a frozen layer; frozen layers by name; or a model, of which everything in its
            state_dict is stored.
        path: where to, for example "model.safetensors".
        metadata: anything JSON-able to store along: vocabularies, settings.
        tensors: further tensors to store along.

    Raises:
        ValueError: a layer is still searching, no layer at all, or something that cannot be
            stored.
        ImportError: safetensors is not installed.
        OSError: the file cannot be written.
    """
    kind: _Kind
    rest: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    if isinstance(obj, AMTLTable):
        kind, layers = "layer", {"": obj}
    elif isinstance(obj, nn.Module):
        kind, layers = "model", layers_of(obj)
        aliases = {
            name: next(n for n, layer in layers.items() if layer is module)
            for name, module in obj.named_modules(remove_duplicate=False)
            if isinstance(module, AMTLTable) and name not in layers
        }
        inside = tuple(f"{name}." for name in (*layers, *aliases))
        rest = {k: v for k, v in obj.state_dict().items() if not k.startswith(inside)}
    else:
        kind, layers = "layers", dict(obj)
    if not layers:
        raise ValueError("there is no AMTL layer to save")
    packed: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if not isinstance(layer, AMTLTable):
            raise ValueError(f"{name!r} is a {type(layer).__name__}, not an AMTL layer")
        if type(layer).__name__ not in _CLASSES:
            raise ValueError(f"{name!r} is of a class of your own, {type(layer).__name__}")
        if layer.phase != "frozen":
            raise ValueError(f"layer {name!r} is still searching its sizes: call freeze() first")
        for tier, block in enumerate(layer.blocks):
            packed[f"layers/{name}/blocks/{tier}"] = block.detach()
        if layer.row_order is not None:
            packed[f"layers/{name}/row_order"] = layer.row_order
    for key, value in rest.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{key!r} of the state_dict is a {type(value).__name__}, not a tensor")
        packed[f"state/{key}"] = value.detach()
    for key, value in (tensors or {}).items():
        packed[f"user/{key}"] = value.detach()
    header = {
        "kind": kind,
        "layers": {name: layer.config() for name, layer in layers.items()},
        "aliases": aliases,
        "metadata": metadata,
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON-able: {error}") from error
    write_tensors(path, packed, {"format": FORMAT, "version": str(VERSION), "amtl": text})


def open_packed(
    path: str | os.PathLike[str],
    *,
    verify: bool | None = None,
    device: torch.device | str | None = None,
) -> PackedFile:
    """Open a packed file with everything in it; tensors are memory-mapped.

    Args:
        path: a file of `save`.
        verify: compare the checksums of all tensors (reads them). None: for files up to 64 MiB.
        device: move everything there.

    Raises:
        PackedFileError: not a packed file, of a newer version, or inconsistent.
        TensorFileError: truncated or corrupted (PackedFileError is one, too).
        FileNotFoundError: no such file.
        ImportError: safetensors is not installed.
    """
    contents, attributes = read_tensors(path, verify)
    if attributes.get("format") != FORMAT:
        raise PackedFileError(
            f"{path} is a safetensors file, but not a packed AMTL file "
            f"(format {attributes.get('format')!r})"
        )
    try:
        version = int(attributes["version"])
    except (KeyError, ValueError):
        raise PackedFileError(f"{path} names no format version") from None
    if version > VERSION:
        raise PackedFileError(
            f"{path} has format version {version}, this build of amtl reads up to {VERSION}: "
            "upgrade amtl to open it"
        )
    if device is not None:
        contents = {name: tensor.to(device) for name, tensor in contents.items()}
    try:
        header = json.loads(attributes["amtl"])
        layers = {name: _layer(name, config, contents) for name, config in header["layers"].items()}
        return PackedFile(
            kind=header["kind"],
            layers=layers,
            aliases=header["aliases"],
            state=_below("state/", contents),
            metadata=header["metadata"],
            tensors=_below("user/", contents),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PackedFileError(f"{path} is inconsistent: {error!r}") from error


def _layer(name: str, config: Mapping[str, Any], contents: Mapping[str, Tensor]) -> AMTLTable:
    blocks = [contents[f"layers/{name}/blocks/{c}"] for c in range(len(config["tier_ends"]))]
    order = contents.get(f"layers/{name}/row_order")
    layer = _CLASSES[config["class"]].from_config(config, blocks, order)
    layer.name = name
    return layer


def _below(prefix: str, contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in contents.items() if k.startswith(prefix)}


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
    """Load what `save` wrote; no pickle, tables are memory-mapped.

    Args:
        path: a file of `save`.
        model: for a file with a model: one of the same architecture, to be filled in place.
        verify: see `open_packed`.
        device: see `open_packed`.

    Returns:
        The layer, or the layers by name. For a model: `model`, or, if none was given, the
        `PackedFile`, whose `into(model)` fills one later.

    Raises:
        As `open_packed` and `PackedFile.into`.
    """
    packed = open_packed(path, verify=verify, device=device)
    if model is not None:
        return packed.into(model)
    if packed.kind == "layer":
        return packed.layers[""]
    if packed.kind == "layers":
        return packed.layers
    return packed
