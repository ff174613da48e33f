"""The one way in which files of results are written.

That of ``amtl.store`` would need torch and ``amtl``, and ``bench gpu`` starts without either.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_aside(path: Path, text: str) -> None:
    """Writes a file; an interrupted write leaves an older one whole. Folders are made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
