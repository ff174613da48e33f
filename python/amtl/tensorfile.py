"""The safetensors format, written without copies and read by memory map, with checksums.

    8 bytes      length n of the header, little endian
    n bytes      JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets"}, ...}
    the rest     the tensors, back to back

Any safetensors reader opens these files. Beyond the format, `__metadata__` holds a checksum of the
header and one of each tensor, and the data start at a multiple of 64 bytes.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_ALIGNMENT = 64
_MAX_HEADER = 100_000_000
_CHUNK = 1 << 26


class TensorFileError(ValueError):
    """A file that is not what it should be: truncated, corrupted, or of another format."""


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    size = tensor.nbytes
    if size == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr())).cast("B")


def _header_checksum(header: Mapping[str, Any]) -> str:
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "header_crc32"}
    plain = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return f"{zlib.crc32(plain.encode()):08x}"


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file; an interruption at any point leaves the old file whole.

    The file is written beside its place, flushed to disk, and renamed. Tensors on a GPU and
    non-contiguous ones are copied one at a time.

    Args:
        path: where to.
        tensors: dense tensors by name.
        metadata: strings by name; `header_crc32` and `tensor_crc32` are added.

    Raises:
        ValueError: a tensor's type has no name in the format.
        OSError: the file cannot be written.
    """
    path = Path(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ValueError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) cannot be packed")
    # Wide types first keeps every tensor aligned to its own type without gaps.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {}}
    start = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            # Checksums come out of the writing, so the header is written last, in room kept for it.
            crc = dict.fromkeys(names, "00000000")
            room = len(_encode(header, metadata, crc))
            file.seek(room)
            for name in names:
                crc[name] = f"{_write(file, tensors[name]):08x}"
            file.seek(0)
            file.write(_encode(header, metadata, crc))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _write(file: BinaryIO, tensor: Tensor) -> int:
    """Write one tensor; returns its checksum."""
    data = _bytes_of(tensor := tensor.detach().cpu().contiguous())
    crc = 0
    for start in range(0, len(data), _CHUNK):
        part = data[start : start + _CHUNK]
        crc = zlib.crc32(part, crc)
        file.write(part)
    return crc


def _encode(header: dict[str, Any], metadata: Mapping[str, str], crc: dict[str, str]) -> bytes:
    header["__metadata__"] = {**metadata, "tensor_crc32": json.dumps(crc)}
    header["__metadata__"]["header_crc32"] = _header_checksum(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_tensors(
    path: str | os.PathLike[str], verify: bool | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file: the tensors read their pages when touched, and writes to them stay private.

    Args:
        path: a file of `write_tensors`, or any safetensors file.
        verify: compare the checksums of the tensors, which reads them all. None: for files up to
            64 MiB. The header's checksum is always compared.

    Returns:
        Tensors by name, metadata by name.

    Raises:
        TensorFileError: truncated, corrupted, or not a safetensors file.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, first = _read_header(path, file, size)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata: dict[str, str] = header.pop("__metadata__", {})
    crc = json.loads(metadata.get("tensor_crc32", "{}"))
    if verify is None:
        verify = size <= _CHUNK
    tensors = {}
    for name, entry in header.items():
        start, end = (first + offset for offset in entry["data_offsets"])
        dtype = _TYPES[entry["dtype"]]
        if verify and name in crc:
            with memoryview(content) as view, view[start:end] as part:
                if f"{zlib.crc32(part):08x}" != crc[name]:
                    raise TensorFileError(f"{path} is corrupted: checksum of tensor {name!r}")
        count = math.prod(entry["shape"])
        if count == 0:
            tensor = torch.empty(0, dtype=dtype)
        elif start % dtype.itemsize:
            with memoryview(content) as view, view[start:end] as part:
                tensor = torch.frombuffer(bytearray(part), dtype=dtype)
        else:
            tensor = torch.frombuffer(content, dtype=dtype, count=count, offset=start)
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors, metadata


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, checked in itself and against the file's size, and where the data start."""
    if size < 8:
        raise TensorFileError(f"{path} is truncated: {size} bytes, not even a header")
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= _MAX_HEADER:
        raise TensorFileError(f"{path} is not a safetensors file (header of {length} bytes)")
    if size < 8 + length:
        raise TensorFileError(f"{path} is truncated: {size} bytes, header needs {8 + length}")
    try:
        header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        end = 0
        entries = sorted(
            (e["data_offsets"], e["dtype"], e["shape"])
            for name, e in header.items()
            if name != "__metadata__"
        )
        for offsets, dtype, shape in entries:
            nbytes = math.prod(shape) * _TYPES[dtype].itemsize
            if any(s < 0 for s in shape) or offsets != [end, end + nbytes]:
                raise ValueError("tensors overlap or leave gaps")
            end += nbytes
        expected = metadata.get("header_crc32")
        if expected is not None and expected != _header_checksum(header):
            raise ValueError("checksum of the header")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} is corrupted or not a safetensors file: {error}") from None
    if size < 8 + length + end:
        raise TensorFileError(
            f"{path} is truncated: {size} bytes, {8 + length + end} expected from its header"
        )
    if size > 8 + length + end:
        raise TensorFileError(
            f"{path} is corrupted: {size - 8 - length - end} bytes more than its header says"
        )
    return header, 8 + length
