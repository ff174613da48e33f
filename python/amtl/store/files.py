"""Files that are whole or absent: written aside and renamed, with checksums.

Everything that this package writes to disk goes through `write_aside`, but two files that are not
written as a whole or have nothing to lose: lines added to a record of runs (`paper/records.py`),
and the log of an unexpected failure (`failures.py`), which must be tried even where little works.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from amtl.errors import UserError

RESTORE = "restore it from a copy or write it anew"
"""What to do about a damaged file."""

_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.part")
_CHUNK = 1 << 22
_MAX_THREADS = 8
_POLYNOMIAL = 0xEDB88320
_CHECKSUM = "crc32"
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"
    ),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "choose another name"),
}


class FileWriteError(UserError, OSError):
    """A file cannot be written; what was in its place is whole. `errno` is the system's."""


def write_aside(
    writes: Mapping[Path, Callable[[Path], object]], before: Callable[[], object] | None = None
) -> None:
    """Write files aside, flush them to disk and rename them to their places.

    A crash, or an error, leaves each file as it was or complete. What a killed process left aside
    is removed by the next write into the same folder.

    Args:
        writes: final path to a function that writes the file whose path it is given. Folders are
            made if needed.
        before: is called when all files are on disk, before the first is renamed.

    Raises:
        FileWriteError: something is in the way, the disk is full, the folder is not to be written.
    """
    path = next(iter(writes))
    try:
        with contextlib.ExitStack() as stack:
            finished: list[tuple[Path, Path]] = []
            for path, write in writes.items():
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder is in the way")
                if path.exists() and not path.is_file():
                    # Renaming would take /dev/null from everybody.
                    raise FileExistsError(errno.EEXIST, "a device or pipe is in the way")
                path.parent.mkdir(parents=True, exist_ok=True)
                _sweep(path.parent)
                aside = stack.enter_context(_folder_aside(path)) / path.name
                aside.touch()
                mode = aside.stat().st_mode
                write(aside)
                # A library that renames its own temporary file makes it for its owner alone.
                os.chmod(aside, mode)
                _sync(aside)
                finished.append((aside, path))
            if before is not None:
                before()
            for aside, path in finished:
                os.replace(aside, path)
        for folder in {path.parent for path in writes}:
            _sync(folder)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> FileWriteError:
    """What is told of a file that could not be written, with what to do."""
    advice = _ADVICE.get(error.errno or 0, "choose another folder")
    failure = FileWriteError(
        f"cannot write {path}: {error.strerror or error}; {advice} "
        "(what was there before is unchanged)"
    )
    failure.errno = error.errno
    return failure


@contextlib.contextmanager
def _folder_aside(path: Path) -> Iterator[Path]:
    """A locked folder beside `path`, for one file; gone afterwards."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        folder.mkdir()
        # Another process may sweep the folder before it is locked.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            # Where the file system has no locks, nobody sweeps.
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                break
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _sweep(parent: Path) -> None:
    """Remove what killed processes left aside: the system drops their locks with them."""
    with os.scandir(parent) as entries:
        left = [entry.path for entry in entries if _ASIDE.fullmatch(entry.name)]
    for folder in left:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text as `write_aside` does."""
    write_aside({path: lambda aside: aside.write_bytes(text.encode())})


def json_text(content: Mapping[str, Any], indent: int | None = 1) -> str:
    """A JSON object whose last member is the checksum of the others."""
    sealed = {**content, _CHECKSUM: _json_checksum(content)}
    return json.dumps(sealed, indent=indent, allow_nan=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `json_text` as `write_aside` does."""
    write_text(path, json_text(content))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, and compare its checksum where it has one.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}; is {path.parent} a run of amtl train?") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    return checked_json(text, str(path))


def checked_json(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object of `json_text`, or any other, without its checksum.

    Args:
        text: UTF-8.
        name: what errors call it.

    Raises:
        UserError: it is damaged.
    """
    try:
        content = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged ({error}): {RESTORE}") from error
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged (it holds no JSON object): {RESTORE}")
    if content:
        key, value = content.popitem()
        checksum = _json_checksum(content)
        if key == _CHECKSUM and value == checksum:
            return content
        # Files without a checksum are read as they are, but not those whose checksum lost its name.
        if key == _CHECKSUM or _CHECKSUM in content or value == checksum:
            raise UserError(
                f"{name} is damaged or was edited (its checksum differs): {RESTORE}; "
                f'after an edit that was meant, delete its member "{_CHECKSUM}"'
            )
        content[key] = value
    return content


def _json_checksum(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, allow_nan=True).encode()):08x}"


def checksums(buffers: Sequence[memoryview]) -> list[int]:
    """CRC-32 of each buffer, of all together by several threads; O(bytes), no copies.

    Args:
        buffers: flat bytes.
    """
    pieces = [
        (number, buffer[start : start + _CHUNK])
        for number, buffer in enumerate(buffers)
        for start in range(0, len(buffer), _CHUNK)
    ]
    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(pieces))
    if threads > 1 and sum(len(buffer) for buffer in buffers) > _CHUNK:
        with ThreadPoolExecutor(threads) as pool:
            crcs = list(pool.map(lambda piece: zlib.crc32(piece[1]), pieces))
    else:
        crcs = [zlib.crc32(piece) for _, piece in pieces]
    result = [0] * len(buffers)
    for (number, piece), crc in zip(pieces, crcs, strict=True):
        result[number] = _product(_zeros(len(piece)), result[number]) ^ crc
    return result


def _product(a: int, b: int) -> int:
    """Product of two polynomials modulo CRC-32's, the highest bit being x^0 as in the checksum."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=1024)
def _zeros(count: int) -> int:
    """x^(8 count): a checksum times this is that of the same bytes followed by `count` zeros.

    So CRC(A + B) = CRC(A) x^(8 |B|) + CRC(B), and pieces may be computed apart.
    """
    power, factor = 1 << 31, 1 << 23
    while count:
        if count & 1:
            power = _product(factor, power)
        factor = _product(factor, factor)
        count >>= 1
    return power
