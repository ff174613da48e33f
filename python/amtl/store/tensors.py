"""Safetensors files with checksums, and nested contents in them.

Reading and writing the format is the work of the `safetensors` library, imported when first
needed; any of its readers opens these files. What is added: one entry of their metadata,
`amtl.tensorfile`, holds as JSON

    {"metadata": {str: str}, "tensors": {name: [dtype, shape, crc32]}, "crc32": of the other two}

and in files of this package that metadata is {"format": name, "version": number, "amtl": JSON}.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amtl.errors import UserError
from amtl.store.files import RESTORE, checksums, write_aside
from amtl_kernels._calls import kind

_ENTRY = "amtl.tensorfile"
_CHECKED_AT_ONCE = 1 << 26
_WORTH_A_CODE = 64
_OF_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""A pickle of torch.serialization.MAGIC_NUMBER."""


class TensorFileError(UserError):
    """A file that is not what it should be: truncated, corrupted, or of another format."""


class PackedFileError(TensorFileError):
    """A file that cannot be used: not of this format, newer, inconsistent."""


class FileTensors(Mapping[str, Tensor]):
    """Tensors of a file, memory-mapped; one is compared with its checksum when first asked for.

    Tensors read their pages when touched, and writes to them stay private.
    """

    def __init__(
        self, path: Path, tensors: dict[str, Tensor], expected: dict[str, tuple[memoryview, int]]
    ) -> None:
        self._path = path
        self._tensors = tensors
        self._expected = expected

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        self.check([name])
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold checked values."""
        return (dict, (dict(self),))

    def unchecked(self, name: str) -> Tensor:
        """A tensor whose values may be damaged until `check` was called for it."""
        return self._tensors[name]

    def select(self, prefix: str, under: str = "") -> FileTensors:
        """Those whose names begin with `prefix`, which is replaced by `under`."""

        def renamed(entries: dict[str, Any]) -> dict[str, Any]:
            return {under + k[len(prefix) :]: v for k, v in entries.items() if k.startswith(prefix)}

        return FileTensors(self._path, renamed(self._tensors), renamed(self._expected))

    def to(self, device: torch.device | str) -> FileTensors:
        """Checked copies on a device."""
        self.check()
        return FileTensors(self._path, {k: v.to(device) for k, v in self._tensors.items()}, {})

    @property
    def checked(self) -> bool:
        """Whether nothing is left to `check`."""
        return not self._expected

    def check(self, names: Iterable[str] | None = None) -> None:
        """Compare these tensors, or all, with their checksums; each is read once.

        Raises:
            TensorFileError: one differs.
        """
        pending = [n for n in (self._tensors if names is None else names) if n in self._expected]
        found = checksums([self._expected[name][0] for name in pending])
        for name, crc in zip(pending, found, strict=True):
            if crc != self._expected[name][1]:
                raise TensorFileError(
                    f"{self._path} is corrupted: checksum of tensor {name!r}; {RESTORE}"
                )
        for name in pending:
            self._expected.pop(name, None)


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a file; an interruption at any point leaves the old file whole.

    Equal contents give equal bytes. Tensors on a GPU, non-contiguous ones and those that share
    memory are copied.

    Args:
        path: where to; its folder is made if needed.
        tensors: dense tensors by name.
        metadata: strings by name.

    Raises:
        ImportError: safetensors, or NumPy which it writes with, is not installed.
        ValueError: a tensor is sparse or of a type that the format has no name for.
        FileWriteError: the file cannot be written; an OSError.
    """
    write_aside({Path(path): _writer(tensors, metadata)})


def _writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], object]:
    """What writes a file at a path given later."""
    try:
        import numpy  # noqa: F401
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            f"saving needs {error.name}, which is not installed: pip install safetensors numpy"
        ) from error
    plain = _plain(tensors)
    crcs = dict(zip(plain, checksums([_bytes(t) for t in plain.values()]), strict=True))
    entry = {_ENTRY: _seal(metadata, plain, {name: f"{crc:08x}" for name, crc in crcs.items()})}

    def write(path: Path) -> None:
        try:
            save_file(plain, path, entry)
        except (KeyError, ValueError) as error:
            raise ValueError(f"tensors cannot be packed: {error}") from error
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(code[1]) if code else 0, str(error)) from error

    return write


