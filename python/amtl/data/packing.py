"""What files hold by their first bytes: those that are compressed, or alone in an archive."""

from __future__ import annotations

import io
import lzma
import os
import shlex
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import pyarrow as pa

from amtl.errors import UserError, listed

_PACKED = (".gz", ".zst", ".bz2", ".xz")
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz"}
"""First bytes of compressed files, which count whatever the name says. Text may begin as bzip2."""
_KINDS = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
"""First and last bytes of tables, which have other names, or none, where programs wrote them."""
_ARCHIVE = b"PK\x03\x04"
_LONGEST = max(map(len, (*_MAGIC, *_KINDS, _ARCHIVE)))


def kind(path: PurePath) -> str:
    """What a file is by its name, that of its compression left out; empty if it does not say."""
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in _PACKED]
    return suffixes[-1] if suffixes else ""


def kind_of(path: Path) -> str:
    """What a file is by its first and last bytes, where these tell, and else by its name."""
    if path.is_file() and path.stat().st_size > _LONGEST:
        with path.open("rb") as file:
            first = file.read(_LONGEST)
            file.seek(-_LONGEST, os.SEEK_END)
            last = file.read()
        for magic, found in _KINDS.items():
            if first.startswith(magic) and last.endswith(magic):
                return found
    return kind(path)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip archive, as sheets of Excel are, too."""
    return path.is_file() and _first(path).startswith(_ARCHIVE)


@contextmanager
def spooled(path: Path) -> Iterator[Path]:
    """What a pipe holds, as a file for as long as it is read.

    Raises:
        UserError: it is a terminal, at which nobody means to type a table.
    """
    with path.open("rb", buffering=0) as pipe, tempfile.NamedTemporaryFile() as file:
        if pipe.isatty():
            raise UserError("nothing is piped in: zcat FILE.gz | amtl train - ..., or name a file")
        shutil.copyfileobj(pipe, file)
        file.flush()
        yield Path(file.name)


def plain(path: Path) -> Path | io.BytesIO:
    """The path, or the contents of a compressed file."""
    packing = _packing(path)
    if packing is None:
        return path
    if packing == "xz":
        try:
            return io.BytesIO(lzma.decompress(path.read_bytes()))
        except lzma.LZMAError as error:
            raise OSError(str(error)) from error
    with pa.input_stream(str(path), compression=packing) as stream:
        return io.BytesIO(stream.read())


def alone(path: Path, is_table: Callable[[PurePath], bool]) -> tuple[str, io.BytesIO]:
    """What an archive holds, if that is one table: its kind and its contents.

    Raises:
        UserError: it holds none or several, or is damaged; the message says what to do.
    """
    unpack = f"unpack it (unzip {shlex.quote(str(path))})"
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePath(i.filename) for i in archive.infolist() if not i.is_dir()]
            # What macOS adds is no table, though it is called so.
            names = [n for n in names if not any(p[:1] in "._" for p in n.parts)]
            tables = [name for name in names if is_table(name)]
            if len(tables) != 1 or kind(tables[0]) != tables[0].suffix.lower():
                held = f"{listed(list(map(str, tables or names)))}" if names else "nothing"
                raise UserError(
                    f"{str(path)!r} is an archive that holds {held}: {unpack} and name one file"
                )
            return kind(tables[0]), io.BytesIO(archive.read(str(tables[0])))
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, zlib.error) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}; {unpack} by yourself") from error


def _packing(path: Path) -> str | None:
    """How a file is compressed, as Arrow calls it; None if it is not."""
    first = _first(path)
    named = "detect" if path.suffix.lower() in _PACKED else None
    return next((kind for magic, kind in _MAGIC.items() if first.startswith(magic)), named)


def _first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_LONGEST)
