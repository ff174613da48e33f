"""Where the command `amtl` starts: outside of `amtl`, whose import takes seconds.

Ctrl-C in these seconds is one line, as it is later (`amtl.failures`).
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> NoReturn:
    """Imports the commands and runs the command line."""
    guard()
    from amtl.cli import main as run

    if signal.getsignal(signal.SIGINT) is _stopped:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def guard() -> None:
    """From here on Ctrl-C is one line."""
    # What a shell runs in the background ignores it, and still does.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stopped)


def _stopped(number: int, frame: FrameType | None) -> NoReturn:
    """Ends at once: an exception could end up in whatever is being imported."""
    os.write(sys.stderr.fileno(), b"error: stopped by Ctrl-C\n")
    os._exit(130)
