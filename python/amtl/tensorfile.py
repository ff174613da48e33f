"""Safetensors files with checksums, written so that an interruption harms nothing.

Reading and writing the format is the work of the `safetensors` library, imported when first
needed; any of its readers opens these files. What is added: files are written aside, flushed and
renamed, and one entry of their metadata, `amtl.tensorfile`, holds as JSON

    {"metadata": {str: str}, "tensors": {name: [dtype, shape, crc32]}, "crc32": of the other two}
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ENTRY = "amtl.tensorfile"
_VERIFIED_SIZE = 1 << 26


class TensorFileError(ValueError):
    """A file that is not what it should be: truncated, corrupted, or of another format."""


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file; an interruption at any point leaves the old file whole.

    The file is written beside its place, flushed to disk, and renamed; equal contents give equal
    bytes. Tensors on a GPU, non-contiguous ones and those that share memory are copied.

    Args:
        path: where to.
        tensors: dense tensors by name.
        metadata: strings by name.

    Raises:
        ImportError: safetensors, or NumPy which it writes with, is not installed.
        ValueError: a tensor is sparse or of a type that the format has no name for.
        OSError: the file cannot be written.
    """
    try:
        import numpy  # noqa: F401
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f"saving needs {error.name}, which is not installed: pip install safetensors numpy"
        ) from error
    path = Path(path)
    plain = _plain(tensors)
    crcs = {name: _checksum(tensor) for name, tensor in plain.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        try:
            save_file(plain, temporary, {_ENTRY: _seal(metadata, plain, crcs)})
        except (KeyError, ValueError) as error:
            raise ValueError(f"tensors cannot be packed: {error}") from error
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        # The library makes files for their owner alone.
        os.chmod(temporary, mode)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def read_tensors(
    path: str | os.PathLike[str], verify: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file: the tensors read their pages when touched, and writes to them stay private.

    Args:
        path: a file of `write_tensors`, or any safetensors file.
        verify: compare the checksums of the tensors, which reads them all. None: for files up to
            64 MiB. The checksum of metadata, names, types and shapes is always compared.

    Returns:
        Tensors by name, metadata by name.

    Raises:
        ImportError: safetensors is not installed.
        TensorFileError: truncated, corrupted, or not a safetensors file.
        FileNotFoundError: no such file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "loading needs safetensors, which is not installed: pip install safetensors"
        ) from error
    if verify is None:
        verify = os.stat(path).st_size <= _VERIFIED_SIZE
    try:
        with safe_open(path, framework="pt") as file:
            attributes: dict[str, str] = file.metadata() or {}
            names = file.keys()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise TensorFileError(
            f"{path} is truncated, corrupted or not a safetensors file: {error}"
        ) from error
    if _ENTRY not in attributes:
        return tensors, attributes
    try:
        content = json.loads(attributes[_ENTRY])
        metadata, crcs = content["metadata"], {k: v[2] for k, v in content["tensors"].items()}
        intact = attributes[_ENTRY] == _seal(metadata, tensors, crcs)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        intact = False
    if not intact:
        raise TensorFileError(f"{path} is corrupted: checksum of its header")
    if verify:
        for name, tensor in tensors.items():
            if _checksum(tensor) != crcs[name]:
                raise TensorFileError(f"{path} is corrupted: checksum of tensor {name!r}")
    return tensors, metadata


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory with another, which safetensors refuses."""
    plain: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"tensor {name!r} ({tensor.layout}, {tensor.device}) cannot be packed")
        flat = tensor.detach().cpu().contiguous()
        if flat.untyped_storage().data_ptr() in storages:
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        plain[name] = flat
    return plain


def _checksum(tensor: Tensor) -> str:
    """CRC-32 of a contiguous CPU tensor's bytes, not copied."""
    if tensor.nbytes == 0:
        return "00000000"
    data = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return f"{zlib.crc32(data):08x}"


def _seal(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], crcs: Mapping[str, str]
) -> str:
    """The entry for these metadata and tensors, with a checksum over all of it."""
    content: dict[str, Any] = {
        "metadata": dict(metadata),
        "tensors": {
            name: [str(t.dtype).removeprefix("torch."), list(t.shape), crcs[name]]
            for name, t in sorted(tensors.items())
        },
    }
    crc = zlib.crc32(json.dumps(content).encode())
    return json.dumps({**content, "crc32": f"{crc:08x}"})


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
