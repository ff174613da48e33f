"""Runs as lines of a file: made once, whoever makes them, and added when they end.

Several processes may work on one file. What one of them is making, the others leave to it; what was
stopped leaves no trace and is made again. Each line has a checksum, but those of older versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from amtl.store.files import cannot_write, checked_json, json_text


class Claim:
    """Holds a lock on one job while it is done: `with Claim(out, job) as mine`.

    `mine` is False where another process has it, and if a line of `out` is of this very job.

    Args:
        out: the file of runs.
        job: what is to be done, JSON-able.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]) -> None:
        name = hashlib.md5(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self._path, self._out, self._job = out.parent / f".{out.name}.{name}", out, job

    def __enter__(self) -> bool:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it before may have removed the file in the meantime.
            here, there = os.fstat(self._file.fileno()), self._path.stat()
            self._mine = (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
        except OSError:
            self._mine = False
        return self._mine and all(record["job"] != self._job for record in read(self._out))

    def __exit__(self, *error: object) -> None:
        if self._mine:
            self._path.unlink(missing_ok=True)
        self._file.close()


def append(out: Path, record: Mapping[str, Any]) -> None:
    """Add a line; what a killed process left half written before it is cut off.

    Raises:
        FileWriteError: it cannot be written.
    """
    try:
        with out.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
            file.write(json_text(record, None).encode() + b"\n")
    except OSError as error:
        raise cannot_write(out, error) from error


def read(out: Path) -> Iterator[dict[str, Any]]:
    """The runs in a file, none if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    if out.exists():
        # What follows the last line break was stopped.
        for number, line in enumerate(out.read_bytes().split(b"\n")[:-1], 1):
            yield checked_json(line, f"line {number} of {out}")