def read_tensors(
    path: str | os.PathLike[str], verify: bool | None = None
) -> tuple[FileTensors, dict[str, str]]:
    """Map a file.

    Args:
        path: a file of `write_tensors`, or any safetensors file.
        verify: compare the checksums of the tensors now (True, reads them all), or never (False).
            None: now for files up to 64 MiB, and when a tensor is first asked for in larger ones,
            which thus open in milliseconds. The checksum of metadata, names, types and shapes is
            always compared.

    Returns:
        Tensors by name, metadata by name.

    Raises:
        ImportError: safetensors is not installed.
        TensorFileError: truncated, corrupted, not a safetensors file, or not to be read.
        FileNotFoundError: no such file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            "loading needs safetensors, which is not installed: pip install safetensors"
        ) from error
    path = Path(path)
    try:
        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            # A view of its own: writes to the tensors before they are checked must not show in it.
            view = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        with safe_open(path, framework="pt") as file:
            attributes: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TensorFileError(f"cannot read {path}: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        if _is_of_torch(path):
            raise PackedFileError(
                f"{path} is a file of torch.save, not of amtl.save: torch.load opens it, and "
                "model.load_state_dict takes a state_dict in it, into a model as it was then"
            ) from error
        raise TensorFileError(
            f"{path} is damaged: truncated, corrupted or not a safetensors file ({error}); "
            f"{RESTORE}"
        ) from error
    if _ENTRY not in attributes:
        return FileTensors(path, tensors, {}), attributes
    try:
        content = json.loads(attributes[_ENTRY])
        metadata, crcs = content["metadata"], {k: v[2] for k, v in content["tensors"].items()}
        intact = attributes[_ENTRY] == _seal(metadata, tensors, crcs)
        start = 8 + int.from_bytes(view[:8], "little")
        offsets = {
            k: v["data_offsets"] for k, v in json.loads(bytes(view[8:start])).items() if k in crcs
        }
        expected = {
            name: (view[start + offsets[name][0] : start + offsets[name][1]], int(crc, 16))
            for name, crc in crcs.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        intact = False
    if not intact:
        raise TensorFileError(f"{path} is corrupted: checksum of its header; {RESTORE}")
    result = FileTensors(path, tensors, {} if verify is False else expected)
    if verify or (verify is None and size <= _CHECKED_AT_ONCE):
        result.check()
    return result, metadata


def _is_of_torch(path: Path) -> bool:
    """Whether torch.save wrote a file: a zip archive, or pickles as before version 1.6."""
    with open(path, "rb") as file:
        if file.read(len(_OF_OLD_TORCH)) == _OF_OLD_TORCH:
            return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def document_writer(
    kind: str, version: int, tensors: Mapping[str, Tensor], content: Any
) -> Callable[[Path], object]:
    """What writes a file of this package, for `write_aside`: tensors, and JSON about them.

    Args:
        kind: what the file is.
        version: of its layout.
        tensors: dense tensors by name.
        content: JSON-able.

    Raises:
        ImportError, ValueError: as `write_tensors`.
    """
    text = json.dumps(content, allow_nan=True, separators=(",", ":"))
    return _writer(tensors, {"format": kind, "version": str(version), "amtl": text})


def read_document(
    path: Path, versions: Mapping[str, int], verify: bool | None = None
) -> tuple[FileTensors, str, int, Any]:
    """Map a file of `document_writer`.

    Args:
        path: the file.
        versions: kinds that may be there, and the newest version known of each.
        verify: as in `read_tensors`.

    Returns:
        Tensors, kind, version, content.

    Raises:
        As `read_tensors`; PackedFileError for files of other kinds or newer versions.
    """
    tensors, attributes = read_tensors(path, verify)
    try:
        content = json.loads(attributes.get("amtl", "null"))
        kind: Any = attributes.get("format")
        version: Any = attributes.get("version")
        if kind is None and isinstance(content, dict):
            # Version 1 of runs' files had all three in one.
            kind, version, content = (content.get(key) for key in ("kind", "version", "meta"))
    except ValueError as error:
        raise PackedFileError(f"{path} is inconsistent: {error!r}") from error
    if kind not in versions:
        raise PackedFileError(
            f"{path} is a safetensors file, but not a packed AMTL file or what belongs here "
            f"(format {kind!r}, not {' or '.join(versions)})"
        )
    try:
        number = int(version)
    except (ValueError, TypeError):
        raise PackedFileError(f"{path} names no format version") from None
    if number > versions[kind]:
        raise PackedFileError(
            f"{path} has format version {number}, this build of amtl reads up to {versions[kind]}: "
            "upgrade amtl to open it"
        )
    return tensors, kind, number, content


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Nested dicts, lists and tuples of tensors, numbers, strings and None, as a flat file has it.

    Long lists of floats become tensors of float64, which keeps every bit.

    Returns:
        Tensors by dotted name, and JSON in which objects with one key that begins with `$` stand
        for what JSON lacks.

    Raises:
        ValueError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def put(tensor: Tensor, name: str) -> str:
        while name in tensors:
            name += "'"
        tensors[name] = tensor
        return name

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": put(value, name)}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, dict):
            # What nn.Module.state_dict() attaches, and load_state_dict() reads.
            versions = getattr(value, "_metadata", None)
            inner = {k: walk(v, f"{name}.{k}".lstrip(".")) for k, v in value.items()}
            if versions is not None:
                return {"$state": [inner, walk(dict(versions), name)]}
            if all(type(k) is str and not k.startswith("$") for k in value):
                return inner
            return {"$items": [[walk(k, name), v] for k, v in inner.items()]}
        if isinstance(value, list) and len(value) > 64 and all(type(v) is float for v in value):
            return {"$floats": put(torch.tensor(value, dtype=torch.float64), name)}
        if type(value) in (list, tuple):
            parts = [walk(v, f"{name}.{i}".lstrip(".")) for i, v in enumerate(value)]
            return parts if type(value) is list else {"$tuple": parts}
        raise ValueError(f"{name or 'the content'} is {kind(value)}: cannot be saved")

    return tensors, walk(tree, "")


def unflatten(tensors: Mapping[str, Tensor], tree: Any) -> Any:
    """The inverse of `flatten`; tensors are copies, in memory of their own.

    Raises:
        KeyError, TypeError, ValueError: `tree` is not from `flatten`.
    """
    if isinstance(tree, list):
        return [unflatten(tensors, value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if not tag.startswith("$"):
        return {key: unflatten(tensors, value) for key, value in tree.items()}
    held = tree[tag]
    if tag == "$tensor":
        return tensors[held].clone()
    if tag == "$floats":
        return tensors[held].tolist()
    if tag == "$tuple":
        return tuple(unflatten(tensors, held))
    if tag == "$items":
        return {unflatten(tensors, k): unflatten(tensors, v) for k, v in held}
    if tag == "$state":
        state = OrderedDict(unflatten(tensors, held[0]))
        state._metadata = OrderedDict(unflatten(tensors, held[1]))  # type: ignore[attr-defined]
        return state
    raise ValueError(f"unknown mark {tag}")


def compact(
    tensors: Mapping[str, Tensor], quickly: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Integer tensors in fewer bytes, nothing lost: as they are, deflated, or their differences.

    Neighbours in a vocabulary are alike (falling counts, values that ascend among equal counts),
    so the differences are small and most of their high bytes are zero.

    Args:
        tensors: by name.
        quickly: take a tenth of the time, and some per cent more bytes: for files that stay here.

    Returns:
        Tensors by the same names, and JSON with the code of each that was changed.
    """
    import numpy as np

    packed, codes = dict(tensors), {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.dtype == torch.bool or not tensor.numel():
            continue
        values = tensor.contiguous().numpy()
        steps = np.diff(values.astype(np.int64).reshape(-1), prepend=np.int64(0))
        unsigned = (steps << 1 ^ steps >> 63).view(np.uint64)
        width = (int(unsigned.max()).bit_length() + 7) // 8
        planes = unsigned.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T
        plain = {"deflate": values.tobytes(), f"delta{width}": planes.tobytes()}
        # Which is the smaller shows at the lowest level, long before either is at its smallest.
        candidates = {key: zlib.compress(data, 1) for key, data in plain.items()}
        code = min(candidates, key=lambda key: len(candidates[key]))
        shortest = candidates[code] if quickly else zlib.compress(plain[code])
        if len(shortest) + _WORTH_A_CODE < tensor.nbytes:
            packed[name] = torch.frombuffer(bytearray(shortest), dtype=torch.uint8)
            codes[name] = [code, str(values.dtype), list(values.shape)]
    return packed, codes


def expand(tensors: Mapping[str, Tensor], codes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `compact`.

    Raises:
        ValueError, TypeError, zlib.error: `codes` are not from `compact`.
    """
    import numpy as np

    whole = dict(tensors)
    for name, (code, dtype, shape) in codes.items():
        data = zlib.decompress(tensors[name].numpy().tobytes())
        if code == "deflate":
            values = np.frombuffer(data, dtype=dtype)
        else:
            count, width = int(np.prod(shape)), int(code.removeprefix("delta"))
            unsigned = np.zeros((count, 8), dtype=np.uint8)
            unsigned[:, :width] = np.frombuffer(data, dtype=np.uint8).reshape(width, count).T
            numbers = unsigned.view("<u8").reshape(-1)
            steps = (numbers >> np.uint64(1)).view(np.int64) ^ -(numbers & np.uint64(1)).view(
                np.int64
            )
            values = np.cumsum(steps).astype(dtype)
        whole[name] = torch.from_numpy(values.reshape(shape).copy())
    return whole


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none overlapping another in memory, which safetensors refuses."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"tensor {name!r} ({tensor.layout}, {tensor.device}) cannot be packed")
        plain[name] = tensor.detach().cpu().contiguous()
    end = 0
    for name in sorted(plain, key=lambda name: plain[name].data_ptr()):
        flat = plain[name]
        if flat.nbytes and flat.data_ptr() < end:
            plain[name] = flat.clone()
        end = max(end, flat.data_ptr() + flat.nbytes)
    return plain


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


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
